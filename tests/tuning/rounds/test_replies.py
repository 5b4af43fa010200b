"""Replies at the door: rows, the bound on how far one goes, whoever comes first, and what a method fails on."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import methods_harness as harness
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from methods_harness import CASES, CLIENTS, begun
from toy import ROWS, SIZE, Averaging, Devices, State, honest, mean_without, play, start, told, with_liars

from fleetune.common.events import RoundDone
from fleetune.errors import FleetError
from fleetune.models import tiny_llama
from fleetune.runs.rundir import checkpoints, create
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import MEAN, Rule
from fleetune.tuning.exchange.messages import LogCode, Payload, ReplySpec
from fleetune.tuning.methods import Reply
from fleetune.tuning.rounds import replies
from fleetune.tuning.rounds.fleets import Answer
from fleetune.tuning.rounds.replies import allowed


def test_a_client_that_claims_more_rows_than_it_has_is_refused(tmp_path):
    heavy = with_liars(lambda r, c, w: told(w + 0.1, n=ROWS + 1), 3)
    played = play(tmp_path, Devices(heavy))
    assert played.refused() == {3: "reply claims 11 rows, the client has 10"}
    assert np.array_equal(played.state.tensors["w"], mean_without(3))
    assert not play(tmp_path, Devices(with_liars(lambda r, c, w: told(w + 0.1, n=ROWS), 3))).refused()
    hidden = play(tmp_path, Devices(heavy), spent=float)
    assert hidden.refused() == {3: "reply claims more rows than the client has"}


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


def test_rows_weigh_at_most_so_many_times_the_median_of_the_round():
    # as published: a simulated client has its rows
    assert with_weight(ANY, MEAN) == pytest.approx(ANY, rel=1e-6)
    assert with_weight(ANY, Rule(times=4.0)) == pytest.approx(4 * ROWS)
    assert with_weight(25, Rule(times=4.0)) == pytest.approx(25)
    assert with_weight(1, Rule(times=4.0)) == pytest.approx(1)
    assert with_weight(25, Rule(times=4.0), max_rows=15) == pytest.approx(15)
    assert with_weight(ANY, MEAN, max_rows=15) == pytest.approx(15)


@settings(max_examples=25)
@given(
    factor=st.floats(0.01, 3.9),
    n=st.sampled_from([1, ROWS, 3 * ROWS, ANY]),
    moves=st.lists(st.floats(0.5, 1.0), min_size=7, max_size=7),
)
def test_no_weight_moves_the_mean_further_than_a_usual_reply_may(factor, n, moves):
    """A liar against seven that go the same way: its pull is at most `allowed` times that of the median client."""
    unit, far = np.ones(SIZE) / np.sqrt(SIZE), [-factor, *moves]
    fleet = Devices(lambda r, c, w: told(w + far[c] * unit, n if c == 0 else ROWS), declared={0: n})
    played = play(Path(tempfile.mkdtemp()), fleet, rule=Rule(times=4.0))
    middle = float(np.sort([factor, *moves])[3])
    if factor > 3.5 * middle * allowed(SIZE) / 4:
        return  # it may be refused
    assert not played.refused()
    # (sum of the others - W factor) / (7 + W), in weights of ROWS
    x = float(played.state.tensors["w"] @ unit)
    W = (sum(moves) - 7 * x) / (x + factor)
    assert W * factor <= allowed(SIZE) * middle * 1.001
    assert W <= 4.001


def test_a_method_knows_the_rows_that_a_client_took_its_steps_on(tmp_path):
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


def test_steps_that_a_claim_stands_for_make_no_reply_short(tmp_path):
    """A method that divides by the steps of the rows: who claims more rows goes no further for it."""
    fleet = Devices(lambda r, c, w: told(w + 1.0) if c else told(w - 7.0, 4 * ROWS), declared={0: 4 * ROWS})
    x = float(play(tmp_path, fleet, Walking(), rule=Rule(times=4.0)).state.tensors["w"].mean())
    W = (7 - 7 * x) / (x + 7)
    assert pytest.approx(allowed(SIZE) / 7, abs=0.1) == W  # weights are whole rows


@dataclass(frozen=True)
class Walking(Averaging):
    """A method that divides by the steps of the rows."""

    def distance(self, state: State, sent: Payload, reply: Reply) -> float:
        return float(np.linalg.norm(reply.payload.array("w"))) / np.sqrt(reply.payload.int("n"))


@pytest.mark.parametrize("clients", [2, 3, 8])
@pytest.mark.parametrize("rule", [Rule(times=1.0), Rule("median"), Rule("norm-clip")])
def test_rows_that_are_claimed_excuse_no_distance(rule, clients, tmp_path):
    """A claim of 2^31 rows used to excuse 14,654 times the distance; four times the median's rows excuse twice."""
    most = allowed(SIZE) * 2
    for times, refused in ((0.9 * most, []), (1.1 * most, [1])):
        moves = {1: told(np.full(SIZE, -times), ANY)}
        fleet = Devices(
            lambda r, c, w, moves=moves: moves.get(c, told(w + 1.0)),
            clients,
            declared={1: ANY},  # type: ignore[misc]
        )
        (folder := tmp_path / f"{times}").mkdir()
        assert list(play(folder, fleet, Walking(), rule=rule).refused()) == refused


@pytest.mark.parametrize(("rows", "far"), [((10, 40), 7.0), ((40, 10), 0.3)])
def test_of_two_devices_no_honest_one_is_refused_for_a_claim_of_either(rows, far, tmp_path):
    """Four times the steps go up to four times as far; and who claims them goes half as far as it does."""
    fleet = Devices(lambda r, c, w: told(w + (far if c else 1.0), rows[c]), 2, declared=dict(enumerate(rows)))
    assert not play(tmp_path, fleet, Walking(), rule=Rule("median")).refused()


def test_a_reply_of_which_no_row_may_count_is_refused(tmp_path):
    """One that may count 0.6 rows used to count one."""
    rows, far = [4] + [1] * 7, [-1.6 * allowed(SIZE)] + [1.0] * 7
    fleet = Devices(lambda r, c, w: told(w + far[c], rows[c]), declared=dict(enumerate(rows)))
    played = play(tmp_path, fleet, Walking(), rule=Rule(times=1.0))
    assert played.refused() == {0: "it goes so far that not one of its rows may count"}


@pytest.mark.parametrize(
    "lie",
    [
        lambda r, c, w: told(np.full(w.shape, 1e9)),
        lambda r, c, w: told(w - 100 * (honest(r, c, w).array("w") - w)),
        lambda r, c, w: told(w + 10 * np.random.default_rng(r).normal(size=w.shape)),
    ],
)
def test_a_liar_is_refused_and_counted_and_the_model_is_that_of_the_others(tmp_path, lie):
    played = play(tmp_path, Devices(with_liars(lie, 2)))
    assert "times as far as the median of the round" in played.refused()[2]
    assert np.array_equal(played.state.tensors["w"], mean_without(2))
    (done,) = (e for e in played.events if isinstance(e, RoundDone))
    assert done.accepted == 7


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_bound_is_where_it_is_said_to_be(tmp_path, factor):
    unit = np.ones(SIZE) / np.sqrt(SIZE)
    fleet = Devices(lambda r, c, w: told(w + unit * (factor * allowed(SIZE) if c == 0 else 1)), 5)
    assert (0 in play(tmp_path, fleet).refused()) == (factor > 1)


def test_replies_that_move_nothing_do_not_count_and_two_are_no_majority(tmp_path):
    """Silence is usual where a step rounds to nothing: who moves then is no liar."""
    still = with_liars(lambda r, c, w: told(w), 0, 1, 2, 3, 4, 5)
    assert not play(tmp_path, Devices(still)).refused()
    two = with_liars(lambda r, c, w: told(w + 1000), 0)
    assert not play(tmp_path, Devices(two, 2)).refused()
    assert list(play(tmp_path, Devices(two, 3)).refused()) == [0]


def extreme(honest: Payload, sent: Payload, size: float, direction: str) -> Payload:
    """A lie within the agreed ranges: so many times the honest move, or one number everywhere."""
    arrays = {}
    for name, array in honest.arrays.items():
        begun = np.asarray(sent.arrays.get(name, 0.0), np.float64) if array.dtype.kind == "f" else 0.0
        move = LogCode.decode(array).astype(np.float64) if array.dtype == np.uint8 else array - begun
        lie = begun + size * (np.ones(array.shape) if direction == "all" else move)
        if array.dtype == np.uint8:
            arrays[name] = LogCode.encode(lie, np.full(array.shape, 0.5))
            continue
        top = min(1e9, float(np.finfo(array.dtype).max)) if array.dtype.kind == "f" else 2.0**31 - 1
        arrays[name] = np.clip(lie, -top, top).astype(array.dtype)
    return Payload(arrays, honest.scalars)


def moved(before: Any, after: Any) -> float:
    if hasattr(after, "ledger"):
        last = after.ledger.rounds == after.round
        return methods.norm([after.ledger.coefficients[last]])
    return methods.norm(t.astype(np.float64) - before.tensors[n] for n, t in after.tensors.items())


@pytest.mark.parametrize("case", CASES)
def test_whoever_answers_first_the_state_of_every_method_is_the_same(case, tmp_path):
    """Bit for bit: sums of floats are not the same in another order, so replies are added in the clients' order."""
    payloads = [harness.usual(*begun(case), c) for c in range(CLIENTS)]
    states = []
    for order in (range(CLIENTS), [3, 1, 4, 0, 2], [4, 3, 2, 1, 0]):
        with harness.gathered(*begun(case), payloads, tmp_path, order) as taken:
            assert taken.accepted >= CLIENTS - 1
            states.append(harness.bits(taken.aggregate()))
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=4)
@given(
    size=st.floats(-20, 20).map(lambda x: float(np.sign(x) * 10 ** (abs(x) - 8))),
    direction=st.sampled_from(["all", "own"]),
)
def test_whatever_one_client_says_the_model_moves_no_further(case, size, direction):
    """The mean of replies that go at most so many times as far as the median does itself not go further."""
    method, state = begun(case)
    sent, _ = method.kinds(state)[method.kind_of(0)]
    honest = [harness.usual(method, state, c) for c in range(CLIENTS)]
    honest = [Payload(p.arrays, {**p.scalars, "n": 1}) for p in honest]
    alone = [method.aggregate(state, iter([Reply(c, c, p)])) for c, p in enumerate(honest)]
    lie = extreme(honest[0], sent, size, direction)
    with harness.gathered(method, state, [lie, *honest[1:]], Path(tempfile.gettempdir())) as taken:
        assert taken.accepted >= CLIENTS - 1
        new = taken.aggregate()
    most = allowed(sum(a.size for a in lie.arrays.values())) * max(moved(state, s) for s in alone)
    assert moved(state, new) <= 1.01 * most


def concentrated(honest: Payload, times: float, codes: int) -> Payload:
    """The lie of so many codes, of which the first alone is not zero: so many times the length of the honest move."""
    lie = np.zeros(codes)
    lie[0] = times * np.linalg.norm(LogCode.decode(honest.array("codes")))
    return Payload({"codes": LogCode.encode(lie, np.full(codes, 0.5))}, honest.scalars)


@pytest.mark.parametrize(("case", "codes"), [("fedkseed", 1), ("fedkseed", 20), ("onebyte", 8)])
@pytest.mark.parametrize("times", [0.5, 2, 16, 30])
def test_who_sends_fewer_numbers_may_not_go_further(case, codes, times, tmp_path):
    """20 codes were agreed: the bound is 5.6 for one code as well, and not 36 (8 for the 8 of `onebyte`)."""
    method, state = begun(case)
    payloads = [harness.usual(method, state, c) for c in range(CLIENTS)]
    payloads[0] = concentrated(payloads[0], times, codes)
    with harness.gathered(method, state, payloads, tmp_path) as taken:
        counted = [kept.answer.client for kept in taken.kept]
    assert counted == [c for c in range(CLIENTS) if c or times < 5]


@pytest.mark.parametrize(("shapes", "numbers"), [([(3, 4), (5,)], 17), ([(-20,)], 20), ([()], 1)])
def test_the_slack_is_by_the_numbers_that_were_agreed(shapes, numbers):
    spec = ReplySpec({f"a{i}": ("float32", shape) for i, shape in enumerate(shapes)}, {})
    assert replies.agreed(spec) == numbers


def of_kind(kind: str, *distances: float) -> list[replies.Kept]:
    answer, kinds = Answer(0, 0, None, "ok", "", 0.0, 0), frozenset([kind])
    return [
        replies.Kept(answer._replace(client=c), 0, 0, kinds, 4.0, d, ROWS, d) for c, d in enumerate(distances)
    ]


@pytest.mark.parametrize(("fewest", "refused"), [(2, [100.0]), (3, [])])
def test_where_rows_are_claimed_the_longer_of_two_is_refused(fewest, refused):
    assert [k.distance for k, _ in replies.too_far(of_kind("walk", 1.0, 100.0), fewest)] == refused


@pytest.mark.parametrize("far", [0.01, 15.9, 16.1, 1e9])
def test_a_lone_kind_is_held_against_all_where_rows_are_claimed(far):
    taken = [*of_kind("walk", far), *of_kind("projected", 1.0, 1.1, 0.9)]
    assert [k.distance for k, _ in replies.too_far(taken, 2)] == [far] * (far > 16)
    assert replies.too_far(taken, 3) == []


def test_devices_of_few_and_of_many_steps_compare():
    """A device of one step and one of a hundred, of random signs: one size to within 2."""
    method = methods.make("fedit", {"r": 2, "batch_size": 1, "lr": 1e-3})
    _, state = begun("fedit")
    rng, sizes = np.random.default_rng(0), []
    for n in (1, 100):
        w = {k: t + 1e-3 * rng.choice([-1, 1], (n, *t.shape)).sum(0) for k, t in state.tensors.items()}
        sizes.append(method.distance(state, Payload({}), Reply(0, 0, Payload(w, {"n": n, "loss": 0.0}))))
    assert sizes == pytest.approx([1, 1], rel=0.1)


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
def test_a_reply_on_which_the_method_fails_is_refused_and_the_rest_adds_up(error, why, tmp_path):
    negative = with_liars(lambda r, c, w: told(w - 0.1), 1, 6)
    played = play(tmp_path, Devices(negative), Fussy(error=error))
    assert sorted(played.refused()) == [1, 6]
    for text in played.refused().values():
        assert text.startswith(f"it cannot be used ({why} (test_replies.py:")
    assert np.array_equal(played.state.tensors["w"], mean_without(1, 6))


def test_a_sum_that_fails_on_no_reply_ends_the_run_without_a_traceback(tmp_path):
    run = create(tmp_path, "averaging", "toy")
    with pytest.raises(FleetError, match=r"round 1 cannot be added up .LinAlgError: SVD"):
        play(run, Devices(honest), Fussy(at_the_end=True))
    assert [r for r, _ in checkpoints(run.path)] == [0]


def test_no_codes_at_all_weigh_nothing():
    """`fedkseed` with K = 1 in a mixed fleet divided 0 by 0."""
    method = methods.make("fedkseed", {"K": 1, "tau": 6, "backprop": 0.5})
    state = method.init(tiny_llama(), 7)
    empty = Reply(0, 5, Payload({"codes": np.zeros(0, np.uint8)}, {"n": 1, "loss": 1.0}))
    assert not len(method.aggregate(state, iter([empty])).ledger)
