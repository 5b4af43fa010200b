# SPDX-License-Identifier: Apache-2.0
"""Load a subject, alone or with the rows to measure it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fleetune.common.shell import quoted
from fleetune.errors import UsageError
from fleetune.subject import Compressed, Plain, Run, Subject

if TYPE_CHECKING:
    from fleetune.common.paired import RowLosses
    from fleetune.data import Example
    from fleetune.evaluation.losses import OnRows
    from fleetune.models.net.model import Model


def load_with_rows(
    subject: Subject,
    given: list[Example],
    *,
    labels: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "auto",
    base: str | None = None,
    needs_rows: bool = True,
    offline: bool = False,
) -> tuple[Model, list[Example]]:
    """Load a subject, and return it with the rows to measure it on: those `given`, else its own held-out rows.

    UsageError, before the model is loaded, when `needs_rows` and there are none, or when `dtype` differs from a run's.
    """
    from fleetune import models

    if isinstance(subject, Run):
        _check_dtype(subject, dtype, device)
        rows = rows_of(subject, given, offline=offline)
        return subject.load(device=device, offline=offline, base=base), rows
    models.check_device(device, dtype or "fp32")
    rows = rows_of(subject, given, offline=offline)
    if not rows and needs_rows:
        what = "this model" if isinstance(subject, Compressed) else "a model"
        raise UsageError(
            f"eval of {what} needs DATA", hint=f"fleetune eval {quoted(subject.argument)} data.jsonl"
        )
    if isinstance(subject, Compressed):
        return subject.load(dtype=dtype or "fp32", device=device, offline=offline, base=base), rows
    words = list(labels) or sorted({e.response.strip() for e in rows})
    model = models.load(
        subject.name, dtype=dtype or "fp32", device=device, offline=offline, labels=words, base=base or "auto"
    )
    return model, rows


def base_losses(
    subject: Subject, model: Model, examples: Sequence[Example], told: Callable[[str], OnRows]
) -> RowLosses | None:
    """Return the losses of rows under the base of a run, whose tuned `model` becomes that base; None for anything else."""
    from fleetune.evaluation import measures

    if not isinstance(subject, Run) or model.attachment is None:
        return None
    model.attachment.detach(model)
    return measures.evaluate(model, examples, ["loss"], max_length=subject.max_length, told=told).rows


def load_alone(
    subject: Subject,
    *,
    dtype: str | None = None,
    device: str = "auto",
    base: str | None = None,
    offline: bool = False,
) -> Model:
    """Load a subject without any rows; UsageError, before that, when `dtype` differs from a run's."""
    from fleetune import models

    if isinstance(subject, Run):
        _check_dtype(subject, dtype, device)
        return subject.load(device=device, offline=offline, base=base)
    models.check_device(device, dtype or "fp32")
    return subject.load(dtype=dtype or "fp32", device=device, offline=offline, base=base)


def rows_of(subject: Subject, given: list[Example], *, offline: bool = False) -> list[Example]:
    """Return the rows to measure a subject on: those `given`, else its own held-out rows, where it has any."""
    return given or ([] if isinstance(subject, Plain) else subject.held_out(offline=offline))


def check_same_tokens(subject: Subject, reference: Subject, *, offline: bool = False) -> None:
    """UsageError when two models have different tokens, before either is loaded; one may have more of them."""
    own, other = (_vocabulary(found, offline=offline).items() for found in (subject, reference))
    if not (own <= other or other <= own):
        raise UsageError(
            f"{subject.argument} and {reference.argument} have different tokens, so what they predict cannot be compared",
            hint="give as --reference the model that it was made from, or another with the same tokenizer",
        )


def _vocabulary(subject: Subject, *, offline: bool) -> dict[str, int]:
    """Return the tokens of a subject, with their numbers."""
    from transformers import AutoTokenizer

    from fleetune import models

    if isinstance(subject, Compressed):
        tokenizer = AutoTokenizer.from_pretrained(subject.model, local_files_only=True)
    else:
        name = subject.recipe.model if isinstance(subject, Run) else subject.name
        tokenizer = models.load_tokenizer(name, offline=offline)
    return dict(tokenizer.get_vocab())


def _check_dtype(run: Run, dtype: str | None, device: str) -> None:
    """UsageError for another dtype than the run's, or a device that cannot compute in it."""
    from fleetune import models

    if dtype not in (None, own := run.recipe.dtype):
        raise UsageError(f"a run has a dtype of its own, here {own}", hint="leave out --dtype")
    models.check_device(device, own)
