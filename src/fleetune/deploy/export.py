# SPDX-License-Identifier: Apache-2.0
"""Every target a model can be exported to, and the one function that does it: whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fleetune import models
from fleetune.common.files import default_mode, storage_error
from fleetune.common.folders import staged
from fleetune.deploy import alternatives, provenance
from fleetune.deploy.checkpoint import Checkpoint, Report, open_checkpoint
from fleetune.deploy.formats import compressed_tensors, gguf, gguf_lora, gptq, hf, mlx
from fleetune.deploy.targets import TARGETS as TARGETS
from fleetune.deploy.targets import check_place, check_target
from fleetune.errors import StorageError, UsageError
from fleetune.models.artefact import is_master
from fleetune.models.families.widths import has_block_widths
from fleetune.models.gguf import convert
from fleetune.models.loading import disk_errors
from fleetune.models.model import Model

NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


def export(source: Path, to: str, out: Path, *, made: Mapping[str, str] = NOTHING) -> Report:
    """Write the model in the folder `source` as target `to` to the new file or folder `out`.

    `source` is a master artefact or a plain Hugging Face directory; `made` (`provenance.py`) goes into a GGUF file's
    header.  Everything written is read back and compared.  UsageError for an unknown target, an `out` that exists, or
    a model that the target cannot hold; ModelError for a source that is none; StorageError when the disk is full.
    `out` appears when it is complete.
    """
    check_target(to)
    check_place(to, out)
    if to == gguf_lora.TARGET:
        raise UsageError("only a run has an adapter", hint=f"fleetune export RUN --to {to}")
    model = open_checkpoint(source)
    if has_block_widths(model.config) and not to.startswith(("gguf", "hf")):
        raise UsageError(
            f"{source} has blocks of different widths, which {to} has no place for",
            hint=f"use {alternatives.instead(model)}, or prune it again with --set first=0 --set last=0",
        )
    kind = to.partition(":")[2] or None
    if to.startswith("gguf"):
        with _staged_file(out) as file:
            report = gguf.write(model, file, kind, {**made, **provenance.of_artefact(model)}, name=out.stem)
    else:
        with staged(out) as folder, disk_errors(out):
            report = _write_folder(model, to, kind, folder)
    return dataclasses.replace(report, path=out)


def export_adapter(adapter: Path, base: Path, out: Path, *, made: Mapping[str, str] = NOTHING) -> Report:
    """Write the LoRA in the PEFT directory `adapter`, of the model in the folder `base`, to the new file `out`.

    UsageError for an `out` that exists or an adapter that GGUF has no place for; ModelError for one of another base.
    """
    check_place(gguf_lora.TARGET, out)
    gguf_lora.check_kind(adapter)
    with _staged_file(out) as file:
        report = gguf_lora.write(adapter, open_checkpoint(base), file, made, name=out.stem)
    return dataclasses.replace(report, path=out)


def load(source: Path) -> Model:
    """The model of a master artefact, a plain directory or a GGUF file, in fp32, ready to run on the CPU.

    ModelError if it is none of them.  Nothing of it stays on the disk.
    """
    if is_master(source):
        return models.load_artefact(source)
    if source.suffix != ".gguf":
        return models.load(str(source), device="cpu")
    with tempfile.TemporaryDirectory(prefix="fleetune-") as folder:
        plain = Path(folder) / source.name
        plain.mkdir()
        convert.convert(source, plain)
        model = models.load(str(plain), device="cpu")
    return dataclasses.replace(model, name=str(source), path=source)


def _write_folder(model: Checkpoint, to: str, kind: str | None, folder: Path) -> Report:
    if to == compressed_tensors.TARGET:
        return compressed_tensors.write(model, folder)
    if to == gptq.TARGET:
        return gptq.write(model, folder)
    if to == mlx.TARGET:
        return mlx.write(model, folder)
    return hf.write(model, folder, kind)


@contextmanager
def _staged_file(target: Path) -> Iterator[Path]:
    """The path of a hidden file beside `target` that becomes `target` when the block ends without an error."""
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(default_mode())
        if target.exists():
            raise StorageError(
                f"{target} has appeared meanwhile; it is left alone", hint="choose a new --path"
            )
        temporary.rename(target)
    except OSError as error:
        raise storage_error(error, target) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
