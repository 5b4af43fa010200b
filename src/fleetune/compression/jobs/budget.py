# SPDX-License-Identifier: Apache-2.0
"""Spend a byte budget: choose the grid of each matrix, and keep the choice for a resumed compression.

`parts/budget.safetensors` holds the choice and, as tensors, what the Hessians of embedding and head are sums of.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from fleetune import compression
from fleetune.common.display import counted, human_bytes
from fleetune.common.events import BudgetMeasured, BudgetSpent
from fleetune.common.files import write_atomic
from fleetune.common.shell import command
from fleetune.compression.training import checksum
from fleetune.errors import FleetuneError, Interrupted, UsageError
from fleetune.runs.compression_folder import CompressRequest
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from torch import Tensor

    from fleetune.compression import Solver
    from fleetune.compression.budget.costs import Costs, Reach
    from fleetune.compression.layerwise.driver import Plan
    from fleetune.models.net.model import Model

FILE: Final = "budget.safetensors"
TOKENS: Final = 8192  # of the windows that sensitivities are measured on
CHOSEN: Final = ("bits", "grid")  # settings of a solver that the budget chooses


def check(request: CompressRequest, solver: Solver) -> None:
    """Raise UsageError when a budget is asked for that the method or the other options have no place for."""
    if not asked(request):
        return
    flag = flag_of(request)
    if request.bytes and request.bpw:
        raise UsageError("--bytes and --bpw both say how large the file may be", hint="give one of them")
    own = {field.name for field in fields(cast(Any, solver))}
    if not solver.data or not own.issuperset((*CHOSEN, "group", "order")):
        raise UsageError(
            f"{flag} chooses the grid of each matrix by the loss, for a method that solves for it: {request.method} does not",
            hint=f"--method {compression.DEFAULT}",
        )
    if given := [name for name in (*CHOSEN, "group", "search") if name in request.set]:
        raise UsageError(f"{flag} chooses {given[0]} for each matrix", hint=f"leave out --set {given[0]}=..")
    if cast(Any, solver).order == "gar":
        raise UsageError(
            f"{flag} may choose super-blocks, whose groups order=gar would move",
            hint="--set order=static or none",
        )
    if request.calibrate != "server":
        raise UsageError(
            f"{flag} needs the text on this machine, and --calibrate {request.calibrate} leaves it where it is",
            hint=f"leave out {flag}, or calibrate on --text",
        )


def asked(request: CompressRequest) -> bool:
    """Tell whether a request has a budget."""
    return bool(request.bytes or request.bpw)


def flag_of(request: CompressRequest) -> str:
    """Return the option that the budget was given with."""
    return "--bytes" if request.bytes else "--bpw"


@dataclass(frozen=True)
class Budget:
    """The bytes of a file, and what they were spent on."""

    chosen: Mapping[str, tuple[str, int]]  # grid and bits of each matrix, by the weight's name
    kinds: Mapping[str, int]  # how many matrices are of each type of GGUF
    bytes: int  # of the file
    cost: float  # estimated KL divergence from the dense model, nats a token
    ends: Sequence[tuple[str, float, Tensor | None]]  # see `driver.End`

    def plan(self, solver: Solver) -> Plan:
        """Return the solver of each matrix."""
        from fleetune.compression.layerwise.driver import End, Plan

        solvers = {
            name: cast("Solver", replace(cast(Any, solver), grid=grid, bits=bits))
            for name, (grid, bits) in self.chosen.items()
        }
        return Plan(solvers, [End(*end) for end in self.ends])

    def report(self, listener: Listener) -> None:
        """Report the choice as an event and a line."""
        listener.event(BudgetSpent(kinds=dict(self.kinds), bytes=self.bytes, kl_divergence=self.cost))
        told = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        listener.note(f"{human_bytes(self.bytes)} as gguf: {told}")


class Room(NamedTuple):
    """How many bytes of a file there are for its matrices."""

    matrices: int
    others: int  # bytes of the header and all else
    reach: Reach  # what the matrices can take

    @property
    def about(self) -> str:
        """Say what the room can buy, for the header."""
        least, most = (human_bytes(size + self.others) for size in (self.reach.least, self.reach.most))
        return (
            f"{human_bytes(self.matrices + self.others)} as gguf, where {least} to {most} can be had · each matrix "
            f"{', '.join(self.reach.kinds)}, by sensitivities that the run measures first (up to 4 times one grid's time)"
        )


def room(model: Model, request: CompressRequest, beside: Callable[[Sequence[str]], int]) -> Room:
    """Return the room that a budget leaves for the matrices; `beside(names)` are the file's bytes without these.

    UsageError, with the least that can be met, for a budget that is too small.
    """
    from fleetune.compression.budget import costs

    matrices = costs.matrices(model)
    others, weights = beside(list(matrices)), sum(W.numel() for W in matrices.values())
    limit = request.bytes - others if request.bytes else int(request.bpw * weights / 8)
    reach = costs.reach(model)
    if limit < reach.least:
        raise _too_small(request, model, reach.least, others, weights)
    return Room(limit, others, reach)


def spend(listener: Listener, model: Model, windows: Tensor, seed: int, room: Room) -> Budget:
    """Measure what each grid costs each matrix on some of the windows, and choose."""
    return chosen(measured(listener, model, windows, seed), room)


def measured(listener: Listener, model: Model, windows: Tensor, seed: int) -> Costs:
    """Measure what each grid costs each matrix, on some of the windows int64 [n, length].  Interrupted on Ctrl-C."""
    from fleetune.compression.budget import costs, sensitivity
    from fleetune.compression.layerwise.driver import experts_in, linears_of

    some = windows[: max(1, TOKENS // windows.shape[1])]

    seen = -1  # block whose matrices are at work

    def on_window(number: int, count: int) -> None:
        listener.event(BudgetMeasured(phase="sensitivity", done=number, total=count))
        _checked(listener, "sensitivity", number, count, "")

    def on_matrix(block: int, blocks: int, name: str) -> None:
        nonlocal seen
        if block != seen:
            seen = block
            listener.event(BudgetMeasured(phase="grids", done=block, total=blocks))
        _checked(listener, "grids", block, blocks, name.rsplit(".", 1)[-1])

    names = [name for _, linears in linears_of(model) for name in linears]
    experts = [each for inside in experts_in(model) for each in inside]
    found = sensitivity.measure(model, some, names, seed, on_window, experts)
    if found.estimated:
        listener.note(
            f"how much the experts of {counted(len(found.estimated), 'layer')} change the predictions is an estimate: they "
            "return something else than the sum of what each computes"
        )
    return costs.measure(model, some, found, on_matrix)


def chosen(costs: Costs, room: Room) -> Budget:
    """Choose the grid of each matrix within the room."""
    from fleetune.compression.budget import choose

    lost = [
        name for name, options in costs.options.items() if not all(math.isfinite(o.cost) for o in options)
    ]
    if lost:
        raise FleetuneError(
            f"what rounding costs {lost[0]} is not a finite number: the text's activations overflow",
            hint="compress with one grid: leave out --bytes and --bpw",
        )
    found = choose.choose(costs.options, room.matrices)
    kinds = Counter(option.candidate.kind for option in found.values())
    return Budget(
        {name: (option.candidate.grid, option.candidate.bits) for name, option in found.items()},
        dict(sorted(kinds.items())),
        room.others + sum(option.bytes for option in found.values()),
        sum(option.cost for option in found.values()),
        [(end.name, end.head, end.table) for end in costs.ends],
    )


def _checked(listener: Listener, what: str, number: int, count: int, text: str) -> None:
    listener.progress(what, number, count, text)
    if listener.stop_requested:
        raise Interrupted("stopped before the first block; nothing is kept of the choice of grids")


def _too_small(request: CompressRequest, model: Model, least: int, others: int, weights: int) -> UsageError:
    from fleetune.models.families.widths import FAMILIES

    if request.bytes:
        size = least + others
        prune = command("compress", request.model, "--method", "llm-pruner")
        fewer = f"   or remove parts of it first: {prune}" if model.net.config.model_type in FAMILIES else ""
        need = f"{math.ceil(size / 1e3)}kB" if size < 1e6 else f"{math.ceil(size / 1e5) / 10:g}MB"
        return UsageError(
            f"no file of {human_bytes(request.bytes)} can hold this model: the smallest that llama.cpp's types allow here has "
            f"{human_bytes(size)}",
            hint=f"--bytes {need}{fewer}",
        )
    bits = math.ceil(800 * least / weights) / 100
    return UsageError(
        f"{request.bpw:g} bits a weight are too few: the smallest types that fit this model take {8 * least / weights:.3f}",
        hint=f"--bpw {bits:g}",
    )


# Keeping it -----------------------------------------------------------------------------------------


def save(budget: Budget, folder: Path, origin: str) -> None:
    """Write the choice into the folder of finished blocks, with what it was made of.  StorageError when it cannot be."""
    from safetensors.torch import save as to_bytes

    tensors = {f"table.{name}": table for name, _, table in budget.ends if table is not None}
    head = json.dumps(
        {
            "chosen": budget.chosen,
            "kinds": budget.kinds,
            "bytes": budget.bytes,
            "cost": budget.cost,
            "ends": [(name, share) for name, share, _ in budget.ends],
            "origin": origin,
        }
    )
    about = {"budget": head, "crc32": checksum.of_tensors(head, tensors.items())}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, to_bytes(tensors, metadata=about))


def saved(folder: Path, origin: str, model: Model) -> Budget | None:
    """Read the choice from the folder of finished blocks.

    None where it is not there, damaged, of another origin, or of other grids than the model's weights can have.
    """
    from safetensors import SafetensorError, safe_open

    from fleetune.compression.budget import costs

    try:
        with safe_open(folder / FILE, framework="pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in set(opened.keys())}
        if checksum.of_tensors(about["budget"], tensors.items()) != about["crc32"]:
            return None
        raw = json.loads(about["budget"])
        if raw["origin"] != origin:
            return None
        ends = [(name, share, tensors.get(f"table.{name}")) for name, share in raw["ends"]]
        chosen = {name: (grid, bits) for name, (grid, bits) in raw["chosen"].items()}
        found = Budget(chosen, raw["kinds"], raw["bytes"], raw["cost"], ends)
        return found if costs.are_possible(chosen, model) else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None
