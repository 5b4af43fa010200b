# SPDX-License-Identifier: Apache-2.0
"""Take a method that a caller wrote and hands over as an object: it is a member of the registry, in this process alone.

What its files say of a method elsewhere is taken from the class or its module: `KIND`, `PAPER`, `SENDS`, `CLIENTS`; of a class
that inherits from another method, from that one's module where its own says nothing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from fleetune.common.registry import Member
from fleetune.common.settings import Value
from fleetune.common.shell import quoted
from fleetune.errors import RecipeError, UsageError
from fleetune.tuning import methods
from fleetune.tuning.methods import MethodEntry
from fleetune.tuning.recipe.recipe import AUTO_METHOD, Recipe

PREFIX: Final = "fleetune_given_method_"
RESULT: Final = {
    "ledger": "ledger.safetensors",
    "adapter": "adapter",
}  # in a run's folder, by the method's KIND
STATED: Final = ("KIND", "PAPER", "SENDS", "CLIENTS")
HINT: Final = "what a method is: CONTRIBUTING.md#add-a-tuning-method"


def registered(method: object) -> str:
    """Make the class of a method known in this process, and return its name; UsageError for what is no method."""
    cls = type(method)
    if not isinstance(method, methods.Method):
        raise UsageError(
            f"an object of {cls.__name__} ({cls.__module__}) is no method: its class does not inherit "
            "fleetune.tuning.methods.Method",
            hint=HINT,
        )
    constants = {name: value for name in STATED if (value := _stated(cls, name)) is not None}
    if constants.get("KIND") not in RESULT:
        raise UsageError(
            f"{cls.__name__} of {cls.__module__} does not state KIND = {' or '.join(map(repr, RESULT))}, what a run leaves",
            hint=f"state it in its module or as a ClassVar of the class; {HINT}",
        )
    name = name_of(cls)
    if name == AUTO_METHOD:
        raise UsageError(
            f"{cls.__name__} of {cls.__module__} has the name by which a method is chosen", hint="rename it"
        )
    known = methods.entries().get(name)
    if known is not None and not known.module.startswith(PREFIX):
        raise UsageError(
            f"{cls.__name__} of {cls.__module__} has the name of the method '{name}'", hint="rename it"
        )
    place = ModuleType(f"{PREFIX}{name}", cls.__doc__)
    place.__dict__["Method"] = cls
    sys.modules[place.__name__] = place
    doc = (
        "" if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else cls.__doc__ or ""
    )  # dataclass writes one itself
    methods.REGISTRY.give(Member(name, place.__name__, doc.strip().split("\n")[0], constants))
    return name


def name_of(cls: type) -> str:
    """Return a class's name as a method's: of a class `Method` that of its module, in lower case, with "-" between words."""
    text = cls.__name__
    if text == "Method":
        text = cls.__module__.rpartition(".")[2]
        if text == "__main__":
            text = Path(getattr(sys.modules["__main__"], "__file__", None) or "method").stem
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", text)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "method"


def entry_of(run: Path, recipe: Recipe) -> MethodEntry:
    """Return the method of a run; of one that is not known here what the run's result tells, which suffices to use it.

    A class that was given later with the same name is another method where its runs leave another result.
    """
    kind = next((kind for kind, name in RESULT.items() if (run / name).exists()), None)
    try:
        known = methods.entry(recipe.method)
    except UsageError:
        if kind is None:
            raise
    else:
        if kind in (None, known.kind) or not known.module.startswith(PREFIX):
            return known
    return MethodEntry(recipe.method, kind, "", "", "", "", max(1, recipe.clients), 0)


def settings_of(recipe: Recipe) -> dict[str, Value]:
    """Return all settings of a run's method by name; of one that is not known here those that the run wrote down: all."""
    known = methods.entries().get(recipe.method.replace("_", "-"))
    if known is None:
        return dict(recipe.set)
    try:
        return methods.values_of(methods.make(recipe.method, recipe.set))
    except RecipeError:
        if not known.module.startswith(PREFIX):
            raise
        return dict(recipe.set)  # of a class that was given before


def check_known(name: str, run: Path) -> None:
    """UsageError where a run's method is not known in this process."""
    if name.replace("_", "-") not in methods.entries():
        raise UsageError(
            f"{run} was made by the method '{name}', which is not known here",
            hint="one that was given as an object is known in its own process alone: register it (CONTRIBUTING.md), "
            f"then: fleetune tune --resume {quoted(run)}",
        )


def _stated(cls: type, name: str) -> Any:
    """Return a constant of a class, or of the first module in its order of inheritance that has it; None for none."""
    if (own := getattr(cls, name, None)) is not None:
        return own
    homes = (vars(sys.modules.get(base.__module__, object)) for base in cls.__mro__)
    return next((home[name] for home in homes if name in home), None)
