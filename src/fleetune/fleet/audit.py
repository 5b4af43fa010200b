"""Keep a log of every device that joined and every answer that was taken or refused, in which nothing can be changed unseen.

audit.jsonl has one JSON object a line; "chain" is the SHA-256 of the chain of the line before and of the line itself.  So the
last chain, kept elsewhere, proves the whole log.  A line that a kill cut short is dropped when the log is opened again.
"""

import errno
import hashlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from fleetune.common.files import PRIVATE, storage_error
from fleetune.errors import StorageError

FILE: Final = "audit.jsonl"
START: Final = "0" * 64
LONGEST: Final = 1 << 16  # characters of a line


class AuditVerdict(NamedTuple):
    """What a log holds up to its first bad line: entries, the last chain, and that line's number (0: none)."""

    entries: int
    chain: str
    bad: int


class Audit:
    """The log of a run's folder, open for more; StorageError where what is there is not a chain."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        if self.file.exists():
            _cut_torn_line(self.file)
        found = verify(self.file) if self.file.exists() else AuditVerdict(0, START, 0)
        if found.bad:
            raise StorageError(
                f"{self.file}: line {found.bad} does not follow from the one before",
                hint="keep it aside as evidence, under another name: the run then begins a new log",
            )
        self.chain = found.chain

    def write(self, what: str, **fields: Any) -> None:
        """Add an entry; StorageError when it cannot be written."""
        entry = {"t": round(time.time(), 3), "what": what, **fields}
        chain = _next(self.chain, entry)
        line = json.dumps({**entry, "chain": chain}, ensure_ascii=False) + "\n"
        try:
            handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, PRIVATE)
            with os.fdopen(handle, "ab", buffering=0) as file:
                _append(file, line.encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise storage_error(error, self.file) from error
        self.chain = chain


def _append(file: io.FileIO, line: bytes) -> None:
    """Write a whole line, or nothing of it where the disk is full."""
    size = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.truncate(file.fileno(), size)
        raise


def verify(file: Path) -> AuditVerdict:
    """Follow the chain through a log; StorageError when it cannot be read."""
    chain, entries = START, 0
    try:
        with file.open("rb") as lines:
            while line := lines.readline(LONGEST):
                entry = _entry(line)
                if entry is None or (stated := entry.pop("chain", None)) != _next(chain, entry):
                    return AuditVerdict(entries, chain, entries + 1)
                chain, entries = str(stated), entries + 1
    except OSError as error:
        raise storage_error(error, file) from error
    return AuditVerdict(entries, chain, 0)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _next(chain: str, entry: dict[str, Any]) -> str:
    text = json.dumps(entry, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(f"{chain} {text}".encode("utf-8", "surrogatepass")).hexdigest()


def _cut_torn_line(file: Path) -> None:
    """Drop what follows the last line break."""
    with file.open("r+b") as opened:
        data = opened.read()
        opened.truncate(data.rfind(b"\n") + 1)
