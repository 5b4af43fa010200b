"""Write an export again from its source, and name the first place that differs: file, byte and tensor."""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from fleetune.deploy import export, targets
from fleetune.deploy.again import Again, Difference, DiffersError, difference
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.errors import ModelError, UsageError
from fleetune.models.gguf import header
from fleetune.models.net.model import Model
from fleetune.runs import compression_folder, rundir
from fleetune.runs.listener import Silent
from fleetune.subject import Compressed, Run, Subject


def written_again(path: Path, source: Subject, tuned: Model | None = None, *, offline: bool) -> str:
    """Return the target as which `source` gives the very bytes of `path`; ModelError with the first place that differs.

    `tuned` is a run's model with the tuning in its weights.
    """
    nearest = Difference(-1, "")
    with ExitStack() as stack:

        @cache
        def opened() -> tuple[Checkpoint, Mapping[str, str]]:
            return stack.enter_context(export.opened(source, tuned, offline=offline))

        for target, name, usual in _ways(path, source):
            with TemporaryDirectory() as place:
                try:
                    made, again = Path(place) / name, Again(path)
                    if isinstance(source, Run) and (tuned is None or target.takes == "adapter"):
                        export.export(source, target.name, made, None, Silent(), offline=offline)
                    elif tuned is not None and target.name == export.DEFAULT_TARGET_OF_A_RUN:
                        export.compare_tuned(tuned, again, made)
                    else:
                        export.compare(opened()[0], target, again, made, opened()[1])
                    found, alike = _rest(path, made, again.seen)
                except DiffersError as error:
                    found, alike = error.found, not error.head
                except UsageError as error:
                    if isinstance(error, ModelError):
                        raise
                    continue  # no target of this source
            if not found.words:
                return target.name
            nearest = max(nearest, found)
            if usual and alike:
                break  # it is of this target, and damaged
    if not nearest.words:
        raise UsageError(
            f"{source.argument} is exported as nothing like {path}",
            hint="name what it was made from: --from RUN, COMPRESSION or MODEL",
        )
    raise ModelError(
        f"{nearest.words}: {source.argument} gives something else",
        hint="export it again; a file that was renamed holds its first name: give it that",
    )


def _rest(path: Path, made: Path, seen: set[str]) -> tuple[Difference, bool]:
    """Compare what was not `seen`; tell also whether `path` is what `made` is, perhaps damaged."""
    if seen and path.is_file():
        return Difference(path.stat().st_size, ""), True
    return difference(path, made, seen), bool(seen) or _size(path) == _size(made)


def _ways(path: Path, source: Subject) -> list[tuple[targets.Target, str, bool]]:
    """Return the targets that `path` may be of, with the name that the file had, and whether that is the target's usual one."""
    stem = ""
    if isinstance(source, Run):
        home = source.folder
    elif isinstance(source, Compressed):
        home = source.home
    else:
        home, stem = Path("."), rundir.of_model(source.name)
    able = [
        target
        for target in targets.every().values()
        if target.suffix == ("" if path.is_dir() else path.suffix)
        and (target.takes != "codes" or isinstance(source, Compressed))
        and (target.takes != "adapter" or isinstance(source, Run))
    ]
    usual = {target.name: target.place(home, stem).name for target in able}
    names = [path.name]
    if path.suffix == export.GGUF:  # which holds the name that it was written under
        with suppress(ModelError):  # of a damaged head, whose first byte that differs is found
            own = header.read(path).values.get("general.name")
            names += {name for name in usual.values() if Path(name).stem == own} - {path.name}
    ways = [(target, name, usual[target.name] == path.name) for name in names for target in able]
    return sorted(ways, key=lambda way: not way[2])


def _size(path: Path) -> int:
    return compression_folder.size(path) if path.is_dir() else path.stat().st_size
