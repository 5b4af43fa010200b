"""LoRA: start, numbers in and out, training, merging into 16 bits, and dropout that is torch's and keeps less."""

from pathlib import Path

import numpy as np
import pytest
import torch
from adapters_harness import IDS, attached, logits, tiny, tuned
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from fleetune import adapters, models
from fleetune.adapters import lora
from fleetune.adapters.lora import DroppedLinear
from fleetune.errors import MessageError, ModelError
from fleetune.models import Model


def test_export_and_load_are_inverse_and_export_is_a_copy() -> None:
    model, other = tuned(2), attached(3)
    arrays = adapters.export(model)
    adapters.load_(other, arrays)
    assert torch.equal(logits(other.net), logits(model.net))
    assert adapters.digest(adapters.export(other)) == adapters.digest(arrays)
    for array in arrays.values():
        array += 1
    assert adapters.digest(adapters.export(model)) == adapters.digest(adapters.export(other))


def test_load_refuses_what_is_not_its_own_and_changes_nothing() -> None:
    model = tuned()
    good = adapters.export(model)
    before, first, last = adapters.digest(good), next(iter(good)), list(good)[-1]
    fresh = {n: a + 1 for n, a in good.items()}
    spoilt = [
        ({n: a for n, a in fresh.items() if n != last}, "differ in 1 names"),
        (fresh | {"extra": fresh[first]}, "'extra'"),
        ({("x" if n == last else n): a for n, a in fresh.items()}, "differ in 2 names"),
        (fresh | {last: fresh[last][:-1]}, r"is float32 \[31, 4\]|is float32 \[15, 4\]"),
        (fresh | {last: fresh[last].T.copy()}, "is float32"),
        (fresh | {last: fresh[last].astype(np.float16)}, "is float16"),
        (fresh | {last: fresh[last].astype(np.float64)}, "is float64"),
    ]
    for arrays, message in spoilt:
        with pytest.raises(MessageError, match=message):
            adapters.load_(model, arrays)
        assert adapters.digest(adapters.export(model)) == before


def train(model: Model, key: int) -> str:
    optimizer = torch.optim.AdamW(adapters.trainable(model).values(), lr=1e-2, weight_decay=0.0)
    with adapters.training(model, key):
        for _ in range(3):
            loss = model.net(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return adapters.digest(adapters.export(model))


def test_training_is_a_function_of_its_key_and_lowers_the_loss() -> None:
    model = attached(dropout=0.2)
    with torch.no_grad():
        before = model.net(IDS, labels=IDS).loss.item()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = train(model, 2**63 + 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert train(attached(dropout=0.2), 2**63 + 5) == first
    assert train(attached(dropout=0.2), 6) != first
    with torch.no_grad():
        assert model.net(IDS, labels=IDS).loss.item() < before - 0.05
    assert not model.net.training
    assert not any(module.training for module in model.net.modules())
    assert all(p.grad is None for p in model.net.parameters())
    adapters.detach(model)
    assert models.digest(models.named_tensors(model.net)) == model.digest


def test_merge_into_16_bits_rounds_once() -> None:
    base, model = tiny(torch.bfloat16), tuned(dtype=torch.bfloat16)
    arrays = adapters.export(model)
    adapters.merge(model)
    weights, stored = dict(model.net.named_parameters()), dict(base.net.named_parameters())
    for layer, (b, a) in adapters.pairs(arrays).items():
        delta = torch.from_numpy(arrays[b]) @ torch.from_numpy(arrays[a]) * 2
        expected = (stored[f"{layer}.weight"].float() + delta).bfloat16()
        assert torch.equal(weights[f"{layer}.weight"], expected)


def test_a_target_that_is_named_often_is_one() -> None:
    """PEFT compares every module with every target."""
    net = models.tiny_llama().net
    assert lora._targets(net, ["q_proj", "self_attn.q_proj"] * 9) == ["q_proj", "self_attn.q_proj"]


def test_a_model_with_an_adapter_is_not_saved_as_a_model(tmp_path: Path) -> None:
    model = tuned()
    with pytest.raises(ModelError, match="still carries adapters"):
        models.save(model.net, model.tokenizer, tmp_path / "out")
    model.merge()
    models.save(model.net, model.tokenizer, tmp_path / "out")
    assert models.load(str(tmp_path / "out"), device="cpu").digest == model.digest


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 5, 64)])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_it_is_torchs_dropout_bit_for_bit(shape: tuple[int, ...], share: float, kind: torch.dtype) -> None:
    """In autocast for the types of 16 bits."""

    def run(own: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        plain = nn.Linear(64, 8, bias=False)
        x = torch.randn(shape, requires_grad=True)
        torch.manual_seed(8)
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            y = DroppedLinear.around(plain, share)(x) if own else plain(F.dropout(x, share))
        after = torch.rand(3)  # as many numbers were drawn
        (y.float().sin() * torch.arange(8.0)).sum().backward()
        assert x.grad is not None
        assert plain.weight.grad is not None
        return y.detach(), x.grad, plain.weight.grad, after

    for ours, theirs in zip(run(True), run(False), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_it_drops_nothing_outside_of_training() -> None:
    plain, x = nn.Linear(64, 8, bias=False), torch.randn(3, 64)
    assert torch.equal(DroppedLinear.around(plain, 0.5).eval()(x), plain(x))


def test_layers_with_one_input_keep_it_once() -> None:
    """Of four layers: the input, and a byte a number for each, where torch keeps eight."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        held.append(tensor)
        return tensor

    held: list[Tensor] = []
    x = torch.randn(100, 64, requires_grad=True)
    layers = [DroppedLinear.around(nn.Linear(64, 8, bias=False), 0.1) for _ in range(4)]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer in layers:
            layer(x)
    weights = sum(layer.weight.nbytes for layer in layers)
    assert sum(kept.values()) == x.nbytes + 4 * x.numel() + weights
