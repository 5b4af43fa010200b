"""A method of one tensor, a fleet whose replies a function makes, and the round loop over both."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from methods_harness import mean_of

from fleetune.common.events import ClientReply, Recorded, as_dict
from fleetune.runs.rundir import RunDir, create
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import MEAN, Rule
from fleetune.tuning.exchange.messages import Message, Payload, ReplySpec, decode, encode
from fleetune.tuning.methods import Reply
from fleetune.tuning.rounds import rounds
from fleetune.tuning.rounds.checkpoint import Releases
from fleetune.tuning.rounds.fleets import Answer, Fleet
from fleetune.tuning.rounds.rounds import Hooks, RoundPlan

BASE = bytes(8)
ROWS = 10
SIZE = 50


class Killed(BaseException):
    pass


class State(NamedTuple):
    tensors: dict[str, np.ndarray]
    scale: float = 1.0


@dataclass(frozen=True)
class Averaging(methods.Method):
    """The plain mean of one tensor, measured as methods are that do not say how."""

    init = local = apply = None  # type: ignore[assignment]  # a server alone

    def broadcast(self, state: State) -> Payload:
        return Payload(state.tensors)

    def expects(self, state: State) -> ReplySpec:
        return ReplySpec({"w": ("float32", state.tensors["w"].shape)})

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        mean = mean_of((float(r.payload.int("n")), r.payload.arrays) for r in replies)
        return state._replace(tensors=mean) if mean else state


Told = Callable[[int, int, np.ndarray], Payload]  # (round, client, w) -> what it replies


@dataclass
class Devices(Fleet):
    """A fleet whose replies a function makes."""

    told: Told
    clients: int = 8
    # rows by client, of those that say another number
    declared: Mapping[int, int] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        return [self.declared.get(c, ROWS) for c in range(self.clients)]

    def present(self) -> Sequence[int]:
        return range(self.clients)

    def ask(self, round: int, clients: Sequence[int], message: Any, goal: int = 0) -> Iterator[Answer]:
        for c in clients:
            sent = message if isinstance(message, bytes) else message[c]
            payload = self.told(round, c, decode(sent).payload.array("w"))
            yield Answer(c, 100 * round + c, encode(Message(round, BASE, payload)), "ok", "", 0.0, len(sent))


def honest(round: int, client: int, w: np.ndarray) -> Payload:
    """A step towards 1, with some noise."""
    noise = np.random.default_rng([round, client]).normal(size=w.shape)
    return told(w + 0.1 * (1 - w) + 0.01 * noise)


def told(w: np.ndarray, n: int = ROWS, loss: float = 1.0) -> Payload:
    return Payload({"w": w.astype(np.float32)}, {"n": n, "loss": loss})


def with_liars(lie: Told, *liars: int) -> Told:
    return lambda round, client, w: (lie if client in liars else honest)(round, client, w)


def start() -> State:
    return State({"w": np.zeros(SIZE, np.float32)})


class Played(NamedTuple):
    state: State
    events: list[Recorded]

    def refused(self) -> dict[int, str]:
        last = {(e.round, e.client): e for e in self.events if isinstance(e, ClientReply)}
        return {c: e.reason for (_, c), e in last.items() if e.status == "refused"}


def play(
    place: Path | RunDir, fleet: Devices, method: Any = None, *, evaluate: Any = lambda state: {}, **plan: Any
) -> Played:
    seen, spent = list[Recorded](), plan.pop("spent", None)
    with place if isinstance(place, RunDir) else create(place, "averaging", "toy") as opened:

        def emit(event: Recorded) -> None:
            seen.append(event)
            opened.record(as_dict(event))

        releases = Releases(opened, spent, lambda more, released: more) if spent else None
        given = {"rounds": 1, "quorum": 1, "participation": 1.0, "eval_every": 1} | plan
        whole = RoundPlan(**given, seed=7, base=BASE, releases=releases)
        hooks = Hooks(lambda: None, evaluate, emit)
        return Played(rounds.run(method or Averaging(), fleet, start(), opened, whole, hooks).state, seen)


def mean_without(*left_out: int, clients: int = 8) -> np.ndarray:
    w = start().tensors["w"]
    return mean_of((ROWS, honest(1, c, w).arrays) for c in range(clients) if c not in left_out)["w"]
