"""Pass the figures of a run on to TensorBoard or Weights & Biases, beside the listener that shows it.

Only settings and figures are passed on: no row of the data, no name of a client, no path of the machine.  A tracker that fails
is reported once, and the run goes on without it.
"""

import importlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Final

from fleetune.common.display import check_installed
from fleetune.common.events import ClientReply, Event, RoundDone, RoundEvaluated, TuneDone
from fleetune.common.files import read_text, write_atomic
from fleetune.common.settings import Value
from fleetune.errors import FAULTS, Interrupted, UsageError, cut_reason, fault, suggest
from fleetune.runs import rundir
from fleetune.runs.listener import Listener, Relay

log = logging.getLogger(__name__)

OF_A_ROUND: Final = ("clients", "accepted", "bytes_up", "bytes_down", "seconds", "rss")


class TensorBoard:
    """One file of events per sitting; figures from `next_round` on of an earlier sitting are replaced."""

    def __init__(self, own: Path, facts: Mapping[str, Value], next_round: int, offline: bool) -> None:
        board: Any = importlib.import_module("torch.utils.tensorboard")
        again = {"purge_step": next_round} if (own / "tensorboard").is_dir() else {}
        self._writer = board.SummaryWriter(str(own / "tensorboard"), **again)
        self._table("settings", facts)

    def _table(self, title: str, facts: Mapping[str, Value]) -> None:
        rows = [f"| {name} | {value} |" for name, value in facts.items()]
        self._writer.add_text(title, "\n".join(["| name | value |", "|---|---|", *rows]))

    def log(self, values: Mapping[str, float], round: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Value], status: str) -> None:
        self._table("summary", {"status": status, **summary})
        self._writer.close()


class Wandb:
    """One run of wandb, whose id is kept in `trackers/wandb.txt`: a resumed run goes on in it.

    WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and WANDB_API_KEY are followed; `offline` keeps all in wandb's offline folder,
    which `wandb sync` sends later.
    """

    def __init__(self, own: Path, facts: Mapping[str, Value], next_round: int, offline: bool) -> None:
        import wandb

        file = own / "wandb.txt"
        known = read_text(file).strip() if file.is_file() else None
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fleetune",
            name=own.parent.resolve().name,
            config=dict(facts),
            dir=str(own),
            id=known,
            resume="allow" if known else None,
            mode="offline" if offline else None,
            settings=wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True),
        )
        write_atomic(file, f"{self._run.id}\n")
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def log(self, values: Mapping[str, float], round: int) -> None:
        self._run.log({"round": round, **values})

    def finish(self, summary: Mapping[str, Value], status: str) -> None:
        self._run.summary.update({"status": status, **summary})
        self._run.finish(exit_code=int(status == "failed"))


# By name, which is that of the package and of the extra too.  `log` takes the figures of a round (0: the base model), by name;
# `finish` the last figures, and done, stopped or failed.
TRACKERS: Final[Mapping[str, type[TensorBoard | Wandb]]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def check(wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the trackers' names, each once; UsageError, before any work, for an unknown one or a missing package."""
    found = tuple(dict.fromkeys(wanted))
    for name in found:
        if name not in TRACKERS:
            raise UsageError(f"no tracker '{name}'.{suggest(name, TRACKERS)}", hint=", ".join(TRACKERS))
        check_installed(f"the tracker {name}", name, name)
    return found


class Tracked(Relay):
    """A `Listener` that passes every call on to another one, and the figures of a run to trackers."""

    def __init__(self, inner: Listener, names: Sequence[str], *, offline: bool) -> None:
        super().__init__(inner)
        self._names, self._offline = check(names), offline
        self._running: dict[str, TensorBoard | Wandb] = {}
        self._round, self._values = 0, dict[str, float]()
        self._losses: dict[int, float] = {}  # of the round's good replies
        self._summary: dict[str, Value] = {}

    def begin(self, folder: Path, facts: Mapping[str, Value]) -> None:
        """Begin the run in `folder` at every tracker; one whose checkpoint is found goes on there."""
        rounds = [number for number, _ in rundir.checkpoints(folder)]
        for name in self._names:
            self._safely(name, partial(self._start, name, folder, facts, rounds[-1] + 1 if rounds else 0))

    def _start(self, name: str, folder: Path, facts: Mapping[str, Value], next_round: int) -> None:
        own = folder / "trackers"
        own.mkdir(exist_ok=True)
        self._running[name] = TRACKERS[name](own, facts, next_round, self._offline)

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
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                call()
        except FAULTS as error:
            self._running.pop(name, None)
            log.info("the tracker %s failed here", name, exc_info=error)
            self.note(f"the tracker {name} failed ({cut_reason(fault(error))}); the run goes on without it")
        for line in said.getvalue().splitlines():
            log.info("%s: %s", name, line)

    def event(self, event: Event) -> None:
        """Pass it on; the figures of a finished round go to the trackers."""
        super().event(event)
        if isinstance(event, ClientReply):
            if event.status == "ok" and isinstance(event.loss, int | float):
                self._losses[event.client] = float(event.loss)
            else:  # a reply that is refused later counts no more
                self._losses.pop(event.client, None)
        elif isinstance(event, RoundDone):
            self._flush()
            self._round, self._values = event.round, _of_round(event, list(self._losses.values()))
            self._losses = {}
        elif isinstance(event, RoundEvaluated):
            objective = {} if event.objective is None else {"objective": event.objective}
            self._round = event.round
            self._values |= {f"validation/{name}": v for name, v in (event.values | objective).items()}
            self._flush()
        elif isinstance(event, TuneDone):
            self._summary = _summary(event)


def _of_round(event: RoundDone, losses: Sequence[float]) -> dict[str, float]:
    found = {f"round/{name}": float(getattr(event, name)) for name in OF_A_ROUND}
    found["total/bytes"] = float(event.bytes_total)
    if losses:
        found["clients/loss"] = sum(losses) / len(losses)
    return found | {f"method/{name}": float(value) for name, value in (event.report or {}).items()}


def _summary(event: TuneDone) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for stage, measures in (("base", event.base), ("tuned", event.tuned)):
        found |= {f"{stage}/{name}": value for name, value in measures.items() if value is not None}
    return found | {
        "held_out_rows": event.rows,
        "rounds": event.rounds,
        "bytes_up": event.bytes_up,
        "bytes_down": event.bytes_down,
        "seconds": event.wall,
        "peak_rss": event.peak_rss,
        "result_bytes": event.result_bytes,
        "digest": event.digest,
    }


def begin(listener: Listener, folder: Path, facts: Mapping[str, Value]) -> None:
    """Begin a run at the trackers of a listener; nothing for a listener without any."""
    if isinstance(listener, Tracked):
        listener.begin(folder, facts)
    elif isinstance(listener, Relay):
        begin(listener.inner, folder, facts)


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
