# SPDX-License-Identifier: Apache-2.0
"""Add up vectors of integers so that the server sees their sum alone: SecAgg, on a ring of neighbours as SecAgg+.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS, Figure 4, with the neighbours
of Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS.  With PRG a stream of AES-256 in
counter mode and all sums modulo 2^64, member u sends

    x_u + PRG(b_u) + sum_{v in N(u), v > u} PRG(s_uv) - sum_{v in N(u), v < u} PRG(s_uv)

    keys     public keys of X25519, one for masks and one for ciphers, and SHA-256 of the seed b_u
    shares   Shamir's t-of-h shares of b_u and of the private mask key, one for each neighbour and encrypted for it (AES-GCM)
    masked   the vector above, over the neighbours whose shares have arrived
    reveal   of each neighbour one share: of b_v where v's vector has arrived, else of v's mask key, never of both

The server takes the masks off: PRG(b_v) of those that have sent, PRG(s_uv) towards those that have not.  What is left is the sum
of the vectors that have arrived, bit for bit.

- s_uv is HKDF-SHA256 of the Diffie-Hellman secret of u and v, the run, the round and the attempt.  No key is used twice.
- t shares of both kinds would be needed to lay a single vector open, and a member gives one of each neighbour, once:
  2 t > h.  A server that tells members different things gets neither, unless more than 2 t - h of the h work for it.
- Up to `RING` + 1 members, all are neighbours and t is `least`, the smallest number of vectors that is ever added up.  Among
  more, each has `RING` neighbours on a ring in the order of SHA-256(attempt, member), so that those of one place are
  spread, and t is half of them.
- Seeds and mask keys that are put together from shares are held against what was announced.  A holder that gives a wrong
  share is left out; where the shares of a member never fit, it is named (`WrongSharesError`), and there is no sum.
- Every answer of a member follows from its secrets and what came, so that it can be given again after a restart.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np

from fleetune.common.shell import pip_install
from fleetune.errors import MessageError, UsageError

with contextlib.suppress(ImportError):  # of the extra `fleet`: `check_installed` says what is missing
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

P: Final = (1 << 256) + 297  # a prime above every secret
SECRET: Final = 32  # bytes of a key or a seed
SHARE: Final = 33  # bytes of a number below P
SEALED: Final = 2 * SHARE + 16  # bytes of two shares, encrypted
KEYS: Final = 3 * SECRET  # mask key, cipher key, SHA-256 of the seed
RING: Final = 256  # neighbours, among more members than that
PIECE: Final = 1 << 16  # numbers that are masked at a time


def check_installed() -> None:
    """UsageError where the library of the ciphers is not there."""
    if not importlib.util.find_spec("cryptography"):
        raise UsageError("secure sums need cryptography, which is not installed", hint=pip_install("fleet"))


class WrongSharesError(MessageError):
    """A member's shares are not those of what it announced."""

    def __init__(self, member: int) -> None:
        super().__init__(f"the shares of member {member} do not fit what it announced")
        self.member = member


def neighbours(members: Collection[int], attempt: bytes) -> dict[int, list[int]]:
    """Return member -> those that hold a share of its secrets, itself included, ascending."""
    ring = sorted(members, key=lambda member: hashlib.sha256(attempt + member.to_bytes(8, "little")).digest())
    n = len(ring)
    if n <= RING + 1:
        return dict.fromkeys(ring, sorted(ring))
    near = range(-(RING // 2), RING // 2 + 1)
    return {member: sorted(ring[(place + i) % n] for i in near) for place, member in enumerate(ring)}


def threshold(holders: int, least: int) -> int:
    """Return t, of how many shares a secret is put together; a sum has `least` vectors or more."""
    return least if holders <= RING else holders // 2 + 1


# A member -----------------------------------------------------------------------------------------------


@dataclass
class Member:
    """One member of one attempt at a sum; its fields are all that it needs to go on after a restart."""

    number: int
    least: int
    context: bytes  # of run, round and attempt
    attempt: bytes
    mask: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET))
    cipher: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET))
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET))  # b_u
    peers: dict[int, bytes] = field(default_factory=dict)  # neighbour -> its keys
    arrived: dict[int, bytes] = field(default_factory=dict)  # neighbour -> its shares, encrypted
    survivors: list[int] | None = None  # neighbours of which the seed was revealed

    def keys(self) -> bytes:
        """Return what is announced."""
        return _public(self.mask) + _public(self.cipher) + hashlib.sha256(self.seed).digest()

    @property
    def _t(self) -> int:
        return threshold(len(self.peers) + 1, self.least)

    def shares(self, peers: Mapping[int, bytes]) -> dict[int, bytes]:
        """Return neighbour -> its shares, encrypted; MessageError for too few neighbours, or others than before."""
        if self.peers not in ({}, dict(peers)):
            raise MessageError("the sum has other members than it had")
        if self.number in peers or len(set(peers.values())) < len(peers) or self.keys() in peers.values():
            raise MessageError("a member of the sum is there twice")
        n, t = len(peers) + 1, threshold(len(peers) + 1, self.least)
        if not t <= n < 2 * t:
            raise MessageError(f"{n} members hold shares, of which {t} lay a secret open")
        self.peers = dict(peers)
        own = self._own()
        return {
            v: AESGCM(self._cipher_key(v, self.number, v)).encrypt(bytes(12), _held(own, v), None)
            for v in peers
        }

    def _own(self) -> tuple[Sequence[int], ...]:
        """Return the polynomials of which neighbours hold a value each: of the seed, and of the mask key."""
        return tuple(polynomial(secret, self._t, self.context) for secret in (self.seed, self.mask))

    def masked(self, x: np.ndarray, arrived: Mapping[int, bytes]) -> np.ndarray:
        """Return uint64[d], the vector int64[d] with its masks; MessageError for too few shares, or others than before."""
        if self.arrived not in ({}, dict(arrived)):
            raise MessageError("the sum has other members than it had")
        if not arrived.keys() <= self.peers.keys() or len(arrived) + 1 < self._t:
            raise MessageError(f"{len(arrived) + 1} members have shared their keys, and {self._t} are needed")
        self.arrived = dict(arrived)
        masked = x.astype(np.int64).view(np.uint64).copy()
        add_stream(masked, self._stream(self.seed), 1)
        for v in arrived:
            add_stream(masked, pair(self.mask, self.peers[v], self.context), sign(self.number, v))
        return masked

    def reveal(self, survivors: Sequence[int]) -> dict[int, bytes]:
        """Return neighbour -> a share: of its seed where it is among the `survivors`, else of its mask key.

        One that cannot be read is left out.  MessageError for too few survivors, or others than before.
        """
        held = {self.number, *self.arrived}
        if self.survivors not in (None, sorted(survivors)):
            raise MessageError("the sum was to be of other members before")
        if not set(survivors) <= held or self.number not in survivors or len(survivors) < self._t:
            raise MessageError(f"a sum of {len(survivors)} members was asked for, and {self._t} are needed")
        self.survivors = sorted(survivors)
        found = {}
        for v in held:
            try:
                both = _held(self._own(), v) if v == self.number else self._opened(v)
            except InvalidTag:
                continue
            found[v] = both[:SHARE] if v in survivors else both[SHARE:]
        return found

    def _opened(self, v: int) -> bytes:
        return AESGCM(self._cipher_key(v, v, self.number)).decrypt(bytes(12), self.arrived[v], None)

    def _cipher_key(self, peer: int, giver: int, holder: int) -> bytes:
        """Return the key for what one member gives to another: each is used once, so that its nonce may be zero."""
        secret = _agreed(self.cipher, self.peers[peer][SECRET : 2 * SECRET])
        return _derived(
            secret, self.context + b"cipher" + giver.to_bytes(8, "little") + holder.to_bytes(8, "little")
        )

    def _stream(self, seed: bytes) -> bytes:
        return _derived(seed, self.context + b"seed")


# The server ---------------------------------------------------------------------------------------------


def unmask(
    total: np.ndarray,
    keys: Mapping[int, bytes],
    shared: Collection[int],
    survivors: Collection[int],
    revealed: Mapping[int, Mapping[int, bytes]],
    *,
    least: int,
    context: bytes,
    attempt: bytes,
) -> np.ndarray:
    """Return int64[d], the sum of the survivors' vectors, of uint64[d], that of their masked ones.

    `keys` are those of all members, `shared` those that have given shares, `revealed` has holder -> member -> share.
    WrongSharesError for a member whose shares do not fit; MessageError where there are too few.
    """
    near = neighbours(keys, attempt)
    found, liars = total.copy(), set[int]()
    for v in sorted(shared):
        shares = {h: int.from_bytes(revealed[h][v], "little") for h in near[v] if v in revealed.get(h, ())}
        announced = (
            (lambda s, v=v: hashlib.sha256(s).digest() == keys[v][2 * SECRET :])
            if v in survivors
            else (lambda s, v=v: _public(s) == keys[v][:SECRET])
        )
        secret = _put_together(v, shares, threshold(len(near[v]), least), announced, liars)
        if v in survivors:
            add_stream(found, _derived(secret, context + b"seed"), -1)
        else:
            for u in near[v]:
                if u in survivors:
                    add_stream(found, pair(secret, keys[u], context), -sign(u, v))
    return found.view(np.int64)


def _put_together(
    member: int, shares: Mapping[int, int], t: int, announced: Callable[[bytes], bool], liars: set[int]
) -> bytes:
    """Return a member's secret by t of its shares; one that lies and is found is added to the `liars`."""
    for left_out in (-1, *sorted(shares)):
        holders = tuple(sorted(h for h in shares if h != left_out and h not in liars)[:t])
        if len(holders) < t:
            raise MessageError(f"{len(shares)} shares of member {member} are there, and {t} are needed")
        number = sum(c * shares[h] for c, h in zip(coefficients(holders), holders, strict=True)) % P
        if not number >> 256 and announced(number.to_bytes(SHARE, "little")[:SECRET]):
            liars |= {left_out} - {-1}
            return number.to_bytes(SHARE, "little")[:SECRET]
        if left_out == -1 and len(shares.keys() - liars) == t:
            break
    raise WrongSharesError(member)


# Shamir's shares, masks and keys ------------------------------------------------------------------------


def polynomial(secret: bytes, t: int, context: bytes) -> Sequence[int]:
    """Return t coefficients mod P: first the secret; the others follow from it, uniform but for 2^-127."""
    stream = _stream(_derived(secret, context + b"shares"), 48 * (t - 1))
    others = [int.from_bytes(stream[i : i + 48], "little") % P for i in range(0, len(stream), 48)]
    return [int.from_bytes(secret, "little"), *others]


def share(polynomial: Sequence[int], holder: int) -> int:
    """Return the value mod P that a member holds: the polynomial's at its number and 1, so never the secret at 0."""
    found, x = 0, holder + 1
    for coefficient in reversed(polynomial):
        found = (found * x + coefficient) % P
    return found


def _held(polynomials: Iterable[Sequence[int]], holder: int) -> bytes:
    return b"".join(share(p, holder).to_bytes(SHARE, "little") for p in polynomials)


@lru_cache(maxsize=4)
def coefficients(holders: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's coefficients at 0, of the places that these holders have."""
    found = []
    for i in holders:
        above = below = 1
        for j in holders:
            if j != i:
                above, below = above * (j + 1) % P, below * (j - i) % P
        found.append(above * pow(below, -1, P) % P)
    return tuple(found)


def sign(u: int, v: int) -> int:
    """Return 1 where u adds what it has in common with v, -1 where it takes it away."""
    return 1 if u < v else -1


def pair(private: bytes, keys: bytes, context: bytes) -> bytes:
    """Return s_uv, by the private mask key of one and what the other has announced."""
    return _derived(_agreed(private, keys[:SECRET]), context + b"mask")


def add_stream(vector: np.ndarray, key: bytes, sign: int) -> None:
    """Add PRG(key) to uint64[d], or take it away, modulo 2^64."""
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    for first in range(0, len(vector), PIECE):
        part = vector[first : first + PIECE]
        numbers = np.frombuffer(encryptor.update(bytes(8 * len(part))), "<u8")
        if sign > 0:
            part += numbers
        else:
            part -= numbers


def _stream(key: bytes, count: int) -> bytes:
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(count))


def _derived(secret: bytes, context: bytes) -> bytes:
    return HKDF(hashes.SHA256(), SECRET, salt=None, info=b"fleetune secagg " + context).derive(secret)


def _agreed(private: bytes, public: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:  # a point of small order
        raise MessageError("a member's key is none") from error


def _public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def checked_keys(found: bytes) -> bytes:
    """Return what a member announces; MessageError where it cannot be keys."""
    if len(found) != KEYS:
        raise MessageError(f"keys have {KEYS} bytes, {len(found)} came")
    _agreed(secrets.token_bytes(SECRET), found[:SECRET])
    _agreed(secrets.token_bytes(SECRET), found[SECRET : 2 * SECRET])
    return found
