"""ggml's blocks: golden bytes, agreement with the gguf package's own decoder, and what does not fit."""

import gguf
import numpy as np
import pytest
import torch
from deploy_harness import changed, matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.deploy.formats import _ggml_blocks
from fleetune.models.artefact import Quantised
from fleetune.models.families.number_types import CODEBOOKS


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
    raw = _ggml_blocks.pack_q4_0(one_row(codes, [-0.5], [8]))
    nibbles = [0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E, 0x0F]
    assert raw.tolist() == [[0x00, 0xB8, *nibbles]]  # -0.5 is 0xB800


def test_q4_0_repeats_the_scale_of_a_wide_group_and_moves_other_zeros() -> None:
    raw = _ggml_blocks.pack_q4_0(one_row([1] * 64, [1.0], [8]))
    assert raw.tolist() == [[0x00, 0x3C, *[0x11] * 16] * 2]
    raw = _ggml_blocks.pack_q4_0(one_row([3] * 32, [1.0], [4], bits=3))  # 3 - 4 + 8 = 7
    assert raw.tolist() == [[0x00, 0x3C, *[0x77] * 16]]


def test_iq4_nl_bytes() -> None:
    codes = [*range(16), *range(15, -1, -1)]
    q = changed(one_row(codes, [-0.5], [0]), codebook="iq4_nl")
    even = one_row(codes, [-0.5], [8])
    assert _ggml_blocks.pack_iq4_nl(q).tolist() == _ggml_blocks.pack_q4_0(even).tolist()
    book = [-value / 2 for value in CODEBOOKS["iq4_nl"]]
    assert q.dense().tolist() == [[*book, *book[::-1]]]


def test_the_values_are_those_of_the_package() -> None:
    assert gguf.quants.IQ4_NL.kvalues == CODEBOOKS["iq4_nl"]


def test_q4_1_bytes() -> None:
    raw = _ggml_blocks.pack_q4_1(one_row([2] * 16 + [13] * 16, [0.25], [3]))
    assert raw.tolist() == [[0x00, 0x34, 0x00, 0xBA, *[0xD2] * 16]]  # -0.75 is 0xBA00


def test_q8_0_bytes() -> None:
    raw = _ggml_blocks.pack_q8_0(one_row([0, 127, 128, 129, 255] + [128] * 27, [2.0], [128], bits=8))
    assert raw.tolist() == [[0x00, 0x40, 0x80, 0xFF, 0x00, 0x01, 0x7F, *[0] * 27]]


def test_q5_bytes() -> None:
    codes = [*range(16), *range(31, 15, -1)]
    nibbles = [0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E, 0x0F]
    fifth = [0x00, 0x00, 0xFF, 0xFF]
    raw = _ggml_blocks.pack_q5_0(one_row(codes, [-0.5], [16], bits=5))
    assert raw.tolist() == [[0x00, 0xB8, *fifth, *nibbles]]
    raw = _ggml_blocks.pack_q5_1(one_row(codes, [0.25], [3], bits=5))
    assert raw.tolist() == [[0x00, 0x34, 0x00, 0xBA, *fifth, *nibbles]]
    raw = _ggml_blocks.pack_q5_1(one_row([16] + [0] * 31, [0.25], [3], bits=5))
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
