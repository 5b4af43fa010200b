# SPDX-License-Identifier: Apache-2.0
"""A device's round with and without checkpoints by layer: the same bytes, dropout included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fleetune import models
from fleetune.data import Encoded
from fleetune.models.net import layers
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, encode
from fleetune.tuning.rounds.simulated_fleet import LocalFleet

BASE = b"12345678"
ROWS = [Encoded(np.arange(i, i + 12, dtype=np.int32), 4) for i in range(6)]
FAST: dict[str, Any] = {"lr": 1e-2, "batch_size": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedit": ("fedit", {"dropout": 0.2}),
    "fedpeptao": ("fedpeptao", {"layers_rule": "half", "tokens": 3}),
} | {
    module: ("fedpetuning", {"module": module})
    for module in ("full", "prefix", "adapter", "lora", "bitfit", "prompt")
}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_change_no_bit_of_a_reply(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings = KINDS[kind]
    monkeypatch.setattr(layers, "SMALL", 0)  # else so small a batch keeps its activations
    real, runs = layers.checkpoint, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(layers, "checkpoint", counted)
    sent, used = [], []
    for on in (True, False):
        model, before = models.tiny_llama(seed=2), runs
        method: Any = methods.make(name, {**FAST, **settings, "checkpointing": on})
        fleet = LocalFleet(model, method, [ROWS], 7, 0)
        state = method.init(model, 5)
        message = encode(Message(1, BASE, method.kinds(state)[0][0]))
        (answer,) = fleet.ask(1, [0], message)
        assert answer.data is not None, answer.reason
        sent.append(answer.data)
        used.append(runs - before)
    assert sent[0] == sent[1]
    assert used[0] > 0 == used[1]
