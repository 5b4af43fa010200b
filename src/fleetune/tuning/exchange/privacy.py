# SPDX-License-Identifier: Apache-2.0
"""Sum the replies of a round with client-level differential privacy: the Gaussian mechanism on integers.

McMahan, Ramage, Talwar, Zhang: "Learning Differentially Private Recurrent Language Models", ICLR 2018, arXiv 1710.06963
(DP-FedAvg), with the noise of Canonne, Kamath, Steinke: "The Discrete Gaussian for Differential Privacy", NeurIPS 2020,
arXiv 2004.00010.  Kairouz et al. 2021, arXiv 2102.06387, sum such integers in federated learning.

A round begins at w.  Client k moves it by x_k, all numbers of its reply as one vector, and

    y_k = trunc(x_k min(1, C / |x_k|) / g)          integers, |y_k| <= C / g
    w'  = w + g / (q N) (sum_k y_k + e)             e_i ~ discrete Gaussian of deviation s = z C / g

- q is the probability with which the server lets each of N clients take part, N a public number of clients: the
  denominator never depends on who took part.  Every client counts once, whatever rows it claims.
- Adding or removing one client moves the sum by at most C / g (L2), so a round is a Gaussian mechanism of noise multiplier z
  (subsampled by q).  `accountant.py` composes the rounds.
- The grid g = z C / 2^24 makes s = 2^24: rounding is far below the noise, the sums are exact in any order, and no bit of a
  float tells what was added (Mironov 2012).  Truncation only shortens, so the bound holds for the integers themselves.
- The noise comes from the operating system's generator, `os.urandom`.  No seed of the run, which a ledger publishes, decides
  any of it: whoever could draw it again could subtract it.
- Acceptance probabilities are float64, so each noise is within a factor 1 +- 2^-48 of its probability: 10^-8 of epsilon for a
  million numbers a round.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

S: Final = 1 << 24  # deviation of the noise, in units of the grid
AT_ONCE: Final = 1 << 17  # numbers of noise that are drawn together
MARGIN: Final = 1 - 2.0**-20  # of the bound: a norm in float64 is nearer to the true one


@dataclass(frozen=True)
class Privacy:
    """What a run guarantees for each client, and by which noise; all of it is public and fixed before round 1."""

    clip: float  # C, L2 norm of a client's whole reply
    noise: float  # z, noise multiplier: deviation over clip
    q: float  # with which each client takes part in a round, by the server's draw; 1: all do
    clients: int  # N
    delta: float
    epsilon: float = math.inf  # budget: no round begins that would exceed it

    @property
    def grid(self) -> float:
        """Return g, the size of a unit."""
        return self.noise * self.clip / S

    @property
    def text(self) -> str:
        """Return the mechanism in words, for a ledger's head."""
        how = f"each client with probability {self.q:g} by Poisson sampling" if self.q < 1 else "all clients"
        return (
            f"client level (add or remove one), {how} of {self.clients:,}; replies clipped to {self.clip:.6g} (L2), sum with "
            f"discrete Gaussian noise of multiplier {self.noise:.6g}, over {self.q * self.clients:g}"
        )


class PrivateSum:
    """The combination of a round's replies under `Privacy`; they are added one at a time."""

    total = 1.0  # never 0: noise is released of a round without replies, too

    def __init__(self, privacy: Privacy, start: Mapping[str, np.ndarray]) -> None:
        """`start` is where moves begin, one array for each that a reply has."""
        self._privacy = privacy
        self._start = {name: np.asarray(t, np.float64) for name, t in start.items()}
        self._sums = {name: np.zeros(t.shape, np.int64) for name, t in start.items()}

    def add(self, n: float, tensors: Mapping[str, np.ndarray]) -> None:
        """Count `tensors` once, whatever the weight `n`."""
        moves = {name: np.asarray(tensors[name], np.float64) - t for name, t in self._start.items()}
        for name, units in units_of(moves, self._privacy.clip, self._privacy.grid).items():
            self._sums[name] += units

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the new tensors, float64; the noise is drawn here, anew at every call."""
        unit = self._privacy.grid / (self._privacy.q * self._privacy.clients)
        return {
            name: self._start[name] + unit * (total + discrete_gaussian(total.size).reshape(total.shape))
            for name, total in self._sums.items()
        }

    def sums(self) -> dict[str, np.ndarray]:
        """Methods that need sums beside the combination are refused before a run (`Method.cannot_combine`)."""
        raise NotImplementedError("a private round releases one sum")


def units_of(moves: Mapping[str, np.ndarray], clip: float, grid: float) -> dict[str, np.ndarray]:
    """Return int64 arrays y with |y| <= clip / grid over all of them: the moves, cut to `clip` and truncated to the grid.

    Moves that are not finite become 0.
    """
    top = float(np.max([np.abs(move).max(initial=0.0) for move in moves.values()], initial=0.0))  # NaN where one is
    if not 0.0 < top < math.inf:
        return {name: np.zeros(move.shape, np.int64) for name, move in moves.items()}
    norm = top * math.sqrt(sum(float(np.square(move / top).sum()) for move in moves.values()))
    factor = min(1.0, clip / norm) * MARGIN / grid
    return {name: np.trunc(move * factor).astype(np.int64) for name, move in moves.items()}


def sample(clients: Sequence[int], q: float) -> list[int]:
    """Return each of the clients with probability q, by the system's generator; all where q is 1.  There may be none."""
    bits = 53
    return [client for client in clients if q >= 1 or secrets.randbits(bits) < q * (1 << bits)]


# The discrete Gaussian of deviation 2^24 (Canonne, Kamath, Steinke 2020, Algorithms 1 to 3, with t = s = 2^24) ---------------


def discrete_gaussian(count: int) -> np.ndarray:
    """Return int64[count] of the discrete Gaussian: P(x) proportional to exp(-x^2 / (2 s^2)), s = `S`."""
    found = np.empty(count, np.int64)
    done = 0
    while done < count:
        y = _discrete_laplace(min(AT_ONCE, 2 * (count - done) + 64))
        far = (np.abs(y) - S) / S  # (|Y| - s^2 / t) / s
        y = y[_bernoulli_exp(far * far / 2)][: count - done]
        found[done : done + len(y)] = y
        done += len(y)
    return found


def _discrete_laplace(count: int) -> np.ndarray:
    """Return at most int64[count] with P(x) proportional to exp(-|x| / s): those of so many tries that were accepted."""
    words = _words(count)
    u = (words & np.uint64(S - 1)).astype(np.int64)  # uniform in [0, s)
    negative = (words >> np.uint64(63)).astype(bool)
    v = np.floor(_exponentials(count)).astype(np.int64)  # P(V >= v) = exp(-v)
    x = u + S * v
    taken = _bernoulli_exp(u / S) & ~(negative & (x == 0))  # zero has one sign
    return np.asarray(np.where(negative, -x, x)[taken])


def _bernoulli_exp(gamma: np.ndarray) -> np.ndarray:
    """Return bool: true with probability exp(-gamma)."""
    return np.asarray(_exponentials(len(gamma)) > gamma)


def _exponentials(count: int) -> np.ndarray:
    """Return float64[count] of the exponential distribution of mean 1."""
    return np.asarray(-np.log((_words(count) + 0.5) * 2.0**-64))


def _words(count: int) -> np.ndarray:
    """Return uint64[count] from the system's generator."""
    return np.frombuffer(os.urandom(8 * count), np.uint64)
