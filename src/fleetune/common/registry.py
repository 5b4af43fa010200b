"""Find plug-ins (tuning methods, compressors, export targets, commands): a folder's modules, and those of other packages.

The constants at the top of a module (`KIND`, `PAPER`, ..) are read from its text (`ast`), so listing imports nothing.
"""

import ast
import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Final

from fleetune.errors import FAULTS, UsageError, fault, suggest

log = logging.getLogger(__name__)

LAST: Final = 1000  # in listings: members that state no ORDER


@dataclass(frozen=True)
class Listed:
    """A member of a registry, read without importing it."""

    name: str  # as a user writes it, with "-" where the file has "_"
    module: str  # dotted, to be imported
    summary: str  # first line of the module's docstring
    constants: Mapping[str, Any]  # the module's literal constants

    @property
    def order(self) -> int:
        """Its place in listings: the constant ORDER, at the end without one."""
        return self.number("ORDER", LAST)

    def number(self, constant: str, default: int) -> int:
        """A constant as an integer; `default` where it is not stated, or is none."""
        value = self.constants.get(constant)
        return value if isinstance(value, int) else default

    def text(self, constant: str) -> str:
        """A constant as text, "" where it is not stated."""
        return str(self.constants.get(constant, ""))


class Registry:
    """The members of a folder and of an entry-point group.

    A module of the folder is a member if it states all constants in `requires`.  A file without them is ignored (a
    helper); a module from another package without them cannot be used.
    """

    def __init__(self, kind: str, package: str, group: str, requires: tuple[str, ...], listing: str) -> None:
        """`kind` names a member in messages ("method"); `listing` is the command that shows them all."""
        self.kind, self.package, self.group = kind, package, group
        self.requires, self.listing = requires, listing
        self._warned: set[str] = set()
        self._given: dict[str, Listed] = {}

    def give(self, member: Listed) -> None:
        """Take a member that a caller handed over, for this process alone."""
        self._given[member.name] = member

    def members(self) -> dict[str, Listed]:
        """Every member by name: those of the folder in order, those that other packages register, those that were given.

        A registered module that cannot be used is left out with a warning, so that it does not stop the others; `member`
        says why.  So is one with the name of a module of the folder.
        """
        found = self._own()
        for point in _points(entry_points, self.group):
            try:
                member = self._registered(point)
            except UsageError as error:
                self._warn(str(error))
                continue
            if member.name in found:
                taken = found[member.name].module
                self._warn(
                    f"the {self.kind} '{member.name}' of {member.module} is left out: {taken} has that name"
                )
                continue
            found[member.name] = member
        return found | {name: member for name, member in self._given.items() if name not in found}

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)

    def member(self, name: str) -> Listed:
        """The member called `name` ("-" and "_" are alike).

        UsageError with a suggestion when there is none, and with the reason when a registered module cannot be used.
        """
        known, asked = self.members(), name.replace("_", "-")
        if asked not in known and asked.lower() in known:
            return known[asked.lower()]
        if asked not in known:
            for point in _points(entry_points, self.group):
                if point.name.replace("_", "-") == asked:
                    self._registered(point)  # raises the reason
            raise UsageError(
                f"no {self.kind} named '{name}'.{suggest(asked, known)}",
                hint=f"there are: {', '.join(known)} ({self.listing})",
            )
        return known[asked]

    def load(self, name: str) -> ModuleType:
        """Import the module of a member; UsageError when that fails in another package's module."""
        member = self.member(name)
        try:
            return importlib.import_module(member.module)
        except FAULTS as error:
            if member.module.startswith(f"{self.package}."):
                raise
            raise UsageError(
                f"the {self.kind} '{member.name}' ({member.module}) cannot be imported: {fault(error)}",
                hint="reinstall or uninstall the package that registers it",
            ) from error

    def _own(self) -> dict[str, Listed]:
        found = {}
        spec = importlib.util.find_spec(self.package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for path in sorted(Path(folder).glob("[a-z]*.py")):
                member = _read(path.stem, f"{self.package}.{path.stem}", path)
                if all(constant in member.constants for constant in self.requires):
                    found[member.name] = member
        return found

    def _registered(self, point: EntryPoint) -> Listed:
        """A member of another package; UsageError when its file cannot be found or read, or lacks a constant."""
        name, module = point.name, point.value.partition(":")[0].strip()
        try:
            spec = importlib.util.find_spec(module)  # imports the packages above it
            if spec is None or spec.origin is None:
                raise ModuleNotFoundError(f"there is no module {module}")
            member = _read(name, module, Path(spec.origin))
        except FAULTS as error:
            raise UsageError(
                f"the {self.kind} '{name}' is registered, but its module {module} cannot be read: {fault(error)}",
                hint="reinstall or uninstall the package that registers it",
            ) from error
        if missing := [c for c in self.requires if c not in member.constants]:
            raise UsageError(
                f"the {self.kind} '{name}' ({module}) does not state {', '.join(missing)}",
                hint=f"its module sets {', '.join(self.requires)} to plain values",
            )
        return member


@functools.lru_cache(maxsize=32)
def _points(look: Callable[..., Iterable[EntryPoint]], group: str) -> tuple[EntryPoint, ...]:
    """Return what the installed packages register; looking through all of them takes milliseconds."""
    return tuple(look(group=group))


def _read(name: str, module: str, path: Path) -> Listed:
    summary, constants = _parsed(path, path.stat().st_mtime_ns)
    return Listed(name.replace("_", "-"), module, summary, constants)


@functools.lru_cache(maxsize=256)
def _parsed(path: Path, changed: int) -> tuple[str, Mapping[str, Any]]:
    """(first line of the docstring, literal constants) of a file; `changed` is its time, so that an edit is seen."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id.isupper() and value is not None:
            try:
                constants[target.id] = ast.literal_eval(value)
            except ValueError:  # it is computed
                continue
    summary = (ast.get_docstring(tree) or "").strip().split("\n")[0]
    return summary, MappingProxyType(constants)
