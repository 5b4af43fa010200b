# SPDX-License-Identifier: Apache-2.0
"""Making a model smaller, a linear layer at a time; the folder is the registry: `compress/optq.py` is `--method optq`.

A solver is one file: a docstring that cites the paper, a constant `PAPER`, and a frozen dataclass `Solver`
whose fields are its settings (as a method's), with

    data: bool                                      whether it needs calibration text (class constant)
    check(name, R, C) -> str                        what is wrong with such a matrix for it, "" for nothing
    solve(W [R, C], H [C, C]) -> Solved             the matrix as it will be; `H` is the sum of 2 x x^T

Listing reads the files as text and imports nothing.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from fleetune import settings
from fleetune.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fleetune.deploy.master import Quantised


@dataclass(frozen=True)
class Solved:
    """A matrix after compression: on a grid, or dense with zeros; and what had to be done differently."""

    weight: Quantised | Tensor
    notes: tuple[str, ...] = ()


class Solver(Protocol):
    """What a solver is; see the module's text."""

    data: ClassVar[bool]

    def check(self, name: str, R: int, C: int) -> str:
        """Why a matrix [R, C] cannot be done as the settings say; "" when it can."""
        ...

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        """The compressed matrix.  W float32 [R, C] and H float32 [C, C] may be overwritten."""
        ...


class Entry(NamedTuple):
    """A solver as it is listed."""

    name: str
    paper: str
    summary: str


def entries() -> dict[str, Entry]:
    """Every solver there is, by name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        paper = next(
            (
                node.value.value
                for node in tree.body
                if isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id == "PAPER"
                and isinstance(node.value, ast.Constant)
            ),
            None,
        )
        if paper:
            summary = (ast.get_docstring(tree) or "").split("\n")[0]
            found[path.stem] = Entry(path.stem, str(paper), summary)
    return found


def solver_class(name: str) -> type[Any]:
    """The class of a solver; UsageError with a suggestion when there is none of that name."""
    known = entries()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        guess = f" Did you mean '{close[0]}'?" if close else ""
        raise UsageError(
            f"no compression method named '{name}'.{guess}", hint=f"there are: {', '.join(known)}"
        )
    cls: type[Any] = importlib.import_module(f"{__name__}.{name}").Solver
    return cls


def make(name: str, values: Mapping[str, Any]) -> Solver:
    """The solver with these settings (strings are parsed); RecipeError lists all that is wrong."""
    made: Solver = settings.make(
        solver_class(name), name, values, hint=f"settings and defaults: fleetune compress --list {name}"
    )
    return made
