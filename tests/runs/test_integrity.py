"""What a run stands on is named in its checkpoints, and its files are private, swept, and said as they are."""

import contextlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from command_line import pressed_when
from fleetune import models
from fleetune.cli.console import InterruptHandler
from fleetune.cli.main import main
from fleetune.common.files import HIDDEN, staged, sweep
from fleetune.runs import rundir
from fleetune.runs.rundir import Metrics, RunDir
from fleetune.tuning.rounds import checkpoint

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

    def too_long(*_: object) -> None:
        raise Endless

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)  # of wall time: the processors may be shared
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _logged(err):
            code = main([*words, "--json", "--offline"])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    lines = [json.loads(line) for line in out.getvalue().splitlines() if line.startswith("{")]
    return Said(code, lines, err.getvalue() + out.getvalue())


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
    pressed = pressed_when(lambda: any(folder.glob("*/checkpoints/round-000002.ckpt")))
    with contextlib.ExitStack() as stack:
        for place in ("cli.commands.tune", "cli.console"):
            stack.enter_context(mock.patch(f"fleetune.{place}.InterruptHandler", pressed))
        yield


def lay_out(place: Path) -> None:
    models.tiny_llama(layers=3).save(place / "model")
    counts = {i: " ".join(map(str, range(1 + i % 8))) for i in range(1, 31)}
    rows = [{"instruction": f"count to {i}", "response": text} for i, text in counts.items()]
    (place / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def begin(kind: str, out: str) -> Said:
    """Begin a job of this kind, in the folder laid out; its folder is the only one under `out`."""
    return call("tune", "model", "data.jsonl", *SMALL, *TUNE[kind], "--out", out, seconds=600)


def resume(path: Path) -> Said:
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
    done = [e for e in _lines(path) if e["event"] == "done"]
    return str(done[-1]["digest"]) if done else ""


def metrics_of(path: Path) -> list[Any]:
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


PRIVATE = 0o600


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Folder]]:
    """A finished and a stopped run of two kinds, in a folder with model and data, which is the working folder."""
    place, before = tmp_path_factory.mktemp("made"), Path.cwd()
    os.chdir(place)
    lay_out(place)
    mask = os.umask(0)  # as open as can be: what is private is so by itself
    try:
        folders = [f for kind in ("scaffold", "fedkseed") for f in whole_and_stopped(kind)]
        yield {(f.kind, f.state): f for f in folders}
    finally:
        os.umask(mask)
        os.chdir(before)


@pytest.fixture
def copy(made: dict[tuple[str, str], Folder], tmp_path: Path) -> Iterator[object]:
    """A function that copies a folder, of which the runs' own folder is the parent."""

    def of(kind: str, state: str) -> tuple[Folder, Path]:
        folder = made[kind, state]
        path = tmp_path / "runs" / folder.path.name
        shutil.copytree(folder.path, path)
        return folder, path

    return of


def refused(said: Said, *words: str) -> None:
    assert said.code in (1, 2), said.text
    for word in words:
        assert word in said.text, said.text


def only_newest(path: Path) -> list[Path]:
    """The memories that the newest checkpoint stands on; the checkpoints before it go."""
    *earlier, (round, _) = rundir.checkpoints(path)
    for _, file in earlier:
        file.unlink()
    return sorted((path / "memories").glob(f"*.round-{round:06d}.ckpt"))


def test_a_lost_memory_is_named_before_any_round(copy):
    _, path = copy("scaffold", "stopped")
    lost, *_ = only_newest(path)
    lost.unlink()
    rest = (p for p in path.rglob("*.*") if p.is_file() and p.name not in ("log.txt", ".lock"))
    before = {p: p.read_bytes() for p in rest}
    refused(resume(path), lost.name, "is gone")
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("how", ["torn", "an earlier one's"])
def test_a_changed_memory_is_named(how, copy):
    _, path = copy("scaffold", "stopped")
    first, *_ = only_newest(path)
    earlier = min((path / "memories").glob(f"{first.name.split('.')[0]}*"))
    assert first != earlier
    first.write_bytes(first.read_bytes()[:-3] if how == "torn" else earlier.read_bytes())
    refused(resume(path), first.name)


def test_with_a_lost_memory_the_checkpoint_before_is_taken(copy):
    folder, path = copy("scaffold", "done")
    for name in ("status", "adapter"):
        shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    newest = max((path / "memories").iterdir(), key=lambda p: p.name.split(".")[1])
    newest.unlink()
    said = resume(path)
    assert said.code == 0, said.text
    assert f"{newest.name}, is gone" in said.text
    assert digest_of(path) == folder.digest
    assert metrics_of(path) == folder.metrics


def test_a_recipe_that_lost_a_line_is_refused_with_the_option(copy):
    _, path = copy("fedkseed", "stopped")
    file = path / "run.toml"
    whole = file.read_text().splitlines(keepends=True)
    for line, words in (("rounds", "rounds = 10, and was 3"), ("K", "set.K = 1024, and was 16")):
        file.write_text(text := "".join(part for part in whole if not part.startswith(f"{line} =")))
        refused(resume(path), "run.toml", words, "as they were")
        assert file.read_text() == text


def test_other_data_and_another_model_are_refused(copy, made, tmp_path):
    _, path = copy("fedkseed", "stopped")
    recipe = (path / "run.toml").read_text()
    rows = Path("data.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(rows)
    (tmp_path / "other.jsonl").write_text(rows.replace("count to 7", "count to 8"))
    models.tiny_llama(5, layers=3).save(tmp_path / "other")
    for old, new, words in (
        ("data.jsonl", tmp_path / "other.jsonl", "the clients' rows have the digest"),
        ('"model"', f'"{tmp_path / "other"}"', "the base model has the digest"),
    ):
        (path / "run.toml").write_text(recipe.replace(old, str(new)))
        status = (path / "status").read_text()
        refused(resume(path), words, str(path))
        assert (path / "status").read_text() == status
    (path / "run.toml").write_text(recipe.replace("data.jsonl", str(tmp_path / "moved.jsonl")))
    assert resume(path).code == 0  # the same rows in another place


def test_a_checkpoint_states_what_it_stands_on(made):
    path = made["scaffold", "done"].path
    round, file = rundir.checkpoints(path)[-1]
    payload = checkpoint.decode(file.read_bytes())
    stated = checkpoint.stands_on(payload)
    assert stated[0] == checkpoint.stated_in(file)
    assert (stated[0].recipe["rounds"], stated[0].recipe["set.scaffold"]) == (3, True)
    assert stated[0].base == rundir.made_on(path)["base"]
    data = (path / "metrics.jsonl").read_bytes()[: stated[1]]
    assert data.count(b"\n") == len(list(rundir.events(path))) - 1
    kept = checkpoint.kept_in(payload)
    assert {c: r for c, (r, _) in kept.items()} == {0: round, 1: round, 2: round}


@pytest.mark.parametrize(
    ("kind", "state", "file", "outcome"),
    [
        ("scaffold", "stopped", "eval.json", "same"),
        ("scaffold", "stopped", "metrics.jsonl", "is damaged|are lost"),
        ("scaffold", "stopped", "run.toml", "run.toml"),
        ("scaffold", "done", "adapter/adapter_model.safetensors", "same"),
        ("fedkseed", "done", "ledger.safetensors", "same"),
        ("fedkseed", "stopped", "checkpoints", "same"),
    ],
)
def test_a_torn_file_is_made_again_or_named(kind, state, file, outcome, copy):
    """Cut in half, as a disk that was full or lost its power leaves it; a bit of a finished result is flipped."""
    folder, path = copy(kind, state)
    torn = rundir.checkpoints(path)[-1][1] if file == "checkpoints" else path / file
    data = torn.read_bytes()
    torn.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if state == "done" else data[: len(data) // 2])
    said = resume(path)
    if outcome != "same":
        assert re.search(outcome, said.text), said.text
    if file != "run.toml":
        assert said.code == 0, said.text
        assert digest_of(path) == folder.digest
        assert outcome != "same" or metrics_of(path) == folder.metrics


def test_lost_lines_are_told(tmp_path):
    record = Metrics(tmp_path)
    for r in range(4):
        record.record({"event": "round", "round": r, "loss": 4.5})
    size = record.size
    record.record({"event": "round", "round": 4})  # beyond the checkpoint
    record.close()
    data = record.file.read_bytes()
    assert Metrics(tmp_path).cut(3, size) == ""
    assert record.file.read_bytes() == data[:size]
    record.file.write_bytes(data[:100])
    assert f"{size - 100} of its {size} bytes are lost" in Metrics(tmp_path).cut(3, size)
    assert [json.loads(line)["round"] for line in record.file.read_bytes().splitlines()] == [0]
    record.file.unlink()
    assert "are lost" in Metrics(tmp_path).cut(3, size)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_stop_and_a_second_one_ends(number):
    def unheard(*_: object) -> None:
        said.append("unheard")

    said: list[str] = []
    before, ui = signal.signal(number, unheard), SimpleNamespace(note=said.append)
    try:
        with InterruptHandler(ui) as interrupt:
            signal.raise_signal(number)
            assert interrupt.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        with InterruptHandler(ui) as interrupt:
            interrupt.at_once = True
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
            assert not interrupt.requested
        assert signal.getsignal(number) is unheard
    finally:
        signal.signal(number, before)
    assert "stopping after this step" in said[0]


def test_rm_of_a_link_leaves_what_it_leads_to(copy, tmp_path):
    _, path = copy("fedkseed", "done")
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    (elsewhere / "others.txt").write_text("of somebody else")
    before = sorted(elsewhere.iterdir())
    link = path.parent / "0009-fedkseed-link"
    link.symlink_to(elsewhere)
    said = call("runs", "rm", "9", "--out", str(path.parent))
    assert (said.code, link.is_symlink()) == (0, False), said.text
    assert str(elsewhere) in said.text
    assert sorted(elsewhere.iterdir()) == before
    link.symlink_to(elsewhere)
    with pytest.raises(Exception, match="is a link"):
        RunDir(link).remove()
    assert set(before) <= set(elsewhere.iterdir())
    (path.parent / "latest").symlink_to(elsewhere)
    call("runs", "rm", str(path.parent / "latest"), "--out", str(path.parent))
    assert set(before) <= set(elsewhere.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_what_holds_rows_or_what_was_learned_is_the_owners_alone(made):
    for folder in made.values():
        private = ("adapter", "checkpoints", "memories")
        alone = ("ledger", "eval", "samples", "report", "metrics", "rows")
        names = [f for f in folder.files if f.split("/")[0] in private or f.split(".")[0] in alone]
        assert len(names) >= 2
        assert {stat.S_IMODE((folder.path / f).stat().st_mode) for f in names} == {PRIVATE}
        for name in private:
            if (folder.path / name).is_dir():
                assert stat.S_IMODE((folder.path / name).stat().st_mode) == 0o700, name


HOLD = "import sys, time\nfrom pathlib import Path\nfrom fleetune.common.files import scratch\nwith scratch(Path(sys.argv[1]), 'gguf') as f:\n    (f / 'half').write_text('x'); print('held', flush=True); sys.stdin.read()"


def test_what_a_killed_process_leaves_is_swept_and_a_living_ones_stays(tmp_path):
    foreign = tmp_path / ".other.12345678.tmp"
    foreign.mkdir()
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        (left,) = tmp_path.glob(f"*{HIDDEN}")
        sweep(tmp_path)
        assert (left / "half").is_file()
        holder.kill()
        holder.wait(timeout=60)
        assert (left / "half").is_file()
    with staged(tmp_path / "out") as folder:
        assert not left.exists()
        (folder / "x").write_text("")
        sweep(tmp_path)  # as another thread would
        assert (folder / "x").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == [foreign.name, "out"]
