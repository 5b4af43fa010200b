"""List the export targets, and check that a place suits one; what formats state is read without importing them."""

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from fleetune.common import words
from fleetune.common.display import pip_install
from fleetune.common.registry import Listed, Registry
from fleetune.errors import UsageError, suggest

log = logging.getLogger(__name__)

FORMATS: Final = Registry(
    "export target", "fleetune.deploy.formats", "fleetune.targets", ("TARGETS",), "fleetune export --help"
)


@dataclass(frozen=True)
class Target:
    """A value of `--to`."""

    name: str
    help: str
    format: Listed  # the file that writes it

    @property
    def kind(self) -> str | None:
        """The part after the colon: q8_0 of gguf:q8_0."""
        return self.name.partition(":")[2] or None

    @property
    def suffix(self) -> str:
        """The suffix of the file; "" for a folder."""
        return self.format.text("SUFFIX")

    @property
    def takes(self) -> str:
        """ "model" (any model), "codes" (compressed models) or "adapter" (of a tuned run)."""
        return self.format.text("TAKES") or "model"

    def states(self, constant: str) -> Any:
        """A constant of the format; None where it does not state it."""
        return self.format.constants.get(constant)

    @property
    def missing(self) -> list[str]:
        """The modules that are not installed and without which its files cannot be run."""
        needs: tuple[str, ...] = self.states("NEEDS") or ()
        return [module for module in needs if importlib.util.find_spec(module) is None]

    @property
    def install(self) -> str:
        """The command that installs what its files are run in; "" where none is stated."""
        extra = self.format.text("EXTRA")
        return pip_install(extra) if extra else self.format.text("INSTALL")

    def load(self) -> ModuleType:
        """Import the format's module."""
        return importlib.import_module(self.format.module)

    def place(self, folder: Path, name: str = "") -> Path:
        """Return the default path of an export: in `folder`, for the model `name` (default: the folder's name)."""
        if self.suffix:
            kind = f"-{self.kind}" if self.kind else ""
            own = folder.name if folder.name not in ("", "..") else folder.resolve().name
            return folder / f"{name or own}{kind}{self.suffix}"
        return folder / (f"{name}-{self.name}" if name else self.name).replace(":", "-")


def every() -> dict[str, Target]:
    """Return all targets by name, in the order of listings.

    A target that takes the name of another is left out with a warning; those of Fleetune come first.
    """
    known: dict[str, Target] = {}
    own = f"{FORMATS.package}."
    for member in sorted(FORMATS.members().values(), key=lambda m: (not m.module.startswith(own), m.order)):
        stated = member.constants["TARGETS"]
        if not isinstance(stated, dict):
            log.warning("%s is left out: TARGETS is no dict of names and helps", member.module)
            continue
        for name, text in stated.items():
            if name in known:
                first = known[name].format.module
                log.warning(
                    "the export target '%s' of %s is left out: %s has that name", name, member.module, first
                )
            else:
                known[str(name)] = Target(str(name), str(text), member)
    return known


def find(to: str) -> Target:
    """Return the target called `to`; UsageError with a suggestion when there is none."""
    known, name = every(), words.VALUES["to"].get(to.lower(), to.lower())
    if (found := known.get(to) or known.get(name)) is not None:
        return found
    guess = suggest(name, known, cutoff=0.5)
    raise UsageError(
        f"no target named '{to}'" + (f".{guess}" if guess else ""), hint="choose one of " + ", ".join(known)
    )


def listed() -> str:
    """Return the names of all targets for a help text: "gguf (gguf:q8_0, gguf:f16), mlx"."""
    kinds: dict[str, list[str]] = {}
    for target in every():
        kinds.setdefault(target.partition(":")[0], []).append(target)
    return ", ".join(
        name if names == [name] else f"{name} ({', '.join(n for n in names if n != name)})"
        for name, names in kinds.items()
    )


def check(to: str | None, path: Path | None, text: str | None) -> None:
    """UsageError for a target, a place or a text that cannot be, before anything heavy is imported."""
    target = find(to) if to else None
    if target and path:
        check_place(target, path)
    if text and not Path(text).is_file():
        raise UsageError(f"no text file at {text}", hint="check the path")
    if text and target and target.takes == "adapter":
        raise UsageError("an adapter alone has no perplexity", hint="leave out --text, or --to hf")


def check_place(target: Target, out: Path) -> None:
    """Raise UsageError unless `out` is a new place that suits a target."""
    if out.exists():
        raise UsageError(f"{out} exists already", hint="choose a new place with --path, or remove it first")
    suffix = out.suffix.lower()
    of_files = {other.suffix for other in every().values() if other.suffix}
    if target.suffix != (suffix if suffix in of_files else ""):
        what = f"a file, named {target.suffix}" if target.suffix else f"a folder, not named {suffix}"
        raise UsageError(
            f"{target.name} is written as {what}; --path is {out}", hint="choose another name with --path"
        )
