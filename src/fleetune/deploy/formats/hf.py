# SPDX-License-Identifier: Apache-2.0
"""Write a plain Hugging Face directory, which transformers and `models.load` read: weights without codes.

In fp32 the weights of a quantised matrix are exact: scale * (code - zero) has at most 11 + 9 bits, and super-blocks' weights are
float32 numbers by definition.  In fp16
and bf16 they are rounded once, and the report says how many tensors kept their values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fleetune.common.display import are
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Report, _hf_writer
from fleetune.errors import UsageError
from fleetune.models.families.widths import has_block_widths
from fleetune.models.loading import DTYPES

TARGETS: Final = {
    "hf": "a plain directory for transformers: fp32 from codes, else as stored",
    "hf:fp32": "the same, in fp32",
    "hf:bf16": "the same, in bf16",
    "hf:fp16": "the same, in fp16",
}
BLOCK_WIDTHS: Final = True
RUNTIME: Final = "transformers"
ORDER: Final = 60


def check(model: Checkpoint, kind: str | None) -> None:
    """Do nothing: every model has a place.  (`write` refuses values beyond fp16's range.)"""


def exact_target(model: Checkpoint) -> str:
    """Return "hf", which holds every model without loss."""
    return "hf"


def write(model: Checkpoint, folder: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write `model` into the empty `folder` in dtype `kind` (fp32, bf16, fp16).

    None is fp32 for a master artefact, else the stored dtype.  UsageError, before anything is written, when values are
    beyond fp16's range; FleetuneError when the file does not hold what was written.
    """
    fallback = torch.float32 if model.compressed else model.dtype
    dtype = fallback if kind is None else DTYPES[kind]
    rounded: set[str] = set()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in model.names:
            weight = model.weight(name)
            cast = weight if name in model.buffers else weight.to(dtype)
            if bool((cast.float() != weight.float()).any()):
                rounded.add(name)
            if bool(cast.isinf().any()) and not bool(weight.isinf().any()):
                raise UsageError(
                    f"{name} has values beyond {kind}'s range", hint="use --to hf:bf16 or hf:fp32"
                )
            yield name, cast

    notes = _hf_writer.write_folder(model, folder, tensors, {"dtype": str(dtype).removeprefix("torch.")})
    to = "hf" if kind is None else f"hf:{kind}"
    notes += [f"{are(len(rounded), 'tensor')} rounded to {kind}"] if rounded else []
    if has_block_widths(model.config):
        notes.append("its blocks differ in width: fleetune loads it, transformers does not")
    return _hf_writer.report(model, folder, to, len(rounded), notes)
