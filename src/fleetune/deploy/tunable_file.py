# SPDX-License-Identifier: Apache-2.0
"""Write the GGUF file of a compressed model once, in which its scales are then tuned.

It is the file that `fleetune export --to gguf` writes, at the place where that puts it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fleetune.common.display import human_bytes
from fleetune.common.ggml import HALVES
from fleetune.common.shell import command, quoted
from fleetune.deploy import targets
from fleetune.deploy.checkpoint import open_checkpoint
from fleetune.deploy.export import facts_of_artefact, write
from fleetune.deploy.formats import Report, gguf
from fleetune.errors import StorageError, UsageError
from fleetune.models.families import table
from fleetune.models.gguf.convert import ARCHITECTURES
from fleetune.subject import Compressed

TARGET = "gguf"


def of(found: Compressed, note: Callable[[str], None]) -> Path:
    """Return the GGUF file of a compressed model; it is written unless it is there, and `note` is told so in a line.

    UsageError, before anything is written, for codes that no blocks with scales hold, and where something else is in the
    file's place.
    """
    _types_of(found)
    place, source = targets.find(TARGET).place(found.home), found.model
    if (report := _written(source, place)) is not None:
        written = f"now written ({human_bytes(report.bytes)})"
        note("; ".join([f"the scales are tuned in a GGUF file, {place}, {written}", *report.notes]))
    elif place.is_file() and _is_written(place, source):
        note(f"the scales are tuned in a GGUF file, {place}, which is there already")
    else:
        raise UsageError(
            f"{place} is not what fleetune export --to {TARGET} writes of {found.argument}, whose scales are tuned in that file",
            hint=f"move {quoted(place)} away; or, if it is the file to tune, give it as the model",
        )
    return place


def _written(source: Path, place: Path) -> Report | None:
    """Write the file, and return what was written; None where there is one, from before or by a process that was faster."""
    try:
        return write(source, TARGET, place)
    except (StorageError, UsageError):
        if not place.exists():
            raise
        return None


def kinds_of(found: Compressed) -> dict[str, str]:
    """Return the types of the matrices in a compressed model's file, by layer; UsageError as in `of`."""
    return {name.removesuffix(".weight"): kind for name, kind in _types_of(found).items()}


def _is_written(place: Path, source: Path) -> bool:
    model = open_checkpoint(source)
    return gguf.is_written(place, model, facts_of_artefact(model))


def _types_of(found: Compressed) -> dict[str, str]:
    """Return the types of the layers' matrices in a compressed model's GGUF file, by parameter.

    UsageError where the file would have no scales, or would not be read.
    """
    model, request = open_checkpoint(found.model), found.request
    why, experts = table.misfit(model.config), any(".experts." in name for name in model.names)
    if why is None and ((family := table.architecture(model.config)) not in ARCHITECTURES or experts):
        what = "mixtures of experts" if experts else f"models of architecture {family}"
        why = f"GGUF files of {what} are not read, so no scales of one are tuned"
    if why is not None:
        raise UsageError(
            f"{found.argument}: {why}",
            hint=f"export it and tune all weights: {command('export', found.argument, '--to', 'hf')}",
        )
    able = f"--train scales is for blocks of {', '.join(HALVES)}"
    again = command("compress", "MODEL" if request is None else request.model, "--set", "grid=ggml")
    try:
        kinds = gguf.layer_types(model)
    except UsageError as error:
        raise UsageError(f"{error.message}; {able}", hint=f"compress again: {again}") from error
    if not set(kinds.values()) & set(HALVES):
        raise UsageError(
            f"the layers of {found.argument} are {', '.join(sorted(set(kinds.values())))} in a GGUF file; {able}",
            hint=f"compress again: {again}",
        )
    return kinds
