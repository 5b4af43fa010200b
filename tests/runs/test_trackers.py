"""Trackers get the figures of a run, and cannot disturb it.  Each is read back with its own library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import fleetune
from fleetune import Silent, models
from fleetune.common.events import ClientReply, RoundDone
from fleetune.errors import Interrupted, UsageError
from fleetune.runs import rundir, trackers
from fleetune.runs.trackers import Tracked
from heard import Heard

OPTIONS: dict[str, Any] = {"method": "mezo", "rounds": 3, "samples": 0, "held_out": 4, "max_length": 64}
OPTIONS |= {"settings": {"lr": 1e-4, "tau": 2, "K": 16}, "offline": True}
SECRET = "the otter's passphrase"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trackers")
    models.tiny_llama().save(folder / "tiny")
    row = '{{"instruction": "Say {0}", "response": "{1} {0}.", "client": "ward-{2}"}}\n'
    (folder / "rows.jsonl").write_text("".join(row.format(n, SECRET, n % 3) for n in range(30)))
    return folder


@pytest.fixture
def at(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return made


def tune(at: Path, tracker: str | list[str], listener: Silent | None = None, **more: Any) -> Any:
    options = {**OPTIONS, "tracker": tracker, "listener": listener, **more}
    return fleetune.tune(at / "tiny", at / "rows.jsonl", **options)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "trackers" / "tensorboard"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_the_losses_of_the_run(at):
    heard = Heard()
    run = tune(at, "tensorboard", heard)
    assert not heard.notes, "nothing failed"
    found, history = scalars(run.folder), run.history
    losses = zip(history["round"], history["loss"], strict=True)
    assert found["validation/loss"] == [(r, pytest.approx(v, rel=1e-6)) for r, v in losses]
    assert [v for _, v in found["total/bytes"]] == history["bytes_total"][1:]
    assert [step for step, _ in found["clients/loss"]] == [1, 2, 3]
    written = b"".join(p.read_bytes() for p in (run.folder / "trackers").rglob("*") if p.is_file())
    for kept in (SECRET, "ward-1", str(at)):
        assert kept.encode() not in written, f"{kept} does not leave the run"
    assert b"set.tau" in written
    assert run.digest.encode() in written


def test_a_resumed_run_goes_on_in_tensorboard_and_every_round_is_there_once(at):
    with pytest.raises(Interrupted):
        tune(at, "tensorboard", Heard(lambda heard: len(heard.of("round")) == 2))
    assert [step for step, _ in scalars(Path("runs/latest"))["validation/loss"]][:2] == [0, 1]
    rundir.checkpoints(Path("runs/latest"))[-1][1].unlink()  # its round, which was logged, is played again
    run = fleetune.resume_run("latest", tracker=["tensorboard"], offline=True)
    assert [step for step, _ in scalars(run.folder)["validation/loss"]] == [0, 1, 2, 3]
    assert run.digest == tune(at, ()).digest, "and the bits are those of a run without a stop or a tracker"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a tracker in wandb's place that fails where it is told to; its `ended` has how runs ended."""

    class Broken:
        where, error, ended = "", BaseException(), list[str]()

        def __init__(self, *_: Any) -> None:
            self.fail("begin")

        def fail(self, where: str) -> None:
            print("noise on stdout")
            if where == self.where:
                raise self.error

        def log(self, values: Mapping[str, float], round: int) -> None:
            self.fail("log")

        def finish(self, summary: Mapping[str, Any], status: str) -> None:
            self.ended.append(status)
            self.fail("finish")

    monkeypatch.setattr(trackers, "TRACKERS", {**trackers.TRACKERS, "json": Broken})
    return Broken


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(at, broken, capfd):
    broken.where, broken.error = "log", SystemExit(7)
    heard = Heard()
    run = tune(at, ["json", "tensorboard"], heard, rounds=2)
    assert run.done.rounds == 2
    (said,) = heard.notes
    assert "the tracker json failed" in said
    assert "SystemExit: 7" in said
    # others are not disturbed
    assert [step for step, _ in scalars(run.folder)["validation/loss"]] == [0, 1, 2]
    assert "noise" not in capfd.readouterr().out


def test_what_cannot_be_is_told_before_any_work(at, monkeypatch):
    with pytest.raises(UsageError, match="Did you mean 'wandb'"):
        tune(at, "wandbb")
    monkeypatch.setattr(trackers, "TRACKERS", {"no_such_package": None})
    with pytest.raises(UsageError, match="not installed"):
        tune(at, "no_such_package")
    assert not Path("runs").exists()


def test_a_failed_run_ends_as_failed_and_a_stopped_one_as_stopped(at, broken):
    class Fails(Silent):
        def step(self, client: int, step: int) -> None:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        tune(at, "json", Fails(), rounds=1)
    with pytest.raises(Interrupted):
        tune(at, "json", Heard(lambda heard: len(heard.of("round")) == 1), rounds=2)
    tune(at, "json", rounds=1)
    assert broken.ended == ["failed", "stopped", "done"]


def test_a_reply_that_is_refused_later_does_not_count_in_the_clients_loss():
    keeps, tracked = Mock(), Tracked(Silent(), [], offline=True)
    tracked._running = {"keeps": keeps}
    reply = {"round": 1, "n": 9, "bytes_up": 1, "bytes_down": 1, "seconds": 0.1, "rss": 1}
    tracked.event(ClientReply(client=0, loss=2.0, status="ok", reason="", **reply))
    tracked.event(ClientReply(client=1, loss=1e9, status="ok", reason="", **reply))
    tracked.event(ClientReply(client=1, loss=1e9, status="refused", reason="too far", **reply))
    done = {"bytes_up": 2, "bytes_down": 2, "bytes_total": 4, "seconds": 0.2, "rss": 1}
    tracked.event(RoundDone(round=1, clients=2, accepted=1, report={"drift": 0.5}, **done))
    tracked.finish("done")
    (logged,) = (told.args[0] for told in keeps.log.call_args_list)
    assert (logged["clients/loss"], logged["method/drift"], logged["round/accepted"]) == (2.0, 0.5, 1.0)


# Heavy ones: pip install 'fleetune[wandb]'


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_keeps_the_losses_of_the_run_in_its_offline_folder(at):
    wandb = pytest.importorskip("wandb", reason="pip install 'fleetune[wandb]'")
    heard = Heard()
    run = tune(at, "wandb", heard)
    assert not heard.notes
    wandb.teardown()  # its own process has written everything
    (file,) = (run.folder / "trackers" / "wandb").glob("offline-run-*/*.wandb")
    assert run.digest.encode() in file.read_bytes()
