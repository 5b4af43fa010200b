# SPDX-License-Identifier: Apache-2.0
"""Divide a device's rows into those that it trains on and those that it only measures on.

The split is a function of the file and the number alone, so the same device holds out the same rows in every session.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Final

from fleetune import data
from fleetune.data import Example
from fleetune.errors import DataError

log = logging.getLogger(__name__)

SEED: Final = 0  # of the order in which rows are drawn


def divided(
    source: str,
    held_out: float = 0,
    eval_data: str = "",
    *,
    columns: str = "",
    note: Callable[[str], None] = log.warning,
    offline: bool = False,
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return (training rows, held-out rows): a share (below 1) or a number of `source`, or all of `eval_data`.

    `columns` says which columns are which, `note` is told what of the rows was left out (`data.read`).  A row that is equal
    to a held-out one is no training row either.  DataError when `eval_data` has rows of `source`, or no training row is left.
    """
    examples = data.read(source, columns=columns, note=note, offline=offline)
    if eval_data:
        held = data.read(eval_data, columns=columns, note=note, offline=offline)
        if shared := len({_content(e) for e in held} & {_content(e) for e in examples}):
            raise DataError(
                f"{shared} rows of {eval_data} are rows of {source} as well: they would be trained on",
                hint="take them out of one of the files; or hold rows of one file out: --held-out",
            )
        return examples, held
    if not held_out:
        return examples, []
    train, aside = data.hold_out(examples, int(held_out) if held_out >= 1 else held_out, SEED)
    held = [examples[i] for i in aside.tolist()]
    known = {_content(e) for e in held}
    training = [e for i in train.tolist() if _content(e := examples[i]) not in known]
    if not training:
        raise DataError(
            f"every row of {source} is equal to a held-out one: none is left to train on",
            hint="hold out fewer rows",
        )
    return training, held


def digest(rows: Sequence[Example]) -> str:
    """Return the SHA-256 of rows' words, however a job has them encoded."""
    return hashlib.sha256(json.dumps([_content(row) for row in rows]).encode()).hexdigest()


def _content(example: Example) -> tuple[object, ...]:
    return (example.messages, example.response, example.texts)
