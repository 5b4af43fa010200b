"""Compressed-tensors, GPTQ and plain directories: golden words, round trips, configurations, refusals, damage."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from deploy_harness import changed, compressed, matrices, matrix, on_grid, tiny
from deploy_harness import write_codes as write
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fleetune import models
from fleetune.compression.layerwise.column_loop import nearest
from fleetune.compression.layerwise.grids import BITS, KINDS, UNIFORM, Grid, quantise
from fleetune.deploy.export import write as export
from fleetune.deploy.formats import _ggml_blocks, compressed_tensors, gptq, hf, mlx
from fleetune.errors import FleetuneError, UsageError
from fleetune.models import Model
from fleetune.models.artefact import Quantised
from fleetune.models.net import saving


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return (words.to(torch.int64) & 0xFFFFFFFF).tolist()


def grids_of(model: Model, bits: int = 4, group: int = 32) -> dict[str, Quantised]:
    return {n: on_grid(t, bits, group) for n, t in matrices(model).items()}


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_words_come_back(bits: int, rows: int, columns: int, seed: int) -> None:
    drawn = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    codes = torch.from_numpy(drawn)
    assert torch.equal(hf.unwords(hf.words(codes, bits), bits, columns), codes)


def test_compressed_tensors_golden() -> None:
    q = matrix([[0, 1, 2, 3, 4, 5, 6, 7], [8] * 8], [[0.5, -2.0], [1.0, 3.0]], [[8, 8], [8, 8]], 4)
    found = dict(compressed_tensors.parts("a.weight", q, middle=True))
    assert list(found) == ["a.weight_packed", "a.weight_scale", "a.weight_shape"]
    assert unsigned(found["a.weight_packed"]) == [[0x76543210], [0x88888888]]
    assert found["a.weight_scale"].tolist() == [[0.5, -2.0], [1.0, 3.0]]
    assert found["a.weight_shape"].tolist() == [2, 8]
    zero = q.zero + torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    found = dict(compressed_tensors.parts("a.weight", changed(q, zero=zero), False))
    assert unsigned(found["a.weight_zero_point"]) == [[0xA8, 0xB9]]


def test_gptq_golden() -> None:
    codes = [[i, 15 - i, 1, 2, 3, 4, 5, 6] for i in range(8)]
    zero = [[i + 1, 16 - i - 1] for i in range(8)]
    q = matrix(codes, [[float(i), -float(i)] for i in range(8)], zero, 4)
    found = dict(gptq.parts("a.weight", q))
    assert unsigned(found["a.qweight"])[0][:3] == [0x654321F0, 0x654321E1, 0x654321D2]
    assert found["a.qweight"].shape == (1, 8)
    assert unsigned(found["a.qzeros"]) == [[0x76543210], [0x789ABCDE]]
    assert found["a.scales"].tolist() == [[float(i) for i in range(8)], [-float(i) for i in range(8)]]
    assert found["a.g_idx"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("to", "bits", "group", "grid"),
    [
        ("compressed-tensors", 4, 32, {}),
        ("compressed-tensors", 4, 32, {"zero": 5}),
        ("gptq", 3, 32, {}),
        ("gptq", 8, 64, {"zero": 100}),
    ],
)
def test_the_codes_are_in_the_file(tmp_path: Path, to: str, bits: int, group: int, grid: dict) -> None:
    model = tiny("qwen2")
    quantised = compressed(model, tmp_path / "m", bits, group, **grid)
    report = export(tmp_path / "m", to, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, q in quantised.items():
        layer = name.removesuffix(".weight")
        if to == "gptq":
            codes = hf.unwords(stored[f"{layer}.qweight"].T, bits, q.codes.shape[1])
            assert torch.equal(stored[f"{layer}.scales"].T, q.scale)
        else:
            codes = hf.unwords(stored[f"{layer}.weight_packed"], bits, q.codes.shape[1])
            assert torch.equal(stored[f"{layer}.weight_scale"], q.scale)
        assert torch.equal(codes, q.codes)
    assert (f"{layer}.weight_zero_point" in stored) == (to != "gptq" and bool(grid))
    assert torch.equal(stored["model.norm.weight"], model.net.model.norm.weight.half())
    assert report.tensors - report.exact == 13
    rounded, *others = report.notes
    assert rounded == "13 dense tensors are rounded to fp16"
    assert others == ([compressed_tensors.ASYMMETRIC] if to == "compressed-tensors" and grid else [])
    assert report.bytes == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def quantization_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float16"
    return config["quantization_config"]


def test_the_configuration_of_compressed_tensors(tmp_path: Path) -> None:
    compressed(tiny(), tmp_path / "m", 4, 32)
    export(tmp_path / "m", "compressed-tensors", tmp_path / "a")
    found = quantization_of(tmp_path / "a")
    assert (found["quant_method"], found["format"]) == ("compressed-tensors", "pack-quantized")
    assert (found["quantization_status"], found["ignore"]) == ("compressed", ["lm_head"])
    group = found["config_groups"]["group_0"]
    assert (group["targets"], group["input_activations"]) == (["Linear"], None)
    plain = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
    assert group["weights"] == plain | {"strategy": "group", "group_size": 32}


def test_whole_rows_are_channels_and_layers_left_out_are_ignored(tmp_path: Path) -> None:
    model = tiny()
    grids = {n: on_grid(t, 4, t.shape[1]) for n, t in matrices(model).items()}
    left = "model.layers.1.mlp.up_proj"
    grids.pop(f"{left}.weight")
    export(write(model, tmp_path / "m", grids), "compressed-tensors", tmp_path / "a")
    found = quantization_of(tmp_path / "a")
    weights = found["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)
    assert found["ignore"] == ["lm_head", left]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_plain_directory_gives_the_same_logits(tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    compressed(model, tmp_path / "m", 4, 16, zero=3)
    report = export(tmp_path / "m", "hf", tmp_path / "a")
    back = models.load(str(tmp_path / "a"))
    ids = torch.tensor([[1, 2, 3, 260]])
    assert torch.equal(back.net(ids).logits, model.net(ids).logits)
    assert back.digest == models.digest(models.named_tensors(model.net))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "m" / file).read_bytes()
    count = len(back.net.state_dict()) - (kind != "qwen2")
    assert (report.exact, report.tensors, report.notes) == (count, count, ())


def test_a_plain_directory_in_16_bits(tmp_path: Path) -> None:
    model = tiny()
    compressed(model, tmp_path / "m")
    report = export(tmp_path / "m", "hf:bf16", tmp_path / "a")
    assert report.types == {"BF16": 20}
    assert report.notes == ("20 tensors are rounded to bf16",)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    back = models.load(str(tmp_path / "a"), dtype="bf16")
    assert torch.equal(back.net.model.norm.weight, model.net.model.norm.weight.bfloat16())
    again = export(tmp_path / "a", "hf", tmp_path / "b")
    assert (again.types, again.exact) == ({"BF16": 20}, 20)
    first, second = (tmp_path / name / "model.safetensors" for name in "ab")
    assert second.read_bytes() == first.read_bytes()


def refused(tmp_path: Path, model: Model, grids: dict[str, Quantised], to: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        export(write(model, tmp_path / "m", grids), to, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_gptq_has_every_matrix_quantised(tmp_path: Path) -> None:
    model = tiny()
    grids = grids_of(model)
    left = "model.layers.0.mlp.up_proj.weight"
    del grids[left]
    refused(tmp_path, model, grids, "gptq", f"but the head quantised; {left} is not quantised")


def test_what_compressed_tensors_does_not_hold(tmp_path: Path) -> None:
    model = tiny()
    refused(tmp_path, model, grids_of(model, bits=3), "compressed-tensors", "4 or 8 bits; .* has 3")
    model.net.model.norm.weight[0] = 1e6
    refused(tmp_path, model, grids_of(model), "compressed-tensors", "norm.weight has values beyond fp16")


def one_tensor() -> Iterator[tuple[str, torch.Tensor]]:
    yield "a", torch.arange(6, dtype=torch.int32).reshape(2, 3)
    yield "b", torch.tensor([1.5], dtype=torch.float16)
    yield "c", torch.tensor([7])


def test_a_safetensors_file_and_every_damaged_byte_of_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saving.write_tensors(path, one_tensor, {"k": "v"})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    assert (length + 8) % 64 == 0
    assert json.loads(whole[8 : 8 + length]) == {
        "__metadata__": {"k": "v"},
        "c": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "a": {"dtype": "I32", "shape": [2, 3], "data_offsets": [8, 32]},
        "b": {"dtype": "F16", "shape": [1], "data_offsets": [32, 34]},
    }
    assert whole[8 + length :] == bytes([7, *[0] * 7, *(b for i in range(6) for b in (i, 0, 0, 0)), 0, 0x3E])
    saving.compare(path, one_tensor)
    for at in range(8 + length, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(FleetuneError, match="does not hold what was written"):
            saving.compare(path, one_tensor)
    path.write_bytes(whole[:-1])
    with pytest.raises(FleetuneError, match="is wrong"):
        saving.compare(path, one_tensor)


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
def test_a_wrong_packer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    compressed(tiny(), tmp_path / "m")
    right = hf.words
    monkeypatch.setattr(hf, "words", lambda codes, bits: right(codes.flip(1), bits))
    with pytest.raises(FleetuneError, match="q_proj does not decode to its weights"):
        export(tmp_path / "m", to, tmp_path / "a")
    assert not (tmp_path / "a").exists()


GROUP, ROWS, GROUPS = 32, 16, 2
SHAPES = {
    "normal": lambda x: x,
    "positive": lambda x: x.abs(),
    "negative": lambda x: -x.abs(),
    "nearly positive": lambda x: x.abs().index_fill(1, torch.tensor([3]), -1e-3),
    "constant": lambda x: x[:, :1].expand_as(x),
    "zero": lambda x: x * 0,
    "one above zero": lambda x: torch.eye(*x.shape) * x.abs(),
    "far from zero": lambda x: x * 0.01 + 3,
}


@st.composite
def solved(draw: st.DrawFn) -> tuple[str, Quantised]:
    """A grid, and a matrix [16, 64] rounded to it, whose groups are of the shapes above and of any size."""
    kind, bits = draw(st.sampled_from(KINDS)), draw(st.sampled_from(BITS))
    assume((kind != "universal" or bits <= 5) and (kind in UNIFORM or bits == 4))
    seed = draw(st.integers(0, 2**31))
    x = torch.randn(ROWS, GROUP * GROUPS, generator=torch.Generator().manual_seed(seed))
    groups = []
    for part in x.split(GROUP, 1):
        shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
        groups.append(shape(part) * 2.0 ** draw(st.integers(-20, 12)))
    grid = Grid(kind, bits)
    weight = quantise(torch.cat(groups, 1), grid, GROUP, nearest).solved(grid, GROUP).weight
    assert isinstance(weight, Quantised)
    return kind, weight


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layer") / "a.safetensors"


@given(case=solved())
@settings(max_examples=60)
def test_directories_hold_what_was_solved(file: Path, case: tuple[str, Quantised]) -> None:
    kind, q = case
    assume(kind in UNIFORM)
    middle = compressed_tensors.symmetric({"a": q})
    assert middle or kind in ("asymmetric", "universal")
    written = {}
    if q.bits in gptq.BITS:
        written["gptq"] = (gptq.parts("a.weight", q), gptq._decode)
    if q.bits in compressed_tensors.BITS:
        written["ct"] = (compressed_tensors.parts("a.weight", q, middle), compressed_tensors._decode)
    dtype = torch.float32 if kind == "asymmetric" else torch.float16
    written["mlx"] = (mlx.parts("a.weight", q, dtype), mlx._decode)
    for to, (parts, decode) in written.items():
        tensors = dict(parts)
        save_file(tensors, file)
        with safe_open(file, "pt") as opened:
            assert torch.equal(decode(opened, "a", q), q.dense()), to
        if to == "gptq":  # a reader that adds 1 without cutting the sum to the bits sees the zero, too
            zero = gptq.hf.unwords(tensors["a.qzeros"], q.bits, ROWS).int() + 1
            assert int(zero.max()) < 1 << q.bits


@given(case=solved())
@settings(max_examples=60)
def test_ggml_blocks_hold_what_was_solved(case: tuple[str, Quantised]) -> None:
    kind, q = case
    others = {"asymmetric": (), "universal": ("Q4_1", "Q5_1"), "iq4_nl": ("IQ4_NL", "Q8_0")}
    pairs = others.get(kind, ("Q4_0", "Q5_0"))
    types = [name for name, bits in zip(pairs, (4, 5), strict=False) if q.bits <= bits]
    types += [] if kind in ("asymmetric", "universal") else ["Q8_0"]
    for name in types:
        assert _ggml_blocks.misfit(q, name) is None, name
        raw = gguf.quants.dequantize(_ggml_blocks.PACKERS[name](q), gguf.GGMLQuantizationType[name])
        assert torch.equal(torch.from_numpy(raw), q.dense()), name
