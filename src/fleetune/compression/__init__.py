# SPDX-License-Identifier: Apache-2.0
"""Making a model smaller; the folder is the registry: `compress/llm_pruner.py` is `--method llm-pruner`.

A method is one file: a docstring that cites the paper, a constant `PAPER`, and a frozen dataclass whose fields are its
settings (as a tuning method's).  It is named `Solver` where it works a linear layer at a time, with

    data: bool                                      whether it needs calibration text (class constant)
    check(name, R, C) -> str                        what is wrong with such a matrix for it, "" for nothing
    solve(W [R, C], H [C, C]) -> Solved             the matrix as it will be; `H` is the sum of 2 x x^T

`Trainer` where it trains a whole model on rows and a teacher, with

    teacher: str                                    a model, a finished run, or "same": the one that is given
    check(model, teacher, length)                   RecipeError for what does not fit
    memory(model, teacher, length) -> int           bytes of the peak, as planned
    disk(model) -> int                              bytes that must be free
    student(model) -> Model                         what is trained
    train(student, teacher, rows, seed, folder, on_step)     in place; goes on with what `folder` holds
    distance(student, teacher, rows) -> float       how far they are from each other

and `Pruner` where it takes parts of the model out and trains what is left, with

    recover: str                                    how it trains, "none" for not
    check(model, length, plain=)                    RecipeError for what does not fit
    disk(model) -> int                              bytes that must be free
    prune(model, rows, folder, on_row) -> Model     the smaller one; `folder` keeps what was decided
    train(pruned, whole, rows, seed, folder, on_step) -> Model   goes on with what `folder` holds

Listing reads the files as text and imports nothing.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from fleetune.common import settings
from fleetune.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fleetune.data import Encoded
    from fleetune.models.artefact import Quantised
    from fleetune.models.model import Model


@dataclass(frozen=True)
class Solved:
    """A matrix after compression: on a grid, or dense with zeros; and what had to be done differently."""

    weight: Quantised | Tensor
    notes: tuple[str, ...] = ()
    loss: float | None = None  # tr((W - Q) H (W - Q)^T) where the solver knows it


class Solver(Protocol):
    """What a solver is; see the module's text."""

    data: ClassVar[bool]

    def check(self, name: str, R: int, C: int) -> str:
        """Why a matrix [R, C] cannot be done as the settings say; "" when it can."""
        ...

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        """The compressed matrix.  W float32 [R, C] and H float32 [C, C] are left as they were."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """What a trainer is; see the module's text."""

    @property
    def teacher(self) -> str:
        """The name of the model that it learns from."""

    def check(self, model: Model, teacher: Model, length: int) -> None:
        """RecipeError with all that is in the way of training on rows of `length` tokens."""

    def memory(self, model: Model, teacher: Model, length: int) -> int:
        """Bytes of the peak of training on rows of `length` tokens at most, as planned."""

    def disk(self, model: Model) -> int:
        """Bytes of what is kept for going on and of the result, at their most."""

    def student(self, model: Model) -> Model:
        """What is trained: `model` itself or a smaller one made of it."""

    def train(
        self,
        student: Model,
        teacher: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        on_step: Callable[[int, int, float, float | None], None],
    ) -> None:
        """Train in place; `on_step(step, steps, loss, reward)` comes after every step and may raise Interrupted.

        `reward` is the mean of what the student has written in the step, None where there is none.
        """

    def distance(self, student: Model, teacher: Model, rows: Sequence[Encoded]) -> float:
        """What the training makes small, on rows as they are."""


@runtime_checkable
class Pruner(Protocol):
    """What a pruner is; see the module's text."""

    @property
    def recover(self) -> str:
        """How it trains what is left; "none" for not."""

    def check(self, model: Model, length: int, *, plain: bool) -> None:
        """RecipeError with all that is in the way of rows of `length` tokens (`plain`: of windows of text)."""

    def disk(self, model: Model) -> int:
        """Bytes of what is kept for going on and of the result, at their most."""

    def prune(
        self, model: Model, rows: Sequence[Encoded], folder: Path, on_row: Callable[[int, int], None]
    ) -> Model:
        """The smaller model; `on_row(row, rows)` comes after every row that is read and may raise Interrupted."""

    def train(
        self,
        pruned: Model,
        whole: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        on_step: Callable[[int, int, float], None],
    ) -> Model:
        """The trained one; `on_step(step, steps, loss)` comes after every step and may raise Interrupted."""  # fmt: skip


class Entry(NamedTuple):
    """A method as it is listed."""

    name: str
    paper: str
    summary: str


def entries() -> dict[str, Entry]:
    """Every method there is, by name."""
    found = {}
    for path in sorted((Path(__file__).parent / "methods").glob("[a-z]*.py")):
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
            name = path.stem.replace("_", "-")
            found[name] = Entry(name, str(paper), summary)
    return found


def method_class(name: str) -> type[Any]:
    """The class of a method; UsageError with a suggestion when there is none of that name (- and _ are alike)."""
    known, asked = entries(), name.replace("_", "-")
    if asked not in known:
        close = difflib.get_close_matches(asked, known, n=1)
        guess = f" Did you mean '{close[0]}'?" if close else ""
        raise UsageError(
            f"no compression method named '{name}'.{guess}", hint=f"there are: {', '.join(known)}"
        )
    module = importlib.import_module(f"{__name__}.methods.{asked.replace('-', '_')}")
    cls: type[Any] = next(
        vars(module)[kind] for kind in ("Solver", "Trainer", "Pruner") if kind in vars(module)
    )
    return cls


def make(name: str, values: Mapping[str, Any]) -> Solver | Trainer | Pruner:
    """The method with these settings (strings are parsed); RecipeError lists all that is wrong."""
    made: Solver | Trainer | Pruner = settings.make(
        method_class(name), name, values, hint=f"settings and defaults: fleetune compress --list {name}"
    )
    return made
