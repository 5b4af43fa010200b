# SPDX-License-Identifier: Apache-2.0
"""Describe GGUF's super-block types: 256 neighbouring columns of a row share one or two fp16 numbers.

A super-block is 8 groups of 32 columns or 16 of 16.  A group's scale is a small whole number k times the super-block's d.  In
the types with a minimum a second whole number m times its dmin is taken off (gguf.quants, Q2_K .. Q6_K and IQ4_XS):

    w = (d k) (code - middle) - dmin m            IQ4_XS: CODEBOOKS["iq4_nl"][code] in place of code - middle

d k and dmin m are exact in float32 (11 + 7 bits), and so is the product with the code (5 bits more at most): only the subtraction
rounds, so every runtime that computes in float32 has the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor

WIDTH: Final = 256  # columns of a super-block


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


class SuperBlocks(NamedTuple):
    """The scales of a matrix [R, C] in super-blocks, as the file holds them."""

    kind: str  # of `SUPER_TYPES`
    d: Tensor  # float16 [R, C / 256]
    multiples: Tensor  # int8 [R, C / group]
    dmin: Tensor  # float16 [R, C / 256]; [R, 0] of a type without a minimum
    minima: Tensor  # int8 [R, C / group]; [R, 0] likewise

    @property
    def type(self) -> SuperType:
        """The numbers of the type."""
        return SUPER_TYPES[self.kind]

    @staticmethod
    def joined(parts: Sequence[SuperBlocks]) -> SuperBlocks:
        """Join the super-blocks of some rows each."""
        tensors = (torch.cat(rows) for rows in list(zip(*parts, strict=True))[1:])
        return SuperBlocks(parts[0].kind, *tensors)

    def scale(self) -> Tensor:
        """Return the groups' scales, float32 [R, C / group], exact."""
        return times(self.d, self.multiples)

    def offset(self) -> Tensor | None:
        """Return what is taken off a group's weights, float32 [R, C / group], exact; None where there is no minimum."""
        return times(self.dmin, self.minima) if self.type.minimum else None

    def misfit(self, R: int, C: int) -> str:
        """Say what keeps the parts from being those of a matrix [R, C]; "" where nothing does."""
        of, blocks = self.type, (R, C // WIDTH)
        groups, none = (R, C // of.group), (R, 0)
        wanted = (blocks, groups, *((blocks, groups) if of.minimum else (none, none)))
        found = (self.d, self.multiples, self.dmin, self.minima)
        dtypes = (torch.float16, torch.int8, torch.float16, torch.int8)
        if C % WIDTH or any(tuple(t.shape) != shape for t, shape in zip(found, wanted, strict=True)):
            return f"parts that are not those of super-blocks of {WIDTH} columns"
        if any(t.dtype != dtype for t, dtype in zip(found, dtypes, strict=True)):
            return f"parts of another type than {self.kind}'s"
        if not all(bool(unit.isfinite().all()) for unit in (self.d, self.dmin)):
            return "units that are no finite numbers"
        ends = [(self.multiples, of.low), (self.minima, 0)]
        if any(t.numel() and (int(t.min()) < low or int(t.max()) > of.high) for t, low in ends):
            return f"multiples that {self.kind} has not"
        return ""


def times(unit: Tensor, multiples: Tensor) -> Tensor:
    """Return multiples [R, groups] of the units [R, blocks] that groups share, float32 [R, groups]."""
    each = multiples.shape[1] // max(1, unit.shape[1])
    return unit.float().repeat_interleave(each, 1) * multiples.float()
