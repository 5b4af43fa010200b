"""fedpetuning on a decoder with grouped queries and on an encoder with a head: what travels, averages, paper's numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_fedit import SIZES, fleet_of, round_of

from fleetune import adapters, models
from fleetune.models import Model
from fleetune.tuning import methods
from fleetune.tuning.methods.fedpetuning import MODULES

NETS: dict[str, Callable[[], Model]] = {"llama": models.tiny_llama, "bert": models.tiny_bert}
# adapters/test_scales_module
each = pytest.mark.parametrize(("net", "module"), [(n, m) for n in NETS for m in MODULES if m != "scales"])


def made(module: str) -> Any:
    size = 0 if module in ("full", "bitfit") else 4
    return methods.make("fedpetuning", {"module": module, "size": size, "batch_size": 4})


@each
def test_only_the_modules_numbers_travel(net, module):
    model, method = NETS[net](), made(module)
    state = method.init(model, 5)
    replies, (down, *_), (up, *_) = round_of(fleet_of(model, method), state)
    names = set(adapters.trainable(model))
    for payload in (method.broadcast(state), replies[0].payload):
        assert set(payload.arrays) == names
    base = {n for n, _ in models.named_tensors(NETS[net]().net)}
    head = {n for n in base if n.startswith("classifier.") or ".pooler." in n}
    assert head <= names
    biases = "bias" if net == "bert" else "norm"
    touched = {"full": "", "adapter": "norm", "bitfit": biases}.get(module, "none")
    assert {n for n in (base & names) - head if touched not in n.lower()} == set()
    numbers = sum(p.numel() for p in adapters.trainable(model).values())
    names_cost = sum(len(n) + 32 for n in names) + 200
    for traffic in (down, up):
        assert 4 * numbers <= traffic <= 4 * numbers + names_cost


def test_traffic_is_in_the_published_order():
    """Full first, then prefix, adapter, LoRA, BitFit at the paper's sizes (its table)."""
    numbers = {}
    for module in PAPERS:
        model = models.tiny_bert()
        method = methods.make("fedpetuning", {"module": module})
        state = method.init(model, 5)
        head = {n for n in state.tensors if n.startswith("classifier.") or ".pooler." in n}
        assert len(head) == 4
        numbers[module] = sum(t.size for n, t in state.tensors.items() if n not in head)
    order = sorted(numbers, key=lambda m: -numbers[m])
    assert order == ["full", "prefix", "adapter", "lora", "bitfit"], numbers


@each
def test_the_server_takes_the_mean_by_rows_and_the_model_follows(net, module):
    model, method = NETS[net](), made(module)
    state = method.init(model, 5)
    replies, _, _ = round_of(fleet_of(model, method), state)
    after = method.aggregate(state, iter(replies))
    p = np.array(SIZES, np.float64) / sum(SIZES)
    for name, tensor in after.tensors.items():
        sent = [r.payload.arrays[name].astype(np.float64) for r in replies]
        mean = sum(w * s for w, s in zip(p, sent, strict=True))
        np.testing.assert_allclose(tensor, mean, rtol=0, atol=1e-7 * max(1.0, float(np.abs(mean).max())))
    other = NETS[net]()
    method.apply(other, after)
    assert adapters.digest(adapters.export(other)) == adapters.digest(after.tensors)
    assert any(not np.array_equal(after.tensors[n], state.tensors[n]) for n in after.tensors)


# section 1.3 of the notes on its code: the best federated lr and size for QNLI
PAPERS = {
    "full": (5e-5, 0),
    "prefix": (5e-4, 64),
    "adapter": (1e-3, 16),
    "lora": (1e-3, 16),
    "bitfit": (1e-3, 0),
}


@pytest.mark.parametrize("module", PAPERS)
def test_lr_and_size_zero_are_the_papers(module):
    lr, size = PAPERS[module]
    kind = MODULES[module]
    assert (kind.lr, kind.size) == (lr, size)
    rates = methods.make("fedpetuning", {"module": module, "batch_size": 10}).rates(40)
    np.testing.assert_allclose(rates, [lr, lr * 3 / 4, lr / 2, lr / 4])  # falls to 0 within the round
    own = methods.make("fedpetuning", {"module": module, "lr": 0.5, "steps": 2}).rates(40)
    np.testing.assert_allclose(own, [0.5, 0.25])


def test_lora_has_alpha_equal_to_its_rank_on_query_and_value():
    model = models.tiny_bert()
    made("lora").init(model, 5)
    spec = adapters.attachment_of(model).spec
    assert isinstance(spec, adapters.Lora)
    assert (spec.r, spec.alpha, spec.dropout) == (4, 4, 0.0)
    layers = {n.split(".")[-3] for n in adapters.trainable(model) if ".lora_A." in n}
    assert layers == {"query", "value"}
