# SPDX-License-Identifier: Apache-2.0
"""Take rows from standard input, and store them, so that what was made of them can be repeated and resumed."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fleetune.common.files import PRIVATE, write_atomic
from fleetune.data import readers
from fleetune.errors import DataError, FleetuneError

NAME: Final = "-"
SHOWN: Final = "standard input"
PIPED: Final = "pipe them in, one JSON object a line: cat rows.jsonl | fleetune tune MODEL -"


def stored(folder: Path) -> Path:
    """Read standard input to its end, and return the JSONL file in `folder` that holds it.

    DataError where nothing came, or what is not in UTF-8 as a whole.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("- stands for rows from standard input, and none are piped into it", hint=PIPED)
    raw = sys.stdin.buffer if hasattr(sys.stdin, "buffer") else sys.stdin
    content = raw.read()
    content = content if isinstance(content, bytes) else content.encode()
    if not content.strip():
        raise DataError(f"no row came from {SHOWN}", hint=PIPED)
    if wide := readers.wide_encoding(content):
        raise DataError(
            f"the rows from {SHOWN} are written in {wide}, not UTF-8",
            hint=f"convert them on the way: iconv -f {wide.lower()} -t utf-8 rows.jsonl | fleetune tune MODEL -",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return write(content, folder)


def write(content: bytes, folder: Path) -> Path:
    """Write rows as JSONL into a private file named by their digest, once."""
    file = folder / f"data-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    if not file.is_file() or file.read_bytes() != content:
        write_atomic(file, content, mode=PRIVATE)
    return file


@contextmanager
def borrowed(source: str) -> Iterator[str]:
    """Yield the name of a source that is read and then forgotten: rows from standard input lie in a file meanwhile.

    An error in the block names standard input in place of that file, which is gone by then.
    """
    if source != NAME:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="fleetune-rows-") as folder:
        file = str(stored(Path(folder)))
        try:
            yield file
        except FleetuneError as error:
            error.message = error.message.replace(file, SHOWN)
            error.hint = error.hint and error.hint.replace(file, "rows.jsonl")
            raise
