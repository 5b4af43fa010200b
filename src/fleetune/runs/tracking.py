# SPDX-License-Identifier: Apache-2.0
"""Pass the figures of a run on to trackers, beside the listener that shows it; no tracker can stop a run.

What a tracker raises is said once; the run then goes on without it.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Final

from fleetune.common.settings import Value
from fleetune.errors import FAULTS, Interrupted, cut_reason, fault
from fleetune.runs import rundir, trackers
from fleetune.runs.events import ClientReply, Event, RoundDone, RoundEvaluated, TuneDone
from fleetune.runs.listener import Listener
from fleetune.runs.trackers import check as check

log = logging.getLogger(__name__)

OF_A_ROUND: Final = ("clients", "accepted", "bytes_up", "bytes_down", "seconds", "rss")


class Tracked:
    """A `Listener` that passes every call on to another one, and the figures of a run to trackers."""

    def __init__(self, inner: Listener, names: Sequence[str], *, offline: bool) -> None:
        """UsageError for a tracker that is unknown or not installed."""
        self._inner, self._names, self._offline = inner, trackers.check(names), offline
        self._running: dict[str, trackers.Tracker] = {}
        self._round, self._values = 0, dict[str, float]()
        self._losses: dict[int, float] = {}  # of the round's good replies
        self._summary: dict[str, Value] = {}

    # The trackers

    def begin(self, folder: Path, facts: Mapping[str, Value]) -> None:
        """Begin the run in `folder` at every tracker; one whose checkpoint is found goes on there."""
        rounds = [number for number, _ in rundir.checkpoints(folder)]
        place = trackers.Place(folder, facts, rounds[-1] + 1 if rounds else 0, self._offline)
        for name in self._names:
            self._safely(name, partial(self._start, name, place))

    def _start(self, name: str, place: trackers.Place) -> None:
        self._running[name] = trackers.begin(name, place)

    def finish(self, status: str) -> None:
        """End the run at every tracker: done, stopped or failed."""
        self._flush()
        for name, tracker in list(self._running.items()):
            self._safely(name, partial(tracker.finish, self._summary, status))
        self._running = {}

    def _flush(self) -> None:
        if self._values:
            for name, tracker in list(self._running.items()):
                self._safely(name, partial(tracker.log, self._values, self._round))
        self._values = {}

    def _safely(self, name: str, call: Callable[[], None]) -> None:
        """Call a tracker with its prints going to the log; one that fails is left out from now on."""
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                call()
        except FAULTS as error:
            self._running.pop(name, None)
            log.info("the tracker %s failed here", name, exc_info=error)
            self._inner.note(
                f"the tracker {name} failed ({cut_reason(fault(error))}); the run goes on without it"
            )
        for line in said.getvalue().splitlines():
            log.info("%s: %s", name, line)

    # The listener

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Pass it on."""
        self._inner.header(title, rows)

    def event(self, event: Event) -> None:
        """Pass it on; the figures of a finished round go to the trackers."""
        self._inner.event(event)
        if isinstance(event, ClientReply):
            self._replied(event)
        elif isinstance(event, RoundDone):
            self._flush()
            self._round, self._values = event.round, _of_round(event, list(self._losses.values()))
            self._losses = {}
        elif isinstance(event, RoundEvaluated):
            self._round = event.round
            self._values |= _measures(event)
            self._flush()
        elif isinstance(event, TuneDone):
            self._summary = _summary(event)

    def note(self, text: str) -> None:
        """Pass it on."""
        self._inner.note(text)

    def step(self, client: int, step: int) -> None:
        """Pass it on."""
        self._inner.step(client, step)

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Pass it on."""
        self._inner.progress(what, done, total, text)

    @property
    def stop_requested(self) -> bool:
        """Whether the other listener asks to stop."""
        return self._inner.stop_requested

    def _replied(self, event: ClientReply) -> None:
        """Note a client's training loss; one that is refused later counts no more."""
        if event.status == "ok" and isinstance(event.loss, int | float):
            self._losses[event.client] = float(event.loss)
        else:
            self._losses.pop(event.client, None)


def _of_round(event: RoundDone, losses: Sequence[float]) -> dict[str, float]:
    """The figures of a round: its costs, the mean of its clients' training losses, and the method's own."""
    found = {f"round/{name}": float(getattr(event, name)) for name in OF_A_ROUND}
    found["total/bytes"] = float(event.bytes_total)
    if losses:
        found["clients/loss"] = sum(losses) / len(losses)
    return found | {f"method/{name}": float(value) for name, value in (event.report or {}).items()}


def _measures(event: RoundEvaluated) -> dict[str, float]:
    values = event.values | ({} if event.objective is None else {"objective": event.objective})
    return {f"validation/{name}": value for name, value in values.items()}


def _summary(event: TuneDone) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for stage, measures in (("base", event.base), ("tuned", event.tuned)):
        found |= {f"{stage}/{name}": value for name, value in measures.items() if value is not None}
    return found | {
        "held_out_rows": event.rows, "rounds": event.rounds, "bytes_up": event.bytes_up, "bytes_down": event.bytes_down,
        "seconds": event.wall, "peak_rss": event.peak_rss, "result_bytes": event.result_bytes, "digest": event.digest,
    }  # fmt: skip


def begin(listener: Listener, folder: Path, facts: Mapping[str, Value]) -> None:
    """Begin a run at the trackers of a listener; nothing for a listener without any."""
    if isinstance(listener, Tracked):
        listener.begin(folder, facts)


@contextmanager
def tracked(listener: Listener, names: Sequence[str], *, offline: bool) -> Iterator[Listener]:
    """Give the listener, with trackers where any are named; they end with the block, as it ends.

    UsageError for a tracker that is unknown or not installed.
    """
    if not names:
        yield listener
        return
    found = Tracked(listener, names, offline=offline)
    try:
        yield found
    except BaseException as error:
        found.finish("stopped" if isinstance(error, KeyboardInterrupt | Interrupted) else "failed")
        raise
    found.finish("done")
