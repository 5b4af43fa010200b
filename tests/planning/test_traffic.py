# SPDX-License-Identifier: Apache-2.0
"""What methods train and send: counted sizes against real modules, counted bytes against real messages."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune import adapters
from fleetune.data import Encoded
from fleetune.models import Model, shapes, tiny_llama
from fleetune.models.tiny import tiny_bert, tiny_roberta
from fleetune.planning import device_cost, plan
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, Payload, encode
from fleetune.tuning.rounds.simulated_fleet import LocalFleet

RATES = device_cost.Rates(flops=1e11, copy=1e10)
ADAPTED = ["fedit", "fedpetuning", "fedpeptao", "fwdllm"]
MODELS = {"llama": tiny_llama, "bert": tiny_bert, "roberta": tiny_roberta}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", ADAPTED)
def test_what_a_method_trains_is_what_it_attaches(name: str, family: str) -> None:
    model = MODELS[family]()
    method = methods.make(name, {})
    module = method.footprint(shapes.shape_of(model.net.config)).module
    method.init(model, 1)
    trained = {n: tuple(p.shape) for n, p in adapters.trainable(model).items()}
    assert module.tensors == trained
    assert module.size == sum(p.numel() for p in adapters.trainable(model).values())


@pytest.mark.parametrize("targets", ["all-linear", "query-value", "LAST, 1.SECOND"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", ["fedit", "fedpetuning", "fwdllm"])
def test_lora_on_other_layers_is_counted_as_it_is_attached(name: str, family: str, targets: str) -> None:
    last, second = {"llama": ("down_proj", "self_attn.o_proj")}.get(family, ("dense", "attention.self.key"))
    model = MODELS[family]()
    named = targets.replace("LAST", last).replace("SECOND", second)
    method = methods.make(name, {"targets": named})
    module = method.footprint(shapes.shape_of(model.net.config)).module
    method.init(model, 1)
    assert module.tensors == {n: tuple(p.shape) for n, p in adapters.trainable(model).items()}


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=40),
        st.tuples(st.sampled_from(["uint8", "int16", "float32"]), st.lists(st.integers(0, 300), max_size=2)),
        max_size=20,
    ),
    st.dictionaries(
        st.text(max_size=5), st.one_of(st.integers(0, 1 << 63), st.floats(allow_nan=False)), max_size=3
    ),
)
@settings(max_examples=60)
def test_message_bytes_is_the_length_of_the_message(arrays: Any, scalars: Any) -> None:
    payload = Payload({n: np.zeros(shape, kind) for n, (kind, shape) in arrays.items()}, scalars)
    told = {n: (kind, tuple(shape)) for n, (kind, shape) in arrays.items()}
    assert plan.message_bytes(told, scalars) == len(encode(Message(1, bytes(8), payload)))


def _filled(method: Any, model: Model) -> Any:
    """A state whose sums need their full 32 bits."""
    state = method.init(model, (1 << 63) + 5)
    if not hasattr(state, "ledger"):
        return state
    ledger = state.ledger.append(np.zeros(1, np.uint64), np.array([1 << 20]), 1)
    head = dataclasses.replace(ledger.head, run_key=(1 << 63) + 7)
    state = state._replace(ledger=dataclasses.replace(ledger, head=head))
    return state._replace(step=4096) if hasattr(state, "step") else state


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("name", methods.entries())
def test_traffic_is_that_of_a_real_round(name: str, family: str) -> None:
    model = MODELS[family]()
    ids = np.arange(9, dtype=np.int32)
    row = Encoded(ids, 0, ids * 0, 1) if model.labels else Encoded(ids, 4)
    more = {"layers_rule": "all"} if name == "fedpeptao" else {}  # all layers travel, and nothing is measured
    method = methods.make(name, more).sized(3, 2)
    message = encode(Message(1, bytes(8), method.broadcast(_filled(method, model))))
    (answer,) = LocalFleet(model, method, [[row] * plan.ROWS], 0, 0).ask(1, [0], message)
    assert answer.data is not None, answer.reason
    table = plan.table(model.net.config, device_cost.Workload(batch=2, length=9, steps=3), rates=RATES)
    planned = next(r for r in table if r.method == name)
    assert (planned.bytes_up, planned.bytes_down) == (len(answer.data), len(message))
