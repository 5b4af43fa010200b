# SPDX-License-Identifier: Apache-2.0
"""Write metrics.jsonl, one event a line, and find out whether it still is as it was written.

A checkpoint states how the file was then: lines, bytes, CRC-32 (`Tally`).  So a resumed run keeps exactly what stood there
(`cut`), and a line that was lost or changed since is not passed over: what can be read is kept, the file as it was stays
as metrics.jsonl.damaged, and the loss is told.  The last line of a finished run, the event `done`, ends with the checksum
`crc` of all lines and itself.
The file has the names of clients, and is the owner's alone.
"""

from __future__ import annotations

import contextlib
import json
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any, Final

from fleetune.common.files import PRIVATE, read_bytes, regular_private, storage_error, write_atomic
from fleetune.errors import StorageError

FILE: Final = "metrics.jsonl"
CRC: Final = "crc"


@dataclass(frozen=True)
class Tally:
    """The content of metrics.jsonl at some time."""

    lines: int
    size: int  # bytes
    crc: int

    def plus(self, line: bytes) -> Tally:
        """Return the tally with one more line."""
        return Tally(self.lines + 1, self.size + len(line), zlib.crc32(line, self.crc))

    def stated(self) -> list[int]:
        """Return it as a checkpoint states it."""
        return list(astuple(self))


class Metrics:
    """The metrics.jsonl of an open run folder."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self._open: IO[bytes] | None = None
        self._tally: Tally | None = None

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            with contextlib.suppress(OSError):  # what `record` could not write, it has raised for
                self._open.close()
            self._open = None

    @property
    def tally(self) -> Tally:
        """The file as it is now."""
        if self._tally is None:
            data = _bytes(self.file)
            self._tally = Tally(data.count(b"\n"), len(data), zlib.crc32(data))
        return self._tally

    def record(self, event: Mapping[str, Any], *, last: bool = False) -> dict[str, Any]:
        """Append one event and give it back as written; a number that is not finite is null.

        With `last` the line ends with a checksum of the whole file.
        """
        raw = json.dumps({"v": 1, "t": round(time.time(), 3), **event}, default=_plain)
        line: dict[str, Any] = json.loads(raw, parse_constant=lambda _: None)
        sealed = line | {CRC: _seal(line, self.tally.crc)} if last else line
        text = json.dumps(sealed).encode() + b"\n"
        before = self.tally
        try:
            if self._open is None:
                self._open = open(self.file, "ab", opener=regular_private)  # noqa: SIM115
            self._open.write(text)
            self._open.flush()
        except OSError as error:
            self._tally = None
            raise storage_error(error, self.file) from error
        self._tally = before.plus(text)
        return line

    def unfinished(self, round: int) -> tuple[int, bool]:
        """Return how many lines are of later rounds, and whether the last line is torn: what a stopped sitting left."""
        *lines, last = _bytes(self.file).split(b"\n")
        found = [event for line in [*lines, last] if (event := event_of(line)) is not None]
        return sum(_round_of(event) > round for event in found), bool(last) and event_of(last) is None

    def cut(self, round: int, stated: Tally | None) -> str:
        """Keep what stood there after `round`, as its checkpoint states it; return what was lost, "" for nothing.

        Without a statement (a new run, or an earlier version's) all lines of later rounds and of the end go.
        """
        self.close()
        data = _bytes(self.file)
        if stated is not None and zlib.crc32(data[: stated.size]) == stated.crc and len(data) >= stated.size:
            write_atomic(self.file, data[: stated.size], mode=PRIVATE)
            self._tally = stated
            return ""
        kept, torn = _readable(data, round)
        self._tally = None
        loss = ""
        if round >= 0 and (stated is not None or torn or not kept):
            aside = _aside(self.file, data)
            loss = _told(self.file, len(kept), torn, stated) + aside
        write_atomic(self.file, b"".join(json.dumps(e).encode() + b"\n" for e in kept), mode=PRIVATE)
        return loss


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """The events in the metrics.jsonl of a run; a line that cannot be read is left out."""
    for line in _bytes(folder / FILE).split(b"\n"):
        if event := event_of(line):
            yield event


def loss_before(folder: Path, round: int) -> float | None:
    """Return the validation loss that was recorded last before a round; None for none."""
    losses = [e.get("loss") for e in events(folder) if e["event"] == "eval" and _round_of(e) < round]
    return float(losses[-1]) if losses and isinstance(losses[-1], int | float) else None


def is_intact(folder: Path) -> bool:
    """Whether the metrics.jsonl of a finished run is as it was written, by the checksum in its last line.

    A file of an earlier version has no checksum: then it is enough that it ends with the event `done`.
    """
    data = _bytes(folder / FILE)
    start = data.rstrip(b"\n").rfind(b"\n") + 1
    last = event_of(data[start:])
    if last is None or last["event"] != "done":
        return False
    stated = last.pop(CRC, None)
    return stated is None or stated == _seal(last, zlib.crc32(data[:start]))


def _seal(line: Mapping[str, Any], before: int) -> str:
    return f"{zlib.crc32(json.dumps(line).encode(), before):08x}"


def event_of(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line of metrics.jsonl; None for a line that cannot be read."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else None


def _readable(data: bytes, round: int) -> tuple[list[dict[str, Any]], int]:
    """Return the events up to `round`, and how many lines before the last cannot be read; the last may be torn by a kill."""
    lines = data.split(b"\n")
    found = [(number, event_of(line)) for number, line in enumerate(lines) if line.strip()]
    torn = sum(event is None and number < len(lines) - 1 for number, event in found)
    read = [event for _, event in found if event is not None and event["event"] != "done"]
    return [e for e in read if _round_of(e) <= round], torn


def _round_of(event: Mapping[str, Any]) -> float:
    value = event.get("round", 0)
    return value if isinstance(value, int | float) else float("inf")


def _told(file: Path, kept: int, torn: int, stated: Tally | None) -> str:
    if stated is None:
        what = f"{torn} lines" if torn else "all lines"
        return f"{file} was damaged: {what} of it are lost, {kept} are kept"
    if (lost := stated.lines - kept) > 0:
        return f"{file} was damaged: {lost} of its {stated.lines} lines are lost"
    return f"{file} was changed since it was written: its numbers may not be those of the run"


def _aside(file: Path, data: bytes) -> str:
    """Keep a damaged file under another name, and return the words for that."""
    if not data:
        return ""
    names = [f"{file.name}.damaged", *(f"{file.name}.damaged{n}" for n in range(2, 1000))]
    place = next(p for name in names if not (p := file.with_name(name)).exists())
    write_atomic(place, data, mode=PRIVATE)
    return f"; the file as it was is {place.name}"


def _bytes(file: Path) -> bytes:
    """Return the content of a file, b"" where it is not there; StorageError when it cannot be read."""
    try:
        return read_bytes(file)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise StorageError(
            f"cannot read {file}: {error.strerror}", hint="check the disk and the folder"
        ) from error


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a numpy number
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be recorded")
