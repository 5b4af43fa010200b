"""Run the rounds of federated learning, the same for every method and fleet: sample, broadcast, local, aggregate, checkpoint.

The loop does not use the model: `evaluate` is passed in.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fleetune.common.display import counted
from fleetune.common.events import Recorded, RoundDone, round_evaluated
from fleetune.common.memory import rss
from fleetune.data import keyed_order
from fleetune.errors import FleetError, MessageError
from fleetune.privacy.mechanism import sample as poisson_sample
from fleetune.runs import rundir
from fleetune.runs.rundir import KEEP, RunDir
from fleetune.seeds.noise import derive
from fleetune.tuning.exchange.aggregation import MEAN, Rule, usual
from fleetune.tuning.exchange.messages import Message, Payload, ReplySpec, encode
from fleetune.tuning.methods import Method
from fleetune.tuning.rounds import checkpoint
from fleetune.tuning.rounds.checkpoint import Course, Releases, StandsOn, Totals
from fleetune.tuning.rounds.fleets import Fleet
from fleetune.tuning.rounds.replies import Replies, Round
from fleetune.tuning.rounds.sealed import Summing
from fleetune.tuning.rounds.watch import advice, noise_of

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

    def give_way(self, best: int, state: Any) -> None:
        """Let the best round's state be the result, instead of the last good one; 0 is the start."""
        self.round, self.state = best, state
        self.message += f"; the best is {best}" if best else "; none was better than the start"
        self.args = (self.message,)
        kept = "the result of the best is" if best else "there is no result; the checkpoint is"
        self.hint = f"{kept} in the run folder; start anew with a lower lr, or set the method's clip"

    page = FleetError("").page  # its section of the docs


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
    patience: int = 0  # evaluated rounds in a row without a better one after which the run ends; 0: never
    keep_best: bool = False  # whether the best evaluated round's state is the result
    max_rows: int = 0  # that a reply counts at most; 0: any number
    releases: Releases | None = None  # of a run with differential privacy
    summing: Summing | None = None  # where replies are added up by a secure sum
    keep_replies: bool = False  # in the run's folder


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop: `begin()` once before round 1, `evaluate(state)`, `emit(event)`.

    `begin` gives the measures of the first state; `score` says what of measures is to be low (None: not known).
    `resumed()` is called once where a run is taken up again, `note(text)` with what was lost of it.
    """

    begin: Callable[[], Mapping[str, float] | None]
    evaluate: Callable[[Any], Mapping[str, float]]
    emit: Callable[[Recorded], None]
    resumed: Callable[[], None] = lambda: None
    note: Callable[[str], None] = log.warning
    clock: Callable[[], float] = lambda: 0.0  # seconds of this sitting so far
    score: Callable[[Mapping[str, float]], float | None] = lambda measured: measured.get("loss")


class Outcome(NamedTuple):
    """The end of a run: the state that is its result and the round that it is of, the totals, and the last round."""

    state: Any
    totals: Totals
    round: int
    last: int
    course: Course
    releases: int  # rounds that were released, those among them again that a resume has released again


def run(method: Method, fleet: Fleet, state: Any, run: RunDir, plan: RoundPlan, hooks: Hooks) -> Outcome:
    """Run (or resume) all rounds, or those until the patience is over; return the outcome.

    A round counts when its checkpoint is written.  FleetError when every client failed in `PATIENCE` rounds in
    a row (or in all, of fewer); a resumed run counts anew, so that it gets past them.
    """
    last, state, totals, course = _start(run, fleet, state, plan, hooks)
    failures = 0
    rounds = plan.rounds if plan.releases is None else last + plan.releases.left(plan.rounds - last)
    for r in range(last + 1, rounds + 1):
        if plan.patience and course.stale >= plan.patience:
            break
        began = time.monotonic()
        new, replies = _played(method, fleet, state, run, plan, hooks, r)
        failures = _failures(method, replies, failures, plan)
        totals.bytes_up += replies.bytes_up
        totals.bytes_down += replies.bytes_down
        totals.seconds += (seconds := time.monotonic() - began)
        hooks.emit(
            RoundDone(
                round=r,
                clients=replies.asked,
                accepted=replies.accepted,
                bytes_up=replies.bytes_up,
                bytes_down=replies.bytes_down,
                bytes_total=totals.bytes_up + totals.bytes_down,
                seconds=round(seconds, 3),
                rss=rss(),
                report=method.report(new) | ({"epsilon": plan.releases.epsilon} if plan.releases else {})
                or None,
            )
        )
        if r == rounds or (plan.eval_every and r % plan.eval_every == 0):
            hooks.emit(evaluated := round_evaluated(r, measured := hooks.evaluate(new)))
            if evaluated.loss is not None and not math.isfinite(evaluated.loss):
                raise ModelLostError(f"the model's loss after round {r} is not finite", r - 1, state)
            course = course.after(r, hooks.score(measured))
        state, last = new, r
        _write(r, state, totals, plan, hooks, run, fleet, course)
        fleet.forget_before(r + 1 - KEEP)
    released = plan.releases.count if plan.releases else 0
    if not plan.keep_best or course.best in (None, last):
        return Outcome(state, totals, last, last, course, released)
    best = checkpoint.best_state(run.path, course.best, state)
    return Outcome(best, totals, course.best, last, course, released)


def keep_best_of(lost: ModelLostError, run: RunDir, plan: RoundPlan) -> None:
    """Let the result of a run that lost its model be the best round's state, where the best is kept and one was better."""
    saved = checkpoint.saved(run, lost.round) if plan.keep_best else None
    course = Course() if saved is None else checkpoint.course_in(saved)
    if course.best not in (None, lost.round):
        try:
            lost.give_way(course.best, checkpoint.best_state(run.path, course.best, lost.state))
        except MessageError as error:  # the last good round's is the result then
            log.warning("%s", error)


def _start(
    run: RunDir, fleet: Fleet, state: Any, plan: RoundPlan, hooks: Hooks
) -> tuple[int, Any, Totals, Course]:
    """Return (the last round done, state, totals, course): those of the run's last checkpoint, or of a new run.

    A checkpoint whose client memories or best round are gone or damaged gives way to the one before it, as a damaged one
    does.
    """

    def usable(data: bytes) -> Payload:
        payload = checkpoint.decode(data)
        fleet.check_kept(checkpoint.kept_in(payload))
        best = checkpoint.course_in(payload).best
        if plan.keep_best and best is not None:
            checkpoint.read_best(run.path, best)
        return payload

    totals, saved = Totals(), run.restore(usable, hooks.note)
    if plan.releases is not None and (saved is None or not saved[0]):
        plan.releases.check_left(plan.rounds)
    if saved is None:
        if any(event["event"] == "round" for event in rundir.events(run.path)):
            hooks.note(f"{run.path} has no checkpoint left: the run begins anew")
        run.cut(-1)
        fleet.rewind(0)
        checkpoint.cut_bests(run, -1)
        course = Course().after(0, hooks.score(hooks.begin() or {}))._replace(stale=0)
        _write(0, state, totals, plan, hooks, run, fleet, course)
        return 0, state, totals, course
    last, payload = saved
    state, totals = checkpoint.unpack(payload, state)
    stated = checkpoint.stands_on(payload)
    for told in run.cut(last, stated[1] if stated else None):
        hooks.note(told)
    fleet.rewind(last)
    fleet.forget_before(last + 1 - KEEP)
    checkpoint.cut_bests(run, last)
    hooks.resumed()
    return last, state, totals, checkpoint.course_in(payload)


def _write(
    round: int,
    state: Any,
    totals: Totals,
    plan: RoundPlan,
    hooks: Hooks,
    run: RunDir,
    fleet: Fleet,
    course: Course,
) -> None:
    """Make a round count: write its checkpoint, with all that it stands on; the state of a new best round before it."""
    until_now = replace(totals, wall=totals.wall + hooks.clock())
    data = checkpoint.encode(round, state, until_now, plan.stands_on, run.metrics.size, fleet.kept(), course)
    if plan.keep_best and course.best == round:
        checkpoint.keep_best(run, round, data)
    run.checkpoint(round, data)
    if plan.keep_best:
        checkpoint.forget_bests(run)


def _played(
    method: Method, fleet: Fleet, state: Any, run: RunDir, plan: RoundPlan, hooks: Hooks, r: int
) -> tuple[Any, Replies]:
    """Return the state that a round gives, and its replies."""
    if plan.summing is not None:
        return _summed(method, fleet, state, run, plan, hooks, r, plan.summing)
    present = fleet.present()
    goal = share_of(len(present), plan.participation)
    if plan.rule.privacy is None:
        chosen = sample(present, plan.participation, plan.seed, r, plan.over_selection)
    else:  # the draw that the accountant counts on; nobody can repeat it
        chosen, goal = poisson_sample(present, plan.rule.privacy.q), len(present)
    kinds = {client: fleet.kind(client) for client in chosen}
    if plan.rule.times < math.inf and plan.releases is None:  # the account has the steps of its own kind
        kinds = of_two(kinds)
    middle = int(usual([fleet.rows[client] for client in chosen]))
    asked = Round(r, plan.base, fleet.rows, state, kinds.__getitem__, middle)
    with Replies(
        method, asked, run, hooks.emit, plan.rule, plan.max_rows, plan.releases is not None
    ) as replies:
        messages = _messages(method, fleet, replies, chosen)
        replies.gather(fleet.ask(r, chosen, messages, goal if len(chosen) > goal else 0))
        _check_model(replies, run, hooks)
        if plan.releases is not None:
            plan.releases.add()
        return _aggregated(method, replies, plan), replies


def _summed(
    method: Method,
    fleet: Fleet,
    state: Any,
    run: RunDir,
    plan: RoundPlan,
    hooks: Hooks,
    r: int,
    summing: Summing,
) -> tuple[Any, Replies]:
    """Return the state that a round gives whose replies nobody sees, and those that were to give one."""
    asked = Round(r, plan.base, fleet.rows, state, fleet.kind)
    with Replies(method, asked, run, hooks.emit, plan.rule, plan.max_rows, True) as replies:
        # that they are done, no more
        replies.kinds = [(sent, ReplySpec({}, {})) for sent, _ in replies.kinds]
        if not summing.pending(r):
            chosen = [client for client in fleet.present() if client not in summing.left_out]
            replies.gather(fleet.ask(r, chosen, _messages(method, fleet, replies, chosen)))
            if plan.releases is not None:
                plan.releases.add()
        numbers = sum(start.size for start in method.begins(replies.kinds[0][0]).values())
        done = [kept.answer.client for kept in replies.kept]
        total, why = summing.add_up(fleet, r, done, numbers)
        replies.bytes_up += summing.bytes_up
        replies.bytes_down += summing.bytes_down
        if total is None:
            replies.lost(why)
            return method.aggregate(state, iter(())), replies
    new = method.aggregate(state, iter(()), replace(plan.rule, privacy=replace(summing.sealed, total=total)))
    if not finite(new):
        raise ModelLostError(f"the sum of round {r} gives no finite model", r - 1, state)
    return new, replies


def _messages(method: Method, fleet: Fleet, replies: Replies, chosen: Sequence[int]) -> dict[int, bytes]:
    """Return what each client is sent: the broadcast of its kind, or the news since what it remembers."""
    asked, kept = replies.round, fleet.kept() if method.has_own("news") else {}
    made: dict[tuple[int, int], bytes] = {}
    keys = {client: (asked.kind(client), kept.get(client, (0, 0))[0]) for client in chosen}
    for kind, known in dict.fromkeys(keys.values()):
        payload = method.news(asked.state, known, kind) if known else replies.kinds[kind][0]
        made[kind, known] = encode(Message(asked.number, asked.base, payload))
    return {client: made[key] for client, key in keys.items()}


def sample(
    clients: Sequence[int], participation: float, seed: int, round: int, over: float = 1.0
) -> Sequence[int]:
    """Return the clients of a round: a share of those, without repeats, in order; keyed by seed and round.

    At least one, unless there are none; `over` times as many as the share.
    """
    count = min(len(clients), math.ceil(share_of(len(clients), participation) * over - 1e-9))
    order = keyed_order(derive(seed, "sample", round), 0, len(clients))
    return sorted(clients[i] for i in order[:count].tolist())


def of_two(kinds: Mapping[int, int]) -> dict[int, int]:
    """Return the clients' kinds of work; a kind other than 0 that one alone has becomes 0: there nothing holds its reply."""
    count = Counter(kinds.values())
    return {client: kind if count[kind] > 1 else 0 for client, kind in kinds.items()}


def share_of(clients: int, participation: float) -> int:
    """Return how many replies a round needs of so many clients; at least one, unless there are none."""
    return min(clients, max(1, int(clients * participation + 0.5)))


def _failures(method: Method, replies: Replies, before: int, plan: RoundPlan) -> int:
    """Count failed rounds in a row, `before` and this one; FleetError when they are too many.

    A round fails when every client fails, or when most replies are not finite.  One is too many where it is the first and none
    of its replies is finite.
    """
    all_failed = replies.failed >= replies.asked > 0 and not replies.accepted
    # then no client's reply may decide whether there is another round
    if plan.rule.privacy is not None and plan.summing is None:
        if all_failed:
            log.warning(
                "round %d: every client that was asked failed: %s", replies.round.number, replies.reason
            )
        return 0
    if not all_failed and not replies.mostly_not_finite:
        return before if not replies.accepted else 0
    hopeless = replies.round.number == 1 and replies.not_finite == replies.asked
    if hopeless or before + 1 >= min(PATIENCE, plan.rounds):
        what = "every client failed, " if not replies.accepted else "most replies are not finite, "
        hint = "-v shows the whole error; when the cause is gone, resume the run"
        if replies.not_finite:  # the learning rate is too high
            hint = f"{advice(method, math.inf if hopeless else 10)}; a run with other options is a new one"
        raise FleetError(
            f"{what}{counted(before + 1, 'round')} in a row; the first of round {replies.round.number}: {replies.reason}",
            hint=hint,
        )
    return before + 1


def _aggregated(method: Method, replies: Replies, plan: RoundPlan) -> Any:
    """Return the new state, or the old one where too few replies are good; ModelLostError when it is not finite."""
    number, state = replies.round.number, replies.round.state
    new = replies.aggregate()
    # with privacy released as it is, noise alone included: whether to is no client's choice
    good = not replies.mostly_not_finite and replies.accepted >= plan.quorum
    if plan.keep_replies:
        replies.keep(good)
    if plan.rule.privacy is None and not good:
        log.warning(
            "round %d: %d good replies (quorum %d), %d not finite; the model stays",
            number,
            replies.accepted,
            plan.quorum,
            replies.not_finite,
        )
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
    of the round before by more than noise.  The round before is then the last good one: its model is kept and the newer
    checkpoint removed.
    """
    if replies.rule.privacy is not None or not replies.mostly_not_finite:
        return
    number = replies.round.number
    now = hooks.evaluate(replies.round.state)
    loss = now.get("loss", 0.0)
    if (saved := checkpoint.saved(run, number - 2)) is None:
        return
    before, _ = checkpoint.unpack(saved, replies.round.state)
    if not loss <= hooks.evaluate(before).get("loss", 0.0) + noise_of(loss, now.get("change_error")):
        run.withdraw(number - 1)
        raise ModelLostError(
            f"{replies.not_finite} of {replies.asked} replies of round {number} are not finite, and round {number - 1} "
            f"had made the model worse (validation loss {loss:.3f})",
            number - 2,
            before,
        )
