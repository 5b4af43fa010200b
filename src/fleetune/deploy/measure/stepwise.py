# SPDX-License-Identifier: Apache-2.0
"""Score and generate with a runtime that reads pieces of a text one after another and keeps what it needs of the earlier ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from fleetune.deploy.measure import cross_entropy

SCORED: Final = 64  # positions whose logits are alive at a time


class Stepwise(ABC):
    """An engine of `harness` but for `open` and `close`, from two functions of a runtime."""

    _logits: np.ndarray  # float32 [n, V], of the piece read last

    @abstractmethod
    def _clear(self) -> None:
        """Forget what was read."""

    @abstractmethod
    def _read(self, ids: Sequence[int]) -> None:
        """Read on, and set `_logits`."""

    def prefill(self, ids: Sequence[int]) -> None:
        """Forget everything and read `ids`, at the last of which the next token is predicted."""
        self._clear()
        self._read(ids)

    def step(self) -> None:
        """Append the likeliest token and predict the next."""
        self._read([int(self._logits[-1].argmax())])

    def losses(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, int]]:
        """Cross-entropy in nats over the tokens of rows (ids, n_prompt) from number n_prompt on (from 1): sums and numbers."""
        found = []
        for ids, n_prompt in rows:
            total, at = 0.0, max(n_prompt, 1)
            for piece in self.scored_logits([(ids, n_prompt)]):
                total += float(cross_entropy.of_tokens(piece, np.asarray(ids)[at : at + len(piece)]).sum())
                at += len(piece)
            found.append((total, len(ids) - max(n_prompt, 1)))
        return found

    def scored_logits(self, rows: Sequence[tuple[Sequence[int], int]]) -> Iterator[np.ndarray]:
        """Yield the logits of the tokens that `losses` scores, in order: float32 [n, V]."""
        for ids, n_prompt in rows:
            self._clear()
            first = max(n_prompt, 1) - 1
            for at in range(0, len(ids) - 1, SCORED):
                self._read(ids[at : min(at + SCORED, len(ids) - 1)])
                if first < at + len(self._logits):
                    yield self._logits[max(0, first - at) :]
