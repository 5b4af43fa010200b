# SPDX-License-Identifier: Apache-2.0
"""Write a model as a Hugging Face directory, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fleetune.common.folders import staged
from fleetune.errors import ModelError, StorageError
from fleetune.models.families.foreign import short_error
from fleetune.models.families.widths import mark_config


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers: what it loaded is checked here."""
    logs = transformers.utils.logging
    shown, level = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity_error()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if shown:
            logs.enable_progress_bar()


def save(
    net: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    card: str | None = None,
    replace: bool = True,
) -> None:
    """Write a Hugging Face directory: configuration, safetensors, tokenizer, chat template, README (`card`).

    Tied weights are written once; file modes follow the umask.  Whole or not at all: an existing model
    directory is replaced when the new one is complete.  StorageError when the disk is full or not writable,
    or `path` holds something that is not a model (without `replace`: is there).
    """
    path = Path(path)
    if any(".base_layer." in name for name, _ in net.named_parameters()):
        raise ModelError("the model still carries adapters", hint="merge or detach them before saving")
    with staged(path, replace="config.json" if replace else None) as folder, disk_errors(path), quiet():
        net.save_pretrained(folder)
        mark_config(folder)
        tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of safetensors, and those of tokenizers for a full disk, into a StorageError."""
    try:
        yield
    except Exception as error:
        full = "No space left" in str(error) or "os error 28" in str(error)
        if not isinstance(error, SafetensorError) and (isinstance(error, OSError) or not full):
            raise
        raise StorageError(
            f"cannot write {path}: {'the disk is full' if full else short_error(error)}",
            hint="free some space, or choose another folder with --out",
        ) from error
