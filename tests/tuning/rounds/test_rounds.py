"""The round loop: quorum, kinds, rounds that ruin the model, early stop and the best round, kills."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import BASE, Averaging, Devices, Killed, State, honest, play, start, told, with_liars

import fleetune
from command_line import FEW
from fleetune import Silent
from fleetune.common.events import Recorded, RoundDone, as_dict
from fleetune.errors import FleetError, RecipeError, StorageError
from fleetune.models import tiny_llama
from fleetune.runs.rundir import RunDir, at, checkpoints, create, events, listing, status_of
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import MEAN, Rule
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode
from fleetune.tuning.methods import Reply
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.result.finished import TuneResult
from fleetune.tuning.rounds import checkpoint as courses
from fleetune.tuning.rounds import rounds
from fleetune.tuning.rounds.checkpoint import Course
from fleetune.tuning.rounds.fleets import Answer
from fleetune.tuning.rounds.rounds import Hooks, ModelLostError, Outcome, RoundPlan
from fleetune.tuning.rounds.simulated_fleet import LocalFleet
from fleetune.tuning.run.resume import resume


@pytest.mark.parametrize(("quorum", "moves"), [(6, True), (7, False)])
def test_under_the_quorum_the_model_stays(tmp_path, quorum, moves):
    """Six good replies: enough for a quorum of six, too few for one of seven."""
    bad = with_liars(lambda r, c, w: told(w, n=99), 0, 1)
    played = play(tmp_path, Devices(bad), quorum=quorum)
    assert played.state.tensors["w"].any() == moves
    (done,) = (e for e in played.events if isinstance(e, RoundDone))
    assert done.accepted == 6


@pytest.mark.parametrize(
    ("wanted", "given"),
    [((0, 0, 1), (0, 0, 0)), ((0, 1), (0, 0)), ((0, 1, 1), (0, 1, 1)), ((1, 2, 2), (0, 2, 2)), ((1,), (0,))],
)
def test_a_kind_of_work_that_one_device_alone_has_is_not_given(wanted, given):
    assert rounds.of_two(dict(enumerate(wanted))) == dict(enumerate(given))


@pytest.mark.parametrize(("times", "ordered"), [(math.inf, [0, 1]), (1.0, [0, 0])])
def test_where_rows_are_claimed_a_round_orders_no_lone_kind(times, ordered, tmp_path):
    method = methods.make("fedkseed", {"K": 8, "tau": 3, "backprop": 0.5})
    asked: list[dict[int, bytes]] = []

    class Fleet(Devices):
        def kind(self, client: int) -> int:
            return client % 2

        def ask(self, round: int, clients: Any, message: Any, goal: int = 0) -> Iterator[Answer]:
            asked.append(dict(message))
            yield from (Answer(c, c, None, "failed", "", 0.0, 0) for c in clients)

    with create(tmp_path, "fedkseed", "toy") as run:
        plan = RoundPlan(1, 1.0, 1, 7, 1, BASE, rule=Rule(times=times))
        hooks = Hooks(lambda: None, lambda state: {}, lambda event: None)
        with pytest.raises(FleetError):
            rounds.run(method, Fleet(honest, clients=2), method.init(tiny_llama(), 7), run, plan, hooks)
    payloads = [decode(asked[0][c]).payload for c in (0, 1)]
    assert [int(p.scalars.get("backprop") is True) for p in payloads] == ordered


def worst(state: State) -> dict[str, float]:
    """A loss that is least at 1; not finite beyond 1e6, as a network's is."""
    top = float(np.abs(state.tensors["w"] - 1).max())
    return {"loss": top if top < 1e6 else float("nan")}


def test_a_model_that_is_not_finite_is_never_taken(tmp_path):
    @dataclass(frozen=True)
    class Overflows(Averaging):
        def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
            new = super().aggregate(state, replies, rule)
            return new._replace(scale=new.scale * 1e200) if new is not state else new

    run = create(tmp_path, "averaging", "toy")
    with pytest.raises(ModelLostError, match="no finite model; the last good round is 1") as lost:
        play(run, Devices(honest), Overflows(), rounds=4)
    assert lost.value.exit_code == 4
    assert (lost.value.round, lost.value.state.scale) == (1, 1e200)
    assert [r for r, _ in checkpoints(run.path)] == [0, 1]


def test_a_loss_that_is_not_finite_ends_the_run_with_the_model_before(tmp_path):
    far = lambda r, c, w: told(w + 1e7) if r == 3 else honest(r, c, w)  # noqa: E731
    run = create(tmp_path, "averaging", "toy")
    said = "loss after round 3 is not finite; the last good round is 2"
    with pytest.raises(ModelLostError, match=said) as lost:
        play(run, Devices(far), rounds=5, evaluate=worst)
    assert worst(lost.value.state)["loss"] < 1
    assert [r for r, _ in checkpoints(run.path)][-1] == 2


def newest(run: RunDir) -> np.ndarray:
    kept, _ = courses.unpack(courses.decode(checkpoints(run.path)[-1][1].read_bytes()), start())
    return kept.tensors["w"]


def test_replies_that_are_not_finite_for_the_models_own_sake_bring_back_the_one_before(tmp_path):
    """Round 2 is ruined by a majority; in round 3 the honest ones fail on it, and the liar alone must not go on."""

    def reply(round: int, client: int, w: np.ndarray) -> Payload:
        if np.abs(w).max() > 1e3 and client:
            return told(np.full(w.shape, np.nan))
        return told(w + 1e4) if round == 2 else honest(round, client, w)

    run = create(tmp_path, "averaging", "toy")
    with pytest.raises(ModelLostError, match=r"7 of 8 replies of round 3 .* last good round is 1") as lost:
        play(run, Devices(reply), rounds=5, evaluate=worst)
    good = play(tmp_path, Devices(reply), rounds=1).state
    assert np.array_equal(lost.value.state.tensors["w"], good.tensors["w"])
    assert checkpoints(run.path)[-1][0] == 1
    assert np.array_equal(newest(run), good.tensors["w"])
    # what happened is on record
    assert {e["round"] for e in events(run.path) if e["event"] == "client"} == {1, 2, 3}


def test_replies_that_are_not_finite_though_the_model_is_good_leave_it(tmp_path):
    """The few that are finite are not believed either; after `PATIENCE` such rounds the run ends."""

    def reply(round: int, client: int, w: np.ndarray) -> Payload:
        broken = client > 2 and round > 1
        return told(np.full(w.shape, np.inf)) if broken else honest(round, client, w)

    run = create(tmp_path, "averaging", "toy")
    with pytest.raises(FleetError, match="most replies are not finite, 3 rounds in a row") as error:
        play(run, Devices(reply), rounds=9, evaluate=worst)
    assert not isinstance(error.value, ModelLostError)
    good = play(tmp_path, Devices(reply), rounds=1).state
    assert np.array_equal(newest(run), good.tensors["w"])
    ruined = Devices(lambda round, client, w: told(np.full(w.shape, np.inf)))
    with pytest.raises(FleetError, match="1 round in a row; the first of round 1") as error:
        play(tmp_path / "first", ruined, rounds=9, evaluate=worst)
    assert "--set lr=auto" in str(error.value.hint)


@pytest.mark.parametrize(("clients", "broken", "error"), [(1, 1, 0.0), (2, 1, 0.0), (4, 3, 1.0)])
def test_neither_few_replies_that_are_not_finite_nor_noise_withdraw_a_round(clients, broken, error, tmp_path):
    """One device's NaN ended the run of all, and a round was withdrawn for 0.001 of its loss."""

    def reply(round: int, client: int, w: np.ndarray) -> Payload:
        lost = round == 3 and client < broken
        return told(np.full(w.shape, np.nan)) if lost else honest(round, client, w)

    def evaluate(state: State) -> dict[str, float]:
        return {"loss": 1.0 + 0.01 * float(state.tensors["w"].mean()), "change_error": error}

    run = create(tmp_path, "averaging", "toy")
    play(run, Devices(reply, clients), rounds=4, evaluate=evaluate)
    assert [r for r, _ in checkpoints(run.path)][-1] == 4


def tuned(out: Path, rounds_: int, **more: Any) -> TuneResult:
    rows = [{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(12)]
    few = FEW | {"clients": 3, "rounds": rounds_, "held_out": 3, "out": out, "offline": True} | more
    settings = {"r": 2, "steps": 1, "lr": 1e-2}
    return fleetune.tune(tiny_llama(), rows, method="fedit", settings=settings, **few)


def test_a_lost_run_leaves_the_result_of_its_last_good_round_and_can_go_on(tmp_path, monkeypatch):
    """A majority lies in round 2, so that everybody fails in round 3: what is left is what round 1 gave."""

    work = LocalFleet._work

    def lying(self: LocalFleet, client: int, key: int, message: bytes) -> bytes:
        true = decode(work(self, client, key, message))
        arrays = {n: np.full_like(a, 1e9) for n, a in true.payload.arrays.items()}
        false = Message(true.round, true.base, Payload(arrays, true.payload.scalars))
        return encode(false if true.round == 2 else true)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFleet, "_work", lying)
        with pytest.raises(ModelLostError, match="the last good round is 1") as lost:
            tuned(tmp_path / "lost", 4)
    assert lost.value.exit_code == 4
    (run,) = listing(tmp_path / "lost")
    once = tuned(tmp_path / "once", 1)
    assert [r for r, _ in checkpoints(run)][-1] == 1
    assert status_of(run).startswith("failed: ")
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (once.folder / weights).read_bytes()
    assert resume(run, Silent(), offline=True).digest == tuned(tmp_path / "whole", 4).digest


FELL_THEN_ROSE = (9.0, 7.0, 5.0, 6.0, 4.0, 4.5, 4.0, 8.0, 9.0, 3.0, 2.0)  # by round; 4 is the best until 9


def counted(
    folder: Path, *, losses: Any = FELL_THEN_ROSE, touch: Any = lambda what: None, **plan: Any
) -> Outcome:
    """Run or resume; `touch` is called before everything that is written."""
    begin, given = State({"w": np.zeros(1, np.float32)}), {"patience": 3, "keep_best": True} | plan
    with at(folder) as run:

        def evaluate(state: State) -> dict[str, float]:
            return {"loss": losses[int(state.tensors["w"][0])]}

        def emit(event: Recorded) -> None:
            touch(event.event)
            run.record(as_dict(event))

        given = {"rounds": len(losses) - 1, "participation": 1.0, "quorum": 1, "eval_every": 1} | given
        plan = RoundPlan(**given, seed=7, base=BASE)
        hooks = Hooks(lambda: {"loss": losses[0]}, evaluate, emit)
        return rounds.run(Averaging(), Devices(lambda r, c, w: told(w + 1), 1), begin, run, plan, hooks)


def test_the_run_stops_and_the_best_round_is_the_result(tmp_path):
    found = counted(tmp_path / "a")
    # 4.5, an equal 4.0 and 8.0 are no better
    assert (found.last, found.round, found.state.tensors["w"][0]) == (7, 4, 4)
    assert found.course == Course(4, 4.0, 3)
    last = counted(tmp_path / "b", keep_best=False)
    assert (last.last, last.round, last.state.tensors["w"][0]) == (7, 7, 7)
    assert not courses.best_files(tmp_path / "b")
    longer = counted(tmp_path / "c", patience=5)
    assert (longer.last, longer.round) == (10, 10)
    assert counted(tmp_path / "d", patience=0).last == 10
    rising = counted(tmp_path / "e", losses=(1.0, 2.0, 3.0, 4.0, 5.0))
    assert (rising.last, rising.round, rising.state.tensors["w"][0]) == (3, 0, 0)  # the start counts
    # 9 5(2).. : rounds 3, 6, 9 and the last are evaluated
    sparse = counted(tmp_path / "f", patience=2, eval_every=3)
    assert (sparse.last, sparse.round) == (10, 10)


@pytest.mark.parametrize("best", [True, False])
def test_a_kill_at_any_point_changes_nothing(best, tmp_path, monkeypatch):
    left = [10**9]

    def touch(what: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    def checked(function: Callable[..., None]) -> Callable[..., None]:
        def called(*args: Any) -> None:
            touch("")
            function(*args)

        return called

    for where, name in ((courses, "keep_best"), (courses, "forget_bests"), (RunDir, "checkpoint")):
        monkeypatch.setattr(where, name, checked(getattr(where, name)))
    losses = (5.0, 4.0, 4.5, 3.0, 3.5, 3.25, 1.0)
    again = partial(counted, patience=2, keep_best=best, losses=losses)
    whole = again(tmp_path / "whole", touch=touch)
    points = 10**9 - left[0]
    assert points > 20
    for point in range(1, points + 1, 2):
        folder = tmp_path / str(point)
        left[0] = point
        with pytest.raises(Killed):
            again(folder, touch=touch)
        left[0] = 10**9
        found = again(folder, touch=touch)
        assert (found.round, found.last, found.course) == (whole.round, whole.last, whole.course), point
        assert np.array_equal(found.state.tensors["w"], whole.state.tensors["w"])
        assert left_in(folder) == left_in(tmp_path / "whole")
    # resumed when it is over: not one round more
    assert again(tmp_path / "whole").last == whole.last


def left_in(folder: Path) -> tuple[list[int], list[tuple[int, float]]]:
    """(the best rounds whose states are kept, the rounds that were evaluated with their losses)."""
    told = [(e["round"], e["loss"]) for e in events(folder) if e["event"] == "eval"]
    return [n for n, _ in courses.best_files(folder)], told


def test_few_states_are_kept_however_often_a_round_is_the_best(tmp_path):
    falling = tuple(float(20 - r) for r in range(15))
    most = 0

    def touch(what: str) -> None:
        nonlocal most
        most = max(most, len(courses.best_files(tmp_path)))

    counted(tmp_path, losses=falling, touch=touch)
    assert most <= 3
    assert len(checkpoints(tmp_path)) == 2
    assert all(p.stat().st_mode & 0o077 == 0 for _, p in courses.best_files(tmp_path))


def test_a_damaged_best_round_is_found_before_any_work(tmp_path):
    assert counted(tmp_path, patience=1, losses=(3.0, 2.0, 2.5, 2.6)).round == 1
    (_, file), *_ = courses.best_files(tmp_path)[-1:]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(StorageError, match="is usable"):
        counted(tmp_path, patience=1, losses=(3.0, 2.0, 2.5, 2.6))


@pytest.mark.parametrize(
    ("losses", "result"),
    [((9.0, 5.0, 6.0, math.nan), 1), ((9.0, 9.5, math.nan), 0), ((9.0, 5.0, 4.0, math.nan), 2)],
)
def test_a_run_that_loses_its_model_gives_its_best_round(losses, result, tmp_path):
    with pytest.raises(rounds.ModelLostError) as lost:
        counted(tmp_path, losses=losses)
    plan = RoundPlan(len(losses) - 1, 1.0, 1, 7, 1, BASE, keep_best=True)
    last = len(losses) - 2
    with at(tmp_path) as run:
        rounds.keep_best_of(lost.value, run, replace(plan, keep_best=False))
        assert lost.value.round == last
        rounds.keep_best_of(lost.value, run, plan)
    assert (lost.value.round, int(lost.value.state.tensors["w"][0])) == (result, result)
    others = {0: "none was better than the start", 1: "the best is 1"}
    assert str(lost.value).endswith(others.get(result, f"the last good round is {last}"))


def test_without_evaluated_rounds_there_is_no_best():
    for more in ({"patience": 2}, {"keep": "best"}):
        recipe = recipes.make({"model": "m", "data": "d", "method": "mezo", "eval_every": 0, **more})
        with pytest.raises(RecipeError, match="eval_every = 0"):
            prepare.check(recipe)
