"""ggml's blocks and super-blocks: bytes, agreement with the gguf package and llama.cpp, artefacts that hold them, what does not fit."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from deploy_harness import WIDE, changed, matrix, put_on, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fleetune import compression, models
from fleetune.common import sums
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.blocks import FinishedBlocks
from fleetune.compression.layerwise.federated import block_message, weights_of
from fleetune.compression.layerwise.grids import Grid, rounded
from fleetune.deploy import harness, llamacpp
from fleetune.deploy.export import write as export
from fleetune.deploy.formats import _ggml_blocks
from fleetune.errors import ModelError
from fleetune.models import Model, artefact
from fleetune.models.artefact import ArtefactHead, Master, Quantised, SuperBlocks
from fleetune.models.cache.names import MASTER
from fleetune.models.families.number_types import CODEBOOKS, SUPER_TYPES, SUPER_WIDTH
from fleetune.tuning.exchange.messages import decode

pytestmark = pytest.mark.usefixtures("own_cache")


def one_row(codes: list[int], scale: list[float], zero: list[int], bits: int = 4) -> Quantised:
    return matrix([codes], [scale], [zero], bits)


NL = changed(one_row([11] * 32, [1.0], [0]), codebook="iq4_nl")


@st.composite
def matrices(draw: st.DrawFn, bits: int, low: int, high: int) -> Quantised:
    """Random codes and signed scales; zeros from `low` to `high`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    R, groups, per = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    C = groups * per * 32
    scale = torch.from_numpy(rng.standard_normal((R, groups)).astype(np.float16))
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (R, C), dtype=np.uint8))
    zeros = torch.from_numpy(rng.integers(low, high + 1, (R, groups), dtype=np.uint8))
    return Quantised(codes, scale, zeros, bits, per * 32)


def read(raw: np.ndarray, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))


def test_q4_0_bytes() -> None:
    codes = [*range(16), *range(15, -1, -1)]
    raw = _ggml_blocks.PACKERS["Q4_0"](one_row(codes, [-0.5], [8]))
    nibbles = [0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E, 0x0F]
    assert raw.tolist() == [[0x00, 0xB8, *nibbles]]  # -0.5 is 0xB800


def test_q4_0_repeats_the_scale_of_a_wide_group_and_moves_other_zeros() -> None:
    raw = _ggml_blocks.PACKERS["Q4_0"](one_row([1] * 64, [1.0], [8]))
    assert raw.tolist() == [[0x00, 0x3C, *[0x11] * 16] * 2]
    raw = _ggml_blocks.PACKERS["Q4_0"](one_row([3] * 32, [1.0], [4], bits=3))  # 3 - 4 + 8 = 7
    assert raw.tolist() == [[0x00, 0x3C, *[0x77] * 16]]


def test_iq4_nl_bytes() -> None:
    codes = [*range(16), *range(15, -1, -1)]
    q = changed(one_row(codes, [-0.5], [0]), codebook="iq4_nl")
    even = one_row(codes, [-0.5], [8])
    assert _ggml_blocks.PACKERS["IQ4_NL"](q).tolist() == _ggml_blocks.PACKERS["Q4_0"](even).tolist()
    book = [-value / 2 for value in CODEBOOKS["iq4_nl"]]
    assert q.dense().tolist() == [[*book, *book[::-1]]]


def test_the_values_are_those_of_the_package() -> None:
    assert gguf.quants.IQ4_NL.kvalues == CODEBOOKS["iq4_nl"]


def test_q4_1_bytes() -> None:
    raw = _ggml_blocks.PACKERS["Q4_1"](one_row([2] * 16 + [13] * 16, [0.25], [3]))
    assert raw.tolist() == [[0x00, 0x34, 0x00, 0xBA, *[0xD2] * 16]]  # -0.75 is 0xBA00


@given(st.integers(0, 2**32 - 1), st.integers(-35, 5), st.integers(1, 9))
def test_plain_weights_are_rounded_as_the_gguf_package_rounds_them(seed: int, scale: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, 96), np.float32) * np.float32(10.0**scale)
    weight[:, :32] = rng.integers(-254, 255, (rows, 32)) * np.float32(0.5)  # halves, where the largest is 127
    weight[:, 0], weight[:, 1], weight[0, 32:64] = 127, np.nextafter(np.float32(0.5), np.float32(0)), 0
    theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(_ggml_blocks.round_q8_0(torch.from_numpy(weight)), theirs)


def test_q8_0_bytes() -> None:
    raw = _ggml_blocks.PACKERS["Q8_0"](one_row([0, 127, 128, 129, 255] + [128] * 27, [2.0], [128], bits=8))
    assert raw.tolist() == [[0x00, 0x40, 0x80, 0xFF, 0x00, 0x01, 0x7F, *[0] * 27]]


def test_q5_bytes() -> None:
    codes = [*range(16), *range(31, 15, -1)]
    nibbles = [0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E, 0x0F]
    fifth = [0x00, 0x00, 0xFF, 0xFF]
    raw = _ggml_blocks.PACKERS["Q5_0"](one_row(codes, [-0.5], [16], bits=5))
    assert raw.tolist() == [[0x00, 0xB8, *fifth, *nibbles]]
    raw = _ggml_blocks.PACKERS["Q5_1"](one_row(codes, [0.25], [3], bits=5))
    assert raw.tolist() == [[0x00, 0x34, 0x00, 0xBA, *fifth, *nibbles]]
    raw = _ggml_blocks.PACKERS["Q5_1"](one_row([16] + [0] * 31, [0.25], [3], bits=5))
    assert raw.tolist() == [[0x00, 0x34, 0x00, 0xBA, 1, 0, 0, 0, *[0] * 16]]


@pytest.mark.parametrize(
    ("kind", "bits", "zeros", "significant", "codebook"),
    [
        ("Q4_0", 4, (8, 8), 11, ""),
        ("Q4_1", 4, (0, 15), 7, ""),  # bits of a scale: scale * zero is exact
        ("Q5_0", 5, (16, 16), 11, ""),
        ("Q5_1", 5, (0, 31), 6, ""),
        ("Q8_0", 8, (128, 128), 11, ""),
        ("IQ4_NL", 4, (0, 0), 11, "iq4_nl"),
        ("Q8_0", 4, (0, 0), 11, "iq4_nl"),
    ],
)
@given(data=st.data())
@settings(max_examples=50)
def test_blocks_decode_to_the_same_weights(kind, bits, zeros, significant, codebook, data):
    q = data.draw(matrices(bits, *zeros))
    exact = q.scale.view(torch.int16) & ~((1 << (11 - significant)) - 1)
    q = changed(q, scale=exact.view(torch.float16), codebook=codebook)
    assert _ggml_blocks.misfit(q, kind) is None
    got = read(_ggml_blocks.PACKERS[kind](q), kind)
    assert torch.equal(got, q.dense())
    assert not codebook or got.numpy().tobytes() == q.dense().numpy().tobytes()  # the sign of 0 too


@given(st.data(), st.booleans(), st.sampled_from(["", "iq4_nl"]))
def test_the_range_of_steps(data: st.DataObject, one: bool, codebook: str) -> None:
    q = changed(data.draw(matrices(4, 7, 8 if one else 15)), codebook=codebook)
    assert q.step_range() == (int(q.steps().min()), int(q.steps().max()))


@given(matrices(4, 0, 15), st.sampled_from(sorted(_ggml_blocks.PACKERS)))
def test_what_is_said_to_fit_is_exact(q: Quantised, kind: str) -> None:
    if _ggml_blocks.misfit(q, kind) is None:
        assert torch.equal(read(_ggml_blocks.PACKERS[kind](q), kind), q.dense())


@pytest.mark.parametrize(
    ("q", "kind", "why"),
    [
        (one_row([1] * 48, [1.0], [8]), "Q4_0", "its groups of 48 are no multiple of Q4_0's blocks of 32"),
        (one_row([15] * 32, [1.0], [7]), "Q4_0", "Q4_0 holds steps -8 to 7 about the zero, it has 8 to 8"),
        (one_row([16] * 32, [1.0], [0], bits=8), "Q4_1", "Q4_1 has 4 bits, its codes have 8"),
        (one_row([1] * 32, [1.0009765625], [3]), "Q4_1", "not exact in fp16"),
        (one_row([255] * 32, [1.0], [0], bits=8), "Q8_0", "Q8_0 holds steps -128 to 127"),
        (one_row([8] * 32, [1.0], [8]), "IQ4_NL", "its codes are not those of the grid iq4_nl"),
        (NL, "Q4_1", "Q4_1 holds evenly spaced values, those of the grid iq4_nl are not"),
        (changed(NL, codes=NL.codes[:, :16], group=16), "IQ4_NL", "no multiple of IQ4_NL's blocks of 32"),
    ],
)
def test_what_does_not_fit_is_said(q: Quantised, kind: str, why: str) -> None:
    assert why in (_ggml_blocks.misfit(q, kind) or "")


TYPES = sorted(SUPER_TYPES)
needs_engine = pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp is not installed")


def drawn(kind: str, seed: int, R: int = 3, blocks: int = 2) -> Quantised:
    """Any codes, any multiples that the type has, and d and dmin of either sign, some of them 0 or subnormal."""
    of, rng = SUPER_TYPES[kind], np.random.default_rng(seed)
    C, G = blocks * SUPER_WIDTH, blocks * SUPER_WIDTH // of.group

    def halves(columns: int) -> torch.Tensor:
        size = 2.0 ** rng.integers(-26, 4, (R, columns))
        return torch.from_numpy((rng.standard_normal((R, columns)) * size).astype(np.float16))

    def whole(low: int, columns: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(low, of.high + 1, (R, columns)).astype(np.int8))

    of_minimum = (blocks, G) if of.minimum else (0, 0)
    parts = SuperBlocks(
        kind, halves(blocks), whole(of.low, G), halves(of_minimum[0]), whole(0, of_minimum[1])
    )
    codes = torch.from_numpy(rng.integers(0, 1 << of.bits, (R, C), dtype=np.uint8))
    return Quantised.of_blocks(codes, parts)


def in_super_blocks(folder: Path, kind: str) -> tuple[Model, dict[str, Quantised]]:
    """Write the artefact of a model 256 wide with the matrices of its layers on a grid, which the model takes over."""
    model, grid = tiny(**WIDE), Grid(kind, SUPER_TYPES[kind].bits)
    return model, put_on(model, folder, lambda tensor: rounded(tensor * 0.3, grid, 32))


@pytest.mark.parametrize("kind", TYPES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_all_that_a_type_can_hold_is_read_as_the_same_weights(kind: str, seed: int) -> None:
    q = drawn(kind, seed)
    assert _ggml_blocks.misfit(q, kind.upper()) is None
    raw = _ggml_blocks.PACKERS[kind.upper()](q)
    type_ = gguf.GGMLQuantizationType[kind.upper()]
    assert raw.shape == (3, 2 * gguf.GGML_QUANT_SIZES[type_][1])
    read = gguf.quants.dequantize(raw, type_)
    assert np.array_equal(read.view(np.int32), q.dense().numpy().view(np.int32))


@pytest.mark.parametrize("kind", TYPES)
def test_an_artefact_holds_the_file_s_own_numbers(kind: str, tmp_path: Path) -> None:
    """Finished blocks, a block's message to devices, the artefact: the same numbers, and weights to the bit."""
    of = SUPER_TYPES[kind]
    model = tiny(**WIDE | {"intermediate_size": 256})
    solver = compression.make("rtn", {"grid": kind})
    parts = driver.run(model, solver, None, tmp_path / "parts")
    artefact.write(tmp_path / "model", model, parts, ArtefactHead("rtn", {}, "a" * 64, "b" * 64))
    master, again = Master(tmp_path / "model"), FinishedBlocks(tmp_path / "parts")
    assert again.open(0)
    sent = weights_of(decode(block_message(tmp_path / "parts", 0, b"\0" * 8)).payload)
    assert parts
    for name, part in parts.items():
        others = [master.quantised(name)]
        if name in again:
            others += [again[name], sent[name]]
        for q in others:
            assert (q.bits, q.group, q.codebook, q.blocks.kind) == (of.bits, of.group, of.codebook, kind)
            assert torch.equal(q.codes, part.codes)
            for own, other in zip(part.blocks[1:], q.blocks[1:], strict=True):
                assert own.dtype == other.dtype
                assert torch.equal(own, other)
        assert master.weight(name).numpy().tobytes() == part.dense().numpy().tobytes()
    assert len(sent) == 7
    assert master.head.codebooks == {}
    assert master.head.superblocks == dict.fromkeys(sorted(parts), kind)
    assert ArtefactHead.from_json(master.head.to_json()) == master.head
    name = next(iter(parts))
    held = {n.removeprefix(f"{name}.") for n in load_file(tmp_path / "model" / MASTER) if n.startswith(name)}
    assert held == {"codes", "d", "multiples", *(("dmin", "minima") if of.minimum else ())}
    bits = harness.bits(tmp_path / "model").linear
    columns, size = Grid(kind, of.bits).block
    assert 8 * size / columns <= bits <= 8 * size / columns + 0.55


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        ("multiples", lambda t: t[:, :-1].contiguous(), "not those of super-blocks of 256 columns"),
        ("multiples", lambda t: t.int(), "of another type than q4_k's"),
        ("multiples", lambda t: torch.full_like(t, 64), "multiples that q4_k has not"),
        ("codes", lambda t: t[:, 1:].contiguous(), "codes that are not 256 a row"),
        ("minima", None, "lacks parts of"),
    ],
)
def test_parts_that_are_no_super_blocks_are_refused(part: str, change, why: str, tmp_path: Path) -> None:
    _, found = in_super_blocks(tmp_path / "m", "q4_k")
    name = next(n for n in found if n.endswith("q_proj.weight"))
    file = tmp_path / "m" / MASTER
    head, tensors = Master(tmp_path / "m").head.to_json(), load_file(file)
    (tmp_path / "m" / sums.FILE).unlink()
    held = tensors.pop(f"{name}.{part}")
    if change is not None:
        tensors[f"{name}.{part}"] = change(held)
    save_file(tensors, file, metadata={"format": "pt", "master": head})
    with pytest.raises(ModelError, match=why):
        Master(tmp_path / "m").quantised(name)


@pytest.mark.parametrize("kind", TYPES)
def test_the_importer_gets_the_weights_back(kind: str, tmp_path: Path) -> None:
    model, found = in_super_blocks(tmp_path / "m", kind)
    report = export(tmp_path / "m", "gguf", tmp_path / "x.gguf")
    assert report.types[kind.upper()] == len(found) == 14
    assert report.exact == report.tensors - 1  # the embedding is rounded to Q8_0
    reader = gguf.GGUFReader(report.path)
    name = gguf.LlamaFileType(reader.fields["general.file_type"].contents()).name
    assert name in (f"MOSTLY_{kind.upper()}", f"MOSTLY_{kind.upper()}_S")
    back = models.load(str(report.path), base="mapped")
    read = dict(models.named_tensors(models.load(str(report.path)).net))
    for name, q in found.items():
        assert torch.equal(read[name], q.dense()), name
    (end,) = [name for name in read if name not in found and read[name].dim() == 2]
    model.net.get_parameter(end).copy_(read[end])
    ids = torch.arange(40, 90)[None]
    with torch.inference_mode():
        torch.testing.assert_close(back.net(ids).logits, model.net(ids).logits, rtol=0, atol=1e-5)


@needs_engine
@pytest.mark.parametrize("kind", ["q2_k", "q6_k", "iq4_xs"])
def test_llama_cpp_reads_the_same_weights(kind: str, tmp_path: Path) -> None:
    """Its logits are torch's but for activations that it rounds to 8 bits; those of f32 of the same weights are not."""
    model, _ = in_super_blocks(tmp_path / "m", kind)
    ids, found = list(range(40, 104)), {}
    for to in ("gguf", "gguf:f32"):
        path = export(tmp_path / "m", to, tmp_path / f"m{to[5:]}.gguf").path
        with llamacpp.opened(path, 1) as engine:
            found[to] = np.concatenate([piece.copy() for piece in engine.scored_logits([(ids, 1)])])
    with torch.inference_mode():
        ours = model.net(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    for to, most in (("gguf", 1e-2), ("gguf:f32", 1e-4)):
        theirs = torch.from_numpy(found[to]).double().log_softmax(-1)
        assert (ours.exp() * (ours - theirs)).sum(-1).mean() < most
        assert (theirs - ours).abs().max() < 0.05 * ours.abs().max()
