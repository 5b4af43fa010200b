# SPDX-License-Identifier: Apache-2.0
"""The contract every method keeps, and the registry: the folder itself.

`methods/fedkseed.py` is `--method fedkseed`.  A method is one file: a docstring that cites the paper, three
constants (`KIND`, `PAPER`, `SENDS`; and `CLIENTS` where a usual fleet is not 8), a State (NamedTuple) and a
frozen dataclass `Method` whose fields are the hyper-parameters, each
`field(default, metadata={"symbol": .., "help": ..})`, with the functions below.
Third parties register a module with the same shape under the entry-point group `fleetune.methods`.

Listing reads the files as text (`ast`): it imports nothing.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fleetune.common.settings import Setting, of
from fleetune.common.settings import make as make_of
from fleetune.errors import UsageError
from fleetune.tuning.messages import Payload, ReplySpec

if TYPE_CHECKING:
    from fleetune.data import Batches
    from fleetune.models.model import Model

GROUP = "fleetune.methods"


class Reply(NamedTuple):
    """A device's answer that passed the door: who, the key it was given for this round, and what it sent."""

    client: int
    key: int
    payload: Payload


class Method(Protocol):
    """What a method is; `State` is the method's own NamedTuple (arrays, dicts of arrays, numbers, a Ledger).

    A method may also have `report(state) -> dict[str, float]`: its own figures, which go into the event of
    every round under "report"; and `kinds(state) -> [(payload, spec), ..]`, where devices are of several
    kinds: client c is then sent the (c modulo their number)-th payload instead of the broadcast, and its
    reply must look like that spec.
    """

    def init(self, model: Model, key: int) -> Any:
        """The global state before round 1; may attach what it trains to `model`, never changes base weights."""
        ...

    def broadcast(self, state: Any) -> Payload:
        """What the server sends to every device of a round."""
        ...

    def expects(self, state: Any) -> ReplySpec:
        """What a reply must look like: everything else is refused at the door."""
        ...

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """A device's round; `memory` is its own dict, kept for it between rounds (arrays and numbers)."""
        ...

    def aggregate(self, state: Any, replies: Iterable[Reply]) -> Any:
        """The server's round: replies come one at a time; none at all must give the state back."""
        ...

    def apply(self, model: Model, state: Any) -> None:
        """Make `model` the tuned model of `state` (from whatever state it was at), base weights untouched."""
        ...


@dataclass(frozen=True)
class Entry:
    """A method as the registry lists it, read without importing it."""

    name: str
    kind: str  # "ledger" or "adapter": what it leaves behind
    paper: str
    sends: str
    summary: str
    module: str
    clients: int  # size of the fleet unless the recipe says otherwise


def entries() -> dict[str, Entry]:
    """Every method there is, by name: ours and those that other packages register."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        found[path.stem] = _read(path.stem, f"{__name__}.{path.stem}", path.read_text(encoding="utf-8"))
    for point in entry_points(group=GROUP):
        found[point.name] = _read(point.name, point.module, _source(point.module))
    return found


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UsageError(
            f"the method module {module} is registered, but cannot be found",
            hint="reinstall or uninstall the package that registers it",
        )
    return Path(spec.origin).read_text(encoding="utf-8")


def _read(name: str, module: str, text: str) -> Entry:
    tree = ast.parse(text)
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    try:
        kind, paper, sends = (str(constants[c]) for c in ("KIND", "PAPER", "SENDS"))
    except KeyError as missing:
        raise UsageError(
            f"the method '{name}' ({module}) does not state {missing}",
            hint="a method file sets KIND, PAPER and SENDS to plain strings",
        ) from missing
    summary = (ast.get_docstring(tree) or "").strip().split("\n")[0]
    return Entry(name, kind, paper, sends, summary, module, int(str(constants.get("CLIENTS", 8))))


def entry(name: str) -> Entry:
    """The method called `name`; UsageError with a suggestion when there is none."""
    known = entries()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        guess = f" Did you mean '{close[0]}'?" if close else ""
        raise UsageError(f"no method named '{name}'.{guess}", hint="all methods: fleetune methods")
    return known[name]


def module_of(name: str) -> ModuleType:
    """The imported module of a method."""
    return importlib.import_module(entry(name).module)


def settings(name: str) -> list[Setting]:
    """The hyper-parameters of a method, in order."""
    return of(module_of(name).Method)


def make(name: str, values: Mapping[str, Any]) -> Method:
    """The method with these hyper-parameters (strings are parsed); RecipeError lists all that is wrong."""
    made: Method = make_of(
        module_of(name).Method, name, values, hint=f"settings and defaults: fleetune methods {name}"
    )
    return made
