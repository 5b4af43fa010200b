"""Write metrics.jsonl, one event a line; cut it to its length at a checkpoint when a run is resumed."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from fleetune.common.files import PRIVATE, read_bytes, regular_private, storage_error, write_atomic
from fleetune.errors import StorageError

FILE: Final = "metrics.jsonl"


class Metrics:
    """The metrics.jsonl of an open run folder."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self._open: IO[bytes] | None = None

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            with contextlib.suppress(OSError):  # what `record` could not write, it has raised for
                self._open.close()
            self._open = None

    @property
    def size(self) -> int:
        """Bytes of the file as it is now."""
        return self.file.stat().st_size if self.file.exists() else 0

    def record(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Append one event and give it back as written; a number that is not finite is null."""
        raw = json.dumps({"v": 1, "t": round(time.time(), 3), **event}, default=_plain)
        line: dict[str, Any] = json.loads(raw, parse_constant=lambda _: None)
        try:
            if self._open is None:
                self._open = open(self.file, "ab", opener=regular_private)  # noqa: SIM115
            self._open.write(json.dumps(line).encode() + b"\n")
            self._open.flush()
        except OSError as error:
            raise storage_error(error, self.file) from error
        return line

    def cut(self, round: int, size: int | None) -> str:
        """Keep the `size` bytes that stood there after `round`; return what was lost of them, "" for nothing.

        Where the file is shorter, or no size is stated (a new run), all lines of later rounds and of the end go.
        """
        self.close()
        data = _bytes(self.file)
        if size is not None and len(data) >= size:
            write_atomic(self.file, data[:size], mode=PRIVATE)
            return ""
        found = [event for line in data.split(b"\n") if (event := event_of(line)) is not None]
        kept = [e for e in found if e["event"] != "done" and _round_of(e) <= round]
        write_atomic(self.file, b"".join(json.dumps(e).encode() + b"\n" for e in kept), mode=PRIVATE)
        if size is None:
            return ""
        return f"{self.file} was damaged: {size - len(data):,} of its {size:,} bytes are lost"


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """The events in the metrics.jsonl of a run; a line that cannot be read is left out."""
    for line in _bytes(folder / FILE).split(b"\n"):
        if event := event_of(line):
            yield event


def loss_before(folder: Path, round: int) -> float | None:
    """Return the validation loss that was recorded last before a round; None for none."""
    losses = [e.get("loss") for e in events(folder) if e["event"] == "eval" and _round_of(e) < round]
    return float(losses[-1]) if losses and isinstance(losses[-1], int | float) else None


def event_of(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line of metrics.jsonl; None for a line that cannot be read."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else None


def _round_of(event: Mapping[str, Any]) -> float:
    value = event.get("round", 0)
    return value if isinstance(value, int | float) else float("inf")


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
