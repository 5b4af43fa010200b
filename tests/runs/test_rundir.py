# SPDX-License-Identifier: Apache-2.0
"""Run folders: numbers, the lock, metrics that survive kills, checkpoints that survive damage, full disks."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fleetune.common.folders import SUFFIX
from fleetune.errors import MessageError, StorageError, UsageError
from fleetune.runs import rundir
from fleetune.runs.rundir import KEEP, RunDir, checkpoints, create, events, find, listing
from fleetune.tuning.exchange.messages import Message, Payload, encode
from fleetune.tuning.rounds import checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    """An open run folder with a recipe."""
    with create(tmp_path / "runs", "fedkseed", "tiny") as opened:
        opened.write("run.toml", "model = 'tiny'\n")
        yield opened


def folder(out: Path, name: str) -> Path:
    path = out / name
    path.mkdir(parents=True)
    (path / "run.toml").write_text("")
    return path


def put(run: RunDir, round: int, payload: Payload) -> None:
    run.checkpoint(round, encode(Message(round, b"", payload)))


def get(run: RunDir) -> tuple[int, Payload] | None:
    return run.restore(checkpoint.decode)


def state(value: int) -> Payload:
    return Payload({"w": np.full(50, value, np.int32)}, {"round": value})


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `size`: a disk that is full, on any file system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(code: int):
    """A function that fails as the operating system does."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


# --- numbers and names --------------------------------------------------------------------------------------


def test_runs_are_numbered_and_latest_points_to_the_newest(tmp_path):
    out = tmp_path / "deep" / "runs"
    names = []
    for method, model in (
        ("mezo", "smollm2-135m"),
        ("fedit", "/some where/My Model.Q4.gguf"),
        ("x", "org/Name_1B"),
    ):
        with create(out, method, model) as run:
            names.append(run.path.name)
            assert (run.path / "checkpoints").is_dir()
            assert (out / "latest").resolve() == run.path.resolve()
            assert os.readlink(out / "latest") == run.path.name  # so that the folder can be moved
    assert names == ["0001-mezo-smollm2-135m", "0002-fedit-my-model.q4", "0003-x-name-1b"]
    with create(out, "x", "???") as run:
        assert run.path.name == "0004-x-model"
    assert sorted(p.name for p in out.iterdir()) == [*names, "0004-x-model", "latest"]


def test_a_number_is_never_used_twice(tmp_path):
    folder(tmp_path, "0041-a-b")
    folder(tmp_path, "0007-mezo-m")
    (tmp_path / "0050-not finished").mkdir()  # even without a recipe
    (tmp_path / "12-x").mkdir()
    (tmp_path / "99990-note.txt").write_text("")
    with create(tmp_path, "mezo", "m") as run:
        assert run.path.name == "99991-mezo-m"


def test_numbers_go_on_beyond_four_digits(tmp_path):
    folder(tmp_path, "9999-mezo-m")
    for want in ("10000-mezo-m", "10001-mezo-m"):
        with create(tmp_path, "mezo", "m") as run:
            run.write("run.toml", "")
            assert run.path.name == want
    assert [p.name for p in listing(tmp_path)] == ["9999-mezo-m", "10000-mezo-m", "10001-mezo-m"]
    assert find("latest", tmp_path).name == "10001-mezo-m"
    assert find("10000", tmp_path).name == "10000-mezo-m"


def test_a_number_taken_in_the_meantime_is_passed_over(tmp_path, monkeypatch):
    real, taken = Path.mkdir, []

    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        if self.name.startswith("0001-") and not taken:
            taken.append(real(self))
        real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with create(tmp_path, "mezo", "m") as run:
        assert run.path.name == "0002-mezo-m"


def test_a_number_that_another_method_took_at_the_same_moment_is_given_up(tmp_path, monkeypatch):
    real, taken = Path.mkdir, []

    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)  # type: ignore[arg-type]
        if self.name.startswith("0001-") and not taken:
            taken.append(real(tmp_path / "0001-fedit-m"))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with create(tmp_path, "mezo", "m") as run:
        assert run.path.name == "0002-mezo-m"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0001-fedit-m", "0002-mezo-m", "latest"]


def test_runs_that_start_together_get_numbers_of_their_own(tmp_path):
    def start(method: str) -> int:
        with create(tmp_path, method, "m") as run:
            return int(run.path.name.split("-")[0])

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(start, [f"method{i}" for i in range(24)]))
    assert len(set(numbers)) == 24
    assert len([p for p in tmp_path.iterdir() if p.name[0].isdecimal()]) == 24


def test_a_folder_without_links_still_has_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "symlink_to", failing(errno.EPERM))
    with create(tmp_path, "mezo", "m") as run:
        run.write("run.toml", "")
        assert find("latest", tmp_path) == run.path
    assert [p.name for p in tmp_path.iterdir()] == ["0001-mezo-m"]


def test_find(tmp_path, monkeypatch):
    out = tmp_path / "runs"
    with pytest.raises(UsageError, match="no run 'latest'"):
        find("latest", out)
    seven, twelve = folder(out, "0007-mezo-m"), folder(out, "0012-fedit-m")
    (out / "0013-unfinished").mkdir()
    assert listing(out) == [seven, twelve]
    for name in ("7", "07", "0007", "0007-mezo-m", str(seven)):
        assert find(name, out) == seven, name
    assert find("latest", out) == twelve
    assert find("12", out) == twelve
    for name in ("1", "2", "70", "mezo", "0013-unfinished", "007-mezo-m", "nowhere/at/all", "0"):
        with pytest.raises(UsageError, match=f"no run '{name}'") as caught:
            find(name, out)
        assert "fleetune runs" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="is not a run folder"):
        find(str(out / "0013-unfinished"), out)
    monkeypatch.chdir(out)
    assert find("0007-mezo-m", tmp_path / "elsewhere") == Path("0007-mezo-m")


def test_latest_never_points_to_a_run_that_is_gone(tmp_path):
    for model in "abc":
        with create(tmp_path, "mezo", model) as run:
            run.write("run.toml", "")
    RunDir(tmp_path / "0003-mezo-c").remove()
    assert (tmp_path / "latest").resolve().name == "0002-mezo-b"
    RunDir(tmp_path / "0001-mezo-a").remove()
    assert (tmp_path / "latest").resolve().name == "0002-mezo-b"
    RunDir(tmp_path / "latest").remove()
    assert list(tmp_path.iterdir()) == []


# --- one process at a time ----------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from fleetune.errors import UsageError
from fleetune.runs.rundir import RunDir
try:
    run = RunDir(Path(sys.argv[1]))
except UsageError as error:
    print("refused", error, flush=True)
    sys.exit(2)
print("held", flush=True)
sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path)], **pipes)


def test_a_second_process_is_refused_until_the_first_is_gone(run):
    with holder(run.path) as second:
        text, _ = second.communicate(timeout=60)
        assert second.returncode == 2
        assert text.startswith("refused")
        assert f"{run.path} is in use by another process" in text
    run.close()
    with holder(run.path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="in use by another process"):
            RunDir(run.path)
        other.send_signal(signal.SIGKILL)  # a killed process holds nothing
        other.wait(timeout=60)
        RunDir(run.path).close()


def test_a_folder_is_held_by_one_and_is_left_as_it_was(tmp_path):
    with (
        rundir.locked(tmp_path),
        pytest.raises(UsageError, match="in use by another process"),
        rundir.locked(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / rundir.LOCK).write_text("")  # as a kill leaves it
    with rundir.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_holder_has_removed_is_nobodys(tmp_path, monkeypatch):
    """Opened before it was removed, locked after: whoever makes the file anew would have the folder as well."""
    real, opened = rundir.lock, list[int]()

    def lock(handle: int) -> bool:
        opened.append(handle)
        if len(opened) == 1:
            (tmp_path / rundir.LOCK).unlink()
        return real(handle)

    monkeypatch.setattr(rundir, "lock", lock)
    with rundir.locked(tmp_path):
        assert len(opened) == 2
        assert (tmp_path / rundir.LOCK).is_file()


def test_a_run_folder_that_is_gone(tmp_path):
    with pytest.raises(StorageError, match="the folder is gone"):
        RunDir(tmp_path / "none")


# --- small files --------------------------------------------------------------------------------------------


def test_status_and_log(run):
    run.status("failed: two\nlines  and " + "x" * 400)
    text = (run.path / "status").read_text()
    assert text.startswith("failed: two lines and xxx")
    assert text.count("\n") == 1
    assert len(text) == 301
    run.log("first")
    run.log("zweitens ü")
    lines = (run.path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["first", "zweitens ü"]


PIPES = """
import os, sys
from pathlib import Path
from fleetune.cli.main import main

for name in ("status", ".lock", "metrics.jsonl", "log.txt", "env.json"):
    run = Path(sys.argv[1], name.strip("."), "0001-mezo-toy")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    out = ["--out", str(run.parent)]
    for words in (["runs"], ["runs", "show", "1"], ["tune", "--resume", "1"]):
        print(name, *words, "gives", main([*words, *out]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path):
    """In another process, which can be ended: it would wait for someone to write."""
    names = ("status", ".lock", "metrics.jsonl", "log.txt", "env.json")
    for name in names:
        folder = create(tmp_path / name.strip("."), "mezo", "toy")
        folder.write("run.toml", "")
        folder.close()
    command = [sys.executable, "-c", PIPES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    codes = re.findall(r"^(\S+) (runs|runs show 1|tune --resume 1) gives (\d)$", done.stdout, re.MULTILINE)
    assert len(codes) == 3 * len(names), done.stdout
    assert all(code == "0" or what == "tune --resume 1" for _, what, code in codes), codes
    assert all(code in "12" for _, what, code in codes if what == "tune --resume 1"), codes
    assert "Traceback" not in done.stderr


# --- metrics ------------------------------------------------------------------------------------------------


def test_events_are_recorded_one_a_line_and_read_back(run):
    given = [
        {"event": "start", "counts": {"ü": [1, 2]}},
        {"event": "eval", "round": 0, "loss": np.float32(0.5), "n": np.int64(3)},
    ]
    written = [run.record(e) for e in given]
    assert written == list(events(run.path))
    assert [e["v"] for e in written] == [1, 1]
    assert written[1]["t"] >= written[0]["t"] > 1.6e9
    assert written[1]["loss"] == 0.5
    lines = (run.path / "metrics.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 3
    assert lines[2] == b""
    assert json.loads(lines[0]) == written[0]


def test_a_number_that_is_not_finite_is_recorded_as_null(run):
    event = {
        "event": "eval",
        "round": 3,
        "loss": float("nan"),
        "base": {"loss": float("inf"), "x": [-np.inf, 1]},
    }
    back = run.record(event)
    assert back["loss"] is None
    assert back["base"] == {"loss": None, "x": [None, 1]}
    (line,) = (run.path / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in line
    assert "Infinity" not in line
    assert list(events(run.path)) == [back]


def test_what_cannot_be_recorded_is_an_error_and_writes_nothing(run):
    with pytest.raises(TypeError, match="object cannot be recorded"):
        run.record({"event": "x", "value": object()})
    assert list(events(run.path)) == []


def test_a_torn_line_is_left_out(run):
    first = run.record({"event": "a", "round": 1})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'\n[1]\n{"no": "event"}\n\xff\xfe\n{"event": "b", "rou')
    assert list(events(run.path)) == [first]
    assert list(events(run.path / "none")) == []


def test_cut_drops_later_rounds_the_end_and_what_was_torn(run):
    kept = [run.record({"event": "start"})]
    kept += [run.record({"event": e, "round": r}) for r in (0, 1, 2) for e in ("client", "round", "eval")]
    run.record({"event": "client", "round": 3})
    run.record({"event": "done"})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "client", "round": 1')
    before = (run.path / "metrics.jsonl").read_bytes()
    said = ["what was not finished after round 2 is dropped: 1 record, a torn line"]
    assert run.cut(2) == said
    assert said[0] in (run.path / "log.txt").read_text()
    after = (run.path / "metrics.jsonl").read_bytes()
    assert list(events(run.path)) == kept
    assert after == b"".join(line + b"\n" for line in before.split(b"\n")[: len(kept)])  # byte for byte
    again = run.record({"event": "client", "round": 3})  # the open file is the new one
    assert list(events(run.path)) == [*kept, again]
    run.record({"event": "done"})
    assert run.cut(2) == ["what was not finished after round 2 is dropped: 1 record"]
    assert (run.path / "metrics.jsonl").read_bytes() == after
    assert run.cut(2) == []
    assert run.cut(-1) == []
    assert (run.path / "metrics.jsonl").read_bytes() == b""


def test_cut_removes_temporary_files_and_checkpoints_of_later_rounds(run):
    for r in (1, 2):
        put(run, r, state(r))
    left = [run.path / ".ledger.safetensors.x1.tmp", run.path / "checkpoints" / ".round-000003.ckpt.x2.tmp"]
    for path in left:
        path.write_bytes(b"half")
    (run.path / f".adapter.x3{SUFFIX}").mkdir()
    assert run.cut(1)[-1] == "what was not finished after round 1 is dropped: 3 half-written files"
    assert not any(path.exists() for path in left)
    assert [r for r, _ in checkpoints(run.path)] == [1]
    assert (run.path / "run.toml").exists()


# --- checkpoints --------------------------------------------------------------------------------------------


def test_the_last_checkpoints_are_kept_and_the_newest_is_restored(run):
    assert get(run) is None
    for r in range(5):
        put(run, r, state(r))
        found = get(run)
        assert found is not None
        assert found[0] == r
        assert found[1].scalars == {"round": r}
        assert found[1].arrays["w"].tolist() == [r] * 50
        assert [n for n, _ in checkpoints(run.path)] == list(range(max(0, r + 1 - KEEP), r + 1))
    assert KEEP == 2
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == [
        "round-000003.ckpt",
        "round-000004.ckpt",
    ]


def test_rounds_count_as_numbers_beyond_six_digits(run):
    for r in (999_998, 999_999, 1_000_000, 1_000_001):
        put(run, r, state(0))
    assert [n for n, _ in checkpoints(run.path)] == [1_000_000, 1_000_001]
    found = get(run)
    assert found is not None
    assert found[0] == 1_000_001


def damages(data: bytes) -> dict[str, bytes]:
    middle = len(data) // 2
    return {
        "cut short": data[:middle],
        "empty": b"",
        "a flipped bit": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
        "a lost byte": data[:middle] + data[middle + 1 :],
        "zeros at the end": data[:-64] + bytes(64),
        "something else": b"not a checkpoint",
    }


@pytest.mark.parametrize("kind", list(damages(b"x" * 300)))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, kind):
    put(run, 4, state(4))
    put(run, 5, state(5))
    newest = run.path / "checkpoints" / "round-000005.ckpt"
    newest.write_bytes(damages(newest.read_bytes())[kind])
    found = get(run)
    assert found is not None
    assert (found[0], found[1].scalars["round"]) == (4, 4)
    assert "checkpoint round-000005.ckpt is not usable" in (run.path / "log.txt").read_text()
    run.cut(4)
    put(run, 5, state(55))
    again = get(run)
    assert again is not None
    assert again[1].scalars["round"] == 55


def test_when_all_are_damaged_it_is_said_and_nothing_is_lost(run):
    for r in (6, 7):
        put(run, r, state(r))
        (run.path / "checkpoints" / f"round-{r:06d}.ckpt").write_bytes(b"FT1")
    with pytest.raises(StorageError, match=r"no checkpoint in .* is usable") as caught:
        get(run)
    assert f"rm {run.path}/checkpoints/*.ckpt" in (caught.value.hint or "")
    assert [r for r, _ in checkpoints(run.path)] == [6, 7]
    for _, path in checkpoints(run.path):  # what the hint says
        path.unlink()
    assert get(run) is None


def test_a_checkpoint_may_be_larger_than_any_message(run, monkeypatch):
    monkeypatch.setattr("fleetune.tuning.exchange.messages.MAX_BYTES", 47)
    put(run, 3, state(3))
    found = get(run)
    assert found is not None
    assert found[0] == 3


def test_files_that_are_no_checkpoints_are_passed_over(run):
    put(run, 1, state(1))
    for name in ("round-x.ckpt", "around-000009.ckpt", "round-000009.ckpt.tmp", ".round-000009.ckpt.ab.tmp"):
        (run.path / "checkpoints" / name).write_bytes(b"")
    assert [n for n, _ in checkpoints(run.path)] == [1]
    found = get(run)
    assert found is not None
    assert found[0] == 1


def test_a_state_without_a_wire_type_is_refused_before_the_disk_is_touched(run):
    put(run, 1, state(1))
    with pytest.raises(MessageError):
        put(run, 2, Payload({}, {"x": None}))  # type: ignore[dict-item]
    assert [n for n, _ in checkpoints(run.path)] == [1]


# --- full and read-only disks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "what"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EIO, "rror")]
)
@pytest.mark.parametrize("step", ["mkstemp", "fsync", "replace"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_old_ones(run, monkeypatch, step, code, what):
    put(run, 1, state(1))
    put(run, 2, state(2))
    before = {p.name: p.read_bytes() for p in (run.path / "checkpoints").iterdir()}
    monkeypatch.setattr(tempfile if step == "mkstemp" else os, step, failing(code))
    with pytest.raises(StorageError, match=what) as caught:
        put(run, 3, state(3))
    monkeypatch.undo()
    assert "round-000003.ckpt" in caught.value.message
    assert {p.name: p.read_bytes() for p in (run.path / "checkpoints").iterdir()} == before
    put(run, 3, state(3))  # space was made: it goes on
    assert [n for n, _ in checkpoints(run.path)] == [2, 3]


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(run):
    put(run, 1, state(1))
    big = Payload({"w": np.zeros(100_000, np.float32)}, {})
    with file_size_limit(150_000), pytest.raises(StorageError, match=r"round-000002\.ckpt"):
        put(run, 2, big)
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["round-000001.ckpt"]


def test_a_disk_that_fills_up_under_the_metrics_is_one_clear_error(tmp_path):
    with pytest.raises(StorageError, match=r"metrics\.jsonl"), create(tmp_path, "mezo", "m") as run:
        run.record({"event": "start"})
        with file_size_limit(2_000):
            try:
                for r in range(100):
                    run.record({"event": "round", "round": r})
            finally:
                run.close()  # while the disk is still full: no second error hides the first
    with RunDir(tmp_path / "0001-mezo-m") as again:  # and the lock was given back
        again.cut(3)
        assert [e.get("round") for e in events(again.path)] == [None, 0, 1, 2, 3]


def test_a_full_disk_under_the_log(run):
    run.log("x" * 3_000)
    with file_size_limit(3_000), pytest.raises(StorageError, match=r"log\.txt"):
        run.log("y" * 3_000)


@pytest.mark.parametrize(
    ("code", "what"), [(errno.EROFS, "the file system is read-only"), (errno.EACCES, "permission denied")]
)
def test_a_read_only_place_is_refused_with_what_to_do(tmp_path, monkeypatch, code, what):
    monkeypatch.setattr(Path, "mkdir", failing(code))
    with pytest.raises(StorageError, match=what) as caught:
        create(tmp_path / "runs", "mezo", "m")
    monkeypatch.undo()
    assert "can write to" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []
    with create(tmp_path / "runs", "mezo", "m") as run:
        path = run.path
    monkeypatch.setattr(rundir, "open", failing(code), raising=False)
    with pytest.raises(StorageError, match=what):
        RunDir(path)
    monkeypatch.undo()
    RunDir(path).close()


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(StorageError) as caught:
        create(tmp_path / "runs", "mezo", "m")
    assert f"{tmp_path / 'runs'}: it is a file, not a folder" in caught.value.message
    with pytest.raises(StorageError, match="it is a file, not a folder"):
        rundir.check_writable(tmp_path / "runs")


def test_the_environment_names_versions_and_what_is_added():
    found = rundir.environment({"device": "cpu"})
    assert found["device"] == "cpu"
    assert found["numpy"] == np.__version__
    assert {"fleetune", "python", "torch", "transformers", "peft", "numba", "safetensors", "system"} <= set(
        found
    )
    json.dumps(found)
