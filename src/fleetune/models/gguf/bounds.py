# SPDX-License-Identifier: Apache-2.0
"""Compare what a configuration claims with the tensors that are there, and refuse weights that no step can be computed with.

A configuration is a few kilobytes, yet makes transformers build as many blocks as it says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fleetune.errors import ModelError
from fleetune.models.families.foreign import AGAIN, foreign_file
from fleetune.models.mapped.lazy import LazyWeight

SLACK: Final = 1 << 22  # parameters that a net may have beyond twice those in its files: a new head
TABLES: Final = 1 << 28  # elements that a net may compute for itself: masks, sines
COMPUTED: Final = (  # buffers that older files hold
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "position_ids",
    "token_type_ids",
    ".attn.bias",
    ".attention.bias",
    ".masked_bias",
)
LARGEST_WEIGHT: Final = 1e9  # trained weights are far below; products of such stay finite in fp32


def check_blocks(blocks: object, tensors: int, file: Path) -> None:
    """Raise ModelError when a configuration claims more blocks than there are tensors."""
    if isinstance(blocks, int) and blocks > tensors:
        raise ModelError(f"{file} says {blocks:,} blocks, but there are {tensors:,} tensors", hint=AGAIN)


def check_size(net: nn.Module, elements: int, path: Path) -> None:
    """Raise ModelError when a net (on the meta device) is much larger than what the files hold, or its tables are huge."""
    wanted = sum(p.numel() for p in net.parameters())
    tables = sum(b.numel() for b in net.buffers())
    if wanted > 2 * elements + SLACK or tables > elements + TABLES:
        raise ModelError(
            f"config.json in {path} describes {wanted:,} parameters (and tables of {tables:,}), "
            f"the files hold {elements:,}",
            hint="config.json is of another model than the weights: " + AGAIN,
        )


def finite(
    tensors: Iterable[tuple[str, Tensor]], path: Path, hint: str = AGAIN
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) as they come; ModelError for weights that are NaN, infinite or beyond `LARGEST_WEIGHT`.

    One pass over each tensor, which takes no memory.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            for _, part in tensor.pieces() if isinstance(tensor, LazyWeight) else [(0, tensor.detach())]:
                low, high = (float(end) for end in torch.aminmax(part))
                check_range(low, high, name, path, hint)
        yield name, tensor


def check_range(low: float, high: float, name: str, path: Path, hint: str = AGAIN) -> None:
    """Raise ModelError unless a tensor's least and largest values are finite and small enough to compute with."""
    if not -LARGEST_WEIGHT <= low <= high <= LARGEST_WEIGHT:  # also for NaN
        what = (
            "are no numbers in places"
            if math.isnan(low) or math.isnan(high)
            else f"go from {low:.3g} to {high:.3g}"
        )
        raise ModelError(
            f"{path}: the weights of {name} {what}; no step can be computed with such", hint=hint
        )


def check_step(net: Any, path: Path) -> None:
    """Raise ModelError unless a model of transformers can be run, and its first outputs are finite."""
    ids = torch.zeros((1, 2), dtype=torch.int64, device=net.device)
    with foreign_file(path, "holds a model that cannot be run"), torch.no_grad():
        finite_outputs = bool(torch.isfinite(net(input_ids=ids).logits).all())
    if not finite_outputs:
        raise ModelError(
            f"the model in {path} gives outputs that are not finite", hint="try --dtype fp32, or " + AGAIN
        )


def check_tensors(
    path: Path, kind: type, found: Mapping[str, Iterable[object]], missing: Sequence[str], *, head: bool
) -> None:
    """Raise ModelError unless the files have just the tensors that the model needs; `found` is transformers' report."""
    wrong = sorted([*missing, *map(str, found["mismatched_keys"])])
    if wrong:
        raise ModelError(
            f"{path} lacks {len(wrong)} tensors of a {kind.__name__} (or they have other shapes): "
            + ", ".join(wrong[:3]),
            hint="the directory holds another or an incomplete model: fetch it again",
        )
    if left := _left_over(map(str, found["unexpected_keys"]), head=head):
        raise ModelError(
            f"{path} has {len(left)} tensors that a {kind.__name__} of its config.json has no place for: "
            + ", ".join(left[:3]),
            hint="config.json is of another model than the weights (does it say fewer blocks?): fetch the model again",
        )


def _left_over(names: Iterable[str], *, head: bool) -> list[str]:
    """Return the tensors of a file that should have a place in the net but have none, sorted.

    Buffers that are computed anew (`COMPUTED`) do not count.  With a head (an encoder) only the blocks' tensors
    count: a checkpoint has other ones as well.
    """
    wanted = re.compile(r"\.\d+\." if head else "")
    return sorted(n for n in names if wanted.search(n) and not n.endswith(COMPUTED))
