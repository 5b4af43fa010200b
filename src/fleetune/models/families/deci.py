# SPDX-License-Identifier: Apache-2.0
"""Read GGUF's architecture deci (a llama whose blocks differ in width) as a transformers configuration.

llama.cpp has it for models found by a search over blocks; `deploy/formats/gguf.py` writes pruned llamas as such.  Each of the
first three is one number for all blocks, or a list of every block's:

    attention.head_count       query heads; 0: the block has no attention
    attention.head_count_kv    key heads; 0 beside query heads: one matrix in the place of attention
    feed_forward_length        channels of the MLP; 0: the block has none
    attention.key_length       the width of a head; not given: embedding_length / query heads of the first block

A llama whose blocks were narrowed has none of those zeros, and in every block as many query heads to a key head.  It
becomes a configuration with widths of its own (`widths.py`), or a plain one where its blocks are alike.  Any other is
refused: no class here has a place for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from transformers import LlamaConfig

from fleetune.models.families.widths import Width, write_widths

ARCHITECTURE: Final = "deci"
HEADS: Final = "attention.head_count"
KEY_HEADS: Final = "attention.head_count_kv"
CHANNELS: Final = "feed_forward_length"

Field = Callable[[str], Any]  # a value by its key without the architecture, or None


def misfit(field: Field) -> str | None:
    """Return why metadata do not describe a llama with narrower blocks; None when they do.

    KeyError for a key that must be there and is not; ValueError when the values make no sense.
    """
    found = block_widths(field)
    first = found[0]
    for i, (heads, key_heads, channels) in enumerate(found):
        if heads == 0:
            return f"block {i} has no attention (head_count 0)"
        if key_heads == 0:
            return f"block {i} has one matrix in the place of attention (head_count {heads}, head_count_kv 0)"
        if channels == 0:
            return f"block {i} has no MLP (feed_forward_length 0)"
        if heads % key_heads:
            return f"block {i} has {heads} query heads, no multiple of its {key_heads} key heads"
        if heads * first.num_key_value_heads != first.num_attention_heads * key_heads:
            return (
                f"block {i} has {heads // key_heads} query heads to a key head, block 0 has {_ratio(first)}"
            )
    width = _head_dim(field, found)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := field(key)) not in (None, width):
            return f"its heads are {width} wide, and {key} is {other}"
    return None


def config_of(field: Field) -> Any:
    """Return the configuration of a llama that `misfit` accepts; errors as there."""
    found = block_widths(field)
    width, hidden = _head_dim(field, found), int(_need(field, "embedding_length"))
    config = LlamaConfig(
        **_whole(found, hidden, width)._asdict(),
        hidden_size=hidden,
        head_dim=width,
        num_hidden_layers=len(found),
        vocab_size=int(_need(field, "vocab_size")),
        max_position_embeddings=int(_need(field, "context_length")),
        rms_norm_eps=float(_need(field, "attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": float(field("rope.freq_base") or 10000.0)},
    )
    write_widths(config, found, width)
    return config


def block_widths(field: Field) -> list[Width]:
    """Return every block's widths, 0 for a part that a block lacks; errors as in `misfit`."""
    count = int(_need(field, "block_count"))
    if count < 1:
        raise ValueError(f"block_count is {count}")
    key_heads = HEADS if field(KEY_HEADS) is None else KEY_HEADS  # llama.cpp's rule
    columns = [_of_blocks(field, key, count) for key in (HEADS, key_heads, CHANNELS)]
    return [Width(*numbers) for numbers in zip(*columns, strict=True)]


def _of_blocks(field: Field, key: str, count: int) -> list[int]:
    value = _need(field, key)
    numbers = value if isinstance(value, list) else [value] * count
    if len(numbers) != count:
        raise ValueError(f"{key} has {len(numbers)} numbers for {count} blocks")
    for i, number in enumerate(numbers):
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{key} of block {i} is {number!r}")
    return numbers


def _need(field: Field, key: str) -> Any:
    if (value := field(key)) is None:
        raise KeyError(key)
    return value


def _head_dim(field: Field, found: Sequence[Width]) -> int:
    width = field("attention.key_length")
    if width is None:
        width = int(_need(field, "embedding_length")) // found[0].num_attention_heads
    if width < 2 or width % 2:  # the rotary embedding turns pairs
        raise ValueError(f"heads are {width} wide")
    return int(width)


def _ratio(width: Width) -> int:
    return width.num_attention_heads // width.num_key_value_heads


def _whole(found: Sequence[Width], hidden: int, head_dim: int) -> Width:
    """Return widths that no block exceeds and whose heads divide the hidden size, as transformers requires.

    The file does not say what the model had before it was pruned; only the configuration depends on it.
    """
    ratio = _ratio(found[0])
    most = max(width.num_key_value_heads for width in found)
    usual = hidden // head_dim // ratio  # heads that fill the hidden size: most likely the model's own
    fits = (n for n in (usual, most, hidden // ratio) if n >= most and hidden % (n * ratio) == 0)
    key_heads = next(fits, most)
    return Width(ratio * key_heads, key_heads, max(width.intermediate_size for width in found))
