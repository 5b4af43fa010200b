# SPDX-License-Identifier: Apache-2.0
"""Check where and how a method's LoRA starts, and start it from data (`start=eva`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from fleetune import adapters, data
from fleetune.adapters.lora_init import FROM_WEIGHTS as FROM_WEIGHTS
from fleetune.data import Batch, collate, encode_rows
from fleetune.evaluation.losses import pad_id
from fleetune.models.net.model import Model

STARTS: Final = (*adapters.INITS, "eva")
ROWS: Final = 32  # that eva looks at
LENGTH: Final = 128  # tokens of each at most


def check(start: str, *, dropout: float, wire: str, start_data: str = "demo") -> None:
    """Raise ValueError, in plain words, for a start that is not known or does not go with the rest."""
    if start not in STARTS:
        raise ValueError(f"start = {start!r} is none of {', '.join(STARTS)}")
    if start_data != "demo" and start != "eva":
        raise ValueError(f"start_data = {start_data!r} is what start=eva looks at; start is {start}")
    if start in FROM_WEIGHTS and (dropout or wire != "fp32"):
        raise ValueError(
            f"start={start} moves a part of the base's weights into A and B, which dropout would drop and fp16 "
            f"would round; use dropout=0 and wire=fp32 (they are {dropout:g} and {wire})"
        )


def check_targets(targets: str) -> None:
    """Raise ValueError where no layers are named between two commas, or none at all."""
    if not all(target.strip() for target in targets.split(",")):
        raise ValueError(
            f"targets = {targets!r} must be {adapters.ALL_LINEAR}, {adapters.QUERY_VALUE} or the layers' names, as q_proj,k_proj"
        )


def check_files(start: str, source: str) -> None:
    """Raise DataError when the rows that a start looks at cannot be read."""
    if start == "eva":
        data.read(source, limit=1, offline=True)


def see(model: Model, source: str) -> None:
    """Set the A of `model`'s LoRA to what its layers see on the first rows of `source`.

    DataError when they cannot be read, ModelError when they show too little.
    """
    adapters.load_(model, adapters.export(model) | adapters.directions(model, _batches(model, source)))


def _batches(model: Model, source: str) -> Iterator[Batch]:
    examples = data.read(source, limit=ROWS, offline=True)
    if model.labels:  # the answers do not matter
        examples = [replace(example, response=model.labels[0]) for example in examples]
    rows, _ = encode_rows(model, examples, LENGTH)
    for i in range(0, len(rows), 4):
        yield collate(rows[i : i + 4], pad_id(model), model.device)
