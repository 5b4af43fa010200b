# SPDX-License-Identifier: Apache-2.0
"""Keep the logits of a reference model in a file, and compare other models with them on the same rows (`kl_divergence`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fleetune.data.encode import Encoded, collate
from fleetune.evaluation import kl_divergence
from fleetune.evaluation.head_loss import tokens_a_piece
from fleetune.evaluation.kl_divergence import Compared
from fleetune.evaluation.losses import OnRows, eval_mode, pad_id, predictors, unheard
from fleetune.models.net.model import Model


@dataclass(frozen=True)
class Reference:
    """The logits of a reference model on rows, in a file."""

    rows: Sequence[Encoded]
    path: Path
    tokens: int  # that are compared

    def compare(self, model: Model, on_rows: OnRows = unheard) -> Compared:
        """Compare a model with the reference, token by token; `on_rows` is called after each row."""
        return kl_divergence.compare(self.path, scored_logits(model, self.rows, on_rows))


def keep(
    model: Model,
    rows: Sequence[Encoded],
    path: Path,
    hint: str = kl_divergence.FREE,
    on_rows: OnRows = unheard,
) -> Reference:
    """Write the logits of a model on rows to the file `path`; `on_rows` is called after each row.

    StorageError, with `hint`, when the disk has no room for them.
    """
    return Reference(
        rows, path, kl_divergence.write(path, scored_logits(model, rows, on_rows), scored(rows), hint)
    )


def scored(rows: Sequence[Encoded]) -> int:
    """Return how many tokens of rows are scored."""
    return kl_divergence.scored((row.ids, row.n_prompt) for row in rows)


def scored_logits(model: Model, rows: Sequence[Encoded], on_rows: OnRows = unheard) -> Iterator[np.ndarray]:
    """Yield the logits from which the scored tokens of rows are predicted, in order, a piece at a time: float32 [n, V]."""
    for done, row in enumerate(rows, 1):
        with eval_mode(model.net):
            inputs, head = predictors(model.net, collate([row], pad_id(model), model.device))
            size = tokens_a_piece(head(inputs[:1]).shape[-1])
        on_rows(done, len(rows))
        for first in range(0, len(inputs), size):
            with eval_mode(model.net):  # not while the caller has the piece
                logits = head(inputs[first : first + size]).float().cpu().numpy()
            yield logits
