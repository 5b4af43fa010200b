"""A state comes back from a checkpoint bit by bit; the course of a run through JSON."""

from typing import Any

import numpy as np
import pytest

from fleetune.errors import LedgerError, MessageError
from fleetune.models import tiny_llama
from fleetune.seeds.ledger import Ledger
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, Payload, ReplySpec, decode, encode
from fleetune.tuning.methods import Method, Reply
from fleetune.tuning.rounds.checkpoint import Course, Totals, pack, unpack

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
    for rounds in (0, 3):
        state = after(method, first, range(rounds))
        stored = encode(Message(3, b"", pack(state, Totals(7, 8, 0.25))))
        back, totals = unpack(decode(stored).payload, first)
        assert_same(back, state)
        assert totals == Totals(7, 8, 0.25)
        sent = [encode(Message(1, b"", method.broadcast(s))) for s in (state, back)]
        assert sent[0] == sent[1]
        assert_same(after(method, back, range(4, 6)), after(method, state, range(4, 6)))
        if rounds:
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
