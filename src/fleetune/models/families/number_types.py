"""List the types of numbers that weights have: plain dtypes, codebooks, and GGUF's super-blocks; torch is not imported.

A super-block is 256 neighbouring columns of a row, in groups of 32 or 16.  A group's scale is an integer k times the
super-block's fp16 number d; types with a minimum subtract an integer m times dmin (gguf.quants, Q2_K .. Q6_K and IQ4_XS):

    w = (d k) (code - middle) - dmin m            IQ4_XS: CODEBOOKS["iq4_nl"][code] in place of code - middle

In float32 only the subtraction rounds, so every runtime that computes in float32 has the same values.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple


class Dtype(NamedTuple):
    """One dtype of weights."""

    full: str  # in torch, numpy and ledgers
    tag: str  # in safetensors and GGUF files
    size: int  # bytes of a number


WEIGHTS: Final[Mapping[str, Dtype]] = MappingProxyType(
    {
        "fp32": Dtype("float32", "F32", 4),
        "bf16": Dtype("bfloat16", "BF16", 2),
        "fp16": Dtype("float16", "F16", 2),
    }
)


# the values that the codes 0, 1, 2 .. stand for, times a scale
CODEBOOKS: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        # llama.cpp's type IQ4_NL (ggml-common.h, kvalues_iq4nl)
        "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    }
)


SUPER_WIDTH: Final = 256  # columns of a super-block


class SuperType(NamedTuple):
    """The numbers of a type."""

    bits: int  # of a code
    group: int  # columns of a group
    low: int  # smallest and largest multiple of d
    high: int
    middle: int = 0  # the code of a scale's 0
    minimum: bool = False  # whether there is a dmin, of multiples 0 .. high
    codebook: str = ""  # of `CODEBOOKS`


SUPER_TYPES: Final[Mapping[str, SuperType]] = MappingProxyType(
    {
        "q6_k": SuperType(6, 16, -128, 127, middle=32),
        "q5_k": SuperType(5, 32, 0, 63, minimum=True),
        "q4_k": SuperType(4, 32, 0, 63, minimum=True),
        "q3_k": SuperType(3, 16, -32, 31, middle=4),
        "q2_k": SuperType(2, 16, 0, 15, minimum=True),
        "iq4_xs": SuperType(4, 32, -32, 31, codebook="iq4_nl"),
    }
)
