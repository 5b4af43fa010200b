"""Every grid in every format that takes it: what was solved is what is in the file, odd groups included."""

from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from fleetune.compression.layerwise.column_loop import nearest
from fleetune.compression.layerwise.grids import BITS, KINDS, UNIFORM, Grid, quantise
from fleetune.deploy.formats import _ggml_blocks, compressed_tensors, gptq, mlx
from fleetune.models.artefact import Quantised

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
