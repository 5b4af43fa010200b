"""Define what a compression method is, and list the methods there are: one file each of `methods/`.

Another package registers a module under the entry-point group `fleetune.compressors`.  The module has a docstring that cites the
paper, a constant `PAPER`, and a frozen dataclass of `fleetune.common.settings.setting` fields.  That class is called `Solver`,
`Trainer` or `Pruner`, after the contract below that it keeps; a `Solver` with a method `correct` is a `Corrector`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, TypeAlias, runtime_checkable

from fleetune.common import settings
from fleetune.common.registry import Listed, Registry
from fleetune.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fleetune.data import Encoded
    from fleetune.models.artefact import Quantised
    from fleetune.models.net.model import Model


@dataclass(frozen=True)
class Solved:
    """A matrix after compression: codes on a grid, or dense with zeros."""

    weight: Quantised | Tensor
    notes: tuple[str, ...] = ()  # what had to be done differently, for the report
    loss: float | None = None  # tr((W - Q) H (W - Q)^T), where the solver knows it


@runtime_checkable
class Solver(Protocol):
    """Compress a model one weight matrix at a time."""

    data: ClassVar[bool]  # whether it needs calibration text

    def check(self, name: str, R: int, C: int) -> str:
        """Say why a matrix [R, C] cannot be compressed with these settings, or "" when it can."""

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        """Return the compressed matrix.

        W float32 [R, C] and H float32 [C, C], the sum of 2 x x^T over the calibration tokens, are left unchanged.
        """


@runtime_checkable
class Corrector(Solver, Protocol):
    """A solver that first corrects the weights for the errors of the layers before.

    It needs text on this machine, since the dense model runs beside the compressed one, and its layers are solved in turn,
    each on inputs that have passed the compressed layers before it in its block.
    """

    def correct(self, W: Tensor, H: Tensor, D: Tensor) -> Tensor:
        """Return the weights float32 [R, C] that are then solved for.

        W and H as in `solve`.  D float32 [C, C] is the sum of 2 (x - y) y^T over the calibration tokens, with x the inputs in
        the dense model and y those in the compressed one, which H is of.  All are left unchanged.
        """


@runtime_checkable
class Trainer(Protocol):
    """Train a whole model on rows and a teacher."""

    @property
    def teacher(self) -> str:
        """The name of the model to learn from: a model, a finished run, or "same" for the model itself."""

    def check(self, model: Model, teacher: Model, length: int) -> None:
        """Raise RecipeError with every reason why the models cannot be trained on rows of `length` tokens."""

    def memory(self, model: Model, teacher: Model, length: int) -> int:
        """Estimate the peak memory, in bytes, of training on rows of at most `length` tokens."""

    def disk(self, model: Model) -> int:
        """Return how many bytes the checkpoints and the result take at most."""

    def student(self, model: Model) -> Model:
        """Return what is trained: `model` itself, or a smaller one made of it."""

    def train(
        self,
        student: Model,
        teacher: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        on_step: Callable[[int, int, float], None],
    ) -> None:
        """Train in place; resume from the checkpoint in `folder`.

        `on_step(step, steps, loss)` is called after every step.  It may raise Interrupted, which saves the step.
        """

    def distance(self, student: Model, teacher: Model, rows: Sequence[Encoded]) -> float:
        """Return the divergence that training minimises, on rows as they are."""


@runtime_checkable
class Pruner(Protocol):
    """Remove parts of a model, then train what is left."""

    @property
    def recover(self) -> str:
        """The way the pruned model is trained; "none" for not at all."""

    def check(self, model: Model) -> None:
        """Raise RecipeError with every reason why the model cannot be pruned."""

    def disk(self, model: Model) -> int:
        """Return how many bytes the checkpoints and the result take at most."""

    def prune(self, model: Model, rows: Sequence[Encoded], on_row: Callable[[int, int], None]) -> Model:
        """Return the smaller model; a resumed compression prunes again, and must come to the same.

        `on_row(row, rows)` is called after every row that is read.  It may raise Interrupted.
        """

    def train(
        self,
        pruned: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        on_step: Callable[[int, int, float], None],
    ) -> Model:
        """Return the trained model; resume from the checkpoint in `folder`.

        `on_step(step, steps, loss)` is called after every step.  It may raise Interrupted, which saves the step.
        """


Compressor: TypeAlias = Solver | Trainer | Pruner
Kind: TypeAlias = Literal["solver", "trainer", "pruner"]
CONTRACTS: Final[Mapping[Kind, type[Any]]] = {"solver": Solver, "trainer": Trainer, "pruner": Pruner}

DEFAULT: Final = (
    "qronos"  # the method unless one is asked for: it changes the model least (docs/compression.md)
)
DEFAULT_OF_DEVICES: Final = (
    "optq"  # where devices calibrate, which have no dense model beside the compressed one
)

REGISTRY: Final = Registry(
    "compression method",
    package="fleetune.compression.methods",
    group="fleetune.compressors",
    requires=("PAPER",),
    listing="fleetune compress --list",
)


def entries() -> dict[str, Listed]:
    """Return every method by name, those of other packages included."""
    return REGISTRY.members()


def kind_of(name: str) -> Kind:
    """Tell which contract a method keeps, by the class that its module defines.

    UsageError for an unknown name, and for a module that does not define exactly one such class.
    """
    module = REGISTRY.load(name)
    kinds = [
        kind
        for kind, contract in CONTRACTS.items()
        if vars(module).get(contract.__name__, contract) is not contract
    ]
    if len(kinds) != 1:
        raise UsageError(
            f"the compression method '{name}' ({module.__name__}) defines {len(kinds)} compressors instead of one",
            hint="its module defines one class: Solver, Trainer or Pruner",
        )
    return kinds[0]


def method_class(name: str) -> type[Any]:
    """Return the class of a method; UsageError with a suggestion for an unknown name ("-" and "_" are alike)."""
    cls: type[Any] = getattr(REGISTRY.load(name), CONTRACTS[kind_of(name)].__name__)
    return cls


def settings_of(name: str) -> list[settings.Setting]:
    """List the settings of a method."""
    return settings.of(method_class(name))


def make(name: str, values: Mapping[str, Any]) -> Compressor:
    """Return the method with these settings (strings are parsed).

    RecipeError lists all settings that are wrong; UsageError is for a class that does not keep its contract.
    """
    made: Compressor = settings.make(
        method_class(name), name, values, hint=f"settings and defaults: fleetune compress --list {name}"
    )
    contract = CONTRACTS[kind_of(name)]
    members = [*contract.__annotations__, *(n for n in vars(contract) if not n.startswith("_"))]
    if missing := [n for n in members if not hasattr(made, n)]:
        raise UsageError(
            f"the compression method '{name}' does not define {', '.join(missing)}",
            hint=f"fleetune.compression.{contract.__name__} describes what it must define",
        )
    return made
