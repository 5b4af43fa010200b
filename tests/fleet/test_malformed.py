"""The door: every malformed answer of a device that has a key is refused with its own reason, and changes nothing.

The devices are in memory; what they send goes the way of a real run: `RemoteFleet`, the checks of a round, the method's sum.
"""

import dataclasses
import json
import pickle
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from methods_harness import bits, usual
from test_remote import JOB, Memory

import hostile
from fleetune import models
from fleetune.common.events import ClientReply
from fleetune.errors import REASON
from fleetune.fleet.orders import Device, DeviceReply, Order
from fleetune.fleet.remote import Pace, RemoteFleet
from fleetune.fleet.table import FILE, Devices
from fleetune.runs.rundir import RunDir, create
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode
from fleetune.tuning.rounds.replies import Replies, Round


@dataclass(frozen=True)
class Honest:
    """What a device was asked, and what it would answer honestly."""

    order: Order
    base: bytes
    payload: Payload
    device: Device
    rows: int
    others: Order  # the order of another device, in the same round
    earlier: Order  # this device's order of the round before

    def body(self, payload: Payload | None = None, **changes: Any) -> bytes:
        """Return the method's reply, with another payload, round or base."""
        message = Message(self.order.round, self.base, payload or self.payload)
        return encode(dataclasses.replace(message, **changes))

    def reply(self, body: bytes | None = None, **changes: Any) -> bytes:
        """Return the answer that holds a reply."""
        body = self.body() if body is None else body
        whole = DeviceReply("done", self.order.nonce, self.order.round, body, (-1, 0), 0.1, 9)
        return dataclasses.replace(whole, **changes).encode()

    def scalars(self, **changes: Any) -> bytes:
        """Return the answer with other scalars; None takes one away."""
        scalars = {n: v for n, v in {**self.payload.scalars, **changes}.items() if v is not None}
        return self.reply(self.body(Payload(self.payload.arrays, scalars)))

    def arrays(self, change: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]) -> bytes:
        """Return the answer with other arrays."""
        return self.reply(self.body(Payload(change(dict(self.payload.arrays)), self.payload.scalars)))

    def array(self, change: Callable[[np.ndarray], np.ndarray], at: int = 0) -> bytes:
        """Return the answer with one array changed, the first unless its place is given."""
        name = list(self.payload.arrays)[at]
        return self.arrays(lambda arrays: {**arrays, name: change(arrays[name].copy())})

    def outer(self, **changes: Any) -> bytes:
        """Return an answer of which a part is of another kind or size, though its checksum is right."""
        whole = decode(self.reply())
        round, nonce = changes.pop("round", whole.round), changes.pop("nonce", whole.base)
        return encode(Message(round, nonce, Payload({}, {**whole.payload.scalars, **changes})))

    def told(self, **changes: Any) -> bytes:
        """Return what the device says of itself when it gets the job, with some of it changed; None takes it away."""
        known = {**dataclasses.asdict(self.device), **changes}
        return self.ready(json.dumps({n: v for n, v in known.items() if v is not None}).encode())

    def ready(self, body: bytes, what: str = "ready") -> bytes:
        """Return an answer to the job."""
        return self.outer(what=what, body=body)


def put(array: np.ndarray, value: float) -> np.ndarray:
    """Return the array with another last value; it is of real numbers then."""
    real = array if array.dtype.kind == "f" else array.astype(np.float32)
    real.reshape(-1)[-1] = value
    return real


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


Make = Callable[[Honest], bytes]


def later(how: Callable[..., bytes], *given: Any, **changes: Any) -> Make:
    """Return what makes an answer of an honest one: a method of it with these arguments."""
    return lambda h: how(h, *given, **changes)


array, arrays, scalars, reply = (
    partial(later, how) for how in (Honest.array, Honest.arrays, Honest.scalars, Honest.reply)
)
outer, told, ready = (partial(later, how) for how in (Honest.outer, Honest.told, Honest.ready))

MILLION, ANOTHER = 1_000_000, "belongs to another order"
WORK: dict[str, tuple[Make, str]] = {  # how it is made, and words of the reason for which it is refused
    # arrays
    "float64 for float32": (array(lambda a: a.astype(np.float64)), "is float64, agreed was"),
    "float16 for float32": (array(lambda a: a.astype(np.float16)), "is float16, agreed was"),
    "int32 for float32": (array(lambda a: a.astype(np.int32)), "is int32, agreed was"),
    "a NaN in the first array": (array(lambda a: put(a, np.nan)), "not finite"),
    "a NaN in the last array": (array(lambda a: put(a, np.nan), at=-1), "not finite"),
    "only NaN": (arrays(lambda x: {n: np.full_like(a, np.nan) for n, a in x.items()}), "not finite"),
    "an infinity": (array(lambda a: put(a, np.inf)), "holds 1 values that are not finite"),
    "minus infinity": (array(lambda a: put(a, -np.inf)), "holds 1 values that are not finite"),
    "1e30": (array(lambda a: put(a, 1e30)), "holds 1e+30"),
    "-2e9": (array(lambda a: put(a, -2e9)), "holds 2e+09"),
    "a shape that broadcasts": (array(lambda a: a.reshape(-1)[:1]), "has shape (1,)"),
    "a shape of ones": (array(lambda a: a.reshape(-1)[:1].reshape((1,) * (a.ndim + 1))), "has shape (1, 1"),
    "one row more": (array(lambda a: np.concatenate([a, a[:1]])), "has shape"),
    "one row less": (array(lambda a: a[1:]), "has shape"),
    "another dim": (array(lambda a: a[..., None]), "has shape"),
    "doubled": (array(lambda a: np.concatenate([a, a], axis=-1)), "has shape"),
    "no dims": (array(lambda a: a.reshape(-1)[0]), "has shape ()"),
    "no values": (array(lambda a: a[:0]), "has shape (0"),
    "a million values": (array(lambda a: np.zeros(MILLION, a.dtype)), "has shape (1000000,)"),
    "an array more": (arrays(lambda a: {**a, "more": np.zeros(3)}), "differ from the agreed"),
    "an array missing": (arrays(lambda a: dict([*a.items()][1:])), "differ from the agreed"),
    "no arrays": (arrays(lambda a: {}), "arrays differ from the agreed: [] more"),
    "another name": (arrays(lambda a: {f"../{n}": v for n, v in a.items()}), "['../"),
    # scalars
    "no n": (scalars(n=None), "scalars differ from the agreed: [] more, ['n'] missing"),
    "a scalar more": (scalars(zeal=9), "['zeal'] more, [] missing"),
    "n = -69": (scalars(n=-69), "scalar 'n' is -69"),
    "n = 0": (scalars(n=0), "scalar 'n' is 0"),
    "n = 1e12": (scalars(n=10**12), "scalar 'n' is 1000000000000"),
    "n beyond its rows": (lambda h: h.scalars(n=h.rows + 1), "rows, the client has"),
    "n = 5.0": (scalars(n=5.0), "scalar 'n' is float"),
    "n = NaN": (scalars(n=float("nan")), "scalar 'n' is float"),
    "n = true": (scalars(n=True), "scalar 'n' is bool"),
    "n = '5'": (scalars(n="5"), "scalar 'n' is str"),
    "n = a book": (scalars(n="9" * MILLION), "scalar 'n' is str"),
    "loss = NaN": (scalars(loss=float("nan")), "scalar 'loss' is nan"),
    "loss = -infinity": (scalars(loss=float("-inf")), "scalar 'loss' is -inf"),
    "loss = 1e12": (scalars(loss=1e12), "scalar 'loss' is 1000000000000.0"),
    "loss = 1": (scalars(loss=1), "scalar 'loss' is int"),
    "loss = b'1'": (scalars(loss=b"1"), "scalar 'loss' is bytes"),
    # the reply's message; what else may be wrong in one: tests/hostile/test_hostile_messages.py
    "the round before": (lambda h: h.reply(h.body(round=h.order.round - 1)), "reply is for round 1"),
    "the round after": (lambda h: h.reply(h.body(round=h.order.round + 1)), "reply is for round 3"),
    "round -1": (lambda h: h.reply(h.body(round=-1)), "reply is for round -1"),
    "another base": (lambda h: h.reply(h.body(base=b"\xff" * 8)), "reply was made on base ffffffffffffffff"),
    "half a base": (lambda h: h.reply(h.body(base=h.base[:4])), "reply was made on base"),
    "no reply": (reply(b""), "not a Fleetune message (0 bytes"),
    "cut in half": (lambda h: h.reply(h.body()[: len(h.body()) // 2]), "is damaged"),
    "without its last byte": (lambda h: h.reply(h.body()[:-1]), "is damaged"),
    "a bit flipped": (lambda h: h.reply(flipped(h.body(), 20)), "is damaged"),
    "a zip file": (reply(b"PK\x03\x04" + bytes(99)), "starts with b'PK"),
    "a pickle": (reply(pickle.dumps({"n": 1})), "starts with b'\\x80"),
    "JSON": (reply(b'{"n": 5}'), "starts with b'{\"n'"),
    # the answer around it
    "an empty answer": (lambda h: b"", "could not be read"),
    "no answer": (lambda h: b"hello", "not a Fleetune message"),
    "an answer cut in half": (lambda h: h.reply()[: len(h.reply()) // 2], "is damaged"),
    "an answer with a bit flipped": (lambda h: flipped(h.reply(), 11), "is damaged"),
    "another nonce": (reply(nonce=bytes(16)), ANOTHER),
    "another device's nonce": (lambda h: h.reply(nonce=h.others.nonce), ANOTHER),
    "the answer before": (lambda h: h.reply(nonce=h.earlier.nonce, round=h.earlier.round), ANOTHER),
    "the right nonce, a later round": (lambda h: h.reply(round=h.order.round + 1), ANOTHER),
    "a nonce of a megabyte": (outer(nonce=bytes(MILLION)), "nonce = "),
    "ready for work": (reply(what="ready"), "'work' was answered with 'ready'"),
    "failed for no reason": (outer(what="failed"), "the reason '' is none"),
    "failed, at length": (outer(what="failed", code="\x1b[2J" + "why " * 900), "at most 60"),
    "failed, in a book": (outer(what="failed", code="why " * MILLION), "exceeds max_str_len"),
    "refused": (outer(what="refused", code="fault"), "answered with 'refused'"),
    "an order": (lambda h: h.order.encode(), "a device's reason is a code"),
    "a word that is none": (outer(what="paid"), "what = 'paid'"),
    "a word that is a number": (outer(what=7), "what = 7"),
    "a body that is text": (outer(body="text"), "body = 'text'"),
    "a memory of a later round": (lambda h: h.outer(kept_round=h.order.round + 1), "to remember round 3"),
    "a memory of round -9": (outer(kept_round=-9), "kept.0 = -9"),
    "a checksum of 64 bits": (outer(kept_crc=1 << 63), "kept.1 = 9223372036854775808"),
    "a checksum that is text": (outer(kept_crc="5"), "kept.1 = 5"),
    "NaN seconds": (outer(seconds=float("nan")), "seconds = nan"),
    "-1 seconds": (outer(seconds=-1.0), "seconds = -1.0"),
    "infinite seconds": (outer(seconds=float("inf")), "seconds = inf"),
    "seconds that are text": (outer(seconds="soon"), "seconds = 'soon'"),
    "-1 bytes of memory": (outer(rss=-1), "rss = -1"),
    "real bytes of memory": (outer(rss=1.5), "rss = 1.5"),
    "a reason that is a number": (outer(code=5), "code = 5"),
}
TO_THE_JOB: dict[str, tuple[Make, str]] = {
    "done for the job": (ready(b"", "done"), "'job' was answered with 'done'"),
    "refused for no reason": (ready(b"", "refused"), "the reason '' is none"),
    "nothing": (ready(b""), "Invalid JSON"),
    "not UTF-8": (ready(b'{"rows": "\xff"}'), "Invalid JSON"),
    "100,000 lists": (ready(b"[" * 100_000), "Invalid JSON"),
    "a list": (ready(b"[]"), "not as agreed"),
    "2 MB of blanks": (ready(b" " * (2 << 20)), "2,097,152 characters"),
    "a field more": (told(more=1), "more = 1"),
    "a field less": (told(threads=None), "threads is missing"),
    "NaN rows": (told(rows=float("nan")), "rows = nan"),
    "true rows": (told(rows=True), "rows = True"),
    "rows as text": (told(rows="9"), "rows = 9"),
    "0 rows": (told(rows=0), "rows = 0: must be at least 1"),
    "-5 rows": (told(rows=-5), "rows = -5"),
    "1e12 rows": (told(rows=10**12), "rows = 1000000000000"),
    "other rows than before": (lambda h: h.told(rows=h.device.rows + 1), "it brought"),
    "a digest of a megabyte": (told(rows_digest="a" * MILLION), "rows_digest = "),
    "a digest that is none": (told(rows_digest="../../etc"), "rows_digest = "),
    "-1 bytes": (told(memory=-1), "memory = -1"),
    "2^70 threads": (told(threads=1 << 70), "threads = 1180591620717411303424"),
    "a version of a megabyte": (told(version="v" * MILLION), "version = "),
    "escapes in the version of torch": (told(torch="2.0\x1b[2J"), "torch = '2.0"),
    "a processor of a megabyte": (told(processor="v" * MILLION), "processor = "),
}
BASE, ROWS, ROUND, LIAR = bytes(range(8)), 9, 2, 1
CLIENTS = 4
FEDIT = ("fedit", {"r": 2, "steps": 1, "dropout": 0.0})
LEFT = ("refused", "failed")
SECONDS = 2.0  # of processor time that a malformed answer may cost


class Toy(NamedTuple):
    """A method, its state, and what each client would answer."""

    method: Any
    state: Any
    replies: list[Payload]


def toy(name: str, settings: dict[str, Any]) -> Toy:
    method = methods.make(name, settings)
    state = method.init(models.tiny_llama(layers=1), 5)
    return Toy(method, state, [usual(method, state, c) for c in range(CLIENTS)])


@dataclass
class Lying(Memory):
    """Honest devices, of which one answers with what `lie` makes of its honest answer."""

    replies: list[Payload] = field(default_factory=list)
    lie: Callable[[Honest], bytes] | None = None
    about: str = "work"  # the kind of order that it lies about
    dies: str = ""  # the device that dies of its work

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        for number, (key, data) in list(self.queue.items()):
            if key == self.dies and Order.decode(data).what == "work":
                del self.queue[number]
                self.marks[key] = self.marks.get(key, 0) + 1
        yield from super().pull(numbers)

    def answer(self, key: str, order: Order) -> bytes:
        client = int(key[1:])
        past = Order("work", ROUND), Order("work", ROUND - 1)
        honest = Honest(order, BASE, self.replies[client], self.devices[key], ROWS, *past)
        if client == LIAR and self.lie is not None and order.what == self.about:
            return self.lie(honest)
        return honest.reply() if order.what == "work" else honest.told()


class Place:
    """A server with its devices, and what becomes of a round."""

    def __init__(self, toy: Toy, run: RunDir, folder: Path) -> None:
        self.toy, self.run, self.notes = toy, run, list[str]()
        known = {f"k{c}": Device(ROWS, f"{c}" * 64, 1 << 33, 1, "0") for c in range(CLIENTS)}
        self.link = Lying(known, random.Random(1), replies=toy.replies)
        self.table = Devices(folder)
        self.table.register([(key, key) for key in known])
        self.events: list[ClientReply] = []
        self.log: list[dict[str, Any]] = []
        self.fleet = self.anew()
        self.fleet.wait_for(CLIENTS)

    def anew(self) -> RemoteFleet:
        """The same server after a restart, with the same table of devices."""

        def audit(what: str, **fields: Any) -> None:
            self.log.append({"what": what, **fields})

        pace = Pace(grace=0.05, poll=0)
        return RemoteFleet(self.link, self.table, JOB, 42, pace, note=self.notes.append, audit=audit)

    def played(self) -> Any:
        """The state after a round in which all clients are asked."""
        self.events.clear()
        kinds = self.toy.method.kinds(self.toy.state)
        sent = {c: encode(Message(ROUND, BASE, kinds[c % len(kinds)][0])) for c in range(CLIENTS)}
        round = Round(ROUND, BASE, self.fleet.rows, self.toy.state)
        with Replies(self.toy.method, round, self.run, self.events.append) as replies:
            replies.gather(self.fleet.ask(ROUND, range(CLIENTS), sent))
            return replies.aggregate()

    def outcome(self, client: int) -> ClientReply:
        return [e for e in self.events if e.client == client][-1]

    def others(self) -> set[str]:
        """What became of the replies of honest devices."""
        return {self.outcome(c).status for c in range(CLIENTS) if c != LIAR}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with create(tmp_path, "averaging", "toy") as opened:
        yield opened


def knock(place: Place, reference: Any) -> tuple[int, list[str]]:
    """Let the liar send every malformed answer; return how many were survived, and what was wrong of the others."""
    faults: list[str] = []
    for name, (make, reason) in WORK.items():
        place.link.lie = make
        began = time.process_time()
        state = place.played()
        seconds, said = time.process_time() - began, place.outcome(LIAR)
        if said.status not in LEFT or reason not in said.reason or len(said.reason) > REASON:
            faults.append(f"{name}: {said.status}, {said.reason}")
        elif place.others() != {"ok"}:
            faults.append(f"{name}: the others' replies were not taken")
        elif bits(state) != bits(reference):
            faults.append(f"{name}: the state is another")
        elif seconds > SECONDS:
            faults.append(f"{name}: {seconds:.1f} s")
    return len(WORK) - len(faults), faults


def reference_of(place: Place) -> Any:
    """The state of a round in which the liar is away."""
    place.link.lie = lambda h: h.outer(what="failed", code="fault")
    return place.played()


OTHERS = [("fedpetuning", {"module": "full", "steps": 1}), ("fwdllm", {"P": 2}), ("fedpeptao", {})]
SOME = [pytest.param(FEDIT, marks=pytest.mark.injects)]
SOME += [pytest.param(method, marks=pytest.mark.faults) for method in OTHERS]


@pytest.mark.parametrize("method", SOME, ids=lambda method: method[0])
def test_every_malformed_answer_is_refused_with_its_own_reason(tmp_path, run, injected, method):
    assert len(WORK) >= 60
    place = Place(toy(*method), run, tmp_path)
    survived, faults = knock(place, reference_of(place))
    injected("malformed answers", len(WORK), survived=survived)
    assert not faults, "\n".join(faults)
    place.link.lie = None
    assert bits(place.played()) != bits(reference_of(place))  # an honest answer counts


@pytest.mark.injects
def test_a_device_that_is_malformed_when_it_joins_takes_no_part(tmp_path, run, injected):
    place = Place(toy(*FEDIT), run, tmp_path)
    known, faults = (tmp_path / FILE).read_bytes(), []
    for name, (make, reason) in TO_THE_JOB.items():
        place.link.lie, place.link.about = make, "job"
        place.fleet, place.notes[:], place.log[:] = place.anew(), [], []
        place.fleet.wait_for(CLIENTS - 1)
        place.played()
        said = [n for n in place.notes if "takes no part" in n]
        logged = [e["reason"] for e in place.log if e["what"] == "not admitted"]
        if len(said) != 1 or reason not in said[0] or logged != [said[0].partition(": ")[2]]:
            faults.append(f"{name}: {said}, {logged}")
        elif place.outcome(LIAR).status != "dropped" or len(place.events) != CLIENTS:
            faults.append(f"{name}: {place.events}")
        elif (tmp_path / FILE).read_bytes() != known:
            faults.append(f"{name}: the table of devices has changed")
    injected("malformed answers", len(TO_THE_JOB), survived=len(TO_THE_JOB) - len(faults))
    assert not faults, "\n".join(faults)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Change a message, and mend its checksum three times in four."""
    body = hostile.mutated(rng, data[7:])
    check = zlib.crc32(body) if rng.random() < 0.75 else zlib.crc32(data)
    return data[:3] + check.to_bytes(4, "little") + body


def storm(place: Place, count: int, seed: int) -> dict[str, int]:
    """Send so many mutated answers, half of them mutated inside; a round completes with each."""
    rng, reference, found = random.Random(seed), reference_of(place), {"refused": 0, "taken": 0}

    def lie(h: Honest) -> bytes:
        return mutated(rng, h.reply()) if rng.random() < 0.5 else h.reply(mutated(rng, h.body()))

    place.link.lie = lie
    for _ in range(count):
        state = place.played()
        assert place.others() == {"ok"}
        if place.outcome(LIAR).status in LEFT:
            found["refused"] += 1
            assert place.outcome(LIAR).reason
            assert bits(state) == bits(reference)
        else:  # what is left of it is within what was agreed
            found["taken"] += 1
            assert all(np.isfinite(a).all() for a in state.tensors.values())
    return found


def test_mutated_answers_change_nothing_or_are_within_what_was_agreed(tmp_path, run):
    assert storm(Place(toy(*FEDIT), run, tmp_path), 150, seed=1)["refused"] > 110


@pytest.mark.faults
def test_ten_thousand_mutated_answers(tmp_path, run, injected):
    found = storm(Place(toy(*FEDIT), run, tmp_path), 10_000, seed=2)
    injected("mutated answers", sum(found.values()))
    assert found["refused"] > 8_000


def test_a_device_that_dies_of_every_order_does_not_hold_the_round(tmp_path, run):
    """Or that comes in anew all the time: it is asked ten times, and the round goes on without it."""
    place = Place(toy(*FEDIT), run, tmp_path)
    reference = reference_of(place)
    place.link.lie = None
    place.link.dies = f"k{LIAR}"
    place.fleet.pace, began = Pace(grace=20, poll=0), time.monotonic()
    assert bits(place.played()) == bits(reference)
    assert (place.outcome(LIAR).status, place.outcome(LIAR).reason) == ("dropped", "10 times lost at work")
    assert time.monotonic() - began < 15
