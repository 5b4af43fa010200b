"""Write the GGUF file of a compressed model in which its scales are then tuned, where `fleetune export --to gguf` writes it."""

from collections.abc import Callable
from pathlib import Path

from fleetune import subject as subjects
from fleetune.common.display import human_bytes
from fleetune.common.ggml import HALVES
from fleetune.common.shell import command, quoted
from fleetune.deploy import export, targets
from fleetune.deploy.checkpoint import open_checkpoint
from fleetune.deploy.formats import gguf
from fleetune.errors import StorageError, UsageError
from fleetune.models.families import table
from fleetune.models.gguf.convert import ARCHITECTURES

TARGET = "gguf"


def model_of(name: str, runs: str | Path, note: Callable[[str], None]) -> str:
    """Return the model that BASE of `fleetune patch make` means: of a compression its GGUF file, as `of`; others as they are.

    UsageError for a run.
    """
    if Path(name).is_file():
        return name
    base = subjects.open(name, runs)
    if isinstance(base, subjects.Run):
        hint = command("patch", "make", base.recipe.model, name, "--to", "FILE")
        raise UsageError(f"{name} is a run: the model comes first, then the run", hint=hint)
    return str(of(base, note)) if isinstance(base, subjects.Compressed) else name


def of(model: subjects.Compressed, note: Callable[[str], None]) -> Path:
    """Return the GGUF file of a compressed model; it is written unless it is there, and `note` is told so in a line.

    UsageError, before anything is written, for codes that no blocks with scales hold, and where something else is in the
    file's place.
    """
    kinds_of(model)
    place, source = targets.find(TARGET).place(model.home), model.model
    try:
        report = export.write(source, TARGET, place)
    except (StorageError, UsageError):  # it is there from before, or a process was faster
        if not place.exists():
            raise
        opened = open_checkpoint(source)
        if not place.is_file() or not export.is_written(place, opened, targets.find(TARGET)):
            raise UsageError(
                f"{place} is not what fleetune export --to {TARGET} writes of {model.argument}",
                hint=f"move {quoted(place)} away; or, if it is the file to tune, give it as the model",
            ) from None
        note(f"the scales are tuned in a GGUF file, {place}, which is there already")
        return place
    written = f"now written ({human_bytes(report.bytes)})"
    note("; ".join([f"the scales are tuned in a GGUF file, {place}, {written}", *report.notes]))
    return place


def kinds_of(model: subjects.Compressed) -> dict[str, str]:
    """Return the types of the layers' matrices in a compressed model's GGUF file, by layer.

    UsageError where the file would have no scales, or would not be read.
    """
    opened, request = open_checkpoint(model.model), model.request
    why, experts = table.misfit(opened.config), any(".experts." in name for name in opened.names)
    if why is None and ((family := table.architecture(opened.config)) not in ARCHITECTURES or experts):
        what = "mixtures of experts" if experts else f"models of architecture {family}"
        why = f"GGUF files of {what} are not read, so no scales of one are tuned"
    if why is not None:
        raise UsageError(
            f"{model.argument}: {why}",
            hint=f"export it and tune all weights: {command('export', model.argument, '--to', 'hf')}",
        )
    again = command("compress", "MODEL" if request is None else request.model, "--set", "grid=ggml")
    able = f"--train scales is for blocks of {', '.join(HALVES)}"
    try:
        kinds = gguf.layer_types(opened)
    except UsageError as error:
        raise UsageError(f"{error.message}; {able}", hint=f"compress again: {again}") from error
    if not set(kinds.values()) & set(HALVES):
        raise UsageError(
            f"the layers of {model.argument} are {', '.join(sorted(set(kinds.values())))} in a GGUF file; {able}",
            hint=f"compress again: {again}",
        )
    return {name.removesuffix(".weight"): kind for name, kind in kinds.items()}
