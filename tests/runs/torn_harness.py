"""Make folders of runs, whole and stopped."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shlex
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from fleetune import models
from fleetune.cli.main import main

SECONDS = 10  # that a command may take on a tiny folder
SMALL = shlex.split(
    "--clients 3 --rounds 3 --limit 24 --held-out 6 --eval-rows 4 --samples 2 --answer-tokens 4 "
    "--max-length 48 --device cpu --threads 1"
)
TUNE = {
    "fedkseed": ["--method", "fedkseed", "--set", "K=16", "--set", "tau=2", "--set", "lr=1e-3"],
    "scaffold": ["--method", "fedit", "--set", "r=2", "--set", "steps=2", "--set", "scaffold=true"],
}
CHANGES = {"t", "seconds", "wall", "rss", "peak_rss", "run", "path", "report", "result", "folder", "planned"}


@dataclass
class Folder:
    """A folder of a job, and what its uninterrupted twin ended with."""

    kind: str
    state: str  # stopped | done
    path: Path
    digest: str
    metrics: list[Any] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """Every file of it, by name."""
        found = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
        return sorted(f for f in found if not f.endswith(".lock"))


@dataclass(frozen=True)
class Said:
    """What a command returned and printed."""

    code: int
    events: list[dict[str, Any]]
    text: str  # on stderr and stdout


class Endless(BaseException):
    """A command took longer than SECONDS; no client's failure, so that nobody catches it."""


def call(*words: str, seconds: int = SECONDS * 3) -> Said:
    """Run a command in this process; any exception that `main` does not turn into an exit code is raised."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(seconds)  # of wall time: the processors may be shared
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _logged(err):
            code = main([*words, "--json", "--offline"])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    lines = [json.loads(line) for line in out.getvalue().splitlines() if line.startswith("{")]
    return Said(code, lines, err.getvalue() + out.getvalue())


def _too_long(*_: object) -> None:
    raise Endless


@contextlib.contextmanager
def _logged(stream: io.StringIO) -> Iterator[None]:
    """The log of the package into `stream`, as the console shows it."""
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.WARNING)
    logging.getLogger("fleetune").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("fleetune").removeHandler(handler)


@contextlib.contextmanager
def stopped_after_two_rounds(folder: Path) -> Iterator[None]:
    """Ctrl-C is pressed when a run in `folder` has done two rounds."""

    class Pressed:
        def __init__(self, ui: object) -> None:
            pass

        def __enter__(self) -> Pressed:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        @property
        def requested(self) -> bool:
            return any(folder.glob("*/checkpoints/round-000002.ckpt"))

    with contextlib.ExitStack() as stack:
        for place in ("cli.commands.tune", "cli.listener"):
            stack.enter_context(mock.patch(f"fleetune.{place}.InterruptHandler", Pressed))
        yield


def lay_out(place: Path) -> None:
    """Put the model, the rows and the texts that all jobs use into the folder `place`."""
    models.tiny_llama(layers=3).save(place / "model")
    counts = {i: " ".join(map(str, range(1 + i % 8))) for i in range(1, 31)}
    rows = [{"instruction": f"count to {i}", "response": text} for i, text in counts.items()]
    (place / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def begin(kind: str, out: str) -> Said:
    """Begin a job of this kind, in the folder laid out; its folder is the only one under `out`."""
    return call("tune", "model", "data.jsonl", *SMALL, *TUNE[kind], "--out", out, seconds=600)


def resume(path: Path) -> Said:
    """Resume a job."""
    return call("tune", "--resume", str(path))


def whole_and_stopped(kind: str) -> list[Folder]:
    """A finished job's folder and a stopped one's; the working folder is laid out."""
    assert (said := begin(kind, f"{kind}-done")).code == 0, said.text
    (done,) = Path(f"{kind}-done").glob("0001-*")
    ended = Folder(kind, "done", done, digest_of(done), metrics_of(done))
    with stopped_after_two_rounds(Path(f"{kind}-stopped")):
        assert (said := begin(kind, f"{kind}-stopped")).code == 130, said.text
    (part,) = Path(f"{kind}-stopped").glob("0001-*")
    return [ended, Folder(kind, "stopped", part, ended.digest, ended.metrics)]


def digest_of(path: Path) -> str:
    """The digest that a finished job states of its result."""
    done = [e for e in _lines(path) if e["event"] == "done"]
    return str(done[-1]["digest"]) if done else ""


def metrics_of(path: Path) -> list[Any]:
    """The events of a run without times and places."""
    found = [e for p in sorted(path.rglob("metrics.jsonl")) for e in _lines(p.parent)]
    return [{k: v for k, v in e.items() if k not in CHANGES} for e in found]


def _lines(path: Path) -> list[dict[str, Any]]:
    text = (path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    return [e for line in text.splitlines() if (e := _event(line))]


def _event(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and "event" in found else {}
