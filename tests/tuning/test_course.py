# SPDX-License-Identifier: Apache-2.0
"""Early stop and the best round: the same bits after a kill at any point, and few files beside the checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import fleetune
from fleetune import models
from fleetune.common.events import Recorded, as_dict
from fleetune.errors import MessageError, RecipeError, StorageError
from fleetune.runs.listener import Silent
from fleetune.runs.rundir import RunDir, at, checkpoints, events
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import MEAN, Rule
from fleetune.tuning.exchange.messages import Message, Payload, ReplySpec, encode
from fleetune.tuning.methods import Reply
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.rounds import checkpoint as courses
from fleetune.tuning.rounds import rounds
from fleetune.tuning.rounds.checkpoint import Course
from fleetune.tuning.rounds.fleets import Answer
from fleetune.tuning.rounds.rounds import Hooks, Outcome, RoundPlan

BASE = bytes(8)
FELL_THEN_ROSE = (9.0, 7.0, 5.0, 6.0, 4.0, 4.5, 4.0, 8.0, 9.0, 3.0, 2.0)  # by round; 4 is the best until 9


class State(NamedTuple):
    tensors: dict[str, np.ndarray]


class Counting(methods.Method):
    """A method whose one number is the round."""

    init = local = apply = None  # type: ignore[assignment]  # a server alone

    def broadcast(self, state: State) -> Payload:
        return Payload(state.tensors)

    def expects(self, state: State) -> ReplySpec:
        return ReplySpec({"w": ("float32", (1,))}, {"n": (int, 1, 10), "loss": (float, -1e9, 1e9)})

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        return State({"w": state.tensors["w"] + 1}) if list(replies) else state


class OneDevice:
    rows = (1,)
    busy = 0

    def present(self) -> Sequence[int]:
        return [0]

    def kind(self, client: int) -> int:
        return 0

    def ask(self, round: int, clients: Sequence[int], message: Any, goal: int = 0) -> Iterator[Answer]:
        reply = Payload({"w": np.zeros(1, np.float32)}, {"n": 1, "loss": 1.0})
        yield Answer(0, 1, encode(Message(round, BASE, reply)), "ok", "", 0.0, 1)

    def kept(self) -> Mapping[int, tuple[int, int]]:
        return {}

    def check_kept(self, stated: object) -> None: ...
    def heard(self, reply: object) -> None: ...
    def rewind(self, round: int) -> None: ...
    def forget_before(self, round: int) -> None: ...


class Killed(BaseException):
    pass


def play(
    folder: Path,
    patience: int = 3,
    *,
    best: bool = True,
    losses: Sequence[float] = FELL_THEN_ROSE,
    every: int = 1,
    touch: Callable[[str], None] = lambda what: None,
) -> Outcome:
    """Run or resume; `touch` is called before everything that is written."""
    start = State({"w": np.zeros(1, np.float32)})
    with at(folder) as run:

        def evaluate(state: State) -> dict[str, float]:
            return {"loss": losses[int(state.tensors["w"][0])]}

        def emit(event: Recorded) -> None:
            touch(event.event)
            run.record(as_dict(event))

        plan = RoundPlan(len(losses) - 1, 1.0, 1, 7, every, BASE, patience=patience, keep_best=best)
        hooks = Hooks(lambda: {"loss": losses[0]}, evaluate, emit)
        return rounds.run(Counting(), OneDevice(), start, run, plan, hooks)  # type: ignore[arg-type]


def test_the_run_stops_and_the_best_round_is_the_result(tmp_path: Path) -> None:
    found = play(tmp_path / "a")
    assert (found.last, found.round, found.state.tensors["w"][0]) == (
        7,
        4,
        4,
    )  # 4.5, an equal 4.0 and 8.0 are no better
    assert found.course == Course(4, 4.0, 3)
    last = play(tmp_path / "b", best=False)
    assert (last.last, last.round, last.state.tensors["w"][0]) == (7, 7, 7)
    assert not courses.best_files(tmp_path / "b")
    longer = play(tmp_path / "c", patience=5)
    assert (longer.last, longer.round) == (10, 10)
    assert play(tmp_path / "d", patience=0).last == 10
    rising = play(tmp_path / "e", losses=(1.0, 2.0, 3.0, 4.0, 5.0))
    assert (rising.last, rising.round, rising.state.tensors["w"][0]) == (3, 0, 0)  # the start counts
    sparse = play(tmp_path / "f", patience=2, every=3)  # 9 5(2).. : rounds 3, 6, 9 and the last are evaluated
    assert (sparse.last, sparse.round) == (10, 10)


@pytest.mark.parametrize("best", [True, False])
def test_a_kill_at_any_point_changes_nothing(
    best: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [10**9]

    def touch(what: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    keep, forget, write = courses.keep_best, courses.forget_bests, RunDir.checkpoint

    def checked(function: Callable[..., None]) -> Callable[..., None]:
        def called(*args: Any) -> None:
            touch("")
            function(*args)

        return called

    monkeypatch.setattr(courses, "keep_best", checked(keep))
    monkeypatch.setattr(courses, "forget_bests", checked(forget))
    monkeypatch.setattr(RunDir, "checkpoint", checked(write))
    losses = (5.0, 4.0, 4.5, 3.0, 3.5, 3.25, 1.0)
    whole = play(tmp_path / "whole", 2, best=best, touch=touch, losses=losses)
    points = 10**9 - left[0]
    assert points > 20
    for point in range(1, points + 1):
        folder = tmp_path / str(point)
        left[0] = point
        with pytest.raises(Killed):
            play(folder, 2, best=best, touch=touch, losses=losses)
        left[0] = 10**9
        again = play(folder, 2, best=best, touch=touch, losses=losses)
        assert (again.round, again.last, again.course) == (whole.round, whole.last, whole.course), point
        assert np.array_equal(again.state.tensors["w"], whole.state.tensors["w"])
        assert [n for n, _ in courses.best_files(folder)] == [
            n for n, _ in courses.best_files(tmp_path / "whole")
        ]
        told = [[e for e in events(f) if e["event"] == "eval"] for f in (folder, tmp_path / "whole")]
        assert next([(e["round"], e["loss"]) for e in of] for of in told) == [
            (e["round"], e["loss"]) for e in told[1]
        ]
    assert (
        play(tmp_path / "whole", 2, best=best, losses=losses).last == whole.last
    )  # resumed when it is over: not one round more


def test_few_states_are_kept_however_often_a_round_is_the_best(tmp_path: Path) -> None:
    falling = tuple(float(20 - r) for r in range(15))
    most = 0

    def touch(what: str) -> None:
        nonlocal most
        most = max(most, len(courses.best_files(tmp_path)))

    play(tmp_path, losses=falling, touch=touch)
    assert most <= 3
    assert len(checkpoints(tmp_path)) == 2
    assert all(p.stat().st_mode & 0o077 == 0 for _, p in courses.best_files(tmp_path))


def test_a_damaged_best_round_is_found_before_any_work(tmp_path: Path) -> None:
    found = play(tmp_path, patience=1, losses=(3.0, 2.0, 2.5, 2.6))
    assert found.round == 1
    (_, file), *_ = courses.best_files(tmp_path)[-1:]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(StorageError, match="is usable"):
        play(tmp_path, patience=1, losses=(3.0, 2.0, 2.5, 2.6))


@pytest.mark.parametrize(
    ("losses", "result"),
    [((9.0, 5.0, 6.0, math.nan), 1), ((9.0, 9.5, math.nan), 0), ((9.0, 5.0, 4.0, math.nan), 2)],
)
def test_a_run_that_loses_its_model_gives_its_best_round(
    losses: Sequence[float], result: int, tmp_path: Path
) -> None:
    with pytest.raises(rounds.ModelLostError) as lost:
        play(tmp_path, losses=losses)
    plan = RoundPlan(len(losses) - 1, 1.0, 1, 7, 1, BASE, keep_best=True)
    last = len(losses) - 2
    with at(tmp_path) as run:
        rounds.keep_best_of(lost.value, run, replace(plan, keep_best=False))
        assert lost.value.round == last
        rounds.keep_best_of(lost.value, run, plan)
    assert (lost.value.round, int(lost.value.state.tensors["w"][0])) == (result, result)
    said = {0: "none was better than the start", 1: "the best is 1"}.get(
        result, f"the last good round is {last}"
    )
    assert str(lost.value).endswith(said)


def test_a_course_through_json_and_back() -> None:
    for course in (Course(), Course(0, 4.25, 2), Course().after(1, None), Course(None, stale=3)):
        assert Course.from_json(course.to_json()) == course
    with pytest.raises(MessageError):
        Course.from_json("[1]")
    assert Course(1, 2.0, 0).after(2, float("nan")) == Course(1, 2.0, 1)


def test_without_evaluated_rounds_there_is_no_best() -> None:
    for more in ({"patience": 2}, {"keep": "best"}):
        recipe = recipes.make({"model": "m", "data": "d", "method": "mezo", "eval_every": 0, **more})
        with pytest.raises(RecipeError, match="eval_every = 0"):
            prepare.check(recipe)


@pytest.mark.parametrize(
    ("given", "kept"), [({}, "last"), ({"patience": 2}, "best"), ({"patience": 2, "keep": "last"}, "last")]
)
def test_patience_keeps_the_best_round_unless_told_otherwise(given: dict[str, Any], kept: str) -> None:
    assert recipes.make({"model": "m", "data": "d", "method": "mezo", **given}).keep == kept


# Whole runs -------------------------------------------------------------------------------------------


class StopAt(Silent):
    """Stops a run after a number of local steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self, client: int, step: int) -> None:
        self.steps -= 1

    @property
    def stop_requested(self) -> bool:
        return self.steps <= 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [("fedit", {"r": 2, "steps": 1, "lr": 2.0}), ("mezo", {"tau": 1, "lr": 3e-2, "K": 16})],
)
def test_a_run_of_either_kind_keeps_its_best_round_and_says_so(
    method: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, tmp_path / "tiny")
    rows = [{"instruction": f"count to {i}", "response": f"one to {i}"} for i in range(20)]
    Path("data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options: dict[str, Any] = {
        "clients": 2,
        "rounds": 9,
        "held_out": 6,
        "max_length": 48,
        "samples": 0,
        "device": "cpu",
        "patience": 2,
        "method": method,
        "settings": settings,
    }
    whole = fleetune.tune("tiny", "data.jsonl", **options)
    losses = dict(zip(whole.history["round"], whole.history["loss"], strict=True))
    best = min(losses, key=lambda r: losses[r])
    assert whole.done.best == best
    assert whole.done.stopped_early
    assert whole.done.rounds == best + 2 < 9
    assert whole.done.tuned["loss"] == losses[best]
    assert any("the result is the best of" in text and "stopped early" in text for text in whole.done.remarks)
    assert "the result is the best of" in whole.report.read_text()
    alone = fleetune.tune(
        "tiny", "data.jsonl", **(options | {"rounds": max(1, best), "patience": 0, "keep": "last"})
    )
    if best:
        assert alone.digest == whole.digest
    with pytest.raises(Exception, match="stopped"):
        fleetune.tune("tiny", "data.jsonl", out="other", listener=StopAt(2 * (best + 1)), **options)
    assert fleetune.resume_run("latest", out="other").digest == whole.digest
