"""Name ggml's types of blocks whose scales can be tuned: 32 codes of a row, and one or two fp16 numbers in front of them."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

import gguf

BLOCK: Final = 32  # numbers of a block
SCALES: Final = "scales"  # what is trained of blocks: the word of the option `train`
ALIGNMENT: Final = int(gguf.GGUF_DEFAULT_ALIGNMENT)  # bytes in a file
HALVES: Final[Mapping[str, int]] = MappingProxyType(  # fp16 numbers that a block begins with: d, or d and m
    {"Q4_0": 1, "Q4_1": 2, "Q5_0": 1, "Q5_1": 2, "Q8_0": 1, "IQ4_NL": 1}
)
BYTES: Final[Mapping[str, int]] = MappingProxyType(  # of a block
    {kind: int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]) for kind in HALVES}
)
SUPER_BLOCK: Final = 256  # numbers of a super-block, whose scales are codes themselves


def in_layers(kinds: Mapping[str, str]) -> dict[str, str]:
    """Return those of some matrices' types that are of a layer's: names of layers have a number."""
    return {name: kind for name, kind in kinds.items() if any(word.isdigit() for word in name.split("."))}


def scales_in(kinds: Mapping[str, str]) -> dict[str, int]:
    """Return how many scales a block has, by matrix, of those that are in blocks."""
    return {name: HALVES[kind] for name, kind in kinds.items() if kind in HALVES}


def has_super_blocks(kinds: Iterable[str]) -> bool:
    """Return whether one of some types is of super-blocks."""
    sizes = {kind.name: block for kind, (block, _) in gguf.GGML_QUANT_SIZES.items()}
    return any(sizes.get(kind) == SUPER_BLOCK for kind in kinds)


def listed(kinds: Iterable[str]) -> str:
    """Return the names of types in words: Q4_K and Q6_K."""
    *first, last = sorted(set(kinds))
    return f"{', '.join(first)} and {last}" if first else last


def share(kinds: Mapping[str, str]) -> str:
    """Say of how many of the layers' matrices (types by name) the scales are trained; "" where of all."""
    layers = in_layers(kinds)
    stay = [kind for kind in layers.values() if kind not in HALVES]
    if not stay:
        return ""
    return f"the scales of {len(layers) - len(stay):,} of the layers' {len(layers):,} matrices; those in {listed(stay)} stay"


def padded(size: int) -> int:
    """Return the bytes that a tensor or the header takes in a file: a multiple of 32."""
    return -(-size // ALIGNMENT) * ALIGNMENT
