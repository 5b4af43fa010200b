"""The scales of a quantised base as a module that is trained by back-propagation, against plain references."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_harness import BLOCKS, gguf_of, tiny
from torch import Tensor, nn

import fleetune
from fleetune import adapters, models
from fleetune.adapters import Scales
from fleetune.common.ggml import BLOCK, BYTES, HALVES
from fleetune.data import Batch
from fleetune.errors import ModelError, RecipeError
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models import Model
from fleetune.models.lazy import weights_of
from fleetune.models.net.layers import by_layer
from fleetune.models.shapes import shape_of
from fleetune.models.stored import Stored, dequantise
from fleetune.planning import choose
from fleetune.tuning.exchange.footprint import scales_module
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.result import finished

pytestmark = pytest.mark.usefixtures("own_cache")
IDS = torch.arange(36).reshape(2, 18) * 7 % 250
ROWS = [{"prompt": f"say {w}", "response": f"{w} it is"} for w in "abcdefghijklmnopqrstuvwxyz"]
FEW: dict[str, Any] = {"clients": 2, "rounds": 2, "samples": 0, "client_rows": 0, "held_out": 4}


@pytest.fixture(scope="module", params=BLOCKS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_of(tmp_path_factory.mktemp("gguf"), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_of(tmp_path_factory.mktemp("gguf"), "Q4_1")


def mapped(file: Path, *, on: bool = True, dtype: str = "fp32") -> Model:
    model = models.load(str(file), device="cpu", base="mapped", dtype=dtype)
    if on:
        adapters.attach(model, Scales(), seed=1)
    return model


def moves(model: Model, size: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {n: rng.normal(0, size, a.shape).astype("f4") for n, a in sorted(adapters.export(model).items())}


def logits(model: Model) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.net(input_ids=IDS).logits
    return found


def moved_blocks(stored: Stored, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a matrix's blocks with moved scales uint8 [n, bytes], the exponents of the scales in their sign [n, 1 or 2]), from the text."""
    halves, size = HALVES[stored.kind], BYTES[stored.kind]
    raw = np.array(stored.file.bytes(stored.offset, stored.size)).reshape(stored.shape[0], -1)
    blocks = (raw if stored.order is None else raw[stored.order]).reshape(-1, size).copy()
    old = blocks[:, : 2 * halves].copy().view("<u2").astype(np.int64)
    p = (old & 0x7FFF).astype(np.float32) / np.float32(1024) + delta.reshape(old.shape)
    b = np.floor(p * np.float32(1024) + np.float32(0.5))
    new = np.where(old & 0x7FFF, b.clip(0, 0x7BFF).astype(np.int64) | (old & 0x8000), old)
    blocks[:, : 2 * halves] = new.astype("<u2").view(np.uint8)
    slopes = np.where(new & 0x8000, -1.0, 1.0) * 2.0 ** (np.maximum(new >> 10 & 31, 1) - 15.0)
    return blocks, slopes


def test_it_starts_at_the_file_and_leaves_it(file: Path) -> None:
    plain, model = mapped(file, on=False), mapped(file)
    assert torch.equal(logits(model), logits(plain))
    adapters.load_(model, moves(model))
    assert not torch.equal(logits(model), logits(plain))
    adapters.detach(model)
    assert torch.equal(logits(model), logits(plain))
    assert all(isinstance(m.forward.__self__, nn.Linear) for m in model.net.modules() if type(m) is nn.Linear)


def test_matrices_are_those_of_the_moved_scales(file: Path) -> None:
    model = mapped(file)
    delta, weights = moves(model), weights_of(model.net)
    adapters.load_(model, delta)
    assert len(delta) == 7 * 2, "all linear layers, not the tied head"
    before = logits(model)
    adapters.merge(model)
    for name, values in delta.items():
        weight = name.replace(".scales", ".weight")
        blocks, _ = moved_blocks(weights[weight].stored, values)
        want = torch.empty(weights[weight].stored.numbers)
        dequantise(want, torch.from_numpy(blocks).view(-1), weights[weight].stored.kind)
        assert torch.equal(model.net.get_parameter(weight), want.view(weights[weight].stored.shape))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_pass_over_the_rounding_as_the_formula_says(file: Path, checkpointed: bool) -> None:
    model, plain = mapped(file), mapped(file)
    delta, stored = moves(model), {n: w.stored for n, w in weights_of(model.net).items()}
    for each in (model, plain):
        adapters.load_(each, delta)
    adapters.merge(plain)
    for name in delta:
        plain.net.get_parameter(name.replace(".scales", ".weight")).requires_grad_(True)
    batch = Batch(IDS, torch.ones_like(IDS), IDS)
    loss_tensor(plain, batch).backward()
    with adapters.training(model, 3), by_layer(model.net) if checkpointed else nullcontext():
        loss_tensor(model, batch).backward()
        for name, parameter in adapters.trainable(model).items():
            weight = name.replace(".scales", ".weight")
            blocks, slopes = moved_blocks(stored[weight], delta[name])
            raw = blocks.copy()
            size = 2 * HALVES[stored[weight].kind]
            raw[:, :size] = np.array([1.0, 0.0], np.float16).view(np.uint8)[:size]
            codes = torch.empty(stored[weight].numbers)  # d = 1 and m = 0 leave the codes
            dequantise(codes, torch.from_numpy(raw).view(-1), stored[weight].kind)
            of_weight = plain.net.get_parameter(weight).grad
            g = of_weight.double().numpy().reshape(-1, BLOCK)
            sums = [(codes.double().view(-1, BLOCK).numpy() * g).sum(1)] + [g.sum(1)] * (slopes.shape[1] - 1)
            want = np.stack(sums, 1) * slopes
            found = parameter.grad.numpy().reshape(want.shape)
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_a_16_bit_model_runs_on_the_same_scales(one: Path) -> None:
    wide, narrow = mapped(one), mapped(one, dtype="bf16")
    delta = moves(wide)
    for model in (wide, narrow):
        adapters.load_(model, delta)
    a, b = adapters.moved_scales(wide), adapters.moved_scales(narrow)
    assert all(torch.equal(a[name], b[name]) for name in a | b)
    assert float((logits(wide) - logits(narrow).float()).abs().max()) < 0.1


def test_layers_with_a_bias_keep_it(tmp_path: Path) -> None:
    model = mapped(gguf_of(tmp_path, model=tiny("qwen2")))
    adapters.load_(model, moves(model))
    before = logits(model)
    adapters.merge(model)
    assert torch.equal(logits(model), before)


def test_a_folder_holds_the_moves(one: Path, tmp_path: Path) -> None:
    model = mapped(one)
    adapters.load_(model, moves(model))
    adapters.save(model, tmp_path / "adapter")
    again = mapped(one, on=False)
    adapters.load(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_a_folder_with_numbers_that_are_not_finite_is_refused(one: Path, tmp_path: Path) -> None:
    model = mapped(one)
    values = moves(model)
    next(iter(values.values()))[0, 0, 0] = np.nan
    adapters.load_(model, values)
    adapters.save(model, tmp_path / "adapter")
    again = mapped(one, on=False)
    with pytest.raises(ModelError, match="not finite"):
        adapters.load(again, tmp_path / "adapter")
    assert again.attachment is None


def test_the_plan_counts_the_scales_that_the_files_blocks_have(file: Path) -> None:
    shape = shape_of(models.load_config(str(file)))
    planned = scales_module(shape._replace(scales=choose.scales_of(str(file))))
    unknown = scales_module(shape)
    own = {name: array.shape for name, array in adapters.export(mapped(file)).items()}
    assert set(map(math.prod, planned.tensors.values())) == set(map(math.prod, own.values()))
    assert planned.size == sum(map(math.prod, own.values()))
    (kind,) = {w.stored.kind for n, w in weights_of(mapped(file).net).items() if "layers" in n}
    assert unknown.size == planned.size * 2 // HALVES[kind]


def test_a_base_in_memory_has_no_scales(one: Path) -> None:
    with pytest.raises(ModelError, match="no scales"):
        adapters.attach(models.load(str(one), device="cpu"), Scales(), seed=1)
    with pytest.raises(ModelError, match="no moved scales"):
        model = mapped(one, on=False)
        adapters.attach(model, adapters.Lora(2, 2.0), seed=1)
        adapters.moved_scales(model)


def test_the_option_and_the_module_mean_one_another() -> None:
    def recipe(**given: Any) -> recipes.Recipe:
        return recipes.make({"model": "m.gguf", "data": "demo", "method": "fedpetuning", **given})

    assert recipe(train="scales").set["module"] == "scales"
    assert recipe(set={"module": "scales"}).train == "scales"
    assert recipe(set={"module": "bitfit"}).train == "weights"
    with pytest.raises(RecipeError, match="is the module scales, not lora"):
        prepare.check(recipe(train="scales", set={"module": "lora"}))
    with pytest.raises(RecipeError, match="base = memory does not"):
        prepare.check(recipe(set={"module": "scales"}, base="memory"))


def test_what_a_run_trained_is_the_file_that_it_exports(one: Path, tmp_path: Path) -> None:
    file, settings = one, {"lr": 0.05, "batch_size": 2}
    run = fleetune.tune(
        str(file), ROWS, method="fedpetuning", train="scales", settings=settings, out=tmp_path / "runs", **FEW
    )
    out = tmp_path / "out.gguf"
    fleetune.export(run, path=out)
    assert out.stat().st_size == file.stat().st_size
    tuned, exported = finished.load(run.folder), models.load(str(out), device="cpu", base="mapped")
    assert torch.equal(logits(exported), logits(tuned))
    losses = run.history["loss"]
    assert losses[-1] < losses[0]
