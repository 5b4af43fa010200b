# SPDX-License-Identifier: Apache-2.0
"""Run the rounds of federated learning: sample, broadcast, local, aggregate, record, evaluate, checkpoint.

The same function for every method and every fleet.  It does not use the model: `evaluate` is passed in.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fleetune.common.display import counted
from fleetune.common.memory import rss
from fleetune.data import keyed_order
from fleetune.errors import FleetError
from fleetune.runs import rundir
from fleetune.runs.events import Recorded, RoundDone, round_evaluated
from fleetune.runs.rundir import KEEP, RunDir
from fleetune.seeds.noise import derive
from fleetune.tuning import checkpoint, methods
from fleetune.tuning.checkpoint import StandsOn, Totals
from fleetune.tuning.fleets import Fleet
from fleetune.tuning.messages import Message, Payload, encode
from fleetune.tuning.methods import Method
from fleetune.tuning.replies import Replies, Round
from fleetune.tuning.robust import MEAN, Rule

log = logging.getLogger(__name__)

PATIENCE = 3  # rounds in a row that fail as a whole before the run ends


class ModelLostError(FleetError):
    """A round has ruined the model: `state` is the one after `round`, the last good one."""

    def __init__(self, message: str, round: int, state: Any) -> None:
        super().__init__(
            f"{message}; the last good round is {round}",
            hint="its result and checkpoint are in the run folder; start anew with a lower lr, or set the method's clip",
        )
        self.round, self.state = round, state

    @property
    def page(self) -> str:
        """The section of the docs on errors of the fleet."""
        return FleetError("").page


@dataclass(frozen=True)
class RoundPlan:
    """The options of a recipe that the loop needs."""

    rounds: int
    participation: float
    quorum: int
    seed: int
    eval_every: int
    base: bytes  # first 8 bytes of the base digest
    stands_on: StandsOn | None = None  # what every checkpoint states of recipe, base and rows
    rule: Rule = MEAN  # how replies are combined
    over_selection: float = 1.0  # so many times the clients that are needed are asked
    late: int = 0  # rounds that a reply may come late and still count

    @property
    def kept(self) -> int:
        """Checkpoints that are kept: a reply that comes late is understood by the state that it stands on."""
        return KEEP + self.late


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop: `begin()` once before round 1, `evaluate(state)`, `emit(event)`.

    `resumed()` is called once where a run is taken up again, `note(text)` with what was lost of it.
    """

    begin: Callable[[], None]
    evaluate: Callable[[Any], Mapping[str, float]]
    emit: Callable[[Recorded], None]
    resumed: Callable[[], None] = lambda: None
    note: Callable[[str], None] = log.warning
    clock: Callable[[], float] = lambda: 0.0  # seconds of this sitting so far


def run(
    method: Method, fleet: Fleet, state: Any, run: RunDir, plan: RoundPlan, hooks: Hooks
) -> tuple[Any, Totals]:
    """Run (or resume) all rounds; return the state after the last, and the totals.

    A round counts when its checkpoint is written.  FleetError when every client failed in `PATIENCE` rounds in
    a row (or in all, of fewer); a resumed run counts anew, so that it gets past them.
    """
    run.keep = plan.kept
    last, state, totals = _start(run, fleet, state, plan, hooks)
    past = _past(run, fleet, state, plan, last)
    failures = 0
    for r in range(last + 1, plan.rounds + 1):
        began = time.monotonic()
        new, replies = _played(method, fleet, state, run, plan, hooks, r, past)
        failures = _failures(replies, failures, plan)
        totals.bytes_up += replies.bytes_up
        totals.bytes_down += replies.bytes_down
        totals.seconds += (seconds := time.monotonic() - began)
        hooks.emit(RoundDone(
            round=r, clients=replies.asked, accepted=replies.accepted, bytes_up=replies.bytes_up,
            bytes_down=replies.bytes_down, bytes_total=totals.bytes_up + totals.bytes_down,
            seconds=round(seconds, 3), rss=rss(), report=methods.report_of(method, new) or None,
        ))  # fmt: skip
        if r == plan.rounds or (plan.eval_every and r % plan.eval_every == 0):
            hooks.emit(evaluated := round_evaluated(r, hooks.evaluate(new)))
            if evaluated.loss is not None and not math.isfinite(evaluated.loss):
                raise ModelLostError(f"the model's loss after round {r} is not finite", r - 1, state)
        state = new
        if plan.late:
            past[r] = replies.round
            past.pop(r - plan.late, None)
        run.checkpoint(r, _encoded(r, state, _until_now(totals, hooks), plan, run, fleet))
        fleet.forget_before(r + 1 - plan.kept)
    return state, totals


def _past(run: RunDir, fleet: Fleet, like: Any, plan: RoundPlan, last: int) -> dict[int, Round]:
    """Return the rounds up to `last` whose replies may still come late, by number."""
    numbers = range(max(1, last + 1 - plan.late), last + 1)
    states = {r: checkpoint.state_of(run, r - 1, like) for r in numbers}
    return {r: Round(r, plan.base, fleet.rows, s, fleet.kind) for r, s in states.items() if s is not None}


def _start(run: RunDir, fleet: Fleet, state: Any, plan: RoundPlan, hooks: Hooks) -> tuple[int, Any, Totals]:
    """Return (the last round done, state, totals): those of the run's last checkpoint, or of a new run.

    A checkpoint whose client memories are gone or damaged gives way to the one before it, as a damaged one does.
    """

    def usable(data: bytes) -> Payload:
        payload = checkpoint.decode(data)
        fleet.check_kept(checkpoint.kept_in(payload))
        return payload

    totals = Totals()
    if (saved := run.restore(usable, hooks.note)) is None:
        if any(event["event"] == "round" for event in rundir.events(run.path)):
            hooks.note(f"{run.path} has no checkpoint left: the run begins anew")
        run.cut(-1)
        fleet.rewind(0)
        hooks.begin()
        run.checkpoint(0, _encoded(0, state, _until_now(totals, hooks), plan, run, fleet))
        return 0, state, totals
    last, payload = saved
    state, totals = checkpoint.unpack(payload, state)
    stated = checkpoint.stands_on(payload)
    if loss := run.cut(last, stated[1] if stated else None):
        hooks.note(loss)
    fleet.rewind(last)
    hooks.resumed()
    return last, state, totals


def _until_now(totals: Totals, hooks: Hooks) -> Totals:
    """Return the totals as a later sitting needs them: with the time of this one."""
    return replace(totals, wall=totals.wall + hooks.clock())


def _encoded(round: int, state: Any, totals: Totals, plan: RoundPlan, run: RunDir, fleet: Fleet) -> bytes:
    """Return the checkpoint of a round, with all that it stands on."""
    return checkpoint.encode(round, state, totals, plan.stands_on, run.metrics.tally, fleet.kept())


def _played(
    method: Method,
    fleet: Fleet,
    state: Any,
    run: RunDir,
    plan: RoundPlan,
    hooks: Hooks,
    r: int,
    past: Mapping[int, Round],
) -> tuple[Any, Replies]:
    """Return the state that a round gives, and its replies; `past` are the rounds whose replies may come late."""
    present = fleet.present()
    goal = share_of(len(present) + fleet.busy, plan.participation)
    chosen = sample(present, plan.participation, plan.seed, r, plan.over_selection, fleet.busy)
    kinds = {client: fleet.kind(client) for client in chosen}
    asked = Round(r, plan.base, fleet.rows, state, kinds.__getitem__)
    with Replies(method, asked, run, hooks.emit, plan.rule, past) as replies:
        coded = [encode(Message(r, plan.base, payload)) for payload, _ in replies.kinds]
        messages = {client: coded[kind] for client, kind in kinds.items()}
        replies.gather(fleet.ask(r, chosen, messages, goal if len(chosen) > goal else 0))
        _check_model(replies, run, hooks)
        return _aggregated(method, replies, plan), replies


def sample(
    clients: Sequence[int], participation: float, seed: int, round: int, over: float = 1.0, busy: int = 0
) -> Sequence[int]:
    """Return the clients of a round: a share of those, without repeats, in order; keyed by seed and round.

    At least one, unless there are none; `over` times as many as the share.  Of `busy` more, which cannot be asked now, the
    share is taken as well, so that a round has as many replies as without them.
    """
    count = min(len(clients), math.ceil(share_of(len(clients) + busy, participation) * over - 1e-9))
    order = keyed_order(derive(seed, "sample", round), 0, len(clients))
    return sorted(clients[i] for i in order[:count].tolist())


def share_of(clients: int, participation: float) -> int:
    """Return how many replies a round needs of so many clients; at least one, unless there are none."""
    return min(clients, max(1, round_half_up(clients * participation)))


def round_half_up(x: float) -> int:
    """Return the nearest integer, halves up."""
    return int(x + 0.5)


def _failures(replies: Replies, before: int, plan: RoundPlan) -> int:
    """Count failed rounds in a row, `before` and this one; FleetError when they are too many.

    A round fails when every client fails, or when more replies are not finite than are good.
    """
    all_failed = replies.failed >= replies.asked > 0 and not replies.accepted
    if not all_failed and not replies.mostly_not_finite:
        return before if not replies.accepted else 0
    if before + 1 >= min(PATIENCE, plan.rounds):
        what = "every client failed, " if not replies.accepted else "most replies are not finite, "
        raise FleetError(
            f"{what}{counted(before + 1, 'round')} in a row; the first of round {replies.round.number}: {replies.reason}",
            hint="see log.txt in the run folder; when the cause is gone, resume the run",
        )
    return before + 1


def _aggregated(method: Method, replies: Replies, plan: RoundPlan) -> Any:
    """Return the new state, or the old one where too few replies are good; ModelLostError when it is not finite."""
    number, state = replies.round.number, replies.round.state
    new = replies.aggregate()
    if replies.mostly_not_finite or replies.accepted < plan.quorum:
        log.warning(
            "round %d: %d good replies (quorum %d), %d not finite; the model stays",
            number, replies.accepted, plan.quorum, replies.not_finite,
        )  # fmt: skip
        return method.aggregate(state, iter(()))
    if not finite(new):
        raise ModelLostError(f"the replies of round {number} add up to no finite model", number - 1, state)
    return new


def finite(state: Any) -> bool:
    """Tell whether every number of a method's state is finite."""
    for value in state:
        parts = value.values() if isinstance(value, Mapping) else [value]
        for part in parts:
            if isinstance(part, np.ndarray | float) and not np.isfinite(part).all():
                return False
    return True


def _check_model(replies: Replies, run: RunDir, hooks: Hooks) -> None:
    """Raise ModelLostError when most replies are not finite because of the model that was sent.

    That it is the model, and not these clients, is seen on the validation rows: its loss is not finite, or higher than that
    of the round before.  The round before is then the last good one: its model is kept and the newer checkpoint removed.
    """
    if not replies.mostly_not_finite:
        return
    number = replies.round.number
    loss = hooks.evaluate(replies.round.state).get("loss", 0.0)
    before = checkpoint.state_of(run, number - 2, replies.round.state)
    if before is not None and not loss <= hooks.evaluate(before).get("loss", 0.0):
        run.withdraw(number - 1)
        raise ModelLostError(
            f"{replies.not_finite} of {replies.asked} replies of round {number} are not finite, and round {number - 1} "
            f"had made the model worse (validation loss {loss:.3f})",
            number - 2, before,
        )  # fmt: skip
