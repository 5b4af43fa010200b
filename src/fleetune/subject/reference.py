# SPDX-License-Identifier: Apache-2.0
"""Run a subject as the reference that another one is compared with: its logits wait in a temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.common.display import counted, human_bytes
from fleetune.errors import DataError
from fleetune.runs.listener import Listener
from fleetune.subject import Run, Subject, loading

if TYPE_CHECKING:
    from fleetune.data import Example
    from fleetune.evaluation.losses import OnRows, Reference


@contextmanager
def logits_of(
    subject: Subject | None,
    examples: Sequence[Example],
    texts: Sequence[str],
    listener: Listener,
    *,
    max_length: int,
    dtype: str | None = None,
    device: str = "auto",
    offline: bool = False,
) -> Iterator[Reference | None]:
    """Keep the logits of a model on texts, else on examples, while the block runs; the model is in memory no longer.

    None without a model, or anything to run it on.  DataError when no token is scored.
    """
    if subject is None or not (examples or texts):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="fleetune-") as folder:
        file = Path(folder) / "reference.npy"

        def on_rows(done: int, total: int) -> None:
            listener.progress("rows of the reference", done, total)

        kept = _write(
            subject, examples, texts, file, max_length, dtype, device, offline=offline, on_rows=on_rows
        )
        size = human_bytes(file.stat().st_size)
        listener.note(
            f"{subject.argument} is the reference: {counted(kept.tokens, 'token')}, {size} of logits in {folder} until the end"
        )
        yield kept


def _write(
    subject: Subject,
    examples: Sequence[Example],
    texts: Sequence[str],
    file: Path,
    max_length: int,
    dtype: str | None,
    device: str,
    *,
    offline: bool,
    on_rows: OnRows,
) -> Reference:
    from fleetune.data.encode import encode_all
    from fleetune.evaluation import kl_divergence
    from fleetune.evaluation.answers import require_text_model
    from fleetune.evaluation.losses import keep_logits, scored_tokens, text_rows

    own = None if isinstance(subject, Run) else dtype  # a run has one of its own
    model = loading.load_alone(subject, dtype=own, device=device, offline=offline)
    require_text_model(model, "a comparison with a reference")
    rows = text_rows(model, texts) if texts else encode_all(examples, model.tokenizer, max_length)[0]
    if not scored_tokens(rows):
        raise DataError("there is no token to compare", hint="give rows with an answer, or a longer text")
    return keep_logits(model, rows, file, kl_divergence.TEMPORARY, on_rows)
