"""Define the contract of a tuning method, and find methods: the folder is the registry (CONTRIBUTING.md has a whole method).

Beside what CONTRIBUTING.md names, a file may state `CLIENTS` (a usual fleet, 8 unless stated) and `RECOMMENDED` (1 is the first
that `plan` considers).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from fleetune.common.registry import Listed, Registry
from fleetune.common.settings import Setting, Value, of
from fleetune.common.settings import make as make_of
from fleetune.tuning.exchange.aggregation import FEWEST, MEAN, PRIVATE, Rule, Tensors
from fleetune.tuning.exchange.messages import Payload, ReplySpec

if TYPE_CHECKING:
    from fleetune.data import Batches
    from fleetune.models.net.model import Model
    from fleetune.models.shapes import Shape
    from fleetune.seeds.slopes import Slopes
    from fleetune.tuning.exchange.footprint import Footprint

REGISTRY = Registry("method", __name__, "fleetune.methods", ("KIND", "PAPER", "SENDS"), "fleetune methods")

OWN_DIRECTIONS = "every device tries directions of its own, so noise would hide each number alone; use fedkseed, mezo or fedit"


class Reply(NamedTuple):
    """A device's checked answer: its number, the key it was given for this round, and what it sent."""

    client: int
    key: int
    payload: Payload
    rows: int = 0  # that its steps were for, where the payload's `n` is what they count; 0: the same


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """A method; `State` is its own NamedTuple (arrays, dicts of arrays, numbers, a Ledger).

    Six functions have no default.  The others have one that says what is usual.
    """

    steps_setting: ClassVar[str] = ""  # the setting that `for_rows` chooses where it is not given
    server_setting: ClassVar[str] = ""  # the setting that `for_clients` chooses where the rates are found
    rate_at_server: ClassVar[bool] = False  # the learning rate acts on the server alone
    learns_alone: ClassVar[bool] = False  # in little time one client learns more than many do
    # fields of the state, beside the ledger, that say what a reply means to `aggregate`; None where that is not known
    replies_by: ClassVar[tuple[str, ...] | None] = None

    @property
    def packs(self) -> bool:
        """Whether `local` takes rows that stand behind one another (`models/net/packed.py`)."""
        return getattr(self, "objective", "loss") == "loss"

    @abstractmethod
    def init(self, model: Model, key: int) -> Any:
        """Return the global state before round 1; may attach what it trains to `model`, never changes base weights."""

    @abstractmethod
    def broadcast(self, state: Any) -> Payload:
        """Return what the server sends to every device of a round."""

    @abstractmethod
    def expects(self, state: Any) -> ReplySpec:
        """Return what a reply must look like: every other one is refused."""

    @abstractmethod
    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Do a device's round; `memory` is its own dict, saved for it between rounds; `payload` may be emptied (`take`)."""

    @abstractmethod
    def aggregate(self, state: Any, replies: Iterable[Reply], rule: Rule = MEAN) -> Any:
        """Do the server's round: replies come one at a time; none at all must leave the weights as they were.

        Replies are combined by `rule` (`Rule.combining`); it is the mean unless `cannot_combine` allows another.
        """

    @abstractmethod
    def apply(self, model: Model, state: Any) -> None:
        """Make `model` the tuned model of `state` (from whatever state it was at), base weights untouched."""

    # What is usual ------------------------------------------------------------------------------------

    def report(self, state: Any) -> dict[str, float]:
        """Return the figures that go into the event of every round, under "report"."""
        return {}

    def stays(self, report: Mapping[str, float]) -> tuple[str, str]:
        """Return why the server has not moved in a round that reports this, and what to do; ("", "") where it always does."""
        return "", ""

    def distance(self, state: Any, sent: Payload, reply: Reply) -> float:
        """Return how far `reply` would move the model, 0 for not at all; honest replies are to be of one size.

        MessageError for a reply that no device can have made.  By default the norm of its arrays, less what was `sent`.
        """
        return norm(
            a.astype(np.float64)
            - (sent.arrays[n] if n in sent.arrays and sent.arrays[n].shape == a.shape else 0.0)
            for n, a in reply.payload.arrays.items()
        )

    def begins(self, sent: Payload) -> Tensors:
        """Return where the numbers begin that replies to `sent` move, float64, as `aggregate` combines them."""
        raise NotImplementedError(f"{type(self).__module__} has no sum of its replies")

    def moved(self, sent: Payload, reply: Reply) -> Tensors:
        """Return where a reply to `sent` puts these numbers; its weight and what it says beside them are no part."""
        raise NotImplementedError(f"{type(self).__module__} has no sum of its replies")

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        """Return why `rule`, not the mean, does not fit replies of `asked` clients, and what to do; "" where it does."""
        return (
            OWN_DIRECTIONS if rule.name == PRIVATE else "this method has its own rule; leave aggregation out"
        )

    def cannot_hide_rows(self) -> str:
        """Return why local steps cannot hide each row (`Batch.drawn`), and what to do; "" where they can."""
        return "its steps do not hide rows; use fedit, mezo or fedkseed"

    def written_out(self) -> Self:
        """Return this method with what 0 or "" stands for in place, which a later version may choose otherwise."""
        return self

    # Kinds of clients: what one is sent says what it does, and decides what it replies

    @property
    def kind_names(self) -> Sequence[str]:
        """Return what each kind of client does, in a few words; by default all are of one."""
        return ("",)

    def kind_of(self, client: int) -> int:
        """Return the kind of a client in a fleet whose clients can all be of any kind."""
        return 0

    def kinds(self, state: Any) -> Sequence[tuple[Payload, ReplySpec]]:
        """Return what each kind is sent and must reply."""
        return [(self.broadcast(state), self.expects(state))]

    def news(self, state: Any, known: int, kind: int) -> Payload:
        """Return what of its broadcast a client of a kind needs that remembers round `known`, where a method has that."""
        raise NotImplementedError

    # Local steps, and what they cost

    def sized(self, steps: int, batch_size: int) -> Self:
        """Return this method with so many local steps a round, each on so many rows; as it is where it has no such number."""
        return self

    def local_steps(self, rows: int) -> int:
        """Return how many local steps a device with so many rows takes in a round."""
        return 1

    def footprint(self, shape: Shape) -> Footprint | None:
        """Return a device's work on a model of this shape; None where the model has no place for the module.

        `fleetune plan` has an empty row for a method that does not say.
        """
        return None

    def footprints(self, shape: Shape) -> Sequence[Footprint | None]:
        """Return the work of each kind of client."""
        return [self.footprint(shape)]

    # Rates and steps that are chosen rather than given

    def for_rows(self, rows: int) -> Self:
        """Return this method with the local steps for so many rows of a client."""
        return self

    def for_clients(self, clients: int) -> Self:
        """Return this method with the server's step for the mean of so many clients."""
        return self

    def rate_from(self, points: Sequence[Slopes], clients: int) -> float:
        """Return the learning rate by slopes that were measured at some points, 0 where none can be told.

        `clients` is the number of those that are asked in a round.  A method that has this function takes two-point steps.
        """
        return 0.0

    # For callers, not to be written anew

    def has_own(self, name: str) -> bool:
        """Return whether a function is the method's own rather than the default."""
        return getattr(type(self), name) is not getattr(Method, name)

    def rule_problem(self, rule: Rule, asked: int) -> str:
        """Return why replies of `asked` clients cannot be combined by `rule`, and what to do; "" where they can."""
        if rule.name == "mean":
            return ""
        if rule.name != PRIVATE and asked < FEWEST and self.has_own("cannot_combine"):
            return f"{asked} clients are asked in a round, and of fewer than {FEWEST} none can be outvoted; ask more"
        return self.cannot_combine(rule, asked)


def norm(arrays: Iterable[np.ndarray]) -> float:
    """Return the Euclidean norm of all arrays together."""
    return math.sqrt(sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays))


def values_of(method: Method) -> dict[str, Value]:
    """Return all settings of a method by name, defaults included: what `make` needs to make the same one."""
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}


# The registry -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MethodEntry:
    """A method as the registry lists it, read without importing it."""

    name: str
    kind: str  # of its result: "ledger" or "adapter"
    paper: str
    sends: str
    summary: str
    module: str
    clients: int  # size of the fleet unless the recipe states one
    recommended: int  # place in the order in which `plan` recommends; 0: only where none of these fits


def entries() -> dict[str, MethodEntry]:
    """Return every method by name: ours and those that other packages register."""
    return {name: _entry(member) for name, member in REGISTRY.members().items()}


def entry(name: str) -> MethodEntry:
    """Return the method called `name`; UsageError with a suggestion when there is none."""
    return _entry(REGISTRY.member(name))


def _entry(member: Listed) -> MethodEntry:
    clients, recommended = (member.number(c, d) for c, d in (("CLIENTS", 8), ("RECOMMENDED", 0)))
    return MethodEntry(
        member.name,
        member.text("KIND"),
        member.text("PAPER"),
        member.text("SENDS"),
        member.summary,
        member.module,
        clients,
        recommended,
    )


def module_of(name: str) -> ModuleType:
    """Import the module of a method."""
    return REGISTRY.load(name)


def settings(name: str) -> list[Setting]:
    """List the hyper-parameters of a method."""
    return of(module_of(name).Method)


def having(names: Iterable[str]) -> list[str]:
    """Return the methods that have all settings of these names, those that `plan` recommends first."""
    wanted = set(names)
    order = sorted(entries().values(), key=lambda e: (e.recommended or math.inf, e.name))
    return [e.name for e in order if wanted <= {s.name for s in settings(e.name)}]


def make(name: str, values: Mapping[str, Any]) -> Method:
    """Return the method with these hyper-parameters (texts are parsed); RecipeError lists all that is wrong."""
    made: Method = make_of(
        module_of(name).Method, name, values, hint=f"settings and defaults: fleetune methods {name}"
    )
    return made
