"""Read and write the folder of a run; no other module writes into it.

    runs/0007-fedkseed-smollm2-135m/
      run.toml        every value resolved; re-runs it       env.json   versions, device, digests
      metrics.jsonl   append-only, one object a line         log.txt (listener.py)   status
      checkpoints/    round-000003.ckpt: the state, checksummed, and what it stands on; the last two are kept
                      replies-000003: what the round counted (`keep_replies`)
      releases        how often a run with privacy has released a round (`tuning/rounds/checkpoint.py`)
      memories/       what methods keep on simulated clients, if they do (`local_work.Memories`)
      ledger.safetensors | adapter/     eval.json  samples.md  report.html
      SHA256SUMS      of a finished run: its record and its result (common/sums.py)
      fleet.json  fleet.stop  devices.json  audit.jsonl          of a real fleet (fleet/)

A round counts once its checkpoint is renamed into place; the next start cuts off what a kill left beyond it.  What holds rows,
names of clients or anything learned from them is the owner's alone.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from fleetune.common import __version__, files
from fleetune.common.display import quoted
from fleetune.common.files import PRIVATE, read_bytes, regular_private, storage_error, write_atomic
from fleetune.errors import MessageError, StorageError, UsageError
from fleetune.runs.listener import LogFile


def slug(text: str) -> str:
    """A text as part of a folder's name: lower case, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def of_model(name: str) -> str:
    """The name of a model (a hub id, a file, a folder) as part of a folder's or a file's name, a GGUF file's without its end."""
    return slug(Path(name).name.removesuffix(".gguf")) or "model"


def number(path: Path) -> int:
    """The number that a run folder's name begins with, 0 for none."""
    match = re.match(r"(\d{4,})-", path.name)
    return int(match[1]) if match else 0


def none_such(name: str, out: Path, there: Sequence[str]) -> UsageError:
    """The error for a run that is not there, with those whose names are like its."""
    elsewhere = "" if str(out) == "runs" else f" --out {quoted(out)}"
    hint = f"runs there are: fleetune runs{elsewhere}"
    if near := difflib.get_close_matches(name, there, 3):
        hint = f"did you mean {' or '.join(str(out / other) for other in near)}? {hint}"
    elif there:
        hint = f"the newest is {out / there[-1]}; {hint}"
    return UsageError(f"no run '{name}' in {out}", hint=hint)


METRICS: Final = "metrics.jsonl"
STARTED_IN: Final = "started_in"  # in env.json and compress.json


def note_start(folder: Path, earlier: Mapping[str, Any]) -> dict[str, str]:
    """Return what the record of `folder` says of its start folder: as it says `earlier`, else this process's folder."""
    if isinstance(stated := earlier.get(STARTED_IN), str):
        return {STARTED_IN: stated}
    try:
        return {STARTED_IN: Path(os.path.relpath(os.getcwd(), folder.resolve())).as_posix()}
    except (OSError, ValueError):  # the folder is gone, or on another drive of Windows
        return {}


def start_of(folder: Path, record: Mapping[str, Any]) -> Path | None:
    """Return the folder in which a run was started; None where that is this one, is not known, or is gone."""
    stated = record.get(STARTED_IN)
    if not isinstance(stated, str):
        return None
    start = Path(os.path.normpath(folder.resolve() / stated))
    try:
        return start if start.is_dir() and not start.samefile(os.getcwd()) else None
    except OSError:
        return None


def find_from(name: str, start: Path | None) -> str:
    """Return a file's name as it is found from here: that in the start folder if there is one, else `name` itself."""
    if not name or start is None or Path(name).expanduser().is_absolute():
        return name
    try:
        return shown_path(start / name) if (start / name).exists() else name
    except (OSError, ValueError):  # too long, or a character that no path has
        return name


def shown_path(path: Path) -> str:
    """Return a path as seen from this process's folder."""
    try:
        return os.path.relpath(path)
    except ValueError:  # another drive of Windows
        return str(path)


ENVIRONMENT: Final = "env.json"


PACKAGES: Final = [
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "numba",
    "numpy",
    "safetensors",
    "jinja2",
    "msgpack",
    "pyarrow",
]


def made_on(path: Path) -> dict[str, str]:
    """The digests of the "base" and the "tokenizer" that a run was made on, by env.json; StorageError when it is damaged."""
    hint = f"fleetune tune --resume {quoted(path)}   writes it anew"
    stated = files.read_json(path / ENVIRONMENT, hint)
    digests = {what: stated.get(f"{what}_digest") for what in ("base", "tokenizer")}
    if missing := [what for what, digest in digests.items() if not isinstance(digest, str)]:
        raise StorageError(f"{path / ENVIRONMENT} is damaged (it states no {missing[0]}_digest)", hint=hint)
    return {what: str(digest) for what, digest in digests.items()}


def environment(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and machine, for env.json."""
    versions = dict.fromkeys(PACKAGES, "not installed")
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    machine = {"system": platform.system(), "machine": platform.machine(), "processors": os.cpu_count()}
    return {"fleetune": __version__, "python": platform.python_version(), **versions, **machine, **extra}


T = TypeVar("T")

_logger = logging.getLogger(__name__)

KEEP = 2  # checkpoints
LOCK = ".lock"
LOOKS = 4  # tries to get the lock
LATEST = "latest"
FLEET = "fleet.json"  # the last word of a real fleet's server
STATUSES = ("running", "done", "interrupted", "failed")


class RunDir:
    """An open run folder.  `close` (or `with`) gives it free again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _locked(path)
        self.metrics = Metrics(path)
        self.log_file = LogFile(path)
        self.keep = KEEP  # checkpoints

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder."""
        self.metrics.close()
        self.log_file.close()
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder with all in it; nobody else can have it meanwhile.

        UsageError, with nothing removed, for a link other than `latest`.  OSError as the system gives.
        """
        if is_foreign_link(self.path):
            self.close()
            raise UsageError(f"{self.path} is a link; the folder that it leads to is left alone")
        folder = self.path.resolve()
        try:
            self.metrics.close()
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:  # Windows removes no file that is open
                    path.unlink()
        finally:
            self.close()
        shutil.rmtree(folder)
        _mend_latest(folder.parent)

    # Small files --------------------------------------------------------------------------------

    def write(self, name: str, data: bytes | str, *, private: bool = False) -> Path:
        """Write one file of the run, atomically; `private` for the owner alone."""
        files.write_atomic(self.path / name, data, mode=files.PRIVATE if private else None)
        return self.path / name

    def status(self, text: str) -> None:
        """running | done | interrupted | failed: <error>, on one line."""
        self.write("status", " ".join(text.split())[:300] + "\n")

    def log(self, text: str) -> None:
        """Add a line with the time to log.txt."""
        self.log_file.write(text)

    # Metrics ------------------------------------------------------------------------------------

    def record(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Append one event to metrics.jsonl, as `Metrics.record`."""
        return self.metrics.record(event)

    def cut(self, round: int, size: int | None = None) -> list[str]:
        """Drop what a kill left: metrics after `round` and of the end, later checkpoints and replies, temporary files.

        `size` is the length of metrics.jsonl that the checkpoint of the round states.  Lost lines are logged and returned.
        """
        lost = [text for text in [self.metrics.cut(round, size)] if text]
        left = [
            p for p in (*self.path.glob(".*.tmp"), *self.path.glob("checkpoints/.*.tmp")) if not p.is_dir()
        ]
        left += [p for p in self.path.glob("checkpoints/replies-*") if int(p.name[len("replies-") :]) > round]
        for path in (*left, *(p for r, p in checkpoints(self.path) if r > round)):
            path.unlink(missing_ok=True)
        files.sweep(self.path)
        for text in lost:
            self.log(text)
        return lost

    # Checkpoints --------------------------------------------------------------------------------

    def checkpoint(self, round: int, data: bytes) -> None:
        """Make `round` count: write its encoded state and flush it to the disk; keep the last ones (`keep`)."""
        files.write_atomic(self._checkpoint(round), data, mode=files.PRIVATE)
        for _, old in checkpoints(self.path)[: -self.keep]:
            old.unlink(missing_ok=True)

    def withdraw(self, round: int) -> None:
        """Remove the checkpoint of a round that has ruined the model."""
        self._checkpoint(round).unlink(missing_ok=True)

    def _checkpoint(self, round: int) -> Path:
        return self.path / "checkpoints" / f"round-{round:06d}.ckpt"

    def restore(
        self, decode: Callable[[bytes], T], note: Callable[[str], None] = _logger.info
    ) -> tuple[int, T] | None:
        """Read the newest checkpoint that `decode` takes: (round, what it gives); None if there are no checkpoints.

        `decode` raises MessageError for bytes that are damaged, or that stand on something that is; `note` is given the
        reason.  StorageError if no checkpoint is usable.
        """
        found = checkpoints(self.path)
        reason = ""
        for round_, path in reversed(found):
            try:
                return round_, decode(files.read_bytes(path))
            except (MessageError, OSError) as error:
                reason = f"checkpoint {path.name} is not usable: {error}"
                self.log(reason)
                note(reason)
        if found:
            folder = self.path / "checkpoints"
            raise StorageError(
                f"no checkpoint in {folder} is usable: {reason}",
                hint=f"put a good copy back, or start this run anew: rm {folder}/*.ckpt",
            )
        return None


def create(out: Path, method: str, model: str) -> RunDir:
    """A new folder `NNNN-method-model` under `out`, numbered after the highest there; never an old one.

    StorageError when `out` cannot be written.
    """
    run = at(numbered(out, f"{method}-{of_model(model)}"))
    _point_latest(out, run.path)
    return run


def at(path: Path) -> RunDir:
    """The run folder at `path`, made if it is not there; StorageError when it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "checkpoints").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise files.storage_error(error, path) from error
    return RunDir(path)


def numbered(out: Path, name: str) -> Path:
    """A new, empty folder `NNNN-name` under `out`; StorageError when `out` cannot be written."""
    check_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for _ in range(1000):
            new = 1 + max((number(p) for p in out.iterdir()), default=0)
            path = out / f"{new:04d}-{name}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            if sum(number(p) == new for p in out.iterdir()) > 1:  # another process had the same idea
                path.rmdir()
                continue
            return path
    except OSError as error:
        raise files.storage_error(error, out) from error
    raise StorageError(f"cannot find a free number for a run in {out}")


def check_folder(folder: Path) -> None:
    """StorageError when a file stands where `folder` is to be."""
    if folder.exists() and not folder.is_dir():
        raise StorageError(
            f"cannot write into {folder}: it is a file, not a folder", hint="choose a folder with --out"
        )


def check_writable(folder: Path, *, make: bool = True) -> None:
    """StorageError, before any slow work, when nothing can be written into `folder`.

    It is made if it is not there; without `make`, the folder above it that is there is tried.
    """
    check_folder(folder)
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise files.storage_error(error, folder) from error


def _point_latest(out: Path, path: Path) -> None:
    link = out / f".latest-{os.getpid()}"
    try:
        link.symlink_to(path.name)
        os.replace(link, out / "latest")
    except OSError:  # a file system without links: `latest` is then found by number
        link.unlink(missing_ok=True)


def _mend_latest(out: Path) -> None:
    """Let `latest` be the newest run that is left, where its own has gone; with none left it goes as well."""
    link = out / "latest"
    if not link.is_symlink() or link.exists():
        return
    if runs := listing(out):
        _point_latest(out, runs[-1])
    else:
        link.unlink(missing_ok=True)


def find(run: str, out: Path) -> Path:
    """The run that a user means: a path, a name or number under `out`, or `latest`.  UsageError if none."""
    if run != "latest" and (Path(run) / "run.toml").is_file():
        return Path(run)
    if run != "latest" and Path(run).is_dir():
        raise UsageError(
            f"{run} is not a run folder (it has no run.toml)", hint="runs there are: fleetune runs"
        )
    runs = listing(out)
    if run == "latest" and runs:
        return runs[-1]
    matches = [p for p in runs if p.name == run or p.name.split("-")[0].lstrip("0") == run.lstrip("0")]
    if len(matches) == 1:
        return matches[0]
    raise none_such(run, out, [p.name for p in runs])


def check_name(name: str, out: Path) -> None:
    """UsageError for what can only be a run and is none, before it is taken for a model's name.

    That is `latest`, a number, a run's name, and a path into a folder of runs that leads nowhere.
    """
    path = Path(name)
    if name == "latest" or name.isdigit() or (re.fullmatch(r"\d{4,}-[\w.-]+", name) and not path.exists()):
        find(name, out)
    elif "/" in name and not path.exists() and (runs := listing(path.parent)):
        raise none_such(path.name, path.parent, [p.name for p in runs])
    elif " " in name and not path.exists():  # no hub id has a blank
        raise UsageError(f"there is no file or folder {name!r}", hint="check the path")


def listing(out: Path) -> list[Path]:
    """Run folders under `out`, in order of number."""
    if not out.is_dir():
        return []
    runs = [p for p in out.iterdir() if number(p) and (p / "run.toml").is_file()]
    return sorted(runs, key=lambda p: (number(p), p.name))


def is_foreign_link(path: Path) -> bool:
    """Whether a folder's name is a link that is not ours: all but `latest`, which leads to a run beside it."""
    return path.is_symlink() and (path.name != LATEST or path.resolve().parent != path.parent.resolve())


def status_of(path: Path) -> str:
    """The status of a run folder: running, done, interrupted, or failed and why; "" when it has none or a damaged one.

    One that says "running" while no process has the folder was killed: it is interrupted.
    """
    try:
        text = files.read_text(path / "status").strip()
    except (OSError, ValueError):
        return ""
    if text.partition(":")[0] not in STATUSES or "\n" in text:
        return ""
    return "interrupted" if text == "running" and not held(path) else text


def held(path: Path) -> bool:
    """Whether a process has the folder now; True where that cannot be found out."""
    try:
        with open(path / LOCK, "rb", opener=files.regular) as file:
            return not files.lock(file.fileno())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def checkpoints(path: Path) -> list[tuple[int, Path]]:
    """(round, file) of the checkpoints in a run folder, oldest first."""
    found = [(re.fullmatch(r"round-(\d+)\.ckpt", p.name), p) for p in (path / "checkpoints").glob("*.ckpt")]
    return sorted((int(m[1]), p) for m, p in found if m)


def replies_file(path: Path, round: int) -> Path:
    """Return the file of a run folder that has what `round` counted."""
    return path / "checkpoints" / f"replies-{round:06d}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder alone while the block runs; UsageError when another process has it.

    The lock's file goes at the end; one that a kill leaves behind is nobody's.
    """
    file = _locked(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            (folder / LOCK).unlink()
        file.close()


def _locked(path: Path) -> IO[bytes]:
    file, tries = None, 0
    try:
        while True:
            file = open(path / LOCK, "ab", opener=files.regular)  # noqa: SIM115
            if not files.lock(file.fileno()):
                file.close()
                if (tries := tries + 1) == LOOKS:
                    break
                time.sleep(0.05)  # somebody may only have looked (`held`)
                continue
            if files.still_names(path / LOCK, file.fileno()):
                return file
            file.close()  # who had it has removed it meanwhile
    except OSError as error:
        if file is not None:
            file.close()
        raise files.storage_error(error, path) from error
    raise UsageError(f"{path} is in use by another process", hint="wait for it, or stop it, then try again")


class Metrics:
    """The metrics.jsonl of an open run folder, one event a line."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / METRICS
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
        raw = json.dumps({"v": 1, "t": round(time.time(), 3), **event}, default=_plain_number)
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
        data = _content(self.file)
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
    for line in _content(folder / METRICS).split(b"\n"):
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


def _content(file: Path) -> bytes:
    """Return the content of a file, b"" where it is not there; StorageError when it cannot be read."""
    try:
        return read_bytes(file)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise StorageError(
            f"cannot read {file}: {error.strerror}", hint="check the disk and the folder"
        ) from error


def _plain_number(value: Any) -> Any:
    if hasattr(value, "item"):  # a numpy number
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be recorded")
