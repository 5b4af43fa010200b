# SPDX-License-Identifier: Apache-2.0
"""Replies that come after their round: discounted, along their own directions, exact in the ledger, and resumed bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import contract_harness as harness
import numpy as np
import pytest

from fleetune import models
from fleetune.common.events import ClientReply, Recorded, as_dict
from fleetune.errors import RecipeError
from fleetune.evaluation.losses import pad_id
from fleetune.runs.rundir import RunDir, create
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, Payload, encode
from fleetune.tuning.methods import Reply
from fleetune.tuning.methods._zeroth import draw
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.rounds.fleets import OLDEST, Answer
from fleetune.tuning.rounds.late import LateReplies
from fleetune.tuning.rounds.replies import Replies, Round
from fleetune.tuning.rounds.rounds import Hooks, RoundPlan, run, sample
from fleetune.tuning.rounds.simulated_fleet import Faults, LocalFleet

BASE = b"12345678"
CASES: dict[str, dict[str, Any]] = {
    "mezo": {"K": 8, "tau": 4},
    "zosgd": {"K": 8, "tau": 4},
    "onebyte": {"K": 8, "directions": 4},
    "fedkseed": {"K": 16, "tau": 4},
    "fedkseed sums": {"K": 16, "tau": 4, "wire": "sums"},
    "fedkseed pro": {"K": 16, "tau": 4, "pro": True},
    "fedkseed pool": {"K": 16, "tau": 4, "epoch_rounds": 1},
    "fedkseed bp": {"K": 16, "tau": 4, "backprop": 1.0},
}


def answer_of(method: Any, state: Any, client: int) -> Payload:
    """What a client replies whose steps are a few hundred units."""
    _, spec = method.kinds(state)[method.kind_of(client)]
    rng, arrays = np.random.default_rng(client), {}
    for name, (kind, shape) in spec.arrays.items():
        size = [abs(n) for n in shape if n is not None]
        arrays[name] = rng.integers(1, 90, size).astype(kind)
    if "sums" in arrays:  # sums that a walk along the drawn directions gives
        arrays["sums"] = (
            np.bincount(draw(100 + client, 4, method.probabilities(state), 16), minlength=16).astype(np.int32)
            * 50
        )
    scalars = {"n": 5 + client, "loss": 1.0, "steps": 4}
    return Payload(arrays, {name: scalars[name] for name in spec.scalars})


def entries(state: Any, round: int) -> dict[int, int]:
    ledger = state.ledger
    of_round = ledger.rounds == round
    return dict(zip(ledger.ids[of_round].tolist(), ledger.coefficients[of_round].tolist(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_late_reply_steps_along_its_own_directions_and_counts_less(case: str) -> None:
    """Alone in its round, it gives what it would have given in its own, times 1 / sqrt(1 + late), rounded once."""
    method = methods.make(case.split()[0], CASES[case])
    first = method.init(models.tiny_llama(), 7)
    on_time = [Reply(c, 100 + c, answer_of(method, first, c)) for c in (0, 1)]
    state = method.aggregate(first, on_time)
    for late in (1, 2, 3):
        state = method.aggregate(state, iter(()))
        reply = Reply(3, 103, answer_of(method, first, 3), late, first)
        then = entries(method.aggregate(first, [reply._replace(late=0, stood_on=None)]), 1)
        now = entries(method.aggregate(state, [reply]), state.round + 1)
        discount = 1 / math.sqrt(1 + late)
        assert then
        assert now.keys() <= then.keys()
        assert all(abs(now.get(id, 0) - c * discount) <= 0.5 + 1e-6 for id, c in then.items())
    both = method.aggregate(state, [Reply(0, 100, answer_of(method, state, 0)), reply])
    method.broadcast(both)  # whose sums have room for every direction
    assert both.round == state.round + 1


@pytest.mark.parametrize("case", CASES)
def test_a_reply_on_time_is_as_it_ever_was(case: str) -> None:
    """The state that a reply stood on is the present one, given or not."""
    method = methods.make(case.split()[0], CASES[case])
    state = method.init(models.tiny_llama(), 7)
    replies = [Reply(c, 100 + c, answer_of(method, state, c)) for c in range(3)]
    plain = method.aggregate(state, replies)
    given = method.aggregate(state, [r._replace(stood_on=state) for r in replies])
    assert harness.equal_states(plain, given)


@pytest.mark.parametrize(
    ("method", "values", "why"),
    [
        ("fedit", {}, "of no use to this method"),
        ("fwdllm", {}, "of no use to this method"),
        ("onebyte", {"wire": "sign"}, "takes a majority once"),
        ("fedkseed", {"epoch_rounds": 2, "server": "adam"}, "moments of the present pool"),
    ],
)
def test_where_late_replies_cannot_be_used_it_is_said_before_any_work(
    method: str, values: dict[str, Any], why: str
) -> None:
    made = {"model": "m", "data": "d", "method": method, "set": values, "late": "use"}
    with pytest.raises(RecipeError, match=why):
        prepare.check(recipes.make(made))
    prepare.check(recipes.make(made | {"late": "drop"}))


def test_a_rule_that_compares_replies_takes_none_of_another_round() -> None:
    made = {"model": "m", "data": "d", "method": "mezo", "aggregation": "median"}
    prepare.check(recipes.make(made))
    with pytest.raises(RecipeError, match="compares the replies of one round"):
        prepare.check(recipes.make(made | {"late": "use"}))


def test_a_reply_to_a_round_that_is_forgotten_is_refused(tmp_path: Path) -> None:
    method = methods.make("mezo", CASES["mezo"])
    state = method.init(models.tiny_llama(), 7)
    events: list[ClientReply] = []
    past = {5: Round(5, BASE, [9] * 9, state)}
    with create(tmp_path, "mezo", "tiny") as folder:
        taken = Replies(method, Round(7, BASE, [9] * 9, state), folder, events.append, past=past)

        def answer(client: int, round: int, late: int) -> Answer:
            data = encode(Message(round, BASE, answer_of(method, state, client)))
            return Answer(client, 1, data, "ok", "", 0.0, 0, late)

        with taken:
            taken.gather(iter([answer(0, 7, 0), answer(1, 5, 2), answer(2, 6, 1), answer(3, 7, 2)]))
    assert (taken.asked, taken.accepted) == (1, 2)
    assert [(e.status, e.late) for e in events] == [("ok", None), ("ok", 2), ("refused", 1), ("refused", 2)]
    assert "reply is for round 6, whose replies count no longer" in events[2].reason
    assert "reply is for round 7, this is round 5" in events[3].reason


# In the simulation ------------------------------------------------------------------------------------


def trained(
    name: str, folder: Path, rounds: int, *, going_on: RunDir | None = None, over: float = 1.0
) -> tuple[Any, RunDir, list[dict[str, Any]]]:
    """A run of some rounds with slow clients whose late replies are used, in a new process's state of things."""
    model = models.tiny_llama()
    method = methods.make(name.split()[0], {**CASES[name], "batch_size": 1, "tau": 1})
    rows, events = harness.rows(model), list[dict[str, Any]]()
    opened = going_on or create(folder, name.split()[0], "tiny")
    faults = Faults(stragglers=0.5, deadline=0.0 if over > 1 else 3.0)

    def emit(event: Recorded) -> None:
        events.append(as_dict(event))
        opened.record(as_dict(event))

    with opened:
        fleet = LocalFleet(
            model,
            method,
            [rows[c::8] for c in range(8)],
            7,
            pad_id(model),
            faults,
            late=LateReplies(opened.path / "late"),
        )
        plan = RoundPlan(rounds, 0.75, 1, 7, 0, harness.base_of(model), over_selection=over, late=OLDEST)
        hooks = Hooks(lambda: None, lambda state: {"loss": 1.0}, emit)
        state, *_ = run(method, fleet, method.init(model, harness.key()), opened, plan, hooks)
    return state, opened, events


@pytest.mark.parametrize(("name", "over"), [("mezo", 1.0), ("fedkseed pool", 1.3)])
def test_a_run_with_late_replies_goes_on_bit_for_bit(name: str, over: float, tmp_path: Path) -> None:
    straight, _, events = trained(name, tmp_path / "straight", 6, over=over)
    _, begun, _ = trained(name, tmp_path / "cut", 3, over=over)
    (begun.path / "late" / "client-000001.round-000004.due-000005").write_bytes(b"what a kill left")
    resumed, _, _ = trained(name, tmp_path, 6, going_on=RunDir(begun.path), over=over)
    assert resumed.ledger.fingerprint() == straight.ledger.fingerprint()
    clients = [e for e in events if e["event"] == "client"]
    came = [(e["round"], e["client"], e["late"]) for e in clients if e.get("late")]
    was = {(e["round"], e["client"]) for e in clients if e["status"] == "late"}
    assert came
    assert all((round - late, client) in was for round, client, late in came)
    between = {(r, c) for round, c, late in came for r in range(round - late + 1, round + 1)}
    assert not [e for e in clients if (e["round"], e["client"]) in between and not e.get("late")]
    done = [e for e in events if e["event"] == "round"]
    assert all(
        e["clients"] == sum(c["round"] == e["round"] and not c.get("late") for c in clients) for e in done
    )


def test_the_round_is_over_when_enough_have_replied() -> None:
    faults = Faults(stragglers=0.5)
    clients = range(20)
    found = list(faults.outcomes(3, 1, clients, 12))
    assert [c for c, _, _ in found] == list(clients)
    on_time = {c for c, status, _ in found if status == "ok"}
    late = {c for c, status, reason in found if (status, reason) == ("late", "12 others were faster")}
    assert (len(on_time), len(late)) == (12, 8)
    assert max(faults.slowness(3, 1, c) for c in on_time) <= min(faults.slowness(3, 1, c) for c in late)
    assert {c for c, s, _ in faults.outcomes(3, 2, clients, 12) if s == "ok"} != on_time
    assert all(status == "ok" for _, status, _ in faults.outcomes(3, 1, clients, 0))


def test_so_many_more_are_asked_than_are_needed() -> None:
    clients = range(100)
    assert len(sample(clients, 0.1, 7, 1)) == 10
    assert len(sample(clients, 0.1, 7, 1, 1.3)) == 13
    assert len(sample(clients, 0.1, 7, 1, 1.31)) == 14
    assert len(sample(clients, 0.9, 7, 1, 1.3)) == 100
    assert len(sample(range(3), 0.4, 7, 1, 1.3)) == 2
    assert len(sample(clients[:60], 0.1, 7, 1, busy=40)) == 10
    assert len(sample(clients[:8], 0.1, 7, 1, 1.3, busy=92)) == 8
    assert sample([], 0.4, 7, 1, 1.3) == []
    assert set(sample(clients, 0.1, 7, 1)) < set(sample(clients, 0.1, 7, 1, 1.3))


def test_held_replies_come_in_their_round_and_again_after_a_rewind(tmp_path: Path) -> None:
    late = LateReplies(tmp_path / "late")
    late.hold(4, 1, 3, b"four")
    late.hold(2, 1, 2, b"two")
    late.hold(9, 2, 3, b"nine")
    assert sorted(late.busy) == [2, 4, 9]
    assert list(late.come(2)) == [(2, 1, b"two")]
    assert sorted(late.busy) == [4, 9]
    assert list(late.come(3)) == [(4, 1, b"four"), (9, 2, b"nine")]
    for again in (late, LateReplies(tmp_path / "late")):
        again.rewind(2)
        assert list(again.come(3)) == [(4, 1, b"four"), (9, 2, b"nine")]
    again.rewind(1)
    assert list(again.come(3)) == [(2, 1, b"two"), (4, 1, b"four")]
    again.forget_before(2)
    assert [p.name for p in (tmp_path / "late").iterdir()] == ["client-000004.round-000001.due-000003"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"late": "use"}, ""),
        ({"stragglers": 0.3}, "does nothing without a deadline"),
        ({"stragglers": 0.3, "over_selection": 1.3, "participation": 0.5}, ""),
        ({"over_selection": 1.3}, "does nothing where all clients are asked"),
        ({"over_selection": 0.5, "participation": 0.5}, "over_selection"),
        ({"late": "later"}, "late"),
    ],
)
def test_options_that_do_nothing_are_refused(options: dict[str, Any], problem: str) -> None:
    def check() -> None:
        prepare.check(recipes.make({"model": "m", "data": "d", "method": "mezo", **options}))

    if not problem:
        check()
        return
    with pytest.raises(RecipeError, match=problem):
        check()
