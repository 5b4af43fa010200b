# SPDX-License-Identifier: Apache-2.0
"""A plain Hugging Face directory, which transformers and `models.load` read: the weights without codes.

In fp32 the weights of a quantised matrix are exact: scale * (code - zero) has at most 11 + 9 bits.  In fp16
and bf16 they are rounded once, and the report says how many tensors kept their values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fleetune.deploy.checkpoint import Checkpoint, Report
from fleetune.deploy.formats import directory
from fleetune.errors import UsageError
from fleetune.models.families.widths import has_block_widths
from fleetune.models.loading import DTYPES


def write(model: Checkpoint, folder: Path, kind: str | None) -> Report:
    """Write `model` into the existing empty `folder` in dtype `kind` (fp32, bf16, fp16).

    None is fp32 for a master artefact, else the type it is stored in.  UsageError when values are beyond
    fp16's range; FleetuneError when the file does not hold what was written.
    """
    fallback = torch.float32 if model.compressed else model.dtype
    dtype = fallback if kind is None else DTYPES[kind]
    rounded: set[str] = set()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in model.names:
            weight = model.weight(name)
            cast = weight.to(dtype)
            if bool((cast.float() != weight.float()).any()):
                rounded.add(name)
            if bool(cast.isinf().any()) and not bool(weight.isinf().any()):
                raise UsageError(
                    f"{name} has values beyond {kind}'s range", hint="use --to hf:bf16 or hf:fp32"
                )
            yield name, cast

    notes = directory.write_folder(model, folder, tensors, {"dtype": str(dtype).removeprefix("torch.")})
    to = "hf" if kind is None else f"hf:{kind}"
    notes += [f"{len(rounded)} tensors are rounded to {kind}"] if rounded else []
    if has_block_widths(model.config):
        notes.append("its blocks differ in width: fleetune loads it, transformers does not")
    return directory.report(model, folder, to, len(rounded), notes)
