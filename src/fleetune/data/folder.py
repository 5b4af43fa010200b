# SPDX-License-Identifier: Apache-2.0
"""Read a folder that has one file of rows per client, as devices leave them: a file's name is its client."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from fleetune.common.display import counted
from fleetune.data.columns import CLIENT
from fleetune.data.hub import NOT_DATA, SPLIT
from fleetune.data.readers import READERS, FileRow, Problem, names_in, rows_of, whole
from fleetune.errors import DataError


def rows(
    source: str, limit: int | None = None, note: Callable[[str], None] = lambda text: None
) -> Iterator[FileRow | Problem]:
    """Yield the rows of all files of a folder, in the order of their names, each with the field `client`.

    With a `limit`, every client gives its first rows, as many as the others where it has them; `note` is told when some
    clients give none.  DataError for a folder without such files, with two of one client, or with the splits of one data set.
    """
    found = files(source)
    shares = (
        _shares([sum(1 for _ in islice(rows_of(*one), limit)) for one in found], limit) if limit else None
    )
    if shares and (without := shares.count(0)):
        note(
            f"the limit of {counted(limit, 'row')} leaves {without:,} of {counted(len(found), 'client')} without any"
        )
    for at, (file, name) in enumerate(found):
        for row in islice(rows_of(file, name), shares[at] if shares else None):
            yield row if isinstance(row, Problem) else FileRow(row.where, {**row.fields, CLIENT: file.stem})


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    """Return how many rows each client gives: row after row in turn, until there are `limit`."""
    shares, left = [0] * len(sizes), limit
    while left and (open_ := [at for at, size in enumerate(sizes) if shares[at] < size]):
        each = max(1, min(left // len(open_), min(sizes[at] - shares[at] for at in open_)))
        for at in open_[: left // each]:
            shares[at] += each
            left -= each
    return shares


def files(source: str) -> list[tuple[Path, str]]:
    """Return the files of a folder's clients, in the order of their names, each with the name to show for it."""
    folder = Path(os.path.expanduser(source))
    return [(file, whole(f"{source.rstrip('/')}/{file.name}")) for file in _files(folder, source)]


def _files(folder: Path, source: str) -> list[Path]:
    files = [
        folder / n for n in names_in(folder) if Path(n).suffix.lower() in READERS and not NOT_DATA.search(n)
    ]
    if not files:
        raise DataError(
            f"{source} is a folder without a file of rows ({', '.join(READERS)})",
            hint="give a file, or a folder with one file per client",
        )
    if (folder / "config.json").is_file():
        raise DataError(f"{source} is the folder of a model, not of rows", hint="fleetune tune MODEL DATA")
    train = next((file for file in files if SPLIT.findall(file.stem.lower())[-1:] == ["train"]), None)
    if train and all(SPLIT.search(file.stem.lower()) for file in files):
        others = [file for file in files if file != train]
        more = f" --eval-data {others[0]}" if others else ""
        raise DataError(
            f"{source} has the splits of one data set, not a file per client: {', '.join(f.name for f in files[:5])}",
            hint=f"give one of them: {train}{more}",
        )
    stems = [file.stem for file in files]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise DataError(
            f"{source} has two files of client {twice[0]!r}", hint="keep one file per client in the folder"
        )
    return files
