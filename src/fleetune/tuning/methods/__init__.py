# SPDX-License-Identifier: Apache-2.0
"""Define the contract of a tuning method, and find methods: the folder is the registry.

`methods/fedkseed.py` is `--method fedkseed`.  A method is one file: a docstring that cites the paper, the constants
`KIND`, `PAPER` and `SENDS`, a State (NamedTuple), and a frozen dataclass `Method` whose fields are the
hyper-parameters, each `name: type = setting(default, symbol, help)`, with the functions of the Protocol below.  A
setting that acts only beside another says so with `only_if` (`common/settings.py`).  Optional: the constants `CLIENTS`
(a usual fleet, 8 unless stated) and `RECOMMENDED` (1 is the first that `plan` considers), and the functions of the
Protocols `Reports`, `Kinds`, `TakesLate`, `Measured`, `Combines`, `Reads`, `WritesOut`, `Sized`, `FollowsRows`,
`FollowsClients`, `FromSlopes` and `Planned`; `rate_at_server`, true where the learning rate acts on the server alone.

Other packages register a module of the same shape under the entry-point group `fleetune.methods`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np

from fleetune.common.registry import Member, Registry
from fleetune.common.settings import Setting, Value, of
from fleetune.common.settings import make as make_of
from fleetune.tuning.messages import Payload, ReplySpec
from fleetune.tuning.robust import FEWEST, MEAN, Rule

if TYPE_CHECKING:
    from fleetune.data import Batches
    from fleetune.models.model import Model
    from fleetune.models.shapes import Shape
    from fleetune.seeds.slopes import Slopes
    from fleetune.tuning.footprint import Footprint

REGISTRY = Registry("method", __name__, "fleetune.methods", ("KIND", "PAPER", "SENDS"), "fleetune methods")


class Reply(NamedTuple):
    """A device's checked answer: its number, the key it was given for this round, and what it sent."""

    client: int
    key: int
    payload: Payload
    late: int = 0  # rounds that it comes late
    stood_on: Any = None  # the state that the device was sent, where that is not the present one
    rows: int = 0  # that its steps were for, where the payload's `n` is what they count; 0: the same

    @property
    def discount(self) -> float:
        """What a late reply counts: 1 / sqrt(1 + late), the same bits on every machine.

        Nguyen et al. 2022, arXiv 2106.06639 (FedBuff); the power of 1/2 of Xie et al. 2019, arXiv 1903.03934 (FedAsync).
        """
        return 1.0 / math.sqrt(1 + self.late)


class Method(Protocol):
    """The functions of every method; `State` is its own NamedTuple (arrays, dicts of arrays, numbers, a Ledger)."""

    def init(self, model: Model, key: int) -> Any:
        """Return the global state before round 1; may attach what it trains to `model`, never changes base weights."""
        ...

    def broadcast(self, state: Any) -> Payload:
        """Return what the server sends to every device of a round."""
        ...

    def expects(self, state: Any) -> ReplySpec:
        """Return what a reply must look like: every other one is refused."""
        ...

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Do a device's round; `memory` is its own dict, saved for it between rounds; `payload` may be emptied (`take`)."""
        ...

    def aggregate(self, state: Any, replies: Iterable[Reply]) -> Any:
        """Do the server's round: replies come one at a time; none at all must leave the weights as they were."""
        ...

    def apply(self, model: Model, state: Any) -> None:
        """Make `model` the tuned model of `state` (from whatever state it was at), base weights untouched."""
        ...


# What a method may also do ----------------------------------------------------------------------------


@runtime_checkable
class Reports(Protocol):
    """A method with figures of its own."""

    def report(self, state: Any) -> dict[str, float]:
        """Return the figures that go into the event of every round, under "report"."""
        ...


@runtime_checkable
class Kinds(Protocol):
    """A method whose clients are of several kinds: what one is sent says what it does, and decides what it replies."""

    @property
    def kind_names(self) -> Sequence[str]:
        """Return what each kind does, in a few words."""
        ...

    def kind_of(self, client: int) -> int:
        """Return the kind of a client in a fleet whose clients can all be of any kind."""
        ...

    def kinds(self, state: Any) -> Sequence[tuple[Payload, ReplySpec]]:
        """Return what each kind is sent and must reply."""
        ...

    def footprints(self, shape: Shape) -> Sequence[Footprint | None]:
        """Return the work of each kind on a model of this shape; None where the model has no place for the module."""
        ...


@runtime_checkable
class TakesLate(Protocol):
    """A method whose replies are steps along directions that stay known: `aggregate` also takes replies to earlier rounds.

    Such a reply counts `Reply.discount` times, along the directions of the state that it stood on.
    """

    def check_late(self) -> None:
        """Raise ValueError, in plain words, where these settings do not allow that."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A method that says how far a reply goes, because what is sent is not the plain numbers."""

    def distance(self, state: Any, reply: Reply) -> float:
        """Return how far `reply` would move the model, 0 for not at all; honest replies are to be of one size.

        MessageError for a reply that no device can have made.
        """
        ...


@runtime_checkable
class Combines(Protocol):
    """A method whose replies can be combined otherwise than by their mean."""

    def aggregate(self, state: Any, replies: Iterable[Reply], rule: Rule = MEAN) -> Any:
        """Do the server's round with the replies combined by `rule` (`Rule.combining`)."""
        ...

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        """Return why `rule` does not fit replies of `asked` clients, and what to do; "" where it does."""
        ...


@runtime_checkable
class Reads(Protocol):
    """A method whose `init` reads files."""

    def check_files(self) -> None:
        """Raise DataError when they cannot be read: called before the model is loaded."""
        ...


@runtime_checkable
class WritesOut(Protocol):
    """A method with settings whose value 0 or "" stands for another one, which a later version may choose otherwise."""

    def written_out(self) -> Method:
        """Return this method with those values in their place; it does the same, to the bit."""
        ...


@runtime_checkable
class Sized(Protocol):
    """A method with a number of local steps."""

    def sized(self, steps: int, batch_size: int) -> Method:
        """Return this method with so many local steps a round, each on so many rows."""
        ...

    def local_steps(self, rows: int) -> int:
        """Return how many local steps a device with so many rows takes in a round."""
        ...


@runtime_checkable
class FollowsRows(Protocol):
    """A method whose number of local steps, where none is given, depends on how many rows a client has."""

    steps_setting: ClassVar[str]  # the setting that has the number

    def for_rows(self, rows: int) -> Method:
        """Return this method with the local steps for so many rows of a client."""
        ...


@runtime_checkable
class FollowsClients(Protocol):
    """A method whose server steps further along the mean of more clients, where its rates are found rather than given."""

    server_setting: ClassVar[str]  # the setting that has the server's step

    def for_clients(self, clients: int) -> Method:
        """Return this method with the server's step for the mean of so many clients."""
        ...


@runtime_checkable
class FromSlopes(Protocol):
    """A method whose device takes two-point steps: slopes along random directions give its learning rate."""

    def rate_from(self, points: Sequence[Slopes], clients: int) -> float:
        """Return the learning rate by what was measured at some points, 0 where none can be told.

        `clients` is the number of those that are asked in a round.
        """
        ...


@runtime_checkable
class Planned(Protocol):
    """A method that `fleetune plan` can count; one that is not has an empty row in its table."""

    def footprint(self, shape: Shape) -> Footprint | None:
        """Return a device's work on a model of this shape; None where the model has no place for the module."""
        ...


def report_of(method: Method, state: Any) -> dict[str, float]:
    """Return a method's own figures, {} where it has none."""
    return method.report(state) if isinstance(method, Reports) else {}


def kinds_of(method: Method, state: Any) -> Sequence[tuple[Payload, ReplySpec]]:
    """Return what each kind of device is sent and must reply; one kind unless the method has more."""
    if isinstance(method, Kinds):
        return method.kinds(state)
    return [(method.broadcast(state), method.expects(state))]


def kind_names(method: Method) -> Sequence[str]:
    """Return what each kind of client does; one kind without a name unless the method has more."""
    return method.kind_names if isinstance(method, Kinds) else ("",)


def kind_of(method: Method, client: int) -> int:
    """Return the kind of a client in a fleet whose clients can all be of any kind."""
    return method.kind_of(client) if isinstance(method, Kinds) else 0


def footprints_of(method: Method, shape: Shape) -> Sequence[Footprint | None]:
    """Return the work of each kind on a model of this shape; None for what cannot be counted."""
    if isinstance(method, Kinds):
        return method.footprints(shape)
    return [method.footprint(shape) if isinstance(method, Planned) else None]


def late_problem(method: Method, name: str) -> str:
    """Say why replies to earlier rounds cannot be used, "" where they can."""
    if not isinstance(method, TakesLate):
        return (
            f"a reply to an earlier round is of no use to {name}; use a method whose replies are steps along directions that "
            "stay known: mezo, zosgd, onebyte or fedkseed"
        )
    try:
        method.check_late()
    except ValueError as error:
        return str(error)
    return ""


def distance_of(method: Method, state: Any, sent: Payload, reply: Reply) -> float:
    """Return how far a reply goes: what the method says, or else the norm of its arrays, less what was `sent`."""
    if isinstance(method, Measured):
        return method.distance(state, reply)
    return norm(
        a.astype(np.float64)
        - (sent.arrays[n] if n in sent.arrays and sent.arrays[n].shape == a.shape else 0.0)
        for n, a in reply.payload.arrays.items()
    )


def norm(arrays: Iterable[np.ndarray]) -> float:
    """Return the Euclidean norm of all arrays together."""
    return math.sqrt(sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays))


def aggregated(method: Method, state: Any, replies: Iterable[Reply], rule: Rule) -> Any:
    """Return the state after a round; every method takes the mean, those that are `Combines` other rules too."""
    if rule.name == "mean":
        return method.aggregate(state, replies)
    assert isinstance(method, Combines)
    return method.aggregate(state, replies, rule)


def cannot_combine(method: Method, rule: Rule, asked: int) -> str:
    """Return why replies of `asked` clients cannot be combined by `rule`, and what to do; "" where they can."""
    if rule.name == "mean":
        return ""
    if not isinstance(method, Combines):
        return "this method has a rule of its own; leave aggregation out"
    if asked < FEWEST:
        return (
            f"{asked} clients are asked in a round, and of fewer than {FEWEST} none can be outvoted; ask more"
        )
    return method.cannot_combine(rule, asked)


def check_files(method: Method) -> None:
    """Raise DataError when a file that `init` will read cannot be read."""
    if isinstance(method, Reads):
        method.check_files()


def local_steps(method: Method, rows: int) -> int:
    """Return how many local steps a device with so many rows takes in a round; 1 where the method does not say."""
    return method.local_steps(rows) if isinstance(method, Sized) else 1


def sized(method: Method, steps: int, batch_size: int) -> Method:
    """Return the method with so many local steps of so many rows, or as it is where it has no such number."""
    return method.sized(steps, batch_size) if isinstance(method, Sized) else method


def written_out(method: Method) -> Method:
    """Return the method with every value in place that 0 or "" stands for."""
    return method.written_out() if isinstance(method, WritesOut) else method


def values_of(method: Method) -> dict[str, Value]:
    """Return all settings of a method by name, defaults included: what `make` needs to make the same one."""
    declared = dataclasses.fields(method)  # type: ignore[arg-type]  # a Protocol cannot say that it is a dataclass
    return {f.name: getattr(method, f.name) for f in declared if f.init}


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


def _entry(member: Member) -> MethodEntry:
    clients, recommended = (member.number(c, d) for c, d in (("CLIENTS", 8), ("RECOMMENDED", 0)))
    return MethodEntry(
        member.name, member.text("KIND"), member.text("PAPER"), member.text("SENDS"),
        member.summary, member.module, clients, recommended,
    )  # fmt: skip


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
