"""Add up vectors of integers so that the server sees their sum alone: SecAgg (Bonawitz et al. 2017, CCS, Figure 4).

With PRG a stream of AES-256 in counter mode and all sums modulo 2^64, member u of the members U sends

    x_u + PRG(b_u) + sum_{v in U, v > u} PRG(s_uv) - sum_{v in U, v < u} PRG(s_uv)

    keys     public keys of X25519, one for masks and one for ciphers, and SHA-256 of the seed b_u
    shares   Shamir's t-of-n shares of b_u and of the private mask key, one for each member and encrypted for it (AES-GCM)
    masked   the vector above, over the members whose shares have arrived
    reveal   of each member one share: of b_v where v's vector has arrived, else of v's mask key, never of both

The server takes off PRG(b_v) of those that have sent, and PRG(s_uv) towards those that have not.

- s_uv is HKDF-SHA256 of the Diffie-Hellman secret of u and v, the run, the round and the attempt.  No key is used twice.
- t is `least`, the smallest number of vectors that is ever added up, at least two thirds of the N that may take part.  A server
  that tells members different things needs 2 t - n >= N / 3 of them to work for it: each gives one share of each other, once.
- Seeds and mask keys that are put together from shares are held against what was announced.  Holders of wrong
  shares are left out, where t others are found (`_choices`); a member whose shares never fit is named (`WrongSharesError`).
- Every answer of a member follows from its secrets and what came, so that it can be given again after a restart.
"""

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np

from fleetune.errors import MessageError

with contextlib.suppress(ImportError):  # of the extra `fleet`: `shell.check_installed` says what is missing
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

FEWEST: Final = 3  # members of a sum: that of two shows each to the other
MOST: Final = 2048  # the same: what each does grows with them
P: Final = (1 << 256) + 297  # a prime above every secret
SECRET: Final = 32  # bytes of a key or a seed
SHARE: Final = 33  # bytes of a number below P
SEALED: Final = 2 * SHARE + 16  # bytes of two shares, encrypted
KEYS: Final = 3 * SECRET  # mask key, cipher key, SHA-256 of the seed
TRIES: Final = 200  # sets of holders at random
PIECE: Final = 1 << 16  # numbers that are masked at a time


class WrongSharesError(MessageError):
    """A member's shares are not those of what it announced."""

    def __init__(self, member: int) -> None:
        super().__init__(f"the shares of member {member} do not fit what it announced")
        self.member = member


# A member -----------------------------------------------------------------------------------------------


@dataclass
class Party:
    """One member of one attempt at a sum; its fields are all that it needs to go on after a restart."""

    number: int
    least: int  # t
    most: int  # N
    context: bytes  # of run, round and attempt
    attempt: bytes
    mask: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET))
    cipher: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET))
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET))  # b_u
    peers: dict[int, bytes] = field(default_factory=dict)  # member -> its keys
    arrived: dict[int, bytes] = field(default_factory=dict)  # member -> its shares, encrypted
    survivors: list[int] | None = None  # members of which the seed was revealed

    def keys(self) -> bytes:
        """Return what is announced."""
        return _public(self.mask) + _public(self.cipher) + hashlib.sha256(self.seed).digest()

    def shares(self, peers: Mapping[int, bytes]) -> dict[int, bytes]:
        """Return member -> its shares, encrypted; MessageError for too few members, too many, or others than before."""
        if self.peers not in ({}, dict(peers)):
            raise MessageError("the sum has other members than it had")
        if self.number in peers or len(set(peers.values())) < len(peers) or self.keys() in peers.values():
            raise MessageError("a member of the sum is there twice")
        if not self.least <= len(peers) + 1 <= self.most:
            raise MessageError(f"{len(peers) + 1} members are none of {self.least} to {self.most}")
        self.peers = dict(peers)
        own = self._own()
        return {
            v: AESGCM(self._cipher_key(v, self.number, v)).encrypt(bytes(12), _held(own, v), None)
            for v in peers
        }

    def _own(self) -> tuple[Sequence[int], ...]:
        """Return the polynomials of which members hold a value each: of the seed, and of the mask key."""
        return tuple(polynomial(secret, self.least, self.context) for secret in (self.seed, self.mask))

    def masked(self, x: np.ndarray, arrived: Mapping[int, bytes]) -> np.ndarray:
        """Return uint64[d], the vector int64[d] with its masks; MessageError for too few shares, or others than before."""
        if self.arrived not in ({}, dict(arrived)):
            raise MessageError("the sum has other members than it had")
        if not arrived.keys() <= self.peers.keys() or len(arrived) + 1 < self.least:
            raise MessageError(
                f"{len(arrived) + 1} members have shared their keys, and {self.least} are needed"
            )
        self.arrived = dict(arrived)
        masked = x.astype(np.int64).view(np.uint64).copy()
        add_stream(masked, self._stream(self.seed), 1)
        for v in arrived:
            add_stream(masked, pair(self.mask, self.peers[v], self.context), sign(self.number, v))
        return masked

    def reveal(self, survivors: Sequence[int]) -> dict[int, bytes]:
        """Return member -> a share: of its seed where it is among the `survivors`, else of its mask key.

        One that cannot be read is left out.  MessageError for too few survivors, or others than before.
        """
        held = {self.number, *self.arrived}
        if self.survivors not in (None, sorted(survivors)):
            raise MessageError("the sum was to be of other members before")
        if not set(survivors) <= held or self.number not in survivors or len(survivors) < self.least:
            raise MessageError(
                f"a sum of {len(survivors)} members was asked for, and {self.least} are needed"
            )
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
) -> np.ndarray:
    """Return int64[d], the sum of the survivors' vectors, of uint64[d], that of their masked ones.

    `keys` are those of all members, `shared` those that have given shares, `revealed` has holder -> member -> share.
    WrongSharesError for a member whose shares do not fit; MessageError where there are too few.
    """
    found, liars = total.copy(), set[int]()
    for v in sorted(shared):
        shares = {h: int.from_bytes(revealed[h][v], "little") for h in revealed if v in revealed[h]}
        announced = (
            (lambda s, v=v: hashlib.sha256(s).digest() == keys[v][2 * SECRET :])
            if v in survivors
            else (lambda s, v=v: _public(s) == keys[v][:SECRET])
        )
        secret = _put_together(v, shares, least, announced, liars, len(revealed), context)
        if v in survivors:
            add_stream(found, _derived(secret, context + b"seed"), -1)
        else:
            for u in survivors:
                add_stream(found, pair(secret, keys[u], context), -sign(u, v))
    return found.view(np.int64)


def _put_together(
    member: int,
    shares: Mapping[int, int],
    t: int,
    announced: Callable[[bytes], bool],
    liars: set[int],
    heard: int,
    context: bytes,
) -> bytes:
    """Return a member's secret by t of its shares; holders of others than it gave are added to the `liars`.

    `heard` is the number of holders that have revealed what they could read.
    """
    if t <= heard and shares.keys() <= {member}:  # nobody could read what it gave: one alone cannot say so
        raise WrongSharesError(member)
    if len(shares) < t:
        raise MessageError(f"{len(shares)} shares of member {member} are there, and {t} are needed")
    for i, holders in enumerate(_choices(sorted(shares, key=lambda h: (h in liars, h)), t)):
        number = sum(c * shares[h] for c, h in zip(coefficients(holders), holders, strict=True)) % P
        secret = number.to_bytes(SHARE, "little")[:SECRET]
        if not number >> 256 and announced(secret):
            if i:
                given = polynomial(secret, t, context)
                liars |= {h for h, s in shares.items() if s != share(given, h)}
            return secret
    if len(shares.keys() - liars) <= t:  # whose is wrong cannot be told
        raise MessageError(f"a share of member {member}'s secrets is wrong")
    raise WrongSharesError(member)


def _choices(holders: Sequence[int], t: int) -> Iterator[tuple[int, ...]]:
    """Yield t of the holders, ascending: the first, without one of these, and at random, against some that work together."""
    yield tuple(sorted(holders[:t]))
    for out in holders[:t] if len(holders) > t else ():
        yield tuple(sorted([h for h in holders if h != out][:t]))
    for _ in range(TRIES if len(holders) > t else 0):
        yield tuple(sorted(secrets.SystemRandom().sample(holders, t)))


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
