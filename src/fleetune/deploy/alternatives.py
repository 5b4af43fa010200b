# SPDX-License-Identifier: Apache-2.0
"""Which targets take a model that another target has refused."""

from __future__ import annotations

from itertools import islice
from typing import Final

from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import ggml_blocks, gguf
from fleetune.errors import UsageError
from fleetune.models.families.widths import has_block_widths

PACKED_BITS: Final = (4, 8)  # of compressed-tensors


def instead(model: Checkpoint) -> str:
    """The targets, as the end of a hint: "--to compressed-tensors, --to gguf or --to hf"; all of them hold the codes exactly."""
    grids = [q for name in model.names if (q := model.quantised(name)) is not None]
    packed = not has_block_widths(model.config) and all(q.bits in PACKED_BITS for q in grids)
    found = ["compressed-tensors"] if packed and gridded_linears(model) else []
    if (kind := gguf_kind(model)) is not None:
        found.append(kind)
    named = ", ".join(f"--to {name}" for name in found)
    return f"{named} or --to hf" if named else "--to hf"


def gridded_linears(model: Checkpoint) -> bool:
    """Whether something is quantised, and linear layers alone."""
    names = [name for name in model.names if model.quantised(name) is not None]
    return bool(names) and all(name in model.linears for name in names)


def gguf_kind(model: Checkpoint, *, sample: bool = False) -> str | None:
    """The GGUF target that holds a model exactly: gguf:f32 where no blocks fit its codes; None for no GGUF at all.

    `sample`: as the first quantised matrix has it, without reading the others.
    """
    try:
        gguf.check_config(model.config)
    except UsageError:
        return None
    codes = (q for name in model.names if (q := model.quantised(name)) is not None)
    for q in islice(codes, 1 if sample else None):
        if all(ggml_blocks.misfit(q, kind) is not None for kind in ggml_blocks.PACKERS):
            return "gguf:f32"
    return "gguf"
