# SPDX-License-Identifier: Apache-2.0
"""Read and write the folder of a run; no other module writes into it.

    runs/0007-fedkseed-smollm2-135m/
      run.toml        every value resolved; re-runs it       env.json   versions, device, digests
      metrics.jsonl   append-only, one object a line         log.txt    status
      checkpoints/    round-000003.ckpt: the state, checksummed; the last two are kept
      memories/       what methods keep on simulated clients, if they do (fleets/memories.py)
      ledger.safetensors | adapter/     eval.json  samples.md  report.html

A round counts once its checkpoint is renamed into place.  Whatever a kill leaves beyond that (metrics of an
unfinished round, a temporary file) is cut off at the next start, so a resumed run writes what the
uninterrupted one would have written.  One process at a time holds a run (`locks.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, TypeVar

from fleetune.common.files import storage_error, write_atomic
from fleetune.common.locks import lock
from fleetune.common.version import __version__
from fleetune.errors import MessageError, StorageError, UsageError

T = TypeVar("T")

KEEP = 2  # checkpoints
LOCK = ".lock"


class RunDir:
    """An open run folder.  `close` (or `with`) gives it free again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _locked(path)
        self._metrics: IO[bytes] | None = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder."""
        self._close_metrics()
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder with all in it; nobody else can have it meanwhile.  OSError as the system gives."""
        folder = self.path.resolve()  # `latest` is a link
        try:
            self._close_metrics()
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:  # Windows removes no file that is open
                    path.unlink()
        finally:
            self.close()
        shutil.rmtree(folder)
        _mend_latest(folder.parent)

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # what `record` could not write, it has raised for
                self._metrics.close()
            self._metrics = None

    # Small files --------------------------------------------------------------------------------

    def write(self, name: str, data: bytes | str) -> Path:
        """Write one file of the run, atomically."""
        write_atomic(self.path / name, data)
        return self.path / name

    def status(self, text: str) -> None:
        """running | done | interrupted | failed: <error>, on one line."""
        self.write("status", " ".join(text.split())[:300] + "\n")

    def log(self, text: str) -> None:
        """Add a line with the time to log.txt."""
        try:
            with (self.path / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            raise storage_error(error, self.path / "log.txt") from error

    # Metrics ------------------------------------------------------------------------------------

    def record(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Append one event to metrics.jsonl and give it back as written; a number that is not finite is null."""
        raw = json.dumps({"v": 1, "t": round(time.time(), 3), **event}, default=_plain)
        line: dict[str, Any] = json.loads(raw, parse_constant=lambda _: None)
        try:
            if self._metrics is None:
                self._metrics = (self.path / "metrics.jsonl").open("ab")
            self._metrics.write(json.dumps(line).encode() + b"\n")
            self._metrics.flush()
        except OSError as error:
            raise storage_error(error, self.path / "metrics.jsonl") from error
        return line

    def cut(self, round: int) -> None:
        """Drop what a kill left: metrics after `round` and of the end, a torn line, later checkpoints, temporary files."""
        self._close_metrics()
        kept = [e for e in events(self.path) if e.get("round", 0) <= round and e["event"] != "done"]
        self.write("metrics.jsonl", "".join(json.dumps(e) + "\n" for e in kept))
        later = [p for r, p in checkpoints(self.path) if r > round]
        for path in (*later, *self.path.glob(".*.tmp"), *self.path.glob("checkpoints/.*.tmp")):
            path.unlink(missing_ok=True)

    # Checkpoints --------------------------------------------------------------------------------

    def checkpoint(self, round: int, data: bytes) -> None:
        """Make `round` count: write its encoded state and flush it to the disk; keep the last two."""
        folder = self.path / "checkpoints"
        write_atomic(folder / f"round-{round:06d}.ckpt", data)
        for _, old in checkpoints(self.path)[:-KEEP]:
            old.unlink(missing_ok=True)

    def withdraw(self, round: int) -> None:
        """Remove the checkpoint of a round that has ruined the model."""
        (self.path / "checkpoints" / f"round-{round:06d}.ckpt").unlink(missing_ok=True)

    def restore(self, decode: Callable[[bytes], T]) -> tuple[int, T] | None:
        """Read the newest checkpoint that `decode` takes: (round, what it gives); None if there are no checkpoints.

        `decode` raises MessageError for bytes that are damaged.  StorageError if all are.
        """
        found = checkpoints(self.path)
        for round_, path in reversed(found):
            try:
                return round_, decode(path.read_bytes())
            except MessageError as error:
                self.log(f"checkpoint {path.name} is not usable: {error}")
                continue
        if found:
            folder = self.path / "checkpoints"
            raise StorageError(
                f"no checkpoint in {folder} is usable (the reasons are in log.txt)",
                hint=f"put a good copy back, or start this run anew: rm {folder}/*.ckpt",
            )
        return None


def create(out: Path, method: str, model: str) -> RunDir:
    """A new folder `NNNN-method-model` under `out`, numbered after the highest there; never an old one.

    StorageError when `out` cannot be written.
    """
    run = at(numbered(out, f"{method}-{slug(Path(model).name) or 'model'}"))
    _point_latest(out, run.path)
    return run


def at(path: Path) -> RunDir:
    """The run folder at `path`, made if it is not there; StorageError when it cannot be."""
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, path) from error
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
        raise storage_error(error, out) from error
    raise StorageError(f"cannot find a free number for a run in {out}")


def slug(text: str) -> str:
    """A text as part of a folder's name: lower case, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def check_folder(folder: Path) -> None:
    """StorageError when a file stands where `folder` is to be."""
    if folder.exists() and not folder.is_dir():
        raise StorageError(
            f"cannot write into {folder}: it is a file, not a folder", hint="choose a folder with --out"
        )


def check_writable(folder: Path) -> None:
    """StorageError, before any slow work, when nothing can be written into `folder` (made if it is not there)."""
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise storage_error(error, folder) from error


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
    raise UsageError(f"no run '{run}' in {out}", hint="runs there are: fleetune runs")


def check_name(name: str, out: Path) -> None:
    """UsageError for `latest` or a number where there is no such run, before it is taken for a model's name."""
    if name == "latest" or name.isdigit():
        find(name, out)


def listing(out: Path) -> list[Path]:
    """Run folders under `out`, in order of number."""
    if not out.is_dir():
        return []
    runs = [p for p in out.iterdir() if number(p) and (p / "run.toml").is_file()]
    return sorted(runs, key=lambda p: (number(p), p.name))


def number(path: Path) -> int:
    """The number that a run folder's name begins with, 0 for none."""
    match = re.match(r"(\d{4,})-", path.name)
    return int(match[1]) if match else 0


def status_of(path: Path) -> str:
    """The status of a run folder: running, done, interrupted, or failed and why; "" when it has none."""
    file = path / "status"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def checkpoints(path: Path) -> list[tuple[int, Path]]:
    """(round, file) of the checkpoints in a run folder, oldest first."""
    found = [(re.fullmatch(r"round-(\d+)\.ckpt", p.name), p) for p in (path / "checkpoints").glob("*.ckpt")]
    return sorted((int(m[1]), p) for m, p in found if m)


def events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a run's metrics.jsonl; a torn last line is left out."""
    file = path / "metrics.jsonl"
    if not file.is_file():
        return
    for line in file.read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def environment(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and machine, for env.json."""
    packages = ("torch", "transformers", "peft", "numba", "numpy", "safetensors")
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    machine = {"system": platform.system(), "machine": platform.machine(), "processors": os.cpu_count()}
    return {
        "fleetune": __version__,
        "python": platform.python_version(),
        **versions,
        **machine,
        **extra,
    }


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
    file = None
    try:
        while True:
            file = (path / LOCK).open("ab")
            if not lock(file.fileno()):
                file.close()
                break
            if _in_place(file, path / LOCK):
                return file
            file.close()  # who had it has removed it meanwhile
    except OSError as error:
        if file is not None:
            file.close()
        raise storage_error(error, path) from error
    raise UsageError(f"{path} is in use by another process", hint="wait for it, or stop it, then try again")


def _in_place(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is what `path` names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a numpy number
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be recorded")
