"""Numbers of tensors in mapped files: blocks, runs of numbers, files that change or are damaged."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fleetune import models
from fleetune.common.ggml import HALVES
from fleetune.errors import ModelError
from fleetune.models.lazy import LazyWeight, Memory
from fleetune.models.stored import MappedFile, Stored, dequantise, of_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ4_NL", "Q5_1", "Q6_K", "Q4_K"]


def blocks(kind: str, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows of a format: any codes, with scales that are finite; uint8 [rows, bytes]."""
    rng = np.random.default_rng(seed)
    whole = rng.normal(size=(rows, width)).astype(np.float32)
    try:
        return gguf.quants.quantize(whole, gguf.GGMLQuantizationType[kind])
    except NotImplementedError:  # the package reads K-quants and IQ4_NL but does not write them
        size, count = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][::-1]
        data = rng.integers(0, 60, (rows, width // count, size), dtype=np.uint8)  # no scale is infinite
        return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_those_of_the_package(kind: str) -> None:
    data = blocks(kind, 7, 512)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    out = torch.empty(expected.size)
    dequantise(out, torch.from_numpy(data).view(-1), kind)
    assert out.numpy().tobytes() == expected.tobytes()


def test_every_code_and_sign_of_scale_is_right() -> None:
    for kind in HALVES:
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        data = np.random.default_rng(1).integers(0, 256, (4096, size), dtype=np.uint8)
        data[:, 1] &= 0x7B  # of the scale: no infinity
        data[:, 3] &= 0x7B if kind == "Q4_1" else 0xFF
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        out = torch.empty(expected.size)
        dequantise(out, torch.from_numpy(data).view(-1), kind)
        assert out.numpy().tobytes() == expected.tobytes(), kind


def stored(folder: Path, kind: str, rows: int, width: int, *, before: int = 0, **more: Any) -> Stored:
    if kind in gguf.GGMLQuantizationType.__members__ and kind not in ("F32", "F16", "BF16"):
        raw = blocks(kind, rows, width).tobytes()
    else:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        values = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)
        raw = values.view(torch.uint8).numpy().tobytes()
    path = folder / f"{kind}-{before}"
    path.write_bytes(bytes(before) + raw)
    return Stored(MappedFile(path), before, len(raw), kind, (rows, width), **more)


@given(
    kind=st.sampled_from([*TYPES[:6], "F32", "F16", "BF16"]),
    before=st.sampled_from([0, 1, 6, 64]),
    ordered=st.booleans(),
    shifted=st.booleans(),
    ends=st.tuples(st.integers(0, 6 * 64), st.integers(0, 6 * 64)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_run_of_numbers_is_a_part_of_the_whole(
    kind: str, before: int, ordered: bool, shifted: bool, ends: tuple[int, int], dtype: torch.dtype
) -> None:
    order = np.array([3, 0, 5, 1, 4, 2]) if ordered else None
    with tempfile.TemporaryDirectory() as folder:
        plain = stored(Path(folder), kind, 6, 64, before=before)
        tensor = plain._replace(order=order, shifted=shifted)
        whole = plain.read(0, 384, torch.float32).float().view(6, 64)
        whole = whole if order is None else whole[torch.from_numpy(order)]
        whole = (whole - 1.0 if shifted else whole).to(dtype)
        first, last = sorted(ends)
        assert torch.equal(tensor.read(first, last, dtype), whole.view(-1)[first:last])
        room = torch.full((384,), torch.nan)
        assert torch.equal(tensor.read(first, last, dtype, room), whole.view(-1)[first:last])
        index = torch.tensor([5, 0, 0, 2])
        assert torch.equal(tensor.rows(index, dtype), whole[index])


def test_pages_are_given_back_and_values_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetune.models.stored.KEPT", 64)
    tensor = stored(tmp_path, "F32", 6, 64)
    views = [tensor.read(64 * i, 64 * i + 64, torch.float32) for i in range(6)]
    assert torch.equal(torch.cat(views), tensor.read(0, 384, torch.float32))


@pytest.mark.parametrize("damage", ["offsets", "shape", "header", "short", "overlap", "floats"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    models.tiny_llama().net.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + size])
    name = sorted(n for n in head if n != "__metadata__")[0]
    ends = {"offsets": lambda n: n + 10**9, "overlap": lambda n: n - 4, "floats": float}
    if damage in ends:
        head[name]["data_offsets"] = [ends[damage](n) for n in head[name]["data_offsets"]]
    elif damage == "shape":
        head[name]["shape"] = [10**6, 10**6]
    new = json.dumps(head).encode() if damage != "header" else b"{" * size
    body = raw[8 + size :] if damage != "short" else raw[8 + size : -100]
    file.write_bytes(len(new).to_bytes(8, "little") + new + body)
    with pytest.raises(ModelError, match="damaged"):
        of_folder(tmp_path)


@pytest.mark.parametrize("cut", [False, True])
def test_a_file_that_is_written_to_while_it_is_in_use_is_noticed(cut: bool, tmp_path: Path) -> None:
    tensor = stored(tmp_path, "Q4_1", 6, 64)
    weight = LazyWeight.make("w", tensor, torch.float32, Memory())
    before = weight.values()
    path = tensor.file.path
    whole = path.read_bytes()
    (tmp_path / "new").write_bytes(bytes(len(whole)))
    (tmp_path / "new").replace(path)  # another file under its name
    assert torch.equal(weight.values(), before)
    again = LazyWeight.make("w", tensor._replace(file=MappedFile(path)), torch.float32, Memory())
    os.utime(path, ns=(1, 1))
    if cut:
        os.truncate(path, 10)
    with pytest.raises(ModelError, match="was changed while"):
        again.values()
