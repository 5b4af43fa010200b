"""A state comes back from a checkpoint bit by bit; the course of a run through JSON."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import BASE, Averaging, Devices, Killed, State, told

from fleetune.common.events import Recorded, RoundDone, as_dict
from fleetune.errors import LedgerError, MessageError, StorageError
from fleetune.models import tiny_llama
from fleetune.privacy.mechanism import Privacy
from fleetune.runs.rundir import at, checkpoints
from fleetune.seeds.ledger import Ledger
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import MEAN, PRIVATE, Rule
from fleetune.tuning.exchange.messages import Message, Payload, ReplySpec, decode, encode
from fleetune.tuning.methods import Method, Reply
from fleetune.tuning.rounds import checkpoint, rounds
from fleetune.tuning.rounds.checkpoint import Course, Releases, Totals, pack, released, unpack
from fleetune.tuning.rounds.rounds import Hooks, RoundPlan

SMALL: dict[str, list[dict[str, Any]]] = {  # settings that make each method small, one run a set
    "fedit": [{"r": 2}, {"r": 2, "average": "product"}, {"r": 2, "wire": "sign"}],
    "fedkseed": [{"K": 32, "tau": 5}, {"K": 32, "tau": 5, "pro": True}],
    "mezo": [{"K": 16, "tau": 10}, {"K": 16, "tau": 10, "law": "gaussian"}],
}

CASES = [(name, i) for name in sorted(methods.entries()) for i in range(len(SMALL.get(name, [{}])))]


def made(name: str, i: int) -> Method:
    return methods.make(name, SMALL.get(name, [{}])[i])


def answer(spec: ReplySpec, seed: int) -> Payload:
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, (kind, shape) in spec.arrays.items():
        sides = [abs(n) for n in shape]
        if np.dtype(kind).kind == "f":
            arrays[name] = rng.normal(size=sides).astype(kind)
        else:
            arrays[name] = rng.integers(0, 120, sides).astype(kind)
    scalars: dict[str, Any] = {}
    for name, (kind, low, high) in spec.scalars.items():
        scalars[name] = float(np.clip(1.5, low, high)) if kind is float else int(np.clip(3, low, high))
    return Payload(arrays, scalars)


def after(method: Method, state: Any, rounds: range) -> Any:
    for r in rounds:
        replies = (Reply(c, 100 * r + c, answer(method.expects(state), 100 * r + c)) for c in range(2))
        state = method.aggregate(state, replies)
    return state


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, Ledger):
        assert left.fingerprint() == right.fingerprint()
        assert left.to_bytes() == right.to_bytes()
    elif isinstance(left, np.ndarray):
        assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, tuple):
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


@pytest.mark.parametrize(("name", "i"), CASES)
def test_every_methods_state_comes_back_and_goes_on_alike(name, i):
    method = made(name, i)
    first = method.init(tiny_llama(), 2**64 - 5)
    for count in (0, 3):
        state = after(method, first, range(count))
        stored = encode(Message(3, b"", pack(state, Totals(7, 8, 0.25))))
        back, totals = unpack(decode(stored).payload, first)
        assert_same(back, state)
        assert totals == Totals(7, 8, 0.25)
        sent = [encode(Message(1, b"", method.broadcast(s))) for s in (state, back)]
        assert sent[0] == sent[1]
        assert_same(after(method, back, range(4, 6)), after(method, state, range(4, 6)))
        if count:
            with pytest.raises(AssertionError):
                assert_same(back, first)


def test_a_checkpoint_that_lacks_a_field_is_refused_by_name():
    method = made("fedkseed", 1)
    first = method.init(tiny_llama(), 5)
    payload = pack(after(method, first, range(1)), Totals())
    inside = tuple(f"state/{f}/" for f, v in first._asdict().items() if isinstance(v, dict))
    needed = [n for n in (*payload.scalars, *payload.arrays) if not n.startswith(inside or ("?",))]
    assert "totals" in needed
    for missing in needed:
        arrays = {n: a for n, a in payload.arrays.items() if n != missing}
        scalars = {n: s for n, s in payload.scalars.items() if n != missing}
        with pytest.raises(MessageError, match=f"the checkpoint lacks '{missing}'"):
            unpack(Payload(arrays, scalars), first)


def test_a_damaged_ledger_in_a_checkpoint_is_refused():
    first = made("mezo", 0).init(tiny_llama(), 5)
    payload = pack(first, Totals())
    with pytest.raises(LedgerError, match="head is damaged"):
        unpack(Payload(payload.arrays, {**payload.scalars, "state/ledger": "{}"}), first)


def test_a_course_through_json_and_back():
    for course in (Course(), Course(0, 4.25, 2), Course().after(1, None), Course(None, stale=3)):
        assert Course.from_json(course.to_json()) == course
    assert Course(1, 2.0, 0).after(2, float("nan")) == Course(1, 2.0, 1)


RULE = Rule(PRIVATE, privacy=Privacy(1.0, 1.0, 1.0, 3))
LOSSES = (9.0, 7.0, 8.0, 6.0, 6.5, 7.0)


@dataclass
class Witness:
    """It sees every release, and kills the run at a point."""

    kill_at: int = 0  # the event, counted from 1
    made: int = 0
    spent: list[float] = field(default_factory=list)  # as each round's event says

    def run(self, folder: Path, length: int, budget: int, *, broken: bool = False, best: bool = False) -> Any:
        left = [self.kill_at]

        def point() -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        witness = self

        class Seen(Averaging):
            def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
                witness.made += 1
                new = super().aggregate(state, replies)
                point()
                return new

        def emit(event: Recorded) -> None:
            if isinstance(event, RoundDone) and event.report:
                self.spent.append(event.report["epsilon"])
            run.record(as_dict(event))
            point()

        def reply(round: int, client: int, w: np.ndarray) -> object:
            return told(np.full(w.shape, np.nan) if broken else w + 1, loss=1.0)

        with at(folder) as run:
            count = Releases(run, float, lambda more, n: max(0, min(more, budget - n)))
            plan = RoundPlan(length, 1.0, 1, 7, 1, BASE, rule=RULE, releases=count, keep_best=best)
            hooks = Hooks(
                lambda: {"loss": LOSSES[0]},
                lambda state: {"loss": LOSSES[int(state.tensors["w"][0]) % len(LOSSES)]},
                emit,
            )
            begin = State({"w": np.zeros(1, np.float32)})
            return rounds.run(Seen(), Devices(reply, 3), begin, run, plan, hooks)  # type: ignore[arg-type]


damage = st.sampled_from(["nothing", "the last checkpoint", "all checkpoints", "the last is cut", "the best"])


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 40), damage), max_size=5), st.integers(3, 7), st.booleans())
def test_a_run_releases_no_more_than_it_counts_nor_than_its_budget(tmp_path_factory, lost, budget, best):
    """Whatever is lost: checkpoints that were removed or cut off had rounds released again that no count knew."""
    folder, witness = tmp_path_factory.mktemp("run"), Witness()
    for kill_at, what in [*lost, (0, "nothing")]:
        witness.kill_at = kill_at
        with contextlib.suppress(Killed, StorageError):  # no checkpoint is left, or none is usable
            found = witness.run(folder, 5, budget, best=best)
            assert found.releases == released(folder) >= found.last
        assert witness.made <= released(folder) <= budget
        assert all(0 < spent <= released(folder) for spent in witness.spent)
        files = [file for _, file in checkpoints(folder)]
        if what == "the best":
            files = [file for _, file in checkpoint.best_files(folder)]
        for file in files if what == "all checkpoints" else files[-1:] if what != "nothing" else ():
            file.write_bytes(file.read_bytes()[:-3]) if what == "the last is cut" else file.unlink()


def test_a_round_that_is_released_again_counts_again(tmp_path):
    witness = Witness()
    assert witness.run(tmp_path, 4, 6).releases == 4
    checkpoints(tmp_path)[-1][1].unlink()
    again = witness.run(tmp_path, 4, 6)
    assert (again.last, again.releases, witness.made) == (4, 5, 5)
    assert witness.spent == [1, 2, 3, 4, 5]
    for _ in range(2):  # one more is in the budget, and then none
        checkpoints(tmp_path)[-1][1].unlink()
        again = witness.run(tmp_path, 4, 6)
    assert (again.last, again.releases, witness.made) == (3, 6, 6)
    for _, file in checkpoints(tmp_path):
        file.unlink()
    record = (tmp_path / "metrics.jsonl").read_bytes()
    said = "no checkpoint of a round is left in .* and the privacy budget is spent"
    with pytest.raises(StorageError, match=said):
        witness.run(tmp_path, 4, 6)
    assert (tmp_path / "metrics.jsonl").read_bytes() == record


@pytest.mark.parametrize("text", [None, "", "0 f4dbdf21\n", "2", "3 00000000\n", "9\n", "-4 0\n", "\udc80"])
def test_a_count_that_is_gone_or_damaged_is_no_count_of_zero(tmp_path, text):
    witness, file = Witness(), tmp_path / checkpoint.RELEASES
    assert released(tmp_path) == 0  # nothing has been released
    witness.run(tmp_path, 3, 9)
    assert file.stat().st_mode & 0o777 == 0o600
    file.unlink()
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StorageError, match="is not known") as error:
        witness.run(tmp_path, 4, 9)
    assert "begin a new run" in str(error.value.hint)
    assert witness.made == 3


def test_bad_replies_do_not_end_a_private_run(tmp_path):
    """Two clients that sent NaN ended it, and so decided about all others."""
    found = Witness().run(tmp_path, 5, 9, broken=True)
    assert (found.last, found.releases) == (5, 5)
