# SPDX-License-Identifier: Apache-2.0
"""Run a directory of `--to mlx` in mlx-lm itself: its losses on given tokens, and one token after another for the clock.

mlx-lm is installed by hand: on Apple computers it runs on their graphics, elsewhere on the processor, and there in fp32, since
mlx has no fast fp16 for processors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.deploy.measure.llamacpp import cross_entropy
from fleetune.errors import ModelError


class MlxLm:
    """A directory's model as mlx-lm loads it."""

    def __init__(self, folder: Path) -> None:
        """ModelError when mlx-lm does not take the directory."""
        import mlx.core as mx
        from mlx_lm.models import cache
        from mlx_lm.utils import load_model

        self._mx: Any = mx
        self._caches: Any = cache
        try:
            self._net, config = load_model(folder)
        except (ValueError, TypeError, OSError) as error:
            raise ModelError(
                f"mlx-lm does not load {folder}: {error}", hint="export the model again"
            ) from error
        if self._mx.default_device() == self._mx.cpu:
            self._net.set_dtype(self._mx.float32)
        self.vocab = int(config["vocab_size"])

    def open(self, length: int) -> None:
        """Nothing to do: the cache grows as it is filled."""

    def prefill(self, ids: Sequence[int]) -> None:
        """Forget everything and read `ids`, at the last of which the next token is predicted."""
        self._cache = self._caches.make_prompt_cache(self._net)
        self._read(ids)

    def step(self) -> None:
        """Append the likeliest token and predict the next."""
        self._read([int(self._logits.argmax())])

    def losses(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, int]]:
        """Cross-entropy in nats over the tokens of rows (ids, n_prompt) from number n_prompt on (from 1): sums and numbers."""
        found = list[tuple[float, int]]()
        for (ids, n_prompt), piece in zip(rows, self.scored_logits(rows), strict=True):
            losses = cross_entropy(piece, np.asarray(ids)[max(n_prompt, 1) :])
            found.append((float(losses.sum()), len(losses)))
        return found

    def scored_logits(self, rows: Sequence[tuple[Sequence[int], int]]) -> Iterator[np.ndarray]:
        """Yield the logits of the tokens that `losses` scores, in order: float32 [n, V] for each row."""
        for ids, n_prompt in rows:
            logits = self._net(self._mx.array([list(ids)]))[0, max(n_prompt, 1) - 1 : len(ids) - 1]
            yield np.array(logits.astype(self._mx.float32))

    def close(self) -> None:
        """Nothing to do: the process ends."""

    def _read(self, ids: Sequence[int]) -> None:
        self._logits = self._net(self._mx.array([list(ids)]), cache=self._cache)[0, -1]
        self._mx.eval(self._logits)
