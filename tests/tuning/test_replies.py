# SPDX-License-Identifier: Apache-2.0
"""One client cannot take the model: the bound on a reply, and rounds that end a run with the last good model."""

from __future__ import annotations

import math
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fleetune
from fleetune import Silent
from fleetune.common.events import ClientReply, Recorded, RoundDone, as_dict
from fleetune.errors import FleetError
from fleetune.models import tiny_llama
from fleetune.report.runlog import read
from fleetune.runs.rundir import RunDir, checkpoints, create, events, listing, status_of
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import MEAN, Rule, weighted_mean
from fleetune.tuning.exchange.messages import LogCode, Message, Payload, ReplySpec, decode, encode
from fleetune.tuning.methods import Reply
from fleetune.tuning.result.finished import TuneResult
from fleetune.tuning.rounds import checkpoint, replies, rounds
from fleetune.tuning.rounds.checkpoint import Totals
from fleetune.tuning.rounds.fleets import Answer
from fleetune.tuning.rounds.replies import Replies, Round, allowed
from fleetune.tuning.rounds.rounds import Hooks, ModelLostError, RoundPlan
from fleetune.tuning.rounds.simulated_fleet import LocalFleet
from fleetune.tuning.run.resume import resume

BASE = bytes(8)
ROWS = 10
SIZE = 50


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
        return ReplySpec(
            {"w": ("float32", state.tensors["w"].shape)}, {"n": (int, 1, 1 << 31), "loss": (float, -1e9, 1e9)}
        )

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        mean = weighted_mean((float(r.payload.int("n")), r.payload.arrays) for r in replies)
        return state._replace(tensors=mean) if mean else state


Told = Callable[[int, int, np.ndarray], Payload]  # (round, client, w) -> what it replies


@dataclass
class Devices:
    """A fleet whose replies a function makes; `order` is the one in which they arrive."""

    told: Told
    clients: int = 8
    order: Callable[[Sequence[int]], Sequence[int]] = lambda clients: clients
    declared: Mapping[int, int] = field(
        default_factory=dict
    )  # rows by client, of those that say another number

    @property
    def rows(self) -> list[int]:
        return [self.declared.get(c, ROWS) for c in range(self.clients)]

    def present(self) -> Sequence[int]:
        return range(self.clients)

    busy = 0

    def kind(self, client: int) -> int:
        return 0

    def ask(
        self, round: int, clients: Sequence[int], message: bytes | Mapping[int, bytes], goal: int = 0
    ) -> Iterator[Answer]:
        for c in self.order(clients):
            sent = message if isinstance(message, bytes) else message[c]
            payload = self.told(round, c, decode(sent).payload.array("w"))
            yield Answer(c, 100 * round + c, encode(Message(round, BASE, payload)), "ok", "", 0.0, len(sent))

    def kept(self) -> Mapping[int, tuple[int, int]]:
        return {}

    def check_kept(self, stated: Mapping[int, tuple[int, int]]) -> None: ...

    def heard(self, reply: ClientReply) -> None: ...

    def rewind(self, round: int) -> None: ...

    def forget_before(self, round: int) -> None: ...


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
        """The reason by client, of all rounds."""
        last = {(e.round, e.client): e for e in self.events if isinstance(e, ClientReply)}
        return {c: e.reason for (_, c), e in last.items() if e.status == "refused"}


def play(
    folder: Path,
    fleet: Devices,
    method: Any = None,
    *,
    rounds_: int = 1,
    quorum: int = 1,
    evaluate: Callable[[State], dict[str, float]] = lambda state: {},
    run: RunDir | None = None,
    rule: Rule = MEAN,
    max_rows: int = 0,
) -> Played:
    seen: list[Recorded] = []
    with run or create(folder, "averaging", "toy") as opened:

        def emit(event: Recorded) -> None:
            seen.append(event)
            opened.record(as_dict(event))

        plan = RoundPlan(rounds_, 1.0, quorum, 7, 1, BASE, rule=rule, max_rows=max_rows)
        state = rounds.run(
            method or Averaging(), fleet, start(), opened, plan, Hooks(lambda: None, evaluate, emit)
        ).state
    return Played(state, seen)


def mean_without(*left_out: int, clients: int = 8) -> np.ndarray:
    """What the clients but these make of the first round."""
    w = start().tensors["w"]
    return weighted_mean((ROWS, honest(1, c, w).arrays) for c in range(clients) if c not in left_out)["w"]


# At the door ------------------------------------------------------------------------------------------


def test_a_client_that_claims_more_rows_than_it_has_is_refused(tmp_path: Path) -> None:
    heavy = with_liars(lambda r, c, w: told(w + 0.1, n=ROWS + 1), 3)
    played = play(tmp_path, Devices(heavy))
    assert played.refused() == {3: "reply claims 11 rows, the client has 10"}
    assert np.array_equal(played.state.tensors["w"], mean_without(3))
    assert not play(tmp_path, Devices(with_liars(lambda r, c, w: told(w + 0.1, n=ROWS), 3))).refused()


@pytest.mark.parametrize(("quorum", "moves"), [(6, True), (7, False)])
def test_under_the_quorum_the_model_stays(tmp_path: Path, quorum: int, moves: bool) -> None:
    """Six good replies: enough for a quorum of six, too few for one of seven."""
    bad = with_liars(lambda r, c, w: told(w, n=99), 0, 1)
    played = play(tmp_path, Devices(bad), quorum=quorum)
    assert played.state.tensors["w"].any() == moves
    (done,) = (e for e in played.events if isinstance(e, RoundDone))
    assert done.accepted == 6


# The weight -------------------------------------------------------------------------------------------

ANY = 2**31 - 1  # rows: what a device may say


def with_weight(n: int, rule: Rule, max_rows: int = 0) -> float:
    """What client 0 of eight, which claims n rows, weighs: the others have `ROWS`, and all go equally far."""
    w, shares = start().tensors["w"], []
    for c in range(8):
        move = np.zeros(SIZE, np.float32)
        move[c] = 1.0
        shares.append(told(w + move, n if c == 0 else ROWS))
    fleet = Devices(lambda r, c, w: shares[c], declared={0: n})
    mean = play(Path(tempfile.mkdtemp()), fleet, rule=rule, max_rows=max_rows).state.tensors["w"]
    return float(mean[0] / mean[1] * ROWS)


def test_rows_weigh_at_most_so_many_times_the_median_of_the_round() -> None:
    assert with_weight(ANY, MEAN) == pytest.approx(
        ANY, rel=1e-6
    )  # as published: a simulated client has its rows
    assert with_weight(ANY, Rule(times=4.0)) == pytest.approx(4 * ROWS)
    assert with_weight(25, Rule(times=4.0)) == pytest.approx(25)
    assert with_weight(1, Rule(times=4.0)) == pytest.approx(1)
    assert with_weight(25, Rule(times=4.0), max_rows=15) == pytest.approx(15)
    assert with_weight(ANY, MEAN, max_rows=15) == pytest.approx(15)


@given(
    factor=st.floats(0.01, 3.9),
    n=st.sampled_from([1, ROWS, 3 * ROWS, ANY]),
    moves=st.lists(st.floats(0.5, 1.0), min_size=7, max_size=7),
)
def test_no_weight_moves_the_mean_further_than_a_usual_reply_may(
    factor: float, n: int, moves: list[float]
) -> None:
    """A liar against seven that go the same way: its pull is at most `allowed` times that of the median client."""
    unit = np.ones(SIZE) / np.sqrt(SIZE)
    fleet = Devices(
        lambda r, c, w: told(w - factor * unit, n) if c == 0 else told(w + moves[c - 1] * unit),
        declared={0: n},
    )
    played = play(Path(tempfile.mkdtemp()), fleet, rule=Rule(times=4.0))
    middle = float(np.sort([factor, *moves])[3])
    if factor > 3.5 * middle * allowed(SIZE) / 4:
        return  # it may be refused
    assert not played.refused()
    x = float(
        played.state.tensors["w"] @ unit
    )  # (sum of the others - W factor) / (7 + W), in weights of ROWS
    W = (sum(moves) - 7 * x) / (x + factor)
    assert W * factor <= allowed(SIZE) * middle * 1.001
    assert W <= 4.001


def test_a_method_knows_the_rows_that_a_client_took_its_steps_on(tmp_path: Path) -> None:
    """SCAFFOLD divides a move by them, so they are not those that the reply counts."""
    seen: dict[int, tuple[int, int]] = {}

    @dataclass(frozen=True)
    class Noting(Averaging):
        def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
            taken = list(replies)
            seen.update({r.client: (r.rows, r.payload.int("n")) for r in taken})
            return super().aggregate(state, iter(taken))

    fleet = Devices(with_liars(lambda r, c, w: told(w + 0.1, 100), 0), declared={0: 100})
    play(tmp_path, fleet, Noting(), rule=Rule(times=4.0))
    assert (seen[0], seen[1]) == ((100, 4 * ROWS), (ROWS, ROWS))


def test_steps_that_a_claim_stands_for_make_no_reply_short(tmp_path: Path) -> None:
    """A method that divides by the steps of the rows: who claims more rows goes no further for it."""

    @dataclass(frozen=True)
    class Stepping(Averaging):
        def distance(self, state: State, sent: Payload, reply: Reply) -> float:
            return float(np.linalg.norm(reply.payload.array("w"))) / np.sqrt(reply.payload.int("n"))

    far = with_liars(lambda r, c, w: told(w - 7.0, 4 * ROWS), 0)
    fleet = Devices(lambda r, c, w: far(r, c, w) if c == 0 else told(w + 1.0), declared={0: 4 * ROWS})
    x = float(play(tmp_path, fleet, Stepping(), rule=Rule(times=4.0)).state.tensors["w"].mean())
    W = (7 - 7 * x) / (x + 7)
    assert pytest.approx(allowed(SIZE) / 7, abs=0.1) == W  # weights are whole rows


# The bound --------------------------------------------------------------------------------------------


def test_honest_replies_are_averaged_as_ever(tmp_path: Path) -> None:
    played = play(tmp_path, Devices(honest))
    assert not played.refused()
    assert np.array_equal(played.state.tensors["w"], mean_without())


@pytest.mark.parametrize(
    "lie",
    [
        lambda r, c, w: told(np.full(w.shape, 1e9)),
        lambda r, c, w: told(w - 100 * (honest(r, c, w).array("w") - w)),
        lambda r, c, w: told(w + 10 * np.random.default_rng(r).normal(size=w.shape)),
    ],
)
def test_a_liar_is_refused_and_counted_and_the_model_is_that_of_the_others(tmp_path: Path, lie: Told) -> None:
    played = play(tmp_path, Devices(with_liars(lie, 2)))
    assert "times as far as the median of the round" in played.refused()[2]
    assert np.array_equal(played.state.tensors["w"], mean_without(2))
    (done,) = (e for e in played.events if isinstance(e, RoundDone))
    assert done.accepted == 7


def test_the_report_counts_a_reply_once_as_refused(tmp_path: Path) -> None:
    """A reply is taken when it comes and refused when all have come: two lines, of which the last counts."""
    run = create(tmp_path, "averaging", "toy")
    play(tmp_path, Devices(with_liars(lambda r, c, w: told(w + 1e6), 2)), run=run)
    lines = [e["status"] for e in events(run.path) if e["event"] == "client" and e["client"] == 2]
    assert lines == ["ok", "refused"]
    log = read(run.path)
    assert [str(e["status"]) for e in log.clients].count("refused") == 1
    assert len(log.clients) == 8


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_bound_is_where_it_is_said_to_be(tmp_path: Path, factor: float) -> None:
    unit = np.ones(SIZE) / np.sqrt(SIZE)
    fleet = Devices(lambda r, c, w: told(w + unit * (factor * allowed(SIZE) if c == 0 else 1)), 5)
    assert (0 in play(tmp_path, fleet).refused()) == (factor > 1)


def test_a_reply_of_few_numbers_may_go_further() -> None:
    """The norm of one slope is often a tenth of another's, that of a thousand never."""
    assert [round(allowed(n), 1) for n in (0, 1, 8, 1000)] == [36, 36, 8, 4]


def test_replies_that_move_nothing_do_not_count_and_two_are_no_majority(tmp_path: Path) -> None:
    """Silence is usual where a step rounds to nothing: who moves then is no liar."""
    still = with_liars(lambda r, c, w: told(w), 0, 1, 2, 3, 4, 5)
    assert not play(tmp_path, Devices(still)).refused()
    two = with_liars(lambda r, c, w: told(w + 1000), 0)
    assert not play(tmp_path, Devices(two, 2)).refused()
    assert list(play(tmp_path, Devices(two, 3)).refused()) == [0]


def test_who_answers_first_makes_no_difference(tmp_path: Path) -> None:
    """Replies are added up in the clients' order, however they come."""
    added: list[list[int]] = []

    @dataclass(frozen=True)
    class Ordered(Averaging):
        def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
            taken = list(replies)
            added.append([r.client for r in taken])
            return super().aggregate(state, iter(taken))

    lying = with_liars(lambda r, c, w: told(w - 50), 5)
    there = play(tmp_path, Devices(lying), Ordered())
    back = play(tmp_path, Devices(lying, order=lambda clients: clients[::-1]), Ordered())
    assert added == [[0, 1, 2, 3, 4, 6, 7]] * 2
    assert there.state.tensors["w"].tobytes() == back.state.tensors["w"].tobytes()


def test_memory_does_not_grow_with_the_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "IN_MEMORY", 1 << 12)

    def peak(clients: int) -> int:
        state = State({"w": np.zeros(1 << 17, np.float32)})  # half a megabyte a reply
        fleet = Devices(lambda r, c, w: told(w + 1), clients)
        with create(tmp_path, "averaging", "toy") as run:
            tracemalloc.start()
            with Replies(Averaging(), Round(1, BASE, fleet.rows, state), run, lambda event: None) as taken:  # type: ignore[arg-type]
                taken.gather(fleet.ask(1, range(clients), encode(Message(1, BASE, Payload(state.tensors)))))
                taken.aggregate()
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return most

    assert peak(48) < peak(4) + (1 << 18)


# Every method -----------------------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "fedit": {"r": 2, "steps": 2},
    "fedit wire": {"r": 2, "steps": 2, "wire": "fp16"},
    "fedpetuning": {"module": "bitfit", "steps": 2},
    "fedpeptao": {"tokens": 1, "steps": 2, "layers_rule": "all", "server_lr": 0.0},
    "fedkseed": {"K": 32, "tau": 20},
    "fedkseed sums": {"K": 32, "tau": 20, "wire": "sums"},
    "fedkseed bp": {"K": 32, "tau": 20, "wire": "sums", "backprop": 1.0},
    "mezo": {"K": 32, "tau": 20},
    "zosgd": {"K": 32, "tau": 20},
    "onebyte": {"K": 32, "directions": 8},
    "onebyte sign": {"K": 32, "directions": 8, "wire": "sign"},
    "fwdllm": {"r": 2, "alpha": 4, "P": 8, "variance_gate": False, "decay": 0, "discriminative": False},
}
CLIENTS = 5


@pytest.fixture(scope="module")
def begun() -> dict[str, tuple[Any, Any]]:
    """(method, its first state) by case."""
    found = {}
    for case, values in SMALL.items():
        method = methods.make(case.split()[0], values)
        found[case] = method, method.init(tiny_llama(), 7)
    return found


def usual(sent: Payload, spec: ReplySpec, client: int) -> Payload:
    """A reply of a usual size: a change of about 1e-3, a few hundred units."""
    rng = np.random.default_rng(client)
    arrays = {}
    for name, (kind, shape) in spec.arrays.items():
        sides = [abs(n) for n in shape if n is not None]
        step = rng.normal(size=sides)
        if np.dtype(kind).kind == "f":
            arrays[name] = (sent.arrays.get(name, np.zeros(sides)) + 1e-3 * step).astype(kind)
        elif kind == "uint8":
            arrays[name] = LogCode.encode(300 * step, np.full(sides, 0.5))
        else:
            arrays[name] = (300 * step).astype(kind)
    scalars: dict[str, Any] = {"n": ROWS, "loss": 1.0, "steps": 20, "kept": 0.5}
    return Payload(arrays, {name: scalars[name] for name in spec.scalars})


def extreme(honest: Payload, sent: Payload, size: float, direction: str) -> Payload:
    """A lie within the agreed ranges: so many times the honest move, or one number everywhere."""
    arrays = {}
    for name, array in honest.arrays.items():
        begun = np.asarray(sent.arrays.get(name, 0.0), np.float64) if array.dtype.kind == "f" else 0.0
        if array.dtype == np.uint8:
            move = LogCode.decode(array).astype(np.float64)
        else:
            move = array - begun
        lie = begun + size * (np.ones(array.shape) if direction == "all" else move)
        if array.dtype == np.uint8:
            arrays[name] = LogCode.encode(lie, np.full(array.shape, 0.5))
            continue
        top = min(1e9, float(np.finfo(array.dtype).max)) if array.dtype.kind == "f" else 2.0**31 - 1
        arrays[name] = np.clip(lie, -top, top).astype(array.dtype)
    return Payload(arrays, honest.scalars)


def moved(before: Any, after: Any) -> float:
    """How far a state went: in its tensors, or in its ledger's sums."""
    if hasattr(after, "ledger"):
        last = after.ledger.rounds == after.round
        return methods.norm([after.ledger.coefficients[last]])
    return methods.norm(t.astype(np.float64) - before.tensors[n] for n, t in after.tensors.items())


@pytest.mark.parametrize("case", SMALL)
@settings(max_examples=4)
@given(order=st.permutations(range(CLIENTS)))
def test_whoever_answers_first_the_state_of_every_method_is_the_same(
    case: str, order: Sequence[int], begun: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bit for bit: sums of floats are not the same in another order, so replies are added in the clients' order."""
    method, state = begun[case]
    kind = method.kind_of(0)
    sent, spec = method.kinds(state)[kind]
    payloads = [
        walked(method, c) if case == "fedkseed sums" else usual(sent, spec, c) for c in range(CLIENTS)
    ]
    payloads = [Payload(p.arrays, {**p.scalars, "n": 1 + 2 * c}) for c, p in enumerate(payloads)]
    asked = Round(1, BASE, [ROWS] * CLIENTS, state, lambda client: kind)

    def added(clients: Sequence[int]) -> bytes:
        answers = [Answer(c, c, encode(Message(1, BASE, payloads[c])), "ok", "", 0.0, 0) for c in clients]
        with Replies(method, asked, Folder(tmp_path_factory.getbasetemp()), lambda event: None) as taken:  # type: ignore[arg-type]
            taken.gather(iter(answers))
            assert taken.accepted >= CLIENTS - 1
            return encode(Message(1, BASE, checkpoint.pack(taken.aggregate(), Totals())))

    assert added(order) == added(range(CLIENTS))


@pytest.mark.parametrize("case", SMALL)
@settings(max_examples=12)
@given(
    size=st.floats(-20, 20).map(lambda x: float(np.sign(x) * 10 ** (abs(x) - 8))),
    direction=st.sampled_from(["all", "own"]),
)
def test_whatever_one_client_says_the_model_moves_no_further(
    case: str, size: float, direction: str, begun: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The mean of replies that go at most so many times as far as the median does itself not go further."""
    method, state = begun[case]
    kind = method.kind_of(0)
    sent, spec = method.kinds(state)[kind]
    honest = [usual(sent, spec, c) for c in range(CLIENTS)]
    if case == "fedkseed sums":  # sums that a walk can give
        honest = [walked(method, c) for c in range(CLIENTS)]
    furthest = max(
        moved(state, method.aggregate(state, iter([Reply(c, c, p)]))) for c, p in enumerate(honest)
    )
    lie = extreme(honest[0], sent, size, direction)
    answers = [
        Answer(c, c, encode(Message(1, BASE, lie if c == 0 else p)), "ok", "", 0.0, 0)
        for c, p in enumerate(honest)
    ]
    run = Folder(tmp_path_factory.getbasetemp())
    asked = Round(1, BASE, [ROWS] * CLIENTS, state, lambda client: kind)
    with Replies(method, asked, run, lambda event: None) as taken:  # type: ignore[arg-type]
        taken.gather(iter(answers))
        assert taken.accepted >= CLIENTS - 1
        new = taken.aggregate()
    assert moved(state, new) <= 1.01 * allowed(sum(a.size for a in lie.arrays.values())) * furthest


class Folder(NamedTuple):
    path: Path


def heard(method: Any, state: Any, payloads: Sequence[Payload], folder: Path) -> list[int]:
    """The clients whose replies count in a round of these."""
    answers = [Answer(c, c, encode(Message(1, BASE, p)), "ok", "", 0.0, 0) for c, p in enumerate(payloads)]
    against = Round(1, BASE, [ROWS] * len(payloads), state)
    with Replies(method, against, Folder(folder), lambda event: None) as taken:  # type: ignore[arg-type]
        taken.gather(iter(answers))
        return [kept.answer.client for kept in taken.kept]


def concentrated(honest: Payload, times: float, codes: int) -> Payload:
    """The lie of so many codes, of which the first alone is not zero: so many times the length of the honest move."""
    lie = np.zeros(codes)
    lie[0] = times * np.linalg.norm(LogCode.decode(honest.array("codes")))
    return Payload({"codes": LogCode.encode(lie, np.full(codes, 0.5))}, honest.scalars)


@pytest.mark.parametrize(
    ("case", "codes"), [("fedkseed", 1), ("fedkseed", 5), ("fedkseed", 20), ("onebyte", 8)]
)
@pytest.mark.parametrize("times", [0.5, 2, 16, 30])
def test_who_sends_fewer_numbers_may_not_go_further(
    case: str, codes: int, times: float, begun: Any, tmp_path: Path
) -> None:
    """20 codes were agreed: the bound is 5.6 for one code as well, and not 36 (8 for the 8 of `onebyte`)."""
    method, state = begun[case]
    sent, spec = method.kinds(state)[0]
    payloads = [usual(sent, spec, c) for c in range(CLIENTS)]
    payloads[0] = concentrated(payloads[0], times, codes)
    assert heard(method, state, payloads, tmp_path) == [c for c in range(CLIENTS) if c or times < 5]


def test_an_honest_device_that_sends_fewer_codes_is_heard(begun: Any, tmp_path: Path) -> None:
    method, state = begun["fedkseed"]
    sent, spec = method.kinds(state)[0]
    payloads = [usual(sent, spec, c) for c in range(CLIENTS)]
    for c, codes in ((0, 1), (3, 7)):
        payloads[c] = Payload({"codes": payloads[c].array("codes")[:codes]}, payloads[c].scalars)
    assert heard(method, state, payloads, tmp_path) == list(range(CLIENTS))


@pytest.mark.parametrize(
    ("shapes", "numbers"), [([(3, 4), (5,)], 17), ([(-20,)], 20), ([()], 1), ([(3, None), (5,)], None)]
)
def test_the_slack_is_by_the_numbers_that_were_agreed(
    shapes: list[tuple[int | None, ...]], numbers: int | None
) -> None:
    spec = ReplySpec({f"a{i}": ("float32", shape) for i, shape in enumerate(shapes)}, {})
    assert replies.agreed(spec) == numbers


def test_where_any_length_was_agreed_the_usual_one_counts() -> None:
    def kept(client: int, numbers: int) -> replies.Kept:
        answer = Answer(client, client, None, "ok", "", 0.0, 0)
        return replies.Kept(answer, 0, 0, frozenset("w"), None, numbers, 6.0 if client == 0 else 1.0, 1, 1.0)

    taken = [kept(0, 1), kept(1, 20), kept(2, 20), kept(3, 30)]
    assert [k.answer.client for k, _ in replies.too_far(taken)] == [0]
    assert replies.bound(taken[0], taken) == allowed(20)


def of_kind(kind: str, *distances: float) -> list[replies.Kept]:
    """Replies of many numbers that go so far."""
    answers = [Answer(c, c, None, "ok", "", 0.0, 0) for c in range(len(distances))]
    many = 1000 * replies.FEW
    return [
        replies.Kept(a, 0, 0, frozenset([kind]), many, many, d, ROWS, d)
        for a, d in zip(answers, distances, strict=True)
    ]


@pytest.mark.parametrize(("fewest", "refused"), [(2, [100.0]), (3, [])])
def test_where_rows_are_claimed_the_longer_of_two_is_refused(fewest: int, refused: list[float]) -> None:
    assert [k.distance for k, _ in replies.too_far(of_kind("walk", 1.0, 100.0), fewest)] == refused


@pytest.mark.parametrize("far", [0.01, 15.9, 16.1, 1e9])
def test_a_lone_kind_is_held_against_all_where_rows_are_claimed(far: float) -> None:
    taken = [*of_kind("walk", far), *of_kind("projected", 1.0, 1.1, 0.9)]
    assert [k.distance for k, _ in replies.too_far(taken, 2)] == [far] * (far > 16)
    assert replies.too_far(taken, 3) == []


def test_two_liars_that_are_all_of_a_kind_are_held_against_the_others() -> None:
    taken = [*of_kind("projected", 1e6, 1e6), *of_kind("walk", 1.0, 1.1, 0.9)]
    assert [k.distance for k, _ in replies.too_far(taken, 2)] == [1e6, 1e6]


@pytest.mark.parametrize(
    ("wanted", "given"),
    [((0, 0, 1), (0, 0, 0)), ((0, 1), (0, 0)), ((0, 1, 1), (0, 1, 1)), ((1, 2, 2), (0, 2, 2)), ((1,), (0,))],
)
def test_a_kind_of_work_that_one_device_alone_has_is_not_given(
    wanted: tuple[int, ...], given: tuple[int, ...]
) -> None:
    assert rounds.of_two(dict(enumerate(wanted))) == dict(enumerate(given))


@pytest.mark.parametrize(("times", "ordered"), [(math.inf, [0, 1]), (1.0, [0, 0])])
def test_where_rows_are_claimed_a_round_orders_no_lone_kind(
    times: float, ordered: list[int], tmp_path: Path
) -> None:
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
            rounds.run(
                method, Fleet(with_liars(honest), clients=2), method.init(tiny_llama(), 7), run, plan, hooks
            )
    payloads = [decode(asked[0][c]).payload for c in (0, 1)]
    assert [int(p.scalars.get("backprop") is True) for p in payloads] == ordered


def walked(method: Any, client: int) -> Payload:
    """The reply in exact sums of a client that took 20 steps."""
    from fleetune.tuning.methods._zeroth import draw

    k = draw(client, 20, None, method.K)
    c = np.random.default_rng(client).integers(-500, 500, 20)
    return method.codec.reply(k, c, method.K, {"n": ROWS, "loss": 1.0})


def test_sums_along_directions_that_were_not_drawn_are_refused(begun: Any) -> None:
    method, state = begun["fedkseed sums"]
    honest = walked(method, 3)
    assert method.distance(state, Payload({}), Reply(3, 3, honest)) > 0
    sums = honest.array("sums").copy()
    sums[np.flatnonzero(sums == 0)[0]] = 1
    with pytest.raises(Exception, match="its steps give 0 at most"):
        method.distance(state, Payload({}), Reply(3, 3, Payload({"sums": sums}, honest.scalars)))


def test_devices_of_few_and_of_many_steps_compare(begun: Any) -> None:
    """A device of one step and one of a hundred, of random signs: one size to within 2."""
    method = methods.make("fedit", {"r": 2, "batch_size": 1, "lr": 1e-3})
    _, state = begun["fedit"]
    rng = np.random.default_rng(0)
    sizes = []
    for n in (1, 100):
        w = {
            k: t + 1e-3 * rng.choice([-1, 1], (n, *t.shape)).sum(0).astype(np.float32)
            for k, t in state.tensors.items()
        }
        sizes.append(method.distance(state, Payload({}), Reply(0, 0, Payload(w, {"n": n, "loss": 0.0}))))
    assert sizes == pytest.approx([1, 1], rel=0.1)


# A reply on which the method fails --------------------------------------------------------------------


@dataclass(frozen=True)
class Fussy(Averaging):
    """Fails on a negative mean, and at the end where it is told to."""

    at_the_end: bool = False
    error: BaseException | None = None

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        taken = []
        for reply in replies:
            if reply.payload.array("w").mean() < 0:
                raise self.error or ZeroDivisionError("negative")
            taken.append(reply)
        if self.at_the_end and taken:
            raise np.linalg.LinAlgError("SVD did not converge")
        return super().aggregate(state, iter(taken))


@pytest.mark.parametrize(
    ("error", "why"),
    [(None, "ZeroDivisionError: negative"), (SystemExit(0), "it ended the process, SystemExit: 0")],
)
def test_a_reply_on_which_the_method_fails_is_refused_and_the_rest_adds_up(
    error: BaseException | None, why: str, tmp_path: Path
) -> None:
    negative = with_liars(lambda r, c, w: told(w - 0.1), 1, 6)
    played = play(tmp_path, Devices(negative), Fussy(error=error))
    assert sorted(played.refused()) == [1, 6]
    assert all(
        text.startswith(f"it cannot be used ({why} (test_replies.py:") for text in played.refused().values()
    )
    assert np.array_equal(played.state.tensors["w"], mean_without(1, 6))


def test_a_sum_that_fails_on_no_reply_ends_the_run_without_a_traceback(tmp_path: Path) -> None:
    run = create(tmp_path, "averaging", "toy")
    with pytest.raises(FleetError, match=r"round 1 cannot be added up .LinAlgError: SVD"):
        play(tmp_path, Devices(honest), Fussy(at_the_end=True), run=run)
    assert [r for r, _ in checkpoints(run.path)] == [0]


def test_no_codes_at_all_weigh_nothing() -> None:
    """`fedkseed` with K = 1 in a mixed fleet divided 0 by 0."""
    method = methods.make("fedkseed", {"K": 1, "tau": 6, "backprop": 0.5})
    state = method.init(tiny_llama(), 7)
    empty = Reply(0, 5, Payload({"codes": np.zeros(0, np.uint8)}, {"n": 1, "loss": 1.0}))
    assert not len(method.aggregate(state, iter([empty])).ledger)


# Rounds that ruin the model ---------------------------------------------------------------------------


def worst(state: State) -> dict[str, float]:
    """A loss that is least at 1; not finite beyond 1e6, as a network's is."""
    top = float(np.abs(state.tensors["w"] - 1).max())
    return {"loss": top if top < 1e6 else float("nan")}


def test_a_model_that_is_not_finite_is_never_taken(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Overflows(Averaging):
        def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
            new = super().aggregate(state, replies, rule)
            return new._replace(scale=new.scale * 1e200) if new is not state else new

    run = create(tmp_path, "averaging", "toy")
    with pytest.raises(ModelLostError, match="no finite model; the last good round is 1") as lost:
        play(tmp_path, Devices(honest), Overflows(), rounds_=4, run=run)
    assert lost.value.exit_code == 4
    assert (lost.value.round, lost.value.state.scale) == (1, 1e200)
    assert [r for r, _ in checkpoints(run.path)] == [0, 1]


def test_a_loss_that_is_not_finite_ends_the_run_with_the_model_before(tmp_path: Path) -> None:
    far = lambda r, c, w: told(w + 1e7) if r == 3 else honest(r, c, w)  # noqa: E731
    run = create(tmp_path, "averaging", "toy")
    with pytest.raises(
        ModelLostError, match=r"loss after round 3 is not finite; the last good round is 2"
    ) as lost:
        play(tmp_path, Devices(far), rounds_=5, evaluate=worst, run=run)
    assert worst(lost.value.state)["loss"] < 1
    assert [r for r, _ in checkpoints(run.path)][-1] == 2


def test_replies_that_are_not_finite_for_the_models_own_sake_bring_back_the_one_before(
    tmp_path: Path,
) -> None:
    """Round 2 is ruined by a majority; in round 3 the honest ones fail on it, and the liar alone must not go on."""

    def reply(round: int, client: int, w: np.ndarray) -> Payload:
        if np.abs(w).max() > 1e3 and client:
            return told(np.full(w.shape, np.nan))
        return told(w + 1e4) if round == 2 else honest(round, client, w)

    run = create(tmp_path, "averaging", "toy")
    with pytest.raises(ModelLostError, match=r"7 of 8 replies of round 3 .* last good round is 1") as lost:
        play(tmp_path, Devices(reply), rounds_=5, evaluate=worst, run=run)
    good = play(tmp_path, Devices(reply), rounds_=1).state
    assert np.array_equal(lost.value.state.tensors["w"], good.tensors["w"])
    newest = checkpoints(run.path)[-1]
    assert newest[0] == 1
    kept, _ = checkpoint.unpack(checkpoint.decode(newest[1].read_bytes()), start())
    assert np.array_equal(kept.tensors["w"], good.tensors["w"])
    assert {e["round"] for e in events(run.path) if e["event"] == "client"} == {
        1,
        2,
        3,
    }  # what happened is on record


def test_replies_that_are_not_finite_though_the_model_is_good_leave_it(tmp_path: Path) -> None:
    """The few that are finite are not believed either; after `PATIENCE` such rounds the run ends."""

    def reply(round: int, client: int, w: np.ndarray) -> Payload:
        broken = client > 2 and round > 1
        return told(np.full(w.shape, np.inf)) if broken else honest(round, client, w)

    run = create(tmp_path, "averaging", "toy")
    with pytest.raises(FleetError, match="most replies are not finite, 3 rounds in a row") as error:
        play(tmp_path, Devices(reply), rounds_=9, evaluate=worst, run=run)
    assert not isinstance(error.value, ModelLostError)
    good = play(tmp_path, Devices(reply), rounds_=1).state
    kept, _ = checkpoint.unpack(checkpoint.decode(checkpoints(run.path)[-1][1].read_bytes()), start())
    assert np.array_equal(kept.tensors["w"], good.tensors["w"])


def tuned(out: Path, rounds_: int, **more: Any) -> TuneResult:
    """A whole run of three clients on the tiny llama."""
    return fleetune.tune(
        tiny_llama(),
        [{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(12)],
        out=out,
        method="fedit",
        settings={"r": 2, "steps": 1, "lr": 1e-2},
        clients=3,
        rounds=rounds_,
        held_out=3,
        samples=0,
        threads=1,
        device="cpu",
        offline=True,
        **more,
    )


def test_a_lost_run_leaves_the_result_of_its_last_good_round_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_lost_run_that_keeps_the_best_leaves_the_best_rounds_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 2 makes the model worse, round 3 loses it: round 1 was the best."""

    best: dict[str, Any] = {"keep": "best", "client_rows": 0}
    work = LocalFleet._work

    def lying(self: LocalFleet, client: int, key: int, message: bytes) -> bytes:
        true = decode(work(self, client, key, message))
        by = -300.0 if true.round == 2 else 1.0
        arrays = {n: a * np.float32(by) for n, a in true.payload.arrays.items()}
        return encode(Message(true.round, true.base, Payload(arrays, true.payload.scalars)))

    once = tuned(tmp_path / "once", 1, **best)
    assert once.done.best == 1
    with monkeypatch.context() as patch:
        patch.setattr(LocalFleet, "_work", lying)
        patch.setattr(rounds, "_check_model", _lose_in_round_3)
        with pytest.raises(ModelLostError, match="the last good round is 2; the best is 1") as lost:
            tuned(tmp_path / "lost", 4, **best)
    assert "the result of the best is in the run folder" in str(lost.value.hint)
    (run,) = listing(tmp_path / "lost")
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (once.folder / weights).read_bytes()


def _lose_in_round_3(replies: Replies, run: Any, hooks: Any) -> None:
    if replies.round.number == 3:
        raise ModelLostError("lost", 2, replies.round.state)


def test_a_loss_that_is_not_finite_is_not_finite_too(tmp_path: Path) -> None:
    played = play(tmp_path, Devices(with_liars(lambda r, c, w: told(w, loss=float("nan")), 4)))
    assert list(played.refused()) == [4]
