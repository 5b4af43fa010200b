"""Signlora: a device's signs against the dense gradient, what the server writes and keeps, and what a device is told."""

import copy
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from contract_harness import base_of, fleet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleetune.data import Encoded
from fleetune.data.encode import Batches, collate
from fleetune.errors import MessageError, ModelError, UsageError
from fleetune.models import Model, named_tensors, tiny_bert, tiny_llama
from fleetune.seeds import noise
from fleetune.seeds.ledger import Ledger, LedgerHead
from fleetune.seeds.weights import layout
from fleetune.tuning.exchange.aggregation import Spool, parse
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode
from fleetune.tuning.methods import Reply
from fleetune.tuning.methods.signlora import Method, State, plane
from fleetune.tuning.rounds.fleets import Answer
from fleetune.tuning.rounds.local_work import Memories
from fleetune.tuning.rounds.replies import Replies, Round
from fleetune.tuning.rounds.rounds import _messages
from fleetune.tuning.rounds.simulated_fleet import LocalFleet

ETA = 0.05
KEY = (1 << 64) - 29


def tiny(**changes: Any) -> Method:
    return Method(**({"lr": ETA, "batch_size": 3, "steps": 1, "stay": 1} | changes))


def answer(model: Model, chosen: Method, payload: Payload, rows: Any, memory: dict[str, Any]) -> Payload:
    down = decode(encode(Message(1, bytes(8), payload))).payload
    up = chosen.local(model, down, Batches(rows, 257, KEY), KEY, memory)
    return decode(encode(Message(1, bytes(8), up))).payload


def sent_rows(rows: int, share: int, key: int) -> list[int]:
    """The rows of a matrix that a device sends: every so many-th from one on that its key names, one at least."""
    return [(key + i * share) % rows for i in range(max(1, rows // share))]


def dense(model: Model, rows: Sequence[Encoded]) -> dict[str, np.ndarray]:
    """The gradient of every parameter of a plain model, in float64."""
    net: Any = copy.deepcopy(model.net).double().requires_grad_(True)
    batch = collate(rows, 257)
    logits = net(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:]).backward()
    return {name: p.grad.numpy() for name, p in net.named_parameters()}


@pytest.mark.parametrize(("targets", "share"), [("all-linear", 1), ("v_proj,down_proj", 3)])
def test_a_step_sends_the_sign_of_minus_the_dense_gradient_along_each_direction(targets, share, rows):
    """Also at a point that was moved, and along a direction for the second time: B starts from 0 in every round."""
    model = tiny_llama(layers=1)
    chosen = tiny(r=2, pool=4, targets=targets, share=str(share), batch_size=len(rows), lr=1.0)
    first, seen, total = {s.name: s.start for s in layout(named_tensors(model.net))}, 0, 0
    state = chosen.init(model, 3)
    head = state.ledger.head
    assert len(state.places) == (7 if targets == "all-linear" else 2)
    for directions in ([0, 1], [2, 3], [0, 1]):
        reply = answer(model, chosen, chosen.broadcast(state), rows, {})
        scales, bits = iter(reply.array("scales").tolist()), reply.array("signs")
        plain = tiny_llama(layers=1)
        chosen.apply(plain, state)
        assert plain.attachment is not None
        plain.attachment.merge(plain)
        gradients = dense(plain, rows)
        for place in state.places.tolist():
            name, (out, width), _ = head.tensors[place]
            for p in directions:
                s = noise.signs(head.run_key, p, first[name], width)
                g = (gradients[name] @ s / np.sqrt(chosen.r * width))[sent_rows(out, share, KEY)]
                size = -(-len(g) // 8)
                sent, bits = np.unpackbits(bits[:size])[: len(g)], bits[size:]
                clear = np.abs(g) > 1e-4 * np.abs(g).mean()  # else float32 may have the other sign
                assert np.array_equal(sent[clear], g[clear] > 0)
                seen, total = seen + int(clear.sum()), total + len(g)
                step = np.mean(np.abs(g) / (np.abs(g) + 1e-8))  # AdamW's first, of rate 1
                assert abs(next(scales) - chosen.lr * step / np.sqrt(chosen.r * width) / head.grid) <= 0.51
        assert not bits.size
        state = chosen.aggregate(state, [Reply(0, KEY, reply)])
    assert seen > 0.99 * total


SHAPES = {"a.weight": (130, 5), "b.weight": (64, 3), "norm": (7,), "z.weight": (30, 9)}
MATRICES, ROWS = [0, 1, 3], [130, 64, 30]  # rows that fill no byte, too


def begun(chosen: Method) -> State:
    tensors = tuple((name, shape, "float32") for name, shape in SHAPES.items())
    head = LedgerHead("ab" * 32, "", tensors, 7, "outer", 1, 2.0**-12)
    return State(Ledger(head), 0, np.array(MATRICES), np.zeros((chosen.pool, sum(ROWS)), np.float32))


def fake(chosen: Method, seed: int, n: int) -> tuple[Reply, list[np.ndarray]]:
    """A reply, and the vectors that it stands for, matrix by matrix and in it direction by direction."""
    draw, key = np.random.default_rng(seed), (1 << 63) + seed
    share = chosen.shares[seed % len(chosen.shares)]
    sent = [sent_rows(rows, share, key) for rows in ROWS for _ in range(chosen.r)]
    scales = draw.integers(0, 1 << draw.integers(1, 32), len(sent), dtype=np.uint32)
    bits = [draw.integers(0, 2, len(rows)) for rows in sent]
    packed = [int("".join(map(str, b)).ljust(-(-len(b) // 8) * 8, "0"), 2) for b in bits]
    signs = b"".join(x.to_bytes(-(-len(b) // 8), "big") for x, b in zip(packed, bits, strict=True))
    payload = Payload({"scales": scales, "signs": np.frombuffer(signs, np.uint8)}, {"n": n, "loss": 1.0})
    vectors = [np.zeros(rows) for rows in ROWS for _ in range(chosen.r)]
    for vector, rows, c, b in zip(vectors, sent, scales.tolist(), bits, strict=True):
        vector[rows] = len(vector) / len(rows) * c * (1 - 2 * b)  # in the mean over all keys, c b itself
    return Reply(0, key, payload), vectors


def written(ledger: Ledger, pool: int) -> np.ndarray:
    """The ledger's tables by the text of the format: int64 [pool, rows of all matrices]."""
    total, bits = np.zeros((pool, sum(ROWS)), np.int64), ledger.signs
    firsts = dict(zip(MATRICES, (0, 130, 194), strict=True))
    for id, c in zip(ledger.ids.tolist(), ledger.coefficients.tolist(), strict=True):
        p, place = divmod(id, 1 << 32)
        rows = ROWS[MATRICES.index(place)]
        mine, bits = bits[: -(-rows // 8)], bits[-(-rows // 8) :]
        for row in range(rows):
            total[p, firsts[place] + row] += -c if mine[row // 8] >> (7 - row % 8) & 1 else c
    assert not bits.size
    return total


@st.composite
def settings_of(draw: Any) -> Method:
    pool, small = draw(st.integers(1, 5)), st.integers(1, 3)
    share = ",".join(map(str, draw(st.lists(st.sampled_from([1, 2, 3, 5, 40]), min_size=1, max_size=3))))
    return tiny(pool=pool, r=draw(st.integers(1, pool)), planes=draw(small), stay=draw(small), share=share)


replies = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 999)), max_size=4)


@given(chosen=settings_of(), rounds=st.lists(replies, min_size=1, max_size=6))
@settings(max_examples=25)
def test_the_server_writes_the_mean_as_signs_and_adds_what_is_left_the_next_time(chosen, rounds):
    state, means = begun(chosen), np.zeros((chosen.pool, sum(ROWS)))
    left, largest = np.zeros((chosen.pool, sum(ROWS)), np.float32), 0.0
    for number, answers in enumerate(rounds):
        made = [fake(chosen, seed, n) for seed, n in answers]
        before, state = state, chosen.aggregate(state, iter([reply for reply, _ in made]))
        assert state.round == number + 1
        if not made:
            assert state.ledger is before.ledger
            assert np.array_equal(state.left, before.left)
            continue
        weights = [n for _, n in answers]
        entries = []
        for place, (matrix, rows) in enumerate(zip(MATRICES, ROWS, strict=True)):
            first = sum(ROWS[:place])
            for i in range(chosen.r):
                p = (number // chosen.stay * chosen.r + i) % chosen.pool
                vectors = [v[place * chosen.r + i] for _, v in made]
                mean = sum(n * v for n, v in zip(weights, vectors, strict=True)) / sum(weights)
                means[p, first : first + rows] += mean
                rest = mean + left[p, first : first + rows].astype(np.float64)
                for q in range(chosen.planes):
                    c = int(np.rint(np.abs(rest).mean()))
                    rest = np.array([x + c if x < 0 else x - c for x in rest])
                    entries.append((q, place, i, p << 32 | matrix, c))
                left[p, first : first + rows] = rest
        new = state.ledger._taken(state.ledger.rounds == number + 1)
        expected = [(id, c) for *_, id, c in sorted(entries) if c]
        assert list(zip(new.ids.tolist(), new.coefficients.tolist(), strict=True)) == expected
        assert np.array_equal(state.left, left)
        assert state.left.dtype == np.float32
        largest = max(largest, float(np.abs(left).max()))
    off = means - written(state.ledger, chosen.pool) - left
    assert np.abs(off).max() <= len(rounds) * largest * 2.0**-24


def test_a_round_without_replies_is_one_whose_directions_are_passed_over():
    chosen = tiny(pool=3)
    state = begun(chosen)
    assert chosen.expects(state).arrays["signs"] == ("uint8", (17 + 8 + 4,))
    assert tiny(share="99", r=2).expects(state).arrays["signs"] == ("uint8", (6,))  # a row of each at least
    for _ in range(2):
        state = chosen.aggregate(state, iter(()))
    state = chosen.aggregate(state, iter([fake(chosen, seed, 2)[0] for seed in (4, 5)]))
    assert set((state.ledger.ids >> np.uint64(32)).tolist()) == {2}
    assert set(state.ledger.rounds.tolist()) == {3}
    assert np.flatnonzero(state.left.any(axis=1)).tolist() == [2]


def told(chosen: Method, fleet: LocalFleet, state: State, number: int, present: Any, folder: Path) -> Any:
    """(what the clients of a round answer, what each was sent: the news since what it remembers)."""
    asked = Round(number, base_of(fleet.model), fleet.rows, state)
    with Replies(chosen, asked, SimpleNamespace(path=folder), lambda event: None) as replies:
        messages = _messages(chosen, fleet, replies, present)
    return list(fleet.ask(number, present, messages)), messages


def taken(chosen: Method, state: State, answers: Sequence[Answer]) -> State:
    return chosen.aggregate(
        state, iter([Reply(a.client, a.key, decode(a.data or b"").payload) for a in answers])
    )


@given(rounds=st.lists(st.sets(st.integers(0, 1)), min_size=2, max_size=5))
@example(rounds=[{0, 1}, {0}, {0}, set(), {0, 1}, {1}])
@settings(max_examples=2)
def test_a_device_that_is_told_the_news_replies_as_one_that_is_told_everything(rounds, tmp_path_factory):
    """Whoever took part when, from bytes to bytes, with memories in files."""
    chosen = tiny(r=2, pool=3)
    own, other = (fleet(tiny_llama(layers=1), chosen, 2) for _ in range(2))
    state = chosen.init(own.model, 3)
    for number, present in enumerate(map(sorted, rounds), 1):
        knew = {client: round for client, (round, _) in own.kept().items()}
        answers, messages = told(chosen, own, state, number, present, tmp_path_factory.getbasetemp())
        everything = encode(Message(number, base_of(own.model), chosen.broadcast(state)))
        whole = list(other.ask(number, present, everything))
        assert [a.reason for a in answers] == [""] * len(present)
        assert [a.data for a in answers] == [a.data for a in whole]
        for client in present:
            since = sum(r >= knew.get(client, 0) for r in state.ledger.rounds.tolist())
            assert len(decode(messages[client]).payload.array("direction")) == since
        state = taken(chosen, state, answers)


def test_a_device_whose_memory_is_gone_says_so_and_is_then_told_everything(tmp_path):
    chosen = tiny()
    own, other = (fleet(tiny_llama(layers=1), chosen, 2, memories=tmp_path / name) for name in ("a", "b"))
    state = chosen.init(own.model, 3)
    for number in (1, 2):
        answers, _ = told(chosen, own, state, number, [0, 1], tmp_path)
        state = taken(chosen, state, answers)
    for file in own.memories.folder.glob("client-000000*"):
        file.unlink()
    (lost, well), _ = told(chosen, own, state, 3, [0, 1], tmp_path)
    assert (lost.data, lost.status, well.status) == (None, "failed", "ok")
    assert "client-000000.round-000002.ckpt" in lost.reason
    own.memories = Memories(own.memories.folder)
    answers, messages = told(chosen, own, state, 3, [0, 1], tmp_path)
    assert len(messages[0]) > len(messages[1])
    everything = encode(Message(3, base_of(own.model), chosen.broadcast(state)))
    assert answers[0].data == next(other.ask(3, [0], everything)).data


def test_devices_of_unlike_uplinks_send_unlike_shares_of_their_rows(rows, tmp_path):
    """Device 0 replies as in a fleet that sends all rows, device 1 as in one that sends a third."""
    mixed = tiny(share="1,3")
    parts = {share: tiny(share=share) for share in ("1", "3")}
    model = tiny_llama(layers=1)
    state = mixed.init(model, 3)
    for round in (1, 2):  # told everything, then the news
        for client, (name, alone) in enumerate(parts.items()):
            assert mixed.kind_of(client) == client
            sent, spec = mixed.kinds(state)[client]
            sent = mixed.news(state, 0, client) if round == 2 else sent
            reply = answer(model, mixed, sent, rows, {})
            same = answer(model, alone, alone.broadcast(state), rows, {})
            assert encode(Message(1, bytes(8), reply)) == encode(Message(1, bytes(8), same)), name
            assert {n: (a.dtype.name, a.shape) for n, a in reply.arrays.items()} == spec.arrays
        state = mixed.written(state, [np.ones(rows) for rows in mixed.rows(state)])
    with pytest.raises(MessageError, match="one row of 3 is not one of the run's shares"):
        answer(model, parts["1"], mixed.kinds(state)[1][0], rows, {})
    with pytest.raises(UsageError, match="share = 900,1000: replies would be of one size"):
        tiny(share="900,1000").init(model, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rows", "the matrices that the run trains are not those of this model"),
        *((n, "not of this run's matrices and dir") for n in ("direction", "matrix", "signs", "scale")),
        ("known", "this device does not remember the rounds before those that came"),
        ("column", "not lists of whole numbers"),  # n directions times n matrices would be n * n entries
        ("nan", "not lists of whole numbers"),
    ],
)
def test_a_message_that_is_not_of_the_run_is_refused(change, said, rows):
    model, chosen = tiny_llama(layers=1), tiny()
    state = chosen.init(model, 3)
    ones = [np.ones(rows) for rows in chosen.rows(state)]
    state = chosen.written(state, ones)
    sent, memory = chosen.broadcast(state), dict[str, Any]()
    arrays = sent.arrays
    if change == "known":
        sent.scalars["known"] = 2
    elif change == "rows":
        arrays["rows"] = arrays["rows"][::-1].copy()
    elif change == "column":
        arrays["direction"] = arrays["direction"][:, None]
    elif change == "nan":
        arrays["scale"] = np.full(len(arrays["scale"]), np.nan)
    else:
        wrong = np.full_like(arrays[change], 8) if change in ("direction", "matrix") else arrays[change][:-1]
        arrays[change] = wrong
    with pytest.raises(MessageError, match=said):
        answer(model, chosen, sent, rows, memory)
    assert not memory


def test_numbers_that_are_not_finite_are_not_sent(rows, monkeypatch):
    model, chosen = tiny_llama(layers=1), tiny()
    name = "model.layers.0.mlp.up_proj.lora_B.weight"
    monkeypatch.setattr(Method, "train", lambda _, m, *__: m.attachment.parameters[name].data.fill_(np.nan))
    with pytest.raises(MessageError, match="not finite; lower lr"):
        answer(model, chosen, chosen.broadcast(chosen.init(model, 3)), rows, {})


@pytest.mark.parametrize("name", ["mean", "norm-clip", "median", "trimmed-mean"])
def test_what_all_devices_agree_on_is_what_a_rule_makes_of_it(name, tmp_path):
    """Each row comes from a third of the devices: a rule counts those alone; and all go as far as with whole replies."""
    chosen, parsed, state = tiny(share="3"), parse(name), begun(tiny())
    sent, sizes = Payload({"rows": np.array(ROWS)}), ([max(1, n // 3) for n in ROWS], ROWS)
    refused = [bool(chosen.cannot_combine(parsed, asked)) for asked in (8, 9)]
    assert name == "mean" or refused == [name != "norm-clip", False]
    planes = [plane([np.full(n, 100.0) for n in rows])[:2] for rows in sizes]
    third, whole = (Payload({"scales": scales, "signs": bits}, {"n": 3}) for scales, bits in planes)
    with closing(Spool(tmp_path)) as spool:
        new = chosen.aggregate(state, [Reply(k, k, third) for k in range(30)], replace(parsed, spool=spool))
    total = written(new.ledger, chosen.pool)[0] + new.left[0]
    assert total.mean() == pytest.approx(100, 0.02)
    assert total.min() > 60
    far = [m.distance(state, sent, Reply(0, 1, up)) for m, up in ((chosen, third), (tiny(), whole))]
    assert far[0] == pytest.approx(far[1], 0.02)


def test_a_model_in_another_methods_hands_is_given_the_own_directions():
    model = tiny_llama(layers=1)
    tiny(targets="q_proj").attached(model)
    assert len(tiny(r=2).init(model, 3).places) == 7
    tiny(r=2).attached(model)
    assert len(tiny().attached(model).places) == 7
    assert model.attachment is not None
    assert min(min(p.shape) for p in model.attachment.parameters.values()) == 1  # the rank


@pytest.mark.parametrize(
    ("model", "targets", "said"),
    [
        (tiny_bert, "all-linear", "signlora trains no classification head"),
        (tiny_llama, "q_proj,no_proj", "no linear layer named 'no_proj'"),
    ],
)
def test_a_model_that_has_no_place_for_it_is_left_as_it_is(model, targets, said):
    made = model()
    with pytest.raises(ModelError, match=said) as refused:
        tiny(targets=targets).init(made, 3)
    assert refused.value.hint
    assert made.attachment is None
