"""A round under a secure sum: bit for bit the sum without masks, whoever drops out or is restarted, and nothing else."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract_harness import base_of, equal_states, fleet, key, kind_of, short

from fleetune import models
from fleetune.errors import MessageError, StorageError
from fleetune.fleet.keys import identity, make
from fleetune.models.net.model import Model
from fleetune.privacy import mechanism, secagg
from fleetune.privacy.mechanism import Privacy, S, Sealed, SealedSum, flattened
from fleetune.tuning.exchange.aggregation import PRIVATE, Rule
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode
from fleetune.tuning.methods import Method, Reply
from fleetune.tuning.rounds.fleets import Answer, Step
from fleetune.tuning.rounds.sealed import ANNOUNCED, FILE, Identity, Participant, Summing, signed_text
from fleetune.tuning.rounds.simulated_fleet import LocalFleet

SEALED = Sealed(1e7, 0.0, 1.0, 4, 3)  # integers of a ledger
SMALL = dataclasses.replace(SEALED, clip=10.0)  # an adapter's numbers
METHODS = ("fedkseed", "mezo", "onebyte", "signlora", "fedit", "fedit:wire=sign")


@pytest.fixture
def model() -> Model:
    return models.tiny_llama(layers=2)


def asked(model: Model, method: Method, state: Any, sealed: Sealed | None) -> tuple[LocalFleet, list[Answer]]:
    made = fleet(model, method, 4)
    made.sealed = sealed
    sent = encode(Message(1, base_of(model), kind_of(method, state)[0]))
    return made, list(made.ask(1, range(4), sent))


def moves(method: Method, state: Any, answer: Answer) -> dict[str, np.ndarray]:
    """Return how far a client's open reply moves each number, by the method's own functions."""
    sent, _ = kind_of(method, state)
    end = method.moved(sent, Reply(answer.client, answer.key, decode(answer.data or b"").payload))
    return {n: end[n].astype(np.float64) - t.astype(np.float64) for n, t in method.begins(sent).items()}


def summing(folder: Path, sealed: Sealed = SEALED) -> Summing:
    return Summing(sealed, "", folder, lambda text: None)


@pytest.mark.parametrize("name", METHODS)
def test_a_round_is_bit_for_bit_that_without_masks(name, model, tmp_path, monkeypatch):
    """The sum, and the new state: that of the open replies by the server's own sum on the same grid, its noise still."""
    method, sealed = short(name), SMALL if name.startswith("fedit") else SEALED
    state = method.init(model, key())
    begins = method.begins(kind_of(method, state)[0])
    _, plain = asked(model, method, state, None)
    wanted = sum(flattened(sealed.units(moves(method, state, answer))) for answer in plain)
    made, quiet = asked(model, method, state, sealed)
    assert all(decode(a.data or b"").payload == Payload({}, {}) for a in quiet)
    total, _ = summing(tmp_path, sealed).add_up(made, 1, range(4), len(wanted))
    np.testing.assert_array_equal(total, wanted)
    assert np.any(wanted)
    summed = dataclasses.replace(sealed, total=total)
    new = method.aggregate(state, iter(()), Rule(PRIVATE, privacy=summed))
    for n, tensor in SealedSum(summed, begins).tensors().items():  # the mean of the replies, on a grid
        mean = np.mean([moves(method, state, a)[n] for a in plain], axis=0)
        np.testing.assert_allclose(tensor - begins[n], mean, rtol=2e-6, atol=sealed.grid)
    monkeypatch.setattr(mechanism, "discrete_gaussian", lambda count: np.zeros(count, np.int64))
    unmasked = Rule(PRIVATE, privacy=Privacy(sealed.clip, 1.0, 1.0, 4))
    replies = [Reply(a.client, a.key, decode(a.data or b"").payload) for a in plain]
    assert equal_states(new, method.aggregate(state, iter(replies), unmasked))
    assert not equal_states(new, method.aggregate(state, iter(replies[1:]), unmasked))


class Dropping(LocalFleet):
    """A fleet of which some members say nothing from a step on."""

    gone: Mapping[str, set[int]]

    def exchange(self, round: int, step: Step, bodies: Any, room: int = 0) -> Iterator[Answer]:
        for answer in super().exchange(round, step, bodies, room):
            if answer.client in self.gone.get(step, ()):
                yield answer._replace(data=None, status="dropped", reason="gone")
            else:
                yield answer


@pytest.mark.parametrize("step", ["keys", "shares", "masked", "reveal"])
def test_whoever_drops_out_is_in_the_sum_or_not(step, model, tmp_path):
    made = held(model)
    made.gone = {step: {2}}
    total, _ = summing(tmp_path).add_up(made, 1, range(4), 3)
    everyone = step == "reveal"  # it has given its vector, and the others take its mask off
    np.testing.assert_array_equal(total, [100, 1000, 10] if everyone else [70, 700, 7])
    made = held(model)
    made.gone = {step: {1, 2}}
    total, why = summing(tmp_path).add_up(made, 1, range(4), 3)
    assert total is None
    assert "needed" in why


def held(model: Model) -> Dropping:
    """Return a fleet of 4 that holds (10, 100, 1), (20, 200, 2), .. for the sum."""
    made = Dropping(model, short("mezo"), [[]] * 4, 7, 0, sealed=SEALED)
    made.gone = {}
    for c in range(4):
        made.participants[c] = Participant("", SEALED)
        made.participants[c].hold(1, np.array([10, 100, 1]) * (c + 1))
    return made


@pytest.mark.parametrize(
    ("what", "answer"),
    [
        ("keys", {"keys": np.zeros(ANNOUNCED, np.uint8)}),
        ("shares", {"of": np.array([0, 1], np.uint32), "rows": np.zeros((2, secagg.SEALED), np.uint8)}),
        ("masked", {"masked": np.zeros(3, np.int64)}),
        ("masked", {"masked": np.zeros(2, np.uint64)}),
        ("reveal", {"of": np.array([3, 1], np.uint32), "rows": np.zeros((2, secagg.SHARE), np.uint8)}),
        ("reveal", {}),
    ],
)
def test_one_that_answers_otherwise_is_left_out_alone(what, answer, model, tmp_path, monkeypatch):
    made = held(model)
    honest = made.participants[3].answer

    def odd(step: str, round: int, number: int, body: bytes) -> bytes:
        return encode(Message(1, b"", Payload(answer))) if step == what else honest(step, round, number, body)

    monkeypatch.setattr(made.participants[3], "answer", odd)
    total, _ = summing(tmp_path).add_up(made, 1, range(4), 3)
    heard = [100, 1000, 10] if what == "reveal" else [60, 600, 6]
    np.testing.assert_array_equal(total, heard)


@pytest.mark.parametrize("step", ["keys", "shares", "masked", "reveal"])
def test_a_server_that_is_restarted_asks_for_the_same_sum(step, model, tmp_path):
    made = held(model)
    made.gone = {step: {3}} if step == "masked" else {}
    with pytest.raises(RuntimeError, match="killed"):
        summing(tmp_path).add_up(Killed(made, step), 1, range(4), 3)  # type: ignore[arg-type]
    again = summing(tmp_path)
    assert again.pending(1) is (step in ("masked", "reveal"))
    total, _ = again.add_up(made, 1, range(4), 3)
    np.testing.assert_array_equal(total, [60, 600, 6] if step == "masked" else [100, 1000, 10])
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


class Killed:
    """A fleet whose server is killed when all have answered a step, before it has heard the last."""

    def __init__(self, fleet: LocalFleet, step: str) -> None:
        self._fleet, self._step = fleet, step

    def exchange(self, round: int, step: Step, bodies: Any, room: int = 0) -> Iterator[Answer]:
        answers = list(self._fleet.exchange(round, step, bodies, room))
        if step == self._step:
            raise RuntimeError("killed")
        yield from answers


def test_a_client_that_is_restarted_before_any_step_answers_alike(model, tmp_path):
    files = {c: tmp_path / f"{c}.ckpt" for c in range(4)}
    for c, file in files.items():
        Participant("", SEALED, file).hold(1, np.array([1, 2, 3]) * 10**c)
    written = {c: file.stat().st_ino for c, file in files.items()}

    class Restarted(LocalFleet):
        def exchange(self, round: int, step: Step, bodies: Any, room: int = 0) -> Iterator[Answer]:
            for c, body in bodies.items():
                first = Participant.kept("", SEALED, files[c]).answer(step, round, c, body)
                assert Participant.kept("", SEALED, files[c]).answer(step, round, c, body) == first
                yield Answer(c, 0, first, "ok", "", 0.0, len(body))

    made = Restarted(model, short("mezo"), [[]] * 4, 7, 0, sealed=SEALED)
    total, _ = summing(tmp_path).add_up(made, 1, range(4), 3)
    np.testing.assert_array_equal(total, np.array([1, 2, 3]) * 1111)
    # the vectors once, the steps beside them
    assert {c: file.stat().st_ino for c, file in files.items()} == written
    for c, file in files.items():  # of a round that has been summed nothing else is said
        with pytest.raises(MessageError, match="summed already"):
            Participant.kept("", SEALED, file).hold(1, np.array([5, 5, 5]))
        begun = encode(Message(1, b"", Payload({"attempt": np.zeros(16, np.uint8)})))
        with pytest.raises(MessageError, match="summed already"):
            Participant.kept("", SEALED, file).answer("keys", 1, c, begun)


def test_what_was_held_for_one_sum_is_not_given_to_another(tmp_path):
    """Of a round before, of the same round again once it is masked, or on other terms than its noise was made for."""
    file, begun = tmp_path / FILE, encode(Message(4, b"", Payload({"attempt": np.zeros(16, np.uint8)})))
    Participant("", SEALED, file).hold(4, np.array([1, 2, 3]))
    assert Participant.kept("", SEALED, file).answer("keys", 4, 0, begun)
    for other in (dataclasses.replace(SEALED, least=4), dataclasses.replace(SEALED, noise=1.0)):
        with pytest.raises(MessageError, match="nothing to add up"):
            Participant.kept("", other, file).answer("keys", 4, 0, begun)
    masked = Participant.kept("", SEALED, file)
    assert masked.member is not None
    masked.member.arrived = {1: b"a share"}
    masked._keep(masked.member)
    for terms in (SEALED, dataclasses.replace(SEALED, clip=2.0)):
        with pytest.raises(MessageError, match="round 4 has been summed already"):
            Participant.kept("", terms, file).hold(4, np.array([1, 2, 3]))
    with pytest.raises(MessageError, match="summed already"):
        Participant.kept("", SEALED, file).hold(3, np.array([1, 2, 3]))


def test_a_client_says_nothing_of_a_round_that_it_has_not_worked_for():
    member = Participant("", SEALED)
    body = encode(Message(1, b"", Payload({"attempt": np.zeros(16, np.uint8)})))
    with pytest.raises(MessageError, match="nothing to add up"):
        member.answer("keys", 1, 0, body)
    member.hold(1, np.array([1]))
    with pytest.raises(MessageError, match="begun with keys"):
        member.answer("reveal", 1, 0, body)


def test_a_damaged_file_of_a_client_is_an_error(tmp_path):
    file = tmp_path / FILE
    Participant("", SEALED, file).hold(4, np.array([1, 2, 3]))
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match="is damaged"):
        Participant.kept("", SEALED, file)


def test_the_least_clients_together_make_all_the_noise():
    """Of variance (z C)^2; and each of them makes its share, whatever it replies."""
    sealed, d = Sealed(2.0, 1.5, 1.0, 12, 8), 1 << 15
    shares = [sealed.vector({"x": np.zeros(d)}) for _ in range(8)]
    deviation = float(np.std(np.sum(shares, axis=0) * sealed.grid))
    assert abs(deviation / (1.5 * 2.0) - 1) < 5 / np.sqrt(2 * d)
    assert all(abs(float(np.std(share)) / S - 1) < 5 / np.sqrt(2 * d) for share in shares)
    far = sealed.vector({"x": np.full(d, 1e9)}) * sealed.grid
    assert abs(np.linalg.norm(far) / np.hypot(2.0, 1.5 * 2.0 * np.sqrt(d / 8)) - 1) < 0.05


def test_a_client_adds_up_with_those_alone_that_it_knows(model, tmp_path):
    """Another's signature, or one of another round, member or keys, is refused by each; so is a device that is there twice."""
    own = [make(tmp_path / f"device-{c}") for c in range(5)]
    (tmp_path / "keys").mkdir()
    for c in range(4):
        (tmp_path / "keys" / f"device-{c}.pub").write_bytes((tmp_path / f"device-{c}.pub").read_bytes())
    everyone = [identity(key, tmp_path / "keys") for key in own]

    def total(*who: Identity, folder: str) -> np.ndarray | None:
        made = held(model)
        for c, one in enumerate(who):
            made.participants[c].identity = one
        (tmp_path / folder).mkdir()
        return summing(tmp_path / folder).add_up(made, 1, range(4), 3)[0]

    np.testing.assert_array_equal(total(*everyone[:4], folder="known"), [100, 1000, 10])
    assert total(*everyone[:3], everyone[4], folder="a stranger") is None
    assert total(*everyone[:3], everyone[0], folder="twice") is None
    forged = dataclasses.replace(everyone[3], sign=everyone[4].sign)
    assert total(*everyone[:3], forged, folder="forged") is None
    text = signed_text("", 1, bytes(16), 3)
    announced = everyone[3].announcement(text, secagg.Party(3, 3, 4, b"", b"").keys())
    assert everyone[0].checked(text, announced)
    for run, number, who in (("", 2, 3), ("", 1, 2), ("x", 1, 3)):
        with pytest.raises(MessageError, match="not one of the devices"):
            everyone[0].checked(signed_text(run, number, bytes(16), who), announced)
    with pytest.raises(MessageError, match="not one of the devices"):
        everyone[0].checked(text, bytes([announced[0] ^ 1]) + announced[1:])
