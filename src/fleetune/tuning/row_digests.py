# SPDX-License-Identifier: Apache-2.0
"""Keep 8 bytes of every row of a run's data, so that a later sitting can name the first row that is another now.

    rows.digests    "FTROWS1\\n", then for each row of the data, in its order, the first 8 bytes of the SHA-256 of its texts,
                    then the first 8 bytes of the SHA-256 of all before it

The file says that rows differ and which; that they are
the same is decided by the whole digests of the checkpoints (`foundations.py`).  It is the owner's alone: who has it can find
out whether a row was in the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from fleetune.common.files import read_bytes
from fleetune.data import Example
from fleetune.runs.rundir import RunDir

FILE: Final = "rows.digests"
HEAD: Final = b"FTROWS1\n"
SIZE: Final = 8  # bytes of a row


def text_of(row: Example) -> bytes:
    """Return what is hashed of a row: its turns, its answer, its texts."""
    return repr((row.messages, row.response, row.texts)).encode("utf-8", "surrogatepass")


def write(run: RunDir, rows: Sequence[Example]) -> None:
    """Write the file into a run's folder."""
    content = HEAD + b"".join(_digest(row) for row in rows)
    run.write(FILE, content + _checksum(content), private=True)


def difference(run: Path, rows: Sequence[Example]) -> str:
    """Say which row is the first that is another than the run was begun on, and how many are; "" where that is not known.

    `rows` are those of the data now.  A file that is not as it was written is named as such.
    """
    try:
        body = _body(read_bytes(run / FILE))
    except FileNotFoundError:
        return ""
    except OSError:
        body = None
    if body is None:
        return f"which rows is not known, since {run / FILE} is damaged or was changed"
    before = np.frombuffer(body, "V8")
    now = np.frombuffer(b"".join(_digest(row) for row in rows), "V8")
    shared = min(len(before), len(now))
    other = np.flatnonzero(before[:shared] != now[:shared])
    counts = "" if len(before) == len(now) else f"; there are {len(now):,} rows, and were {len(before):,}"
    if len(other):
        first = int(other[0])
        more = f" ({len(other):,} of {shared:,} rows differ)" if len(other) > 1 else ""
        return f"{_place(rows, first)} is another row now{more}{counts}"
    if len(now) > len(before):
        return f"{_place(rows, shared)} is a new row{counts}"
    return f"row {shared + 1:,} and those after it are gone{counts}" if len(now) < len(before) else ""


def _body(raw: bytes) -> bytes | None:
    """Return the digests of the rows; None where the file is not as it was written."""
    head, content, checksum = raw[: len(HEAD)], raw[:-SIZE], raw[-SIZE:]
    if head != HEAD or checksum != _checksum(content) or len(content) % SIZE:
        return None
    return content[len(HEAD) :]


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:SIZE]


def _place(rows: Sequence[Example], index: int) -> str:
    """Return a row as a reader finds it: the file and line, or its number."""
    return rows[index].where or f"row {index + 1:,}"


def _digest(row: Example) -> bytes:
    return hashlib.sha256(text_of(row)).digest()[:SIZE]
