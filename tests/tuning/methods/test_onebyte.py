"""One byte: the code table, the step against the formula in float64, votes, and machines that come and go."""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.data import Encoded, Example
from fleetune.data.encode import Batches, collate, encode_all
from fleetune.models import Model, named_tensors, tiny_llama
from fleetune.seeds.noise import derive
from fleetune.seeds.view import View
from fleetune.seeds.weights import kernels, layout
from fleetune.tuning.exchange.messages import LogCode, Message, Payload, decode, encode
from fleetune.tuning.methods import Reply
from fleetune.tuning.methods._zeroth import UNITS, open_view
from fleetune.tuning.methods.onebyte import FINER, Method, State
from law_definition import direction

K = 64


def tiny(**changes: Any) -> Method:
    return Method(**({"K": K, "directions": 5, "lr": 1e-3, "eps": 1e-3, "batch_size": 3} | changes))


@pytest.mark.parametrize(("wire", "size"), [("byte", lambda n: n), ("sign", lambda n: -(-n // 8))])
def test_a_direction_is_one_byte_or_one_bit_of_the_message(wire, size, rows):
    model, lengths = tiny_llama(), {}
    for n in (8, 24, 41):
        chosen = tiny(directions=n, wire=wire, batch_size=1)
        reply = answer(model, chosen, chosen.init(model, 1), rows, 5)
        lengths[n] = len(encode(Message(1, bytes(8), reply.payload)))
        assert reply.payload.array("codes").nbytes == size(n)
    assert lengths[41] - lengths[8] == size(41) - size(8)
    assert lengths[8] - size(8) < 60


def answer(model: Model, chosen: Method, state: State, rows: Sequence[Encoded], key: int) -> Reply:
    down = decode(encode(Message(1, bytes(8), chosen.broadcast(state)))).payload
    up = chosen.local(model, down, Batches(rows, 257, key), key, {})
    return Reply(0, key, decode(encode(Message(1, bytes(8), up))).payload)


def slope_by_hand(model: Model, run_key: int, id: int, rows: Any, at: dict[str, Any], eps: float) -> float:
    """(L(w + eps z) - L(w - eps z)) / 2 eps with weights written, in float64."""
    net: Any = copy.deepcopy(model.net).double()
    places, losses = layout(named_tensors(model.net)), []
    for sign in (1.0, -1.0):
        weights = dict(net.named_parameters(remove_duplicate=False))  # a tied head goes by its first name
        for s in places:
            z = torch.from_numpy(direction("hashed", id, s.start, s.tensor.numel(), K, run_key)).double()
            with torch.no_grad():
                weights[s.name].copy_(
                    (at[s.name].double().view(-1) + sign * eps * z).view_as(weights[s.name])
                )
        batch = collate(rows, 257)
        logits = net(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:])))
    return (losses[0] - losses[1]) / (2 * eps)


def test_a_round_is_the_formula():
    """w <- w - lr/(n N) sum of g z: wrong signs, sqrt(N), a forgotten n or other directions all end here."""
    model, chosen = tiny_llama(), tiny(directions=3, batch_size=8, lr=0.05)
    texts = [Example((("user", f"say {n}"),), "yes", {}) for n in range(4)]
    few = encode_all(texts, model.tokenizer, 48)[0]  # every batch is all four rows
    state = chosen.init(model, 3)
    run_key = state.ledger.head.run_key
    state = chosen.aggregate(state, [answer(model, chosen, state, few, 11)])  # not from the base itself
    chosen.apply(model, state)
    before = {name: t.clone() for name, t in model.attachment.tensors()}
    keys = (101, 102)
    after = chosen.aggregate(state, [answer(model, chosen, state, few, key) for key in keys])
    chosen.apply(model, after)
    moved = {name: t.double() - before[name].double() for name, t in model.attachment.tensors()}
    model.attachment.remove()
    places = layout(named_tensors(model.net))
    expected = {s.name: np.zeros(s.tensor.numel()) for s in places}
    for key in keys:
        for k in chosen.draw(1, run_key, key).tolist():
            g = slope_by_hand(model, run_key, k, few, before, chosen.eps)
            for s in places:
                z = direction("hashed", k, s.start, s.tensor.numel(), K, run_key)
                expected[s.name] -= chosen.lr / (3 * 2) * g * z
    a = np.concatenate([moved[name].reshape(-1).numpy() for name in expected])
    b = np.concatenate(list(expected.values()))
    assert np.linalg.norm(a - b) < 0.12 * np.linalg.norm(b)  # a byte's error


def fake(key: int, codes: np.ndarray, n: int = 10) -> Reply:
    return Reply(0, key, Payload({"codes": codes.astype(np.uint8)}, {"n": n, "loss": 1.0}))


def sums(state: State) -> np.ndarray:
    found = np.zeros(K, np.int64)
    found[(state.ledger.ids & np.uint64(0xFFFFFFFF)).astype(int)] = state.ledger.coefficients
    return found


@given(st.lists(st.tuples(st.integers(0, 1 << 63), st.integers(1, 999)), min_size=1, max_size=9))
@settings(max_examples=30)
def test_the_server_takes_the_mean_weighted_by_rows_whoever_answers(machines):
    model, chosen = tiny_llama(), tiny()
    state = chosen.init(model, 1)
    codes = [np.random.default_rng(key).integers(0, 256, 5) for key, _ in machines]
    replies = [fake(key, c, n) for (key, n), c in zip(machines, codes, strict=True)]
    got = sums(chosen.aggregate(state, iter(replies)))
    total = np.zeros(K)
    for (key, n), c in zip(machines, codes, strict=True):
        for k, step in zip(chosen.draw(0, state.ledger.head.run_key, key), LogCode.decode(c), strict=True):
            total[k] += n * step
    assert np.array_equal(got, np.rint(16 * total / sum(n for _, n in machines)))
    assert state.ledger.head.grid == pytest.approx(chosen.lr / (5 * 16 * 256))


def test_directions_are_different_within_a_machine_and_between_machines_and_rounds():
    assert sorted(tiny(directions=K).draw(0, 1, 2)) == list(range(K))
    few = tiny(directions=8)
    drawn = {tuple(few.draw(0, 1, key)) for key in range(20)}
    assert len(drawn) == 20
    assert [few.epoch(r) for r in (0, 7, 8, 16)] == [0, 0, 1, 2]  # a pool of 64 lasts 8 rounds of 8
    vote = tiny(directions=8, wire="sign")
    assert {tuple(vote.draw(3, 1, key)) for key in range(20)} == {tuple(vote.draw(3, 1, 0))}
    assert len({tuple(vote.draw(r, 1, 0)) for r in range(20)}) == 20


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(1, 5)), min_size=1, max_size=7))
@settings(max_examples=60)
def test_the_majority_of_rows_decides_each_direction_and_a_tie_is_no_step(votes):
    model, chosen = tiny_llama(), tiny(directions=8, wire="sign")
    state = chosen.init(model, 1)
    got = sums(chosen.aggregate(state, [fake(i, np.array([bits]), n) for i, (bits, n) in enumerate(votes)]))
    for j, k in enumerate(chosen.draw(0, state.ledger.head.run_key, 0)):
        balance = sum(n if bits >> (7 - j) & 1 else -n for bits, n in votes)
        assert got[k] == FINER * UNITS * np.sign(balance)
    assert np.count_nonzero(got) <= 8


def test_a_bit_is_the_sign_of_the_slope_and_a_zero_slope_tosses_a_coin():
    chosen = tiny(directions=10, wire="sign")
    slopes = np.array([1.0, -1e-9, 3.0, -7.0, 5e4, -5e4, 0.1, 0.2, -0.3, -0.4])
    codes = chosen.encode(slopes, np.full(10, 0.9))
    assert codes.nbytes == 2
    assert np.array_equal(chosen.decode(codes), -UNITS * np.sign(slopes))
    coins = [chosen.decode(chosen.encode(np.zeros(10), np.full(10, u))).sum() for u in (0.49, 0.51)]
    assert coins == [10 * UNITS, -10 * UNITS]


def test_one_liar_moves_a_mean_but_not_a_vote(rows):
    model = tiny_llama()
    for wire, bounded in (("byte", False), ("sign", True)):
        chosen = tiny(wire=wire)
        state = chosen.init(model, 2)
        honest = [answer(model, chosen, state, rows, 5)._replace(client=c) for c in range(4)]
        lie = np.full(5, 255) if wire == "byte" else ~honest[0].payload.array("codes")
        with_liar = chosen.aggregate(state, [*honest, fake(honest[0].key, lie, 12)])
        assert np.array_equal(sums(with_liar), sums(chosen.aggregate(state, honest))) == bounded


class Machine:
    """A machine with a model of its own (its own view, caches and kernels): it shares nothing but messages."""

    def __init__(self, number: int, rows: Sequence[Encoded], state: State, dtype: torch.dtype) -> None:
        self.model, self.rows, self.number = tiny_llama(layers=1), rows, number
        self.model.net.to(dtype)
        head = state.ledger.head
        named, net = named_tensors(self.model.net), self.model.net
        view = View(named, net, run_key=head.run_key, law=head.law, grid=head.grid)
        view.kernels = kernels(view.device, "numba" if number % 3 else "torch")
        self.model.attachment = view

    def reply(self, chosen: Method, message: bytes, round: int) -> Reply:
        key = derive(9, "local", round, self.number)
        mine = Batches(self.rows[self.number % 4 :: 4], 257, key)
        payload = chosen.local(self.model, decode(message).payload, mine, key, {})
        return Reply(self.number, key, decode(encode(Message(round, bytes(8), payload))).payload)

    def stands_at(self, chosen: Method, message: bytes) -> str:
        grid = {"law": chosen.law, "K": chosen.K, "lr": chosen.grid_lr}
        view, position = open_view(self.model, decode(message).payload, **grid)
        position.place(view)
        return weights(view)


def weights(view: View) -> str:
    h = hashlib.sha256()
    for name, tensor in view.tensors():
        h.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"law": "rademacher"}, torch.bfloat16),
        pytest.param({"K": 16}, torch.float32, marks=pytest.mark.slow),
        pytest.param({"wire": "sign"}, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_machines_join_and_leave_at_random_and_all_stand_at_the_servers_replay(changes, dtype, rows):
    """Each round 30 % of those present leave, before or after their work, and as many join with nothing but the base."""
    rng = np.random.default_rng(1)
    chosen = tiny(directions=2, batch_size=1, **changes)
    base = tiny_llama(layers=1)
    base.net.to(dtype)
    state, present, met = chosen.init(base, 4), [], 0
    for round in range(10):
        stay = [m for m in present if rng.random() > 0.3]
        left = [m for m in present if m not in stay]
        while len(stay) < 4:
            stay.append(Machine(met, rows, state, dtype))
            met += 1
        message = encode(Message(round, bytes(8), chosen.broadcast(state)))
        replies = [m.reply(chosen, message, round) for m in stay]
        for machine in left[: len(left) // 2]:  # these do their work, and their reply is lost
            machine.reply(chosen, message, round)
        state, present = chosen.aggregate(state, iter(replies)), stay
    message = encode(Message(10, bytes(8), chosen.broadcast(state)))
    chosen.apply(base, state)
    server = weights(base.attachment)
    assert met > 10
    assert [m.stands_at(chosen, message) for m in present] == [server] * len(present)
    pairs = zip(tiny_llama(layers=1).net.parameters(), present[0].model.net.parameters(), strict=True)
    assert all(torch.equal(a.to(dtype), b) for a, b in pairs)  # untouched
