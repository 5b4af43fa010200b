# SPDX-License-Identifier: Apache-2.0
"""Export a model or an adapter to a target: the whole file or folder appears, or nothing does."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from fleetune import models
from fleetune.common.files import default_mode, storage_error
from fleetune.common.folders import appeared, scratch, staged
from fleetune.deploy import provenance, targets
from fleetune.deploy.checkpoint import Checkpoint, open_checkpoint
from fleetune.deploy.formats import AdapterFormat, Misfit, ModelFormat, Report, gguf
from fleetune.deploy.targets import Target, check_place, find
from fleetune.errors import UsageError
from fleetune.models.artefact import ArtefactHead
from fleetune.models.cache.names import is_master
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.families.widths import has_block_widths, mark_config
from fleetune.models.gguf import convert
from fleetune.models.net.model import Model, stored_tensors
from fleetune.models.net.saving import disk_errors

NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


def export(source: Path, to: str, out: Path, *, made: Mapping[str, str] = NOTHING) -> Report:
    """Write the model in the folder `source` as target `to` to the new file or folder `out`.

    `source` is a master artefact or a plain Hugging Face directory; `made` (`provenance.py`) goes into the file where
    the format has a place for it.  Everything written is read back and compared.  UsageError for an unknown target, an
    `out` that exists, or a model that the target cannot hold; ModelError for a source that is none; StorageError when the
    disk is full.  `out` appears when it is complete.
    """
    target = find(to)
    check_place(to, out)
    if target.takes == "adapter":
        raise UsageError("only a run has an adapter", hint=f"fleetune export RUN --to {to}")
    model = open_checkpoint(source)
    if has_block_widths(model.config) and not target.states("BLOCK_WIDTHS"):
        raise UsageError(
            f"{source} has blocks of different widths, which {to} has no place for",
            hint=_others(model, "prune it again with --set first=0 --set last=0"),
        )
    writer: ModelFormat = target.load()
    with _staged(target, out) as place, _hinted(model):
        facts = {**made, **provenance.of_artefact(model)} if target.states("PROVENANCE") else made
        report = writer.write(model, place, target.kind, facts)
    return dataclasses.replace(report, path=out)


def written(source: Path, to: str, out: Path) -> Report | None:
    """Return what `export` reports of a GGUF file `out` that it has written of an artefact before; None for any other file.

    The file is compared byte for byte.  UsageError for a model that the target cannot hold, ModelError for a source that is none.
    """
    if not out.is_file():
        return None
    if to not in gguf.TARGETS:
        return None
    model = open_checkpoint(source)
    with _hinted(model):
        return gguf.written(out, model, find(to).kind, provenance.of_artefact(model))


def export_adapter(
    adapter: Path, base: Path | None, to: str, out: Path, *, made: Mapping[str, str] = NOTHING
) -> Report:
    """Write the adapter in the PEFT directory `adapter`, of the model in the folder `base`, to the new `out`.

    A target that does not state BASE needs no `base`.  UsageError for a target that takes no adapter, an `out` that
    exists or an adapter that the target has no place for; ModelError for one of another base.
    """
    check_place(to, out)
    check_adapter(adapter, to)
    target = find(to)
    writer: AdapterFormat = target.load()
    model = None if base is None else open_checkpoint(base)
    with _staged(target, out) as place, _hinted(model):
        report = writer.write(adapter, model, place, target.kind, made)
    return dataclasses.replace(report, path=out)


def check_adapter(adapter: Path, to: str) -> None:
    """Raise UsageError unless `to` takes adapters and has a place for that in the folder `adapter`."""
    target = find(to)
    if target.takes != "adapter":
        raise UsageError(f"{to} is for whole models, not for adapters", hint="see fleetune export --help")
    checker: AdapterFormat = target.load()
    checker.check(adapter, target.kind)


def load(source: Path) -> Model:
    """Load a master artefact, a plain directory or a GGUF file in fp32, ready to run on the CPU.

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


def _others(model: Checkpoint, remedy: str = "") -> str:
    """Return a hint for a model that a target refused: the targets that hold it exactly, then the `remedy`."""
    found = []
    for name in targets.FORMATS.members():
        exact = getattr(targets.FORMATS.load(name), "exact_target", None)
        if exact is not None and (target := exact(model)) is not None:
            found.append(f"--to {target}")
    exactly = " or ".join([", ".join(found[:-1]), found[-1]] if found[:-1] else found)
    return f"use {exactly}" + (f", or {remedy}" if remedy else "")


@contextmanager
def _hinted(model: Checkpoint | None) -> Iterator[None]:
    """Name the targets that can hold the model where the format says that it cannot."""
    try:
        yield
    except Misfit as misfit:
        hint = _others(model, misfit.remedy) if model else misfit.hint
        raise UsageError(misfit.message, hint=hint) from misfit


@contextmanager
def _staged(target: Target, out: Path) -> Iterator[Path]:
    """The place to write to: it becomes `out` when the block ends without an error."""
    if target.suffix:
        with _staged_file(out) as file:
            yield file
    else:
        with staged(out) as folder, disk_errors(out):
            yield folder


@contextmanager
def _staged_file(out: Path) -> Iterator[Path]:
    """The path of a file in a hidden folder beside `out`, moved to `out` when the block ends without an error."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch(out.parent, out.name) as folder:
            file = folder / out.name
            yield file
            with file.open("rb+") as written:
                os.fsync(written.fileno())
            file.chmod(default_mode())
            try:
                os.link(file, out)  # which fails where a rename would replace what has appeared there
            except FileExistsError:
                raise appeared(out) from None
            except OSError:  # a file system without hard links
                if out.exists():
                    raise appeared(out) from None
                file.rename(out)
    except OSError as error:
        raise storage_error(error, out) from error


# ---------------------------------------------------------------- the size of a file to come


class _Names:
    """The names of a model's tensors, as a source that is asked for no values."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.folder = folder
        self.names = [name for name, _ in stored_tensors(model.net)]

    def quantised(self, name: str) -> None:
        """Return None: nothing is compressed yet."""

    def weight(self, name: str) -> Tensor:
        """Raise KeyError: there are no values."""
        raise KeyError(name)


class _ToBeCompressed(Checkpoint):
    """A model in memory as the compressed one that will be made of it."""

    compressed = True

    def __init__(self, model: Model, folder: Path) -> None:
        super().__init__(_Names(model, folder))
        self.dtype: torch.dtype = getattr(torch, WEIGHTS[model.dtype].full)


def size_beside(model: Model, quantised: Collection[str], head: ArtefactHead, name: str) -> int:
    """Return the bytes of a model's GGUF file beside the matrices `quantised`: the header and all other tensors.

    `head` is that of the artefact to come, `name` the file's, without its ending: the header holds it.  UsageError when the
    model has no place in GGUF.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.net.config.save_pretrained(folder)
        mark_config(folder)
        model.tokenizer.save_pretrained(folder)
        try:
            checkpoint = _ToBeCompressed(model, folder)
            without = {name for name in checkpoint.names if checkpoint.stored_name(name) in quantised}
            made = provenance.of_head(head, "0" * 64)
            return gguf.size_beside(checkpoint, without, folder / f"{name}.gguf", made)
        except UsageError as error:
            told = error.message.replace(place, model.name)
            raise UsageError(
                f"grids are chosen among those of GGUF files, and none can be made of this model: {told}",
                hint="leave out --bytes and --bpw, and choose one grid: --set grid=.. --set bits=..",
            ) from error
