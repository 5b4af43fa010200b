"""Spend a byte budget: choose the grid of each matrix, and keep the choice for a resumed compression.

Of each matrix only the options on the lower convex hull of cost over bytes are taken.  All matrices start with the smallest; the
step that saves most cost for a byte is taken next, while it fits.  As long as every step fits, the choice is optimal for the
bytes that it uses (Everett 1963).  The last steps fill what is left.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from safetensors.torch import load_file, save
from torch import Tensor

from fleetune import compression
from fleetune.common.display import human_bytes
from fleetune.common.events import BudgetMeasured, BudgetSpent
from fleetune.common.files import write_atomic
from fleetune.compression.jobs.progress import stop_if_asked
from fleetune.compression.layerwise import costs, sensitivity
from fleetune.compression.layerwise.driver import End, SolverPlan, experts_in, linears_of
from fleetune.compression.training import head_of, metadata
from fleetune.errors import FleetuneError, UsageError
from fleetune.models.net.model import Model
from fleetune.runs.compression_folder import CompressRequest
from fleetune.runs.listener import Listener

FILE: Final = "budget.safetensors"
TOKENS: Final = 3072  # of the windows that sensitivities are measured on: a third solves the embedding worse
CHOSEN: Final = ("bits", "grid")  # settings of a solver that the budget chooses


def check(request: CompressRequest, solver: compression.Solver) -> None:
    """Raise UsageError when a budget is asked for that the method or the other options have no place for."""
    if not request.limited:
        return
    flag = flag_of(request)
    if request.bytes and request.bits:
        raise UsageError("--bytes and --bits both say how large the file may be", hint="give one of them")
    own = {field.name for field in fields(cast(Any, solver))}
    if not solver.data or not own.issuperset((*CHOSEN, "group")):
        raise UsageError(
            f"{flag} chooses the grid of each matrix by the loss, for a method that solves for it: {request.method} does not",
            hint=f"--set bits={request.bits}" if request.bits else f"--method {compression.DEFAULT}",
        )
    if given := [name for name in (*CHOSEN, "group") if name in request.set]:
        raise UsageError(f"{flag} chooses {given[0]} for each matrix", hint=f"leave out --set {given[0]}=..")
    if request.length < 2:
        raise UsageError(
            f"{flag} goes by the gradient of predictions, and in windows of 1 token nothing is predicted",
            hint="give a larger --length",
        )


def flag_of(request: CompressRequest) -> str:
    """Return the option that the budget was given with."""
    return "--bits" if request.bits else "--bytes"


@dataclass(frozen=True)
class Budget:
    """The bytes of a file, and what they were spent on."""

    chosen: Mapping[str, tuple[str, int]]  # grid and bits of each matrix, by the weight's name
    kinds: Mapping[str, int]  # how many matrices are of each type of GGUF
    bytes: int  # of the file
    cost: float  # estimated KL divergence from the dense model, nats a token
    ends: Sequence[End]

    def plan(self, solver: compression.Solver) -> SolverPlan:
        """Return the solver of each matrix."""
        solvers = {
            name: cast("compression.Solver", replace(cast(Any, solver), grid=grid, bits=bits))
            for name, (grid, bits) in self.chosen.items()
        }
        return SolverPlan(solvers, self.ends)

    def report(self, listener: Listener) -> None:
        """Report the choice as an event and a line."""
        listener.event(BudgetSpent(kinds=dict(self.kinds), bytes=self.bytes, kl_divergence=self.cost))
        matrices = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        listener.note(f"{human_bytes(self.bytes)} as gguf: {matrices}")


class Room(NamedTuple):
    """How many bytes of a file there are for its matrices."""

    matrices: int
    others: int  # bytes of the header and all else
    reach: costs.Reach  # what the matrices can take

    @property
    def about(self) -> str:
        """Say what the room can buy, for the header."""
        least, most = (human_bytes(size + self.others) for size in (self.reach.least, self.reach.most))
        return (
            f"{human_bytes(self.matrices + self.others)} as gguf, of {least} to {most} possible · what each matrix tolerates is "
            "measured first (in all about 1.3 times as long as with one grid: --fast)"
        )


def room(model: Model, request: CompressRequest, beside: Callable[[Sequence[str]], int]) -> Room:
    """Return the room that a budget leaves for the matrices; `beside(names)` are the file's bytes without these.

    UsageError, with the least that can be met, for a budget that is too small.
    """
    matrices = costs.matrices(model)
    others, reach = beside(list(matrices)), costs.reach(model)
    of_bits = [c for c in costs.CANDIDATES if (c.grid, c.bits) == ("ggml", request.bits)]
    limit = costs.size_of(model, of_bits[0]) if of_bits else request.bytes - others
    if limit >= reach.least:
        return Room(limit, others, reach)
    size = reach.least + others
    need = f"{math.ceil(size / 1e3)}kB" if size < 1e6 else f"{math.ceil(size / 1e5) / 10:g}MB"
    raise UsageError(
        f"no file of {human_bytes(limit + others)} can hold this model: the smallest that llama.cpp's types allow here has "
        f"{human_bytes(size)}",
        hint=f"--bytes {need}   or remove parts of it first: --method llm-pruner",
    )


def measured(listener: Listener, model: Model, windows: Tensor, seed: int) -> costs.Costs:
    """Measure what each grid costs each matrix, on some of the windows int64 [n, length].  Interrupted on Ctrl-C."""
    some = windows[: max(1, TOKENS // windows.shape[1])]
    stopped, seen = "stopped before the first block; nothing is kept of the choice of grids", -1

    def on_window(number: int, count: int) -> None:
        listener.event(BudgetMeasured(phase="sensitivity", done=number, total=count))
        listener.progress("sensitivity", number, count, "")
        stop_if_asked(listener, stopped)

    def on_matrix(block: int, blocks: int, name: str) -> None:
        nonlocal seen
        if block != seen:
            seen = block
            listener.event(BudgetMeasured(phase="grids", done=block, total=blocks))
        listener.progress("grids", block, blocks, name.rsplit(".", 1)[-1])
        stop_if_asked(listener, stopped)

    names = [name for _, linears in linears_of(model) for name in linears]
    experts = [each for inside in experts_in(model) for each in inside]
    return costs.measure(
        model, some, sensitivity.measure(model, some, names, seed, on_window, experts), on_matrix
    )


def hull(options: Sequence[costs.Option]) -> list[costs.Option]:
    """Return the options on the lower convex hull of cost over bytes, by bytes."""
    found = list[costs.Option]()
    for option in sorted(options, key=lambda o: (o.bytes, o.cost)):
        if found and option.cost >= found[-1].cost:
            continue
        while len(found) > 1 and _saved(found[-2], found[-1]) <= _saved(found[-2], option):
            found.pop()
        found.append(option)
    return found


def _saved(small: costs.Option, large: costs.Option) -> float:
    """Return how much cost each further byte saves."""
    return (small.cost - large.cost) / (large.bytes - small.bytes)


def solve_budget(options: Mapping[str, Sequence[costs.Option]], budget: int) -> dict[str, costs.Option]:
    """Return an option for each name, of at most `budget` bytes together; ValueError where even the smallest take more."""
    hulls = {name: hull(each) for name, each in options.items()}
    chosen = {name: each[0] for name, each in hulls.items()}
    left = budget - sum(o.bytes for o in chosen.values())
    if left < 0:
        raise ValueError(f"{budget} bytes are too few")
    steps = [(-_saved(each[0], each[1]), name, 1) for name, each in hulls.items() if len(each) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, to = heapq.heappop(steps)
        each = hulls[name]
        if (more := each[to].bytes - each[to - 1].bytes) > left:
            continue  # a smaller matrix may still fit
        left -= more
        chosen[name] = each[to]
        if to + 1 < len(each):
            heapq.heappush(steps, (-_saved(each[to], each[to + 1]), name, to + 1))
    return chosen


def make_budget(measured: costs.Costs, room: Room) -> Budget:
    """Choose the grid of each matrix within the room."""
    for name, options in measured.options.items():
        if not all(math.isfinite(option.cost) for option in options):
            raise FleetuneError(
                f"what rounding costs {name} is not a finite number: the text's activations overflow",
                hint="compress with one grid: --fast",
            )
    best = solve_budget(measured.options, room.matrices)
    kinds = Counter(option.candidate.kind for option in best.values())
    return Budget(
        {name: (option.candidate.grid, option.candidate.bits) for name, option in best.items()},
        dict(sorted(kinds.items())),
        room.others + sum(option.bytes for option in best.values()),
        sum(option.cost for option in best.values()),
        measured.ends,
    )


# Keeping it -----------------------------------------------------------------------------------------


def save_choice(budget: Budget, folder: Path, origin: str) -> None:
    """Write the choice into the folder of finished blocks, with what it was made of.  StorageError when it cannot be."""
    tensors = {end.name: end.table for end in budget.ends if end.table is not None}
    ends = [(end.name, end.head) for end in budget.ends]
    head = {"origin": origin, "chosen": budget.chosen, "kinds": budget.kinds, "bytes": budget.bytes}
    head |= {"cost": budget.cost, "ends": ends}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, save(tensors, metadata=metadata(head, tensors)))


def saved_choice(folder: Path, origin: str) -> Budget | None:
    """Read the choice from the folder of finished blocks; None where it is not there, damaged, or of another origin."""
    head = head_of(folder / FILE)
    if head is None or head["origin"] != origin:
        return None
    tables = load_file(folder / FILE)
    ends = [End(name, share, tables.get(name)) for name, share in head["ends"]]
    chosen = {name: (grid, bits) for name, (grid, bits) in head["chosen"].items()}
    return Budget(chosen, head["kinds"], head["bytes"], head["cost"], ends)
