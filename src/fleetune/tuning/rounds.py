# SPDX-License-Identifier: Apache-2.0
"""Run the rounds of federated learning: sample, broadcast, local, aggregate, record, evaluate, checkpoint.

The same function for every method and every fleet.  It does not use the model: `evaluate` is passed in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetune.common.memory import rss
from fleetune.data import keyed_order
from fleetune.errors import FleetError, MessageError, cut_reason
from fleetune.runs import rundir
from fleetune.runs.events import ClientReply, Recorded, RoundDone, round_evaluated
from fleetune.runs.rundir import KEEP, RunDir
from fleetune.seeds.noise import derive
from fleetune.tuning import checkpoint, methods
from fleetune.tuning.checkpoint import StandsOn, Totals
from fleetune.tuning.fleets import Answer, Fleet
from fleetune.tuning.messages import Message, Payload, ReplySpec, check, decode, encode
from fleetune.tuning.methods import Method, Reply

log = logging.getLogger(__name__)

PATIENCE = 3  # rounds in a row that fail as a whole before the run ends


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


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop: `begin()` once before round 1, `evaluate(state)`, `emit(event)`.

    `resumed(round)` is called once where a run is taken up again, `note(text)` with what was lost of it.
    """

    begin: Callable[[], None]
    evaluate: Callable[[Any], Mapping[str, float]]
    emit: Callable[[Recorded], None]
    resumed: Callable[[int], None] = lambda round: None
    note: Callable[[str], None] = log.warning


def run(
    method: Method, fleet: Fleet, state: Any, run: RunDir, plan: RoundPlan, hooks: Hooks
) -> tuple[Any, Totals]:
    """Run (or resume) all rounds; return the state after the last, and the totals.

    A round counts when its checkpoint is written.  FleetError when every client failed in `PATIENCE` rounds in
    a row (or in all, of fewer); a resumed run counts anew, so that it gets past them.
    """
    last, state, totals = _start(run, fleet, state, plan, hooks)
    failures = 0
    for r in range(last + 1, plan.rounds + 1):
        began = time.monotonic()
        kinds = methods.kinds_of(method, state)
        answers = _ReplyCheck([spec for _, spec in kinds], run, plan, r, hooks, fleet.rows)
        chosen = sample(len(fleet.rows), plan.participation, plan.seed, r)
        coded = [encode(Message(r, plan.base, payload)) for payload, _ in kinds]
        messages = {client: coded[client % len(coded)] for client in chosen}
        new = method.aggregate(state, answers.replies(fleet.ask(r, chosen, messages)))
        failures = answers.failures(failures)
        state = _accept(method, state, new, answers, plan, r)
        totals.bytes_up += answers.bytes_up
        totals.bytes_down += answers.bytes_down
        totals.seconds += (seconds := time.monotonic() - began)
        hooks.emit(RoundDone(
            round=r, clients=len(chosen), accepted=answers.accepted, bytes_up=answers.bytes_up,
            bytes_down=answers.bytes_down, bytes_total=totals.bytes_up + totals.bytes_down,
            seconds=round(seconds, 3), rss=rss(), report=methods.report_of(method, state) or None,
        ))  # fmt: skip
        if r == plan.rounds or (plan.eval_every and r % plan.eval_every == 0):
            hooks.emit(round_evaluated(r, hooks.evaluate(state)))
        run.checkpoint(r, _encoded(r, state, totals, plan, run, fleet))
        fleet.forget_before(r + 1 - KEEP)
    return state, totals


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
        run.checkpoint(0, _encoded(0, state, totals, plan, run, fleet))
        return 0, state, totals
    last, payload = saved
    state, totals = checkpoint.unpack(payload, state)
    stated = checkpoint.stands_on(payload)
    if loss := run.cut(last, stated[1] if stated else None):
        hooks.note(loss)
    fleet.rewind(last)
    hooks.resumed(last)
    return last, state, totals


def _encoded(round: int, state: Any, totals: Totals, plan: RoundPlan, run: RunDir, fleet: Fleet) -> bytes:
    """Return the checkpoint of a round, with all that it stands on."""
    return checkpoint.encode(round, state, totals, plan.stands_on, run.metrics.tally, fleet.kept())


def sample(clients: int, participation: float, seed: int, round: int) -> Sequence[int]:
    """Return the clients of a round: a share of all, at least one, without repeats, in order; keyed by seed and round."""
    count = max(1, min(clients, round_half_up(clients * participation)))
    return sorted(keyed_order(derive(seed, "sample", round), 0, clients)[:count].tolist())


def round_half_up(x: float) -> int:
    """Return the nearest integer, halves up."""
    return int(x + 0.5)


class _ReplyCheck:
    """Checks the replies of a round, one at a time, and records every client's outcome."""

    def __init__(
        self,
        specs: Sequence[ReplySpec],
        run: RunDir,
        plan: RoundPlan,
        round: int,
        hooks: Hooks,
        rows: Sequence[int],
    ) -> None:
        self.specs, self.rows = specs, rows
        self.run, self.plan, self.round, self.hooks = run, plan, round, hooks
        self.accepted = self.failed = self.asked = 0
        self.bytes_up = self.bytes_down = 0
        self.reason = ""

    def failures(self, before: int) -> int:
        """Count rounds in a row, `before` and this one, in which every client failed; FleetError when they are too many."""
        if self.accepted:
            return 0
        count = before + (self.failed == self.asked > 0)
        if count >= min(PATIENCE, self.plan.rounds):
            raise FleetError(
                f"every client failed, {count} rounds in a row; the first of round {self.round}: {self.reason}",
                hint="see log.txt in the run folder; when the cause is gone, resume the run",
            )
        return count

    def replies(self, answers: Iterator[Answer]) -> Iterator[Reply]:
        """Yield the replies that pass; the others are recorded with the reason."""
        for answer in answers:
            self.asked += 1
            self.bytes_down += answer.sent
            self.bytes_up += len(answer.data or b"")
            payload, status, reason = self._open(answer)
            self._record(answer, payload, status, reason)
            if payload is not None:
                self.accepted += 1
                yield Reply(answer.client, answer.key, payload)

    def _open(self, answer: Answer) -> tuple[Payload | None, str, str]:
        if answer.data is None:
            self.failed += answer.status == "failed"
            why = cut_reason(answer.reason)
            self.reason = self.reason or why
            return None, answer.status, why
        try:
            spec = self.specs[answer.client % len(self.specs)]
            payload = check(decode(answer.data), spec, round=self.round, base=self.plan.base)
            _check_rows(payload, self.rows[answer.client])
        except MessageError as error:
            log.warning("round %d: reply of client %d refused: %s", self.round, answer.client, error)
            self.failed += 1
            self.reason = self.reason or str(error)
            return None, "refused", str(error)
        return payload, "ok", ""

    def _record(self, answer: Answer, payload: Payload | None, status: str, reason: str) -> None:
        loss = payload.scalars.get("loss") if payload else None
        n = payload.scalars.get("n") if payload else None
        self.hooks.emit(ClientReply(
            round=self.round, client=answer.client, n=n, loss=loss, bytes_up=len(answer.data or b""),
            bytes_down=answer.sent, seconds=round(answer.seconds, 3), rss=rss(), status=status, reason=reason,
        ))  # fmt: skip


def _check_rows(payload: Payload, rows: int) -> None:
    """Raise MessageError for a client that claims more rows, and so more weight, than it is known to have."""
    claimed = payload.scalars.get("n")
    if isinstance(claimed, int) and claimed > rows:
        raise MessageError(f"reply claims {claimed} rows, the client has {rows}")


def _accept(method: Method, old: Any, new: Any, checked: _ReplyCheck, plan: RoundPlan, round: int) -> Any:
    """Return the new state, or the old one where too few replies came."""
    if checked.accepted >= plan.quorum:
        return new
    log.warning(
        "round %d: %d good replies are under the quorum of %d; the model stays",
        round,
        checked.accepted,
        plan.quorum,
    )
    return method.aggregate(old, iter(()))
