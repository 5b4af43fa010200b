# SPDX-License-Identifier: Apache-2.0
"""Run a directory of `--to mlx` in mlx-lm itself: its losses on given tokens, and one token after another for the clock.

mlx-lm is installed by hand (`INSTALL`): on Apple computers it runs on their graphics, elsewhere on the processor, and there in
fp32, since mlx has no fast fp16 for processors.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from fleetune.deploy.measure import cross_entropy
from fleetune.errors import ModelError, UsageError

MODULES: Final = ("mlx", "mlx_lm")
INSTALL: Final = "pip install mlx mlx-lm (on Linux also mlx-cpu)"


class MlxLm:
    """A directory's model as mlx-lm loads it."""

    def __init__(self, folder: Path) -> None:
        """UsageError when mlx-lm is not installed, ModelError when it does not take the directory."""
        if any(importlib.util.find_spec(module) is None for module in MODULES):
            raise UsageError(f"mlx-lm is not installed, so {folder} cannot be run", hint=INSTALL)
        self._mx: Any = importlib.import_module("mlx.core")
        self._caches: Any = importlib.import_module("mlx_lm.models.cache")
        load: Any = importlib.import_module("mlx_lm.utils").load_model
        try:
            self._net, config = load(folder)
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
            losses = cross_entropy.of_tokens(piece, np.asarray(ids)[max(n_prompt, 1) :])
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
