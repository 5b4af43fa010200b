"""Where LoRA starts: the formulas in float64, what leaves the base, what is saved, and what a device is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters_harness import LEAVES, PEFT_WARNS, move
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fleetune import adapters, models
from fleetune.adapters import lora_init
from fleetune.data import Batch
from fleetune.errors import MessageError, ModelError
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models import Model

IDS = torch.arange(24).reshape(2, 12) * 7 % 250
MASK = (torch.arange(12) < torch.tensor([[12], [5]])).long()
R, ALPHA = 4, 12
drawn = pytest.mark.parametrize("init", lora_init.FROM_SEED)
taken = pytest.mark.parametrize("init", lora_init.FROM_WEIGHTS)


def on(init: str, seed: int = 1, *, net: Callable[[], Model] = models.tiny_llama, **options: Any) -> Model:
    model = net()
    adapters.attach(model, adapters.Lora(**({"r": R, "alpha": ALPHA, "init": init} | options)), seed=seed)
    return model


def logits(net: Any) -> torch.Tensor:
    with torch.inference_mode():
        return net(input_ids=IDS).logits


def weights(model: Model) -> dict[str, np.ndarray]:
    return {n: p.detach().double().numpy() for n, p in model.net.named_parameters()}


def factors(arrays: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer -> (B, A) in float64."""
    exact = {n: a.astype(np.float64) for n, a in arrays.items()}
    return {layer: (exact[b], exact[a]) for layer, (b, a) in adapters.pairs(arrays).items()}


GOLDEN = {
    "default": "305d07ffe9463f4464c9b973a135106d8f653952aa06eb53e73d225c991bc4e0",
    "gaussian": "b2df537c9b0f81603c01f5793389b2055cc398a9efd3e779e098bfe256188e22",
    "shared": "f6658761dc9c15288b23a721896e5fb10cb02fff3745e69a6e62ab9c2dac15eb",
}  # equal on every machine


@pytest.mark.parametrize("init", sorted(GOLDEN))
def test_starts_that_no_math_library_makes_have_these_bits(init: str) -> None:
    assert adapters.digest(adapters.export(on(init))) == GOLDEN[init]


@drawn
def test_a_drawn_start_is_a_function_of_seed_and_layer(init: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = adapters.export(on(init))
    assert torch.equal(torch.get_rng_state(), before)
    some = adapters.export(on(init, targets="q_proj,down_proj"))
    assert len(some) == 8
    assert all(np.array_equal(a, one[n]) for n, a in some.items())
    other = adapters.export(on(init, 2))
    a_names = [n for n in one if ".lora_A." in n]
    assert all(not np.array_equal(one[n], other[n]) for n in a_names)
    assert len({one[n].tobytes() for n in a_names}) == len(a_names)


@drawn
def test_a_drawn_start_changes_nothing(init: str) -> None:
    base, model = models.tiny_llama(), on(init)
    torch.testing.assert_close(logits(model.net), logits(base.net), rtol=0, atol=1e-5)
    assert adapters.start_factors(model) == {}
    for b, a in factors(adapters.export(model)).values():
        assert np.abs(b @ a).max() < 1e-6
        assert b.any() == (init == "orthogonal")


@PEFT_WARNS
def test_gaussian_is_spread_as_in_peft() -> None:
    ours = factors(adapters.export(on("gaussian", r=32, alpha=32)))
    config = LoraConfig(r=32, target_modules=LEAVES, init_lora_weights="gaussian")
    net = get_peft_model(models.tiny_llama().net, config)
    theirs = [p.detach().numpy() for n, p in net.named_parameters() if ".lora_A." in n]
    made = np.concatenate([a.ravel() for _, a in ours.values()])
    assert made.std() == pytest.approx(1 / 32, rel=0.02)
    assert made.std() == pytest.approx(np.concatenate([a.ravel() for a in theirs]).std(), rel=0.03)
    assert abs(made.mean()) < 3 * made.std() / made.size**0.5
    assert (made**4).mean() / made.var() ** 2 == pytest.approx(3.0, rel=0.1)  # a normal's, no other


@pytest.mark.parametrize(("into", "r"), [(32, 4), (72, 5), (300, 16), (16, 16)])
def test_shared_is_a_sketch_with_orthonormal_rows(into: int, r: int) -> None:
    b, a = lora_init.shared("layer", 8, into, r, 3)
    assert not b.any()
    np.testing.assert_allclose(a.astype(np.float64) @ a.T, np.eye(r), atol=1e-6)
    assert ((a != 0).sum(axis=0) == 1).all()  # every input in one row
    sizes = (a != 0).sum(axis=1)
    assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(np.abs(a[a != 0]), np.repeat(1 / np.sqrt(sizes.astype(np.float32)), sizes))
    if into == 300:
        assert 100 < (a > 0).sum() < 200


def test_orthogonal_is_random_and_its_product_zero() -> None:
    b, a = lora_init.orthogonal("layer", 48, 64, 8, 3)
    assert np.abs(b.astype(float) @ a).max() < 1e-6
    assert np.linalg.matrix_rank(a) == np.linalg.matrix_rank(b) == 4
    # N [in, r/2] Q / 10 with orthonormal rows of Q: the squared norm is that of N, in r/2 / 100 on average
    assert (a**2).sum() == pytest.approx(64 * 4 / 100, rel=0.2)
    assert (b**2).sum() == pytest.approx(48 * 4 / 100, rel=0.2)
    with pytest.raises(ModelError, match="even rank"):
        lora_init.orthogonal("layer", 8, 8, 3, 1)


def reference(init: str, w: np.ndarray, r: int) -> np.ndarray:
    """(alpha / r) B A of the start in float64: the first r terms of U S V', or of Q R."""
    if init == "pissa":
        u, s, vt = np.linalg.svd(w)
        return (u[:, :r] * s[:r]) @ vt[:r]
    q, upper = np.linalg.qr(w)
    return ALPHA / R * q[:, :r] @ upper[:r]  # olora does not divide the scale out


@taken
def test_what_is_taken_out_is_the_formula(init: str) -> None:
    model = on(init)
    stored = weights(models.tiny_llama())
    for layer, (b, a) in factors(adapters.start_factors(model)).items():
        w = stored[f"{layer}.weight"]
        # float32's eps, times the condition of the r-th direction: |w| over the gap to the next one
        np.testing.assert_allclose(ALPHA / R * b @ a, reference(init, w, R), atol=5e-5)
        if init == "pissa":  # equation 2: both sides hold the root of the singular values
            np.testing.assert_allclose(b.T @ b, a @ a.T, atol=1e-5)
    assert adapters.digest(adapters.start_factors(model)) == adapters.digest(adapters.export(model))


@PEFT_WARNS
@taken
def test_peft_starts_in_the_same_place(init: str) -> None:
    """Its net after the start, and after the same step of the product, says the same as ours."""
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=LEAVES, init_lora_weights=init)
    theirs = get_peft_model(models.tiny_llama().net, config)
    model = on(init)
    torch.testing.assert_close(logits(theirs), logits(model.net), rtol=0, atol=2e-5)
    for layer, (b, a) in factors(adapters.export(model)).items():
        other = theirs.base_model.model.get_submodule(layer)
        b_t, a_t = (m["default"].weight.detach().double().numpy() for m in (other.lora_B, other.lora_A))
        np.testing.assert_allclose(b_t @ a_t, b @ a, atol=1e-5)
        left = other.base_layer.weight.detach().double().numpy()
        w = weights(models.tiny_llama())[f"{layer}.weight"]
        np.testing.assert_allclose(left, w - ALPHA / R * b @ a, atol=1e-5)


@taken
def test_the_base_stays_and_comes_back_bit_for_bit(init: str) -> None:
    base, model = models.tiny_llama(), on(init)
    torch.testing.assert_close(logits(model.net), logits(base.net), rtol=0, atol=2e-5)
    move(model, size=0.05)
    assert (logits(model.net) - logits(base.net)).abs().max() > 1e-2
    names = {n.replace(".base_layer.", "."): p for n, p in model.net.named_parameters()}
    assert all(torch.equal(p, names[n]) for n, p in base.net.named_parameters())
    adapters.detach(model)
    assert models.digest(models.named_tensors(model.net)) == base.digest
    assert torch.equal(logits(model.net), logits(base.net))
    assert not any(m._forward_hooks for m in model.net.modules())


def tiny_gpt2() -> Model:
    """Its linear layers are stored [in, out]."""
    model = models.tiny_llama()
    sizes = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=264, n_positions=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.net = GPT2LMHeadModel(sizes).eval()
    for parameter in model.net.parameters():
        parameter.requires_grad_(False).mul_(5)
    model.digest = models.digest(models.named_tensors(model.net))
    return model


@pytest.mark.parametrize("net", [models.tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_merged_weights_are_the_formula(init: str, net: Callable[[], Model]) -> None:
    model, stored = on(init, net=net), weights(net())
    start = factors((adapters.export if init == "orthogonal" else adapters.start_factors)(model))
    move(model, size=0.05)
    before, now = logits(model.net), factors(adapters.export(model))
    adapters.merge(model)
    torch.testing.assert_close(logits(model.net), before, rtol=0, atol=1e-4)
    merged = weights(model)
    for layer, (b, a) in now.items():
        b0, a0 = start[layer]
        change = ALPHA / R * (b @ a - (0 if init == "orthogonal" else b0 @ a0))
        change = change.T if net is tiny_gpt2 else change
        np.testing.assert_allclose(merged[f"{layer}.weight"], stored[f"{layer}.weight"] + change, atol=3e-6)
    untouched = stored.keys() - {f"{layer}.weight" for layer in now}
    assert all(np.array_equal(stored[n], merged[n]) for n in untouched)


@PEFT_WARNS
@taken
def test_the_saved_adapter_is_a_plain_lora_on_the_plain_base(init: str, tmp_path: Path) -> None:
    model = on(init)
    move(model, size=0.05)
    adapters.save(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (2 * R, 2 * ALPHA, True)
    assert "twice that rank" in (tmp_path / "adapter" / "README.md").read_text()
    base = models.tiny_llama()
    models.save(base.net, base.tokenizer, tmp_path / "base")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(net, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model.net), rtol=0, atol=2e-5)
    adapters.load(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(base.net), logits(model.net), rtol=0, atol=2e-5)
    adapters.merge(base)
    adapters.merge(model)
    for left, right in zip(base.net.parameters(), model.net.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-6)


@taken
def test_a_device_that_is_told_the_start_has_the_servers_model(init: str) -> None:
    server = on(init)
    start = adapters.start_factors(server)
    move(server, size=0.05)
    device = on("default", 9)
    adapters.set_start_factors(device, start)
    adapters.load_(device, adapters.export(server))
    assert torch.equal(logits(device.net), logits(server.net))
    for array in start.values():
        array += 1  # it has kept a copy
    assert torch.equal(logits(device.net), logits(server.net))
    adapters.set_start_factors(device, {})
    adapters.load_(device, {n: a * 0 for n, a in adapters.export(device).items()})
    assert torch.equal(logits(device.net), logits(models.tiny_llama().net))


def test_a_start_of_another_adapter_is_refused() -> None:
    model = on("pissa")
    start, before = adapters.start_factors(model), logits(model.net)
    name = next(iter(start))
    for bad in (
        {n: a for n, a in start.items() if n != name},
        start | {"more": start[name]},
        start | {name: start[name][:-1]},
        start | {name: start[name].astype(np.float64)},
    ):
        with pytest.raises(MessageError, match="differ in 1"):
            adapters.set_start_factors(model, bad)
        assert torch.equal(logits(model.net), before)
    full = models.tiny_llama()
    adapters.attach(full, adapters.Bitfit(), seed=1)
    assert adapters.start_factors(full) == {}
    adapters.set_start_factors(full, {})
    with pytest.raises(MessageError, match="differ in"):
        adapters.set_start_factors(full, start)


def test_a_rank_that_no_start_can_have_leaves_the_model_alone() -> None:
    for init, r, message in (("orthogonal", 3, "even"), ("pissa", 17, "17"), ("olora", 17, "16 or less")):
        model = models.tiny_llama()
        with pytest.raises(ModelError) as caught:
            adapters.attach(model, adapters.Lora(r=r, alpha=4, init=init), seed=1)
        assert message in f"{caught.value} {caught.value.hint}"
        assert model.attachment is None
        assert torch.equal(logits(model.net), logits(models.tiny_llama().net))
        adapters.attach(model, adapters.Lora(r=2, alpha=4, init=init), seed=1)  # and it can be used again


def batches(count: int) -> list[Batch]:
    random = np.random.default_rng(0)
    ids = [torch.from_numpy(random.integers(0, 250, (2, 12))) for _ in range(count)]
    return [Batch(i, MASK, i) for i in ids]


def inputs(seen: list[Batch], layer: str) -> np.ndarray:
    """What the layer is given at the real tokens, in float64."""
    base, rows = models.tiny_llama(), []
    base.net.get_submodule(layer).register_forward_pre_hook(
        lambda module, args: rows.append(args[0][seen[len(rows)].attention_mask.bool()].double().numpy())
    )
    with torch.inference_mode():
        for batch in seen:
            base.net(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return np.concatenate(rows)


def eva(model: Model, seen: list[Batch], rank: int = R) -> dict[str, np.ndarray]:
    part = adapters.attachment_of(model).parts[0]
    assert isinstance(part, adapters.LoraPart)
    return lora_init.explained_directions(model, part.layers, rank, seen)


@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_eva_takes_the_directions_that_explain_most(layer: str) -> None:
    model, few, many = on("default"), batches(1), batches(8)
    vt = np.linalg.svd(inputs(few, layer))[2]
    a = eva(model, few)[f"{layer}.lora_A.weight"].astype(np.float64)
    np.testing.assert_allclose(np.abs(np.sum(a * vt[:R], axis=1)), 1.0, atol=1e-5)  # the same up to sign
    x = inputs(many, layer)
    a = eva(model, many)[f"{layer}.lora_A.weight"].astype(np.float64)
    np.testing.assert_allclose(a @ a.T, np.eye(R), atol=1e-5)
    best = (np.linalg.svd(x, compute_uv=False)[:R] ** 2).sum()
    assert best * 0.99 < ((x @ a.T) ** 2).sum() <= best * (1 + 1e-6)


def test_gradient_takes_the_directions_in_which_the_loss_falls_fastest() -> None:
    model, seen, base = on("default"), batches(3), models.tiny_llama()
    part = adapters.attachment_of(model).parts[0]
    assert isinstance(part, adapters.LoraPart)
    with pytest.raises(ModelError, match="fewer than 17 directions"):
        lora_init.gradient_directions(model, part.layers, 17, seen)
    found = factors(lora_init.gradient_directions(model, part.layers, R, seen))
    own = {name: base.net.get_parameter(f"{name}.weight").requires_grad_(True) for name in found}
    with torch.enable_grad():
        sum(loss_tensor(base, batch) for batch in seen).backward()  # type: ignore[union-attr]
    for name, weight in own.items():
        assert weight.grad is not None
        u, _, vt = np.linalg.svd(weight.grad.double().numpy())
        b, a = found[name]
        np.testing.assert_allclose(np.abs(np.sum(b * u[:, :R], axis=0)), 1.0, atol=1e-3)
        np.testing.assert_allclose(np.abs(np.sum(a * vt[:R], axis=1)), 1.0, atol=1e-3)
    assert all(p.grad is None for p in model.net.parameters())


def test_eva_says_when_it_sees_too_little_and_leaves_the_model_alone() -> None:
    model = on("default", r=32, alpha=32)
    before = [[*m._forward_pre_hooks] for m in model.net.modules()]
    with pytest.raises(ModelError, match="fewer than 32 directions"):
        eva(model, batches(1), 32)
    assert [[*m._forward_pre_hooks] for m in model.net.modules()] == before
