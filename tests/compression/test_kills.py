"""A compression that is stopped or killed: what is left is finished, or gone on with; Ctrl-C stops what is measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_harness import tuned
from deploy_harness import tiny as wide
from pruner_harness import tiny

import fleetune
from command_line import Capture, ok
from command_line import call_json as call
from fleetune import models
from fleetune.compression.jobs import solve
from fleetune.compression.methods import optq, rtn
from fleetune.deploy.export import size_beside
from fleetune.errors import Interrupted
from fleetune.models import artefact
from fleetune.runs import compression_folder
from fleetune.runs.listener import Silent
from heard import Heard, counting

FEW = "--set steps=2 --set batch_size=2 --data rows.jsonl --length 64"
WORK = {
    "optq": "--method optq --set group=4 --windows 2 --length 16 --text text.txt",
    "gkd": f"--method gkd --set teacher=same --set keep_layers=2 --set lmbda=0 {FEW}",
    "llm-pruner": f"--method llm-pruner --set first=1 --set last=1 --set round_to=4 --set ratio=0.34 {FEW}",
}


class Killed(BaseException):
    """Nobody catches it."""


def die(*args: object, **kwargs: object) -> None:
    raise Killed


def before_the_record(patch: pytest.MonkeyPatch) -> None:
    write = compression_folder.write_atomic

    def watched(path: Path, data: bytes | str, **mode: Any) -> None:
        if path.name == compression_folder.RECORD and '"result"' in str(data):
            raise Killed
        write(path, data, **mode)

    patch.setattr(compression_folder, "write_atomic", watched)


def while_parts_are_removed(patch: pytest.MonkeyPatch) -> None:
    real = shutil.rmtree

    def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if "parts" in path.name and path.exists():
            next(p for p in sorted(path.rglob("*")) if p.is_file()).unlink()
            raise Killed
        real(path, *args, **kwargs)

    patch.setattr(shutil, "rmtree", rmtree)


POINTS: dict[str, tuple[bool, Callable[[pytest.MonkeyPatch], None]]] = {
    "the result alone": (False, lambda patch: patch.setattr(compression_folder, "weights_size", die)),
    "before the record": (False, before_the_record),
    "after the record": (True, lambda patch: patch.setattr(compression_folder, "drop_parts", die)),
    "while parts are removed": (True, while_parts_are_removed),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path, made = tmp_path_factory.mktemp("models") / "small", tiny()
    models.save(made.net, made.tokenizer, path)
    return str(path)


@pytest.mark.parametrize("method", WORK)
def test_a_kill_near_the_end_loses_nothing(method: str, model: str, at: Path, capsys: Capture) -> None:
    events = ok(capsys, "compress", model, *WORK[method].split())
    want = events[-1]["digest"]
    for number, (point, (done, kill)) in enumerate(POINTS.items(), 2):
        with pytest.MonkeyPatch.context() as patch:
            kill(patch)
            with pytest.raises(Killed):
                call(capsys, "compress", model, *WORK[method].split())
        capsys.readouterr()
        (folder,) = (at / "runs").glob(f"000{number}-*")
        _, told, _ = call(capsys, "runs")
        assert told[-1]["status"] == ("done" if done else "stopped"), point
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optq.Solver, "solve", die)
            code, events, err = call(capsys, "compress", "--resume", "latest")
        assert code == 0, (point, err)
        assert not [e for e in events if e["event"] == "step"], point
        assert (events[-1]["event"], events[-1]["digest"]) == ("done", want), point
        assert ("there is nothing to resume" in err) == done, point
        assert sorted(p.name for p in folder.iterdir()) == ["compress.json", "model"], point
        assert json.loads((folder / "compress.json").read_text())["result"]["digest"] == want, point


def test_a_finished_one_whose_model_is_gone_is_made_anew(model: str, at: Path, capsys: Capture) -> None:
    first = ok(capsys, "compress", model, *WORK["optq"].split())
    made = at / "runs" / "0001-optq-small" / "model"
    shutil.rmtree(made)
    made.mkdir()
    again = ok(capsys, "compress", "--resume", "latest")
    assert [e["event"] for e in again] == [e["event"] for e in first]
    assert again[-1]["digest"] == first[-1]["digest"]


@pytest.mark.parametrize(
    "point",
    [
        "after it is written",
        pytest.param("before it is written", marks=pytest.mark.faults),
        pytest.param("while parts are removed", marks=pytest.mark.faults),
    ],
)
def test_a_kill_while_the_base_is_compressed(point: str, model: str, at: Path, capsys: Capture) -> None:
    tuned(capsys, model)
    ok(capsys, "compress", "latest", "--method", "rtn", "--set", "group=4")
    folder = next((at / "runs").glob("0002-*"))
    with pytest.MonkeyPatch.context() as patch:
        if point == "before it is written":
            patch.setattr(artefact, "write", die)
        elif point == "after it is written":
            patch.setattr(compression_folder, "drop_parts", die)
        else:
            while_parts_are_removed(patch)
        with pytest.raises(Killed):
            solve.compressed_base(Silent(), folder, size_beside, offline=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtn.Solver, "solve", die)
        made = solve.compressed_base(Silent(), folder, size_beside, offline=True)
        assert solve.compressed_base(Silent(), folder, size_beside, offline=True) == made
    assert [p.name for p in (folder / "base").iterdir()] == ["model"]
    artefact.Master(made).digest()


@pytest.fixture
def little(at: Path) -> Path:
    """The folder that we are in, with a small model."""
    wide().save(at / "little")
    (at / "text.txt").write_text("a few words of a text, some more of them. " * 60)
    return at


def counts(heard: Heard) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for what, done, total, _ in heard.counts:
        found.setdefault(what, []).append((done, total))
    return found


def test_a_compression_counts_the_rows_that_it_measures_on(little: Path) -> None:
    heard = Heard()
    fleetune.compress("little", method="rtn", eval_text="text.txt", listener=heard)
    found = counts(heard)
    windows = found["rows of the reference"][-1][1]
    assert windows > 1
    once = [(n, windows) for n in range(1, windows + 1)]
    assert found["rows of the reference"] == found["rows compared"] == once
    other = found["rows of other text"][-1][1]
    assert found["rows of other text"] == [(n, other) for n in range(1, other + 1)] * 2, "before and after"


@pytest.mark.parametrize("what", ["rows of other text", "rows compared"])
def test_a_stop_while_measuring_is_heard_and_resumed_to_the_same_bits(little: Path, what: str) -> None:
    whole = fleetune.compress("little", method="rtn", eval_text="text.txt")
    with pytest.raises(Interrupted) as caught:
        fleetune.compress("little", method="rtn", eval_text="text.txt", listener=Heard(counting(what)))
    assert caught.value.hint == "fleetune compress --resume runs/0002-rtn-little"
    again = fleetune.resume_compression("latest")
    assert again.folder == Path("runs/0002-rtn-little")
    assert (again.digest, again.done.after) == (whole.digest, whole.done.after)
    assert not list(again.folder.glob("*.npy"))
