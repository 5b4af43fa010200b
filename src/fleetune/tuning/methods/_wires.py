# SPDX-License-Identifier: Apache-2.0
"""Encode a client's local steps (each: a direction and an integer) for sending.

The steps of a client in a round are its *walk*: tau steps, step j the integer c_j along direction k_j of the pool.
`Byte` sends one byte a step.  The directions are drawn from the client's key of the round, so the server draws them
again and they are never sent.  `Sums` sends the exact sum along each of the K directions, 4 bytes each.  A client that
back-propagates (`_mixed_fleet`) sends its *projection* instead: how far it moved along each direction, one integer each.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np

from fleetune.errors import MessageError
from fleetune.seeds.descent import uniforms
from fleetune.tuning.exchange.messages import LogCode, Payload, ReplySpec, Scalar
from fleetune.tuning.methods import Reply
from fleetune.tuning.methods._zeroth import INT32, draw

SCALARS: Final = MappingProxyType({"n": (int, 1, 1 << 31), "loss": (float, -1e9, 1e9)})


class Wire(Protocol):
    """A form in which integers are sent.  It decides which integers a step may have."""

    dtype: str  # of the array that is sent

    def spec(self, K: int, tau: int) -> ReplySpec:
        """Return the form of a walk's reply."""
        ...

    def integer(self, units: float, u: float, tau: int) -> int:
        """Return the integer that stands for a step of so many units; u, uniform in [0, 1), is the step's coin."""
        ...

    def reply(self, k: np.ndarray, c: np.ndarray, K: int, scalars: Mapping[str, Scalar]) -> Payload:
        """Return the reply of a walk: c int64[steps] along the directions k."""
        ...

    def steps(self, payload: Payload) -> int:
        """Return the number of steps of a walk's reply."""
        ...

    def walk(self, reply: Reply, p: np.ndarray | None, K: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (k, c) of a walk's reply, or what is equal to it in sum."""
        ...

    def check(self, reply: Reply, p: np.ndarray | None, K: int, tau: int) -> None:
        """Raise MessageError for a walk's reply that no steps along the drawn directions can give."""
        ...

    def projection(self, moved: np.ndarray, key: int) -> np.ndarray:
        """Return the array that is sent of a projection float64[K]."""
        ...

    def integers(self, array: np.ndarray) -> np.ndarray:
        """Return int64: the integers that an array stands for."""
        ...


class Byte:
    """One byte a step (`LogCode`): a step is rounded to a level, without bias."""

    dtype = "uint8"

    def spec(self, K: int, tau: int) -> ReplySpec:
        return ReplySpec({"codes": (self.dtype, (-tau,))}, SCALARS)

    def integer(self, units: float, u: float, tau: int) -> int:
        return int(LogCode.decode(LogCode.encode(np.array([units]), np.array([u])))[0])

    def reply(self, k: np.ndarray, c: np.ndarray, K: int, scalars: Mapping[str, Scalar]) -> Payload:
        codes = LogCode.encode(c, np.zeros(len(c)))  # each c is a level, so nothing is rounded
        return Payload({"codes": codes}, scalars)

    def steps(self, payload: Payload) -> int:
        return len(payload.array("codes"))

    def walk(self, reply: Reply, p: np.ndarray | None, K: int) -> tuple[np.ndarray, np.ndarray]:
        c = self.integers(reply.payload.array("codes"))
        return draw(reply.key, len(c), p, K), c

    def check(self, reply: Reply, p: np.ndarray | None, K: int, tau: int) -> None:
        return  # every code is a step

    def projection(self, moved: np.ndarray, key: int) -> np.ndarray:
        return LogCode.encode(moved, uniforms(key, "rounding", len(moved)))

    def integers(self, array: np.ndarray) -> np.ndarray:
        return LogCode.decode(array)


class Sums:
    """Exact sums: 4 bytes for each of the K directions, whatever the number of steps."""

    dtype = "int32"

    def spec(self, K: int, tau: int) -> ReplySpec:
        return ReplySpec({"sums": (self.dtype, (K,))}, {**SCALARS, "steps": (int, 0, tau)})

    def integer(self, units: float, u: float, tau: int) -> int:
        top = INT32 // tau  # so that a sum of all steps fits its 32 bits
        return max(-top, min(top, round(units)))

    def reply(self, k: np.ndarray, c: np.ndarray, K: int, scalars: Mapping[str, Scalar]) -> Payload:
        return Payload({"sums": summed(k, c, K).astype(np.int32)}, {**scalars, "steps": len(c)})

    def steps(self, payload: Payload) -> int:
        return payload.int("steps")

    def walk(self, reply: Reply, p: np.ndarray | None, K: int) -> tuple[np.ndarray, np.ndarray]:
        sums = self.integers(reply.payload.array("sums"))
        return np.flatnonzero(sums), sums[sums != 0]

    def check(self, reply: Reply, p: np.ndarray | None, K: int, tau: int) -> None:
        sums, drawn = (
            self.integers(reply.payload.array("sums")),
            draw(reply.key, self.steps(reply.payload), p, K),
        )
        most = np.bincount(drawn, minlength=K) * (INT32 // tau)
        if (beyond := np.flatnonzero(np.abs(sums) > most)).size:
            k = int(beyond[0])
            raise MessageError(f"the sum along direction {k} is {sums[k]}, its steps give {most[k]} at most")

    def projection(self, moved: np.ndarray, key: int) -> np.ndarray:
        sent: np.ndarray = np.clip(np.rint(moved), -INT32, INT32).astype(np.int32)
        return sent

    def integers(self, array: np.ndarray) -> np.ndarray:
        return array.astype(np.int64)


WIRES: Final[Mapping[str, Wire]] = MappingProxyType({"byte": Byte(), "sums": Sums()})


def summed(k: np.ndarray, c: np.ndarray, K: int) -> np.ndarray:
    """Return int64[K]: the integers of a walk summed per direction."""
    sums = np.zeros(K, np.int64)
    np.add.at(sums, k, c)
    return sums
