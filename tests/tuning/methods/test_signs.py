"""wire=sign of fedit and fedpetuning: every device has the server's module to the bit, whatever it missed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetune import adapters, models
from fleetune.data import Batches, Encoded
from fleetune.errors import MessageError
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, Payload, check, decode, encode
from fleetune.tuning.methods import Reply
from fleetune.tuning.rounds.local_work import Memories, work

BASE = b"12345678"
FAST: dict[str, Any] = {"lr": 1e-2, "batch_size": 3, "dropout": 0.0, "r": 2, "targets": "query-value"}
CASES = [
    ("fedit", FAST),
    ("fedit", FAST | {"start": "orthogonal"}),  # drawn by a math library: the server sends it
    ("fedit", FAST | {"server": "adam"}),
    ("fedpetuning", {"module": "bitfit", "batch_size": 3}),  # starts at the base's weights
]


def rows(seed: int) -> list[Encoded]:
    random = np.random.default_rng(seed)
    return [Encoded(random.integers(0, 250, 12).astype(np.int32), 4) for _ in range(3)]


class Devices:
    """Devices with models of their own, which remember."""

    def __init__(self, method: Any, folder: Path) -> None:
        self.method, self.memories = method, Memories(folder)
        self.had: dict[int, dict[str, np.ndarray]] = {}  # client -> the module that it trained last

    def reply(self, state: Any, r: int, client: int, payload: Payload) -> Reply:
        model = models.tiny_llama()
        raw = work(
            self.method,
            model,
            Batches(rows(client), 0, client, "cpu", client),
            client,
            decode(encode(Message(r, BASE, payload))),
            self.memories,
            lambda client, step: None,
        )
        sent = self.method.broadcast(state)
        reply = Reply(client, client, check(decode(raw), self.method.expects(state), round=r, base=BASE))
        (change,) = self.method.moved(sent, reply).values()
        trained = adapters.export(model)  # the model is what was sent
        layout = methods._adapter.Layout.of(trained)
        self.had[client] = layout.tensors(layout.flat(trained) - change)
        return reply


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.allclose(a[n], b[n], rtol=0, atol=1e-6) for n in a)


@pytest.mark.parametrize(("name", "values"), CASES)
def test_whatever_a_device_missed_it_has_the_servers_module(name, values, tmp_path):
    method = methods.make(name, values | {"wire": "sign"})
    state = method.init(models.tiny_llama(), 7)
    devices = Devices(method, tmp_path)
    asked: Sequence[Sequence[int]] = [(0, 1), (0,), (0, 1, 2), ()]
    for r, clients in enumerate(asked, 1):
        replies, kept = [], devices.memories.kept()
        whole = state.tensors if values.get("start") == "orthogonal" else {}
        for client in clients:
            known = kept.get(client, (0, 0))[0]
            payload = method.news(state, known, 0)
            missed = r - 1 if not known else r - known
            assert payload.arrays.keys() == (whole.keys() if whole and not known else {"bits", "scales"})
            if "bits" in payload.arrays:
                assert len(payload.array("scales")) == methods._adapter.PLANES * missed
            replies.append(devices.reply(state, r, client, payload))
            layout = methods._adapter.Layout.of(state.tensors)
            memory = devices.memories.of(client)["module"]
            np.testing.assert_array_equal(memory, layout.flat(state.tensors))  # to the bit
            assert equal(devices.had[client], state.tensors)
        new = method.aggregate(state, replies)
        assert new.round == r
        if not clients:
            assert all(np.array_equal(new.tensors[n], t) for n, t in state.tensors.items())
        elif values.get("server") is None:  # what was not sent is not lost
            moves = [
                (x.payload.int("n"), *method.moved(method.broadcast(state), x).values()) for x in replies
            ]
            mean = sum(n * m.astype(np.float64) for n, m in moves) / sum(n for n, _ in moves)
            was = layout.flat(state.tensors) + state.left
            np.testing.assert_allclose(layout.flat(new.tensors) + new.left, was + mean, atol=1e-6)
        state = new


def test_what_is_longer_than_the_module_is_sent_as_the_module():
    method = methods.make("fedit", FAST | {"wire": "sign"})
    state = method.init(models.tiny_llama(), 7)
    size = sum(t.nbytes for t in state.tensors.values())
    for _ in range(40):
        state = method.aggregate(state, ())
        sent = method.broadcast(state)
        assert sum(a.nbytes for a in sent.arrays.values()) <= size
        assert len(method.news(state, state.round, 0).arrays["scales"]) == methods._adapter.PLANES
    assert sent.arrays.keys() == state.tensors.keys()
    assert method.news(state, 1, 0).scalars["known"] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e12])
def test_a_scale_that_is_no_number_is_refused(bad):
    method = methods.make("fedit", FAST | {"wire": "sign"})
    state = method.init(models.tiny_llama(), 7)
    spec = method.expects(state)
    arrays = {n: np.zeros(shape, kind) for n, (kind, shape) in spec.arrays.items()}
    payload = Payload(arrays, {"n": 3, "loss": 1.0})
    check(Message(1, BASE, payload), spec, round=1, base=BASE)
    arrays["scales"][0, 1] = bad
    with pytest.raises(MessageError, match=r"'scales' holds"):
        check(Message(1, BASE, payload), spec, round=1, base=BASE)


def test_changes_of_another_module_are_refused():
    other = methods.make("fedit", FAST | {"wire": "sign", "r": 4})
    sent = other.broadcast(other.init(models.tiny_llama(), 7))
    batches = Batches(rows(0), 0, 1, "cpu", 0)
    with pytest.raises(MessageError, match="not of this model's module"):
        methods.make("fedit", FAST | {"wire": "sign"}).local(models.tiny_llama(), sent, batches, 1, {})


def test_a_device_that_forgot_the_module_says_so():
    method, model = methods.make("fedit", FAST | {"wire": "sign"}), models.tiny_llama()
    news = method.news(method.aggregate(method.init(model, 1), iter(())), 1, 0)
    with pytest.raises(MessageError, match="does not remember"):
        method.local(model, news, Batches(rows(0), 0, 0, "cpu", 0), 0, {})
