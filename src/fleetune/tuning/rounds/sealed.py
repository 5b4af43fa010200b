"""Add up a round's replies by a secure sum: what the server asks, in four steps, and what a client answers.

The clients do the round's work first and keep their replies (`Participant.hold`).  Those that are done take part in the sum
(`privacy/secagg.py`) in quick succession, so that few drop out in its middle.

    rounds      keys -> shares -> masked -> reveal       an order of each name; its body is a message of arrays
    sum.ckpt    in the run's folder, once the shares have come, and again once the masked vectors have: a server that is killed
                asks for the same again, and a client masks and reveals nothing else of that round
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from fleetune.common.files import PRIVATE, read_bytes, write_atomic
from fleetune.errors import MessageError, StorageError
from fleetune.privacy import secagg
from fleetune.privacy.mechanism import Sealed
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode
from fleetune.tuning.rounds.fleets import Fleet, Step

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]

FILE: Final = "sum.ckpt"
STEPS: Final = ".steps"  # a client's, beside its FILE
ATTEMPT: Final = 16  # bytes of its number
KEYS: Final = secagg.KEYS
NAME: Final = 32  # bytes
SIGNATURE: Final = 112  # bytes, its length before it: ECDSA's on P-384 has 104 at most
ANNOUNCED: Final = KEYS + NAME + SIGNATURE
NOBODY: Final = np.zeros(0, np.uint32)


def context(run: str, round: int, attempt: bytes) -> bytes:
    """Return what keys are derived for: nothing else has the same."""
    return f"{run} {round} ".encode() + attempt


@dataclass(frozen=True)
class Identity:
    """Who a client is to the others, and whom it adds up with; a simulated one has none."""

    name: bytes = bytes(NAME)  # SHA-256 of its public key
    sign: Callable[[bytes], bytes] = lambda text: b""
    trusts: Callable[[bytes, bytes, bytes], bool] = lambda name, text, signature: True

    def announcement(self, text: bytes, keys: bytes) -> bytes:
        """Return the keys with the name and the signature of what they are for."""
        signature = self.sign(text + keys)
        return keys + self.name + bytes([len(signature)]) + signature.ljust(SIGNATURE - 1, b"\0")

    def checked(self, text: bytes, announced: bytes) -> bytes:
        """Return the keys of an announcement; MessageError where they are none that this client trusts."""
        keys, name, signed = (announced[:KEYS], announced[KEYS : KEYS + NAME], announced[KEYS + NAME :])
        if not self.trusts(name, text + keys, signed[1 : 1 + signed[0]]):
            raise MessageError("a member of the sum is not one of the devices that this one adds up with")
        return secagg.checked_keys(keys)


ANYBODY: Final = Identity()


def signed_text(run: str, round: int, attempt: bytes, number: int) -> bytes:
    """Return what a member signs before its keys."""
    return b"fleetune sum " + context(run, round, attempt) + number.to_bytes(8, "little")


# A client -----------------------------------------------------------------------------------------------


@dataclass
class Participant:
    """What one client keeps for the sum of one round: its vector in `file`, its steps beside it, to survive a restart."""

    run: str
    sealed: Sealed
    file: Path | None = None
    round: int = 0
    vector: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # its noise in it
    member: secagg.Party | None = None
    identity: Identity = ANYBODY

    @classmethod
    def kept(cls, run: str, sealed: Sealed, file: Path, identity: Identity = ANYBODY) -> Participant:
        """Return what was kept in the file; StorageError where it is damaged, so that nothing is masked twice."""
        found = cls(run, sealed, file, identity=identity)
        try:
            message = decode(read_bytes(file), any_size=True)
            found.round = message.round
            found.member = _member(file.with_suffix(STEPS), found.round)
            if message.payload.scalars["terms"] == sealed.text:  # else it was made for another sum
                found.vector = message.payload.array("vector").copy()
        except FileNotFoundError:
            pass
        except (OSError, MessageError, KeyError, ValueError, TypeError) as error:
            hint = f"to take part in this run again, its round begun anew: remove {file.parent}"
            raise StorageError(f"{file} or its {STEPS} is damaged ({error})", hint=hint) from error
        return found

    def hold(self, round: int, vector: np.ndarray) -> None:
        """Keep int64[d] for the sum of a round; MessageError for one that was masked already, or a round before that."""
        if round < self.round or (round == self.round and self._is_masked):
            raise MessageError(f"round {round} has been summed already")
        self.round, self.vector, self.member = round, vector, None
        if self.file is not None:  # the vector before its steps are gone: no round is masked twice
            self._write(self.file, {"vector": vector}, {"terms": self.sealed.text})
            self.file.with_suffix(STEPS).unlink(missing_ok=True)

    @property
    def _is_masked(self) -> bool:
        return self.member is not None and bool(self.member.arrived)

    def answer(self, step: str, round: int, number: int, body: bytes) -> bytes:
        """Return what this client says in a step of the sum; MessageError for what it does not say."""
        arrays = decode(body).payload.arrays
        if round != self.round or not len(self.vector):
            raise MessageError(f"there is nothing to add up of round {round}")
        if step == "keys":
            return self._coded(self._keys(number, _bytes(arrays, "attempt", ATTEMPT)))
        member = self.member
        if member is None or member.number != number:
            raise MessageError("the sum has not begun with keys")
        before = _dumped(member)
        found = self._step(step, member, arrays)
        if _dumped(member) != before:
            self._keep(member)
        return self._coded(found)

    def _keys(self, number: int, attempt: bytes) -> Arrays:
        member = self.member
        if member is None or (member.number, member.attempt) != (number, attempt):
            if self._is_masked:
                raise MessageError(f"round {self.round} has been summed already")
            own = context(self.run, self.round, attempt)
            self.member = member = secagg.Party(number, self.sealed.least, self.sealed.N, own, attempt)
            self._keep(member)
        text = signed_text(self.run, self.round, attempt, number)
        return {"keys": np.frombuffer(self.identity.announcement(text, member.keys()), np.uint8)}

    def _peers(self, member: secagg.Party, announced: Mapping[int, bytes]) -> dict[int, bytes]:
        """Return member -> its keys; MessageError where one is nobody's that this client trusts, or is there twice."""
        names = [self.identity.name, *(a[KEYS : KEYS + NAME] for a in announced.values())]
        if self.identity.name != ANYBODY.name and len(set(names)) < len(names):
            raise MessageError("a device is in the sum twice")
        return {
            v: self.identity.checked(signed_text(self.run, self.round, member.attempt, v), a)
            for v, a in announced.items()
        }

    def _step(self, step: str, member: secagg.Party, arrays: Arrays) -> Arrays:
        if step == "reveal":
            return _rows(member.reveal(_numbers(arrays)), secagg.SHARE)
        if step == "shares":
            return _rows(member.shares(self._peers(member, _table(arrays, ANNOUNCED))), secagg.SEALED)
        if step == "masked":
            return {"masked": member.masked(self.vector, _table(arrays, secagg.SEALED))}
        raise MessageError(f"a sum has no step {step!r}")

    def _coded(self, arrays: Arrays) -> bytes:
        return encode(Message(self.round, b"", Payload(arrays)))

    def _keep(self, member: secagg.Party) -> None:
        if self.file is not None:
            self._write(self.file.with_suffix(STEPS), {}, {"member": _dumped(member)})

    def _write(self, file: Path, arrays: Arrays, scalars: Mapping[str, str]) -> None:
        write_atomic(file, encode(Message(self.round, b"", Payload(arrays, scalars))), mode=PRIVATE)


def _dumped(member: secagg.Party) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.hex()
        return {key: v.hex() for key, v in value.items()} if isinstance(value, dict) else value

    return json.dumps({f.name: plain(getattr(member, f.name)) for f in fields(member)})


def _member(file: Path, round: int) -> secagg.Party | None:
    """Return the steps of a round; None where there are none."""
    if not file.exists() or (message := decode(read_bytes(file), any_size=True)).round != round:
        return None

    def back(value: Any) -> Any:
        if isinstance(value, str):
            return bytes.fromhex(value)
        return {int(k): bytes.fromhex(v) for k, v in value.items()} if isinstance(value, dict) else value

    found = json.loads(str(message.payload.scalars["member"]))
    return secagg.Party(**{name: back(value) for name, value in found.items()})


# The server ---------------------------------------------------------------------------------------------


@dataclass
class Summing:
    """The secure sums of a run; what it counts in bytes goes to the round's totals."""

    sealed: Sealed
    run: str
    folder: Path | None  # of the run; None where clients cannot go on after a restart
    note: Callable[[str], None]
    left_out: set[int] = field(default_factory=set)  # clients whose shares were wrong
    bytes_up: int = 0
    bytes_down: int = 0

    def pending(self, round: int) -> bool:
        """Tell whether the masked vectors of a round are here already, from before a restart."""
        return self._saved(round) is not None

    def add_up(
        self, fleet: Fleet, round: int, clients: Collection[int], numbers: int
    ) -> tuple[np.ndarray | None, str]:
        """Return int64[d], the sum of what these clients hold; or None, and why it cannot be told."""
        self.bytes_up = self.bytes_down = 0
        try:
            saved = self._saved(round) or self._shared(fleet, round, clients)
            if "total" not in saved.arrays:
                saved = self._masked(fleet, round, saved, numbers)
            return self._revealed(fleet, round, saved), ""
        except MessageError as error:
            if isinstance(error, secagg.WrongSharesError):
                self.left_out.add(error.member)
            if self.folder is not None:
                (self.folder / FILE).unlink(missing_ok=True)
            self.note(f"round {round} has no sum, and the model stays: {error.message}")
            return None, error.message

    def _shared(self, fleet: Fleet, round: int, clients: Collection[int]) -> Payload:
        """Take the steps up to the shares, and keep these: a client masks its vector for one set of them alone."""
        attempt = np.frombuffer(secrets.token_bytes(ATTEMPT), np.uint8)

        def announced(client: int, arrays: Arrays) -> bytes:
            found = _bytes(arrays, "keys", ANNOUNCED)
            secagg.checked_keys(found[:KEYS])
            return found

        begun = {c: {"attempt": attempt} for c in self._enough(clients)}
        told = self._ask(fleet, round, "keys", begun, announced)
        members = sorted(self._enough(told))

        def given(client: int, arrays: Arrays) -> bytes:
            if sorted([client, *(shares := _table(arrays, secagg.SEALED))]) != members:
                raise MessageError("its shares are not for those that it was told")
            return b"".join(shares[v] for v in sorted(shares))

        peers = {c: _rows({v: told[v] for v in members if v != c}, ANNOUNCED) for c in members}
        shares = self._ask(fleet, round, "shares", peers, given)
        return self._keep(
            round,
            {
                "attempt": attempt,
                "members": np.array(members, np.uint32),
                "keys": np.frombuffer(b"".join(told[c][:KEYS] for c in members), np.uint8),
                "shared": np.array(sorted(self._enough(shares)), np.uint32),
                "shares": np.frombuffer(b"".join(shares[c] for c in sorted(shares)), np.uint8),
            },
        )

    def _masked(self, fleet: Fleet, round: int, saved: Payload, numbers: int) -> Payload:
        """Take the masked vectors, and keep their sum."""
        members, shared = saved.arrays["members"].tolist(), saved.arrays["shared"].tolist()
        table = saved.arrays["shares"].reshape(len(shared), len(members) - 1, secagg.SEALED)
        of = {
            v: dict(zip([c for c in members if c != v], table[i], strict=True)) for i, v in enumerate(shared)
        }
        arrived = {c: _rows({v: of[v][c].tobytes() for v in shared if v != c}, secagg.SEALED) for c in shared}
        total = np.zeros(numbers, np.uint64)

        def added(client: int, arrays: Arrays) -> None:
            vector = arrays.get("masked")
            if vector is None or vector.dtype != np.uint64 or vector.shape != (numbers,):
                raise MessageError(f"it gives no {numbers:,} numbers")
            np.add(total, vector, out=total)

        survivors = self._ask(fleet, round, "masked", arrived, added, 8 * numbers)
        heard = np.array(sorted(self._enough(survivors)), np.uint32)
        kept = {name: array for name, array in saved.arrays.items() if name != "shares"}
        return self._keep(round, {**kept, "survivors": heard, "total": total})

    def _keep(self, round: int, arrays: Arrays) -> Payload:
        if self.folder is not None:
            write_atomic(self.folder / FILE, encode(Message(round, b"", Payload(arrays))), mode=PRIVATE)
        return Payload(arrays)

    def _revealed(self, fleet: Fleet, round: int, saved: Payload) -> np.ndarray:
        """Let the clients reveal what takes the masks off the sum of those that were heard."""
        found = saved.arrays
        attempt, members = found["attempt"].tobytes(), found["members"].tolist()
        raw = found["keys"].tobytes()
        keys = {c: raw[secagg.KEYS * i : secagg.KEYS * (i + 1)] for i, c in enumerate(members)}
        survivors = found["survivors"].tolist()
        orders = {c: {"of": found["survivors"]} for c in survivors}
        revealed = self._ask(
            fleet, round, "reveal", orders, lambda client, arrays: _table(arrays, secagg.SHARE)
        )
        total = secagg.unmask(
            found["total"],
            keys,
            found["shared"].tolist(),
            survivors,
            revealed,
            least=self.sealed.least,
            context=context(self.run, round, attempt),
        )
        self.note(f"round {round}: the sum of {len(survivors)} of {len(members)} that were done")
        return total

    def _ask(
        self,
        fleet: Fleet,
        round: int,
        step: Step,
        orders: Mapping[int, Arrays],
        read: Callable[[int, Arrays], T],
        room: int = 0,
    ) -> dict[int, T]:
        """Return client -> what it says, of those that answer a step as agreed; the others are left out from here on."""
        bodies = {c: encode(Message(round, b"", Payload(arrays))) for c, arrays in orders.items()}
        found = {}
        for answer in fleet.exchange(round, step, bodies, room):
            self.bytes_down += answer.sent
            self.bytes_up += len(answer.data or b"")
            try:
                if answer.data is None:
                    raise MessageError(answer.reason)
                found[answer.client] = read(answer.client, decode(answer.data).payload.arrays)
            except MessageError as error:
                self.note(f"client {answer.client} takes no further part in the sum: {error.message}")
        return found

    def _enough(self, clients: Collection[int]) -> Collection[int]:
        if len(clients) < self.sealed.least:
            raise MessageError(f"{len(clients)} clients are left, and {self.sealed.least} are needed")
        return clients

    def _saved(self, round: int) -> Payload | None:
        if self.folder is None:
            return None
        try:
            message = decode(read_bytes(self.folder / FILE), any_size=True)
        except (OSError, MessageError):
            return None
        return message.payload if message.round == round else None


# What travels -------------------------------------------------------------------------------------------


def _rows(parts: Mapping[int, bytes], size: int) -> dict[str, np.ndarray]:
    """Return numbers and a table of as many rows of `size` bytes."""
    numbers = sorted(parts)
    raw = np.frombuffer(b"".join(parts[number] for number in numbers), np.uint8)
    return {"of": np.array(numbers, np.uint32), "rows": raw.reshape(len(numbers), size)}


def _table(arrays: Arrays, size: int) -> dict[int, bytes]:
    """Return number -> its row; MessageError for another form."""
    numbers, rows = _numbers(arrays), arrays.get("rows")
    if rows is None or rows.dtype != np.uint8 or rows.shape != (len(numbers), size):
        raise MessageError("a table of a secure sum has not the form that was agreed")
    return dict(zip(numbers, (row.tobytes() for row in rows), strict=True))


def _numbers(arrays: Arrays) -> list[int]:
    found = arrays.get("of", NOBODY)
    if found.dtype != np.uint32 or found.ndim != 1 or (np.diff(found.astype(np.int64)) <= 0).any():
        raise MessageError("the members of a secure sum are not told as agreed")
    return [int(number) for number in found.tolist()]


def _bytes(arrays: Arrays, name: str, size: int) -> bytes:
    found = arrays.get(name)
    if found is None or found.dtype != np.uint8 or found.shape != (size,):
        raise MessageError(f"'{name}' of a secure sum has not the form that was agreed")
    return found.tobytes()
