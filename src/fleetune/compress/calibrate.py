# SPDX-License-Identifier: Apache-2.0
"""The driver of all solvers: block after block, each with the inputs that it will meet once those before are done.

For every decoder block: run the calibration windows through it and sum the Hessians of its linear layers (`hessian`;
layers that read the same tensor share one), solve them, then run the windows through the compressed block, whose
outputs are the next block's inputs.  Embedding, norms and head stay as they are.

Memory is the model (or, of one that stays in its files, a block of it: `pages`), one block's Hessians and dense
copies, and the windows' hidden states; never a second model (`costs` has the sum).  Every finished block is a file in
`parts`; a run that was killed reads those it finds and goes on with the next.

The Hessians come from a `Source`: the windows at hand (`Stream`), or devices that have theirs (`federated`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fleetune.adapters.layers import layers_of
from fleetune.compress import Solver
from fleetune.compress.hessian import accumulate, relative_error
from fleetune.deploy.master import Quantised, stored, unpack
from fleetune.errors import DataError, RecipeError
from fleetune.files import write_atomic
from fleetune.models import Model
from fleetune.pages import held


@dataclass(frozen=True)
class Matrix:
    """What became of one linear layer."""

    name: str
    error: float  # ||WX - QX||^2 / ||WX||^2 on the calibration windows; NaN without any
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """What became of one decoder block."""

    number: int
    matrices: tuple[Matrix, ...]
    seconds: float


def part(folder: Path, number: int) -> Path:
    """The file of a finished block."""
    return folder / f"block-{number:04d}.safetensors"


class Parts(Mapping[str, "Quantised | Tensor"]):
    """Finished blocks on the disk, by parameter; a weight is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[
            str, tuple[int, tuple[int, int, int] | None]
        ] = {}  # -> block, (bits, group, columns)
        self.blocks: list[Block] = []

    def open(self, number: int) -> bool:
        """Take in a block's file; False when there is none that is whole."""
        try:
            with safe_open(part(self.folder, number), framework="pt") as opened:
                head = json.loads((opened.metadata() or {})["block"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        for name, grid in head["weights"].items():
            self._where[name] = (number, None if grid is None else tuple(grid))
        matrices = (Matrix(n, float(e), tuple(notes)) for n, e, notes in head["matrices"])
        self.blocks.append(Block(number, tuple(matrices), head["seconds"]))
        return True

    def put(self, block: Block, weights: Mapping[str, Quantised | Tensor]) -> None:
        """Keep a finished block.  StorageError when it cannot be written."""
        grids = {
            n: (w.bits, w.group, w.codes.shape[1]) if isinstance(w, Quantised) else None
            for n, w in weights.items()
        }
        matrices = [[m.name, m.error, m.notes] for m in block.matrices]
        head = json.dumps({"weights": grids, "matrices": matrices, "seconds": block.seconds})
        tensors = {k: v for n, w in weights.items() for k, v in stored(n, w).items()}
        write_atomic(part(self.folder, block.number), save(tensors, metadata={"format": "pt", "block": head}))
        self.open(block.number)

    def __getitem__(self, name: str) -> Quantised | Tensor:
        number, grid = self._where[name]
        with safe_open(part(self.folder, number), framework="pt") as opened:
            if grid is None:
                dense: Tensor = opened.get_tensor(name)
                return dense
            bits, group, columns = grid
            codes, scale, zero = (opened.get_tensor(f"{name}.{x}") for x in ("codes", "scale", "zero"))
            return Quantised(unpack(codes, bits, columns), scale, zero, bits, group)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def linears_of(model: Model) -> list[tuple[nn.Module, dict[str, nn.Linear]]]:
    """(block, its linear layers by their name in the net) for every decoder block."""
    modules = dict(model.net.named_modules())
    found = []
    for layer in layers_of(model.net):
        inside = modules[layer.name].named_modules()
        found.append(
            (modules[layer.name], {f"{layer.name}.{n}": m for n, m in inside if isinstance(m, nn.Linear)})
        )
    return found


def check(model: Model, solver: Solver) -> None:
    """RecipeError with everything in the way: matrices that the settings do not fit, weights that are no numbers."""
    problems = []
    for block, linears in linears_of(model):
        with held(model, block):
            for name, linear in linears.items():
                R, C = linear.weight.shape
                if problem := solver.check(f"{name}.weight", R, C):
                    problems.append(problem)
                if not _finite(linear.weight):
                    problems.append(f"{name}.weight holds values that are not finite")
    if problems:
        more = [f"and {len(problems) - 6} more"] if len(problems) > 6 else []
        raise RecipeError(problems[:6] + more, hint="choose settings that fit every layer")


def _finite(weight: Tensor) -> bool:
    """Whether all values are numbers, by their sum in float64: no mask as large as the weights."""
    return bool(torch.isfinite(weight.sum(dtype=torch.float64)))


def windows(ids: Sequence[np.ndarray], length: int, count: int) -> Tensor:
    """int64 [count', length]: the first windows of all texts' tokens joined; DataError when they fill less than one."""
    joined = np.concatenate([np.zeros(0, np.int64), *ids])[: length * count]
    whole = len(joined) // length
    if not whole:
        raise DataError(
            f"the calibration text has {len(joined)} tokens, a window needs {length}",
            hint="give more text, or a smaller --length",
        )
    return torch.from_numpy(joined[: whole * length].astype(np.int64)).view(whole, length)


@torch.inference_mode()
def written(model: Model, length: int, count: int, seed: int) -> Tensor:
    """int64 [count, length]: windows that the model writes itself, so that nobody's text is needed.

    Sampled from its own distribution from the token that begins a text on, past every end of one.
    """
    start = next(t for t in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id, 0) if t is not None)
    rows = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for first in range(0, count, 8):
            begin = torch.full((min(8, count - first), 1), start, device=model.device)
            out = model.net.generate(
                begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=start,
            )  # fmt: skip
            rows.append(out.cpu())
    return torch.cat(rows)


class Source(Protocol):
    """Where the Hessians of a block's layers come from; blocks are asked for in order."""

    def hessians(self, number: int, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """H float32 [C, C] by layer name: the sum of 2 x x^T over all tokens."""
        ...

    def advance(self, number: int) -> None:
        """Go on to the next block; this one's layers have their compressed weights while it is called."""
        ...


@torch.inference_mode()
def run(
    model: Model,
    solver: Solver,
    calibration: Tensor | Source | None,
    folder: Path,
    on_matrix: Callable[[int, int, str], None] = lambda block, blocks, name: None,
    on_block: Callable[[Block, int], None] = lambda block, blocks: None,
) -> Parts:
    """Compress every block of `model` (which is as it was afterwards); goes on with what `folder` holds already.

    calibration: int64 [N, length] windows of tokens, or where else Hessians come from; None for a solver that needs
    none.  `on_matrix(block, blocks, name)` is called before every matrix and may raise to stop; finished blocks stay
    in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts, blocks = Parts(folder), linears_of(model)
    source = Stream(model, calibration) if isinstance(calibration, Tensor) else calibration
    for number, (block, linears) in enumerate(blocks):
        with held(model, block):
            if not parts.open(number):
                began = time.monotonic()
                H = source.hessians(number, linears) if source else {}
                weights, matrices = dict[str, Quantised | Tensor](), list[Matrix]()
                for name, linear in linears.items():
                    on_matrix(number, len(blocks), name)
                    weights[f"{name}.weight"], matrix = _solve(solver, name, linear, H.get(name))
                    matrices.append(matrix)
                del H  # before the windows go through the block
                parts.put(Block(number, tuple(matrices), round(time.monotonic() - began, 3)), weights)
            on_block(parts.blocks[-1], len(blocks))
            if source and number + 1 < len(blocks):
                with placed(linears, parts):
                    source.advance(number)
    return parts


def _solve(
    solver: Solver, name: str, linear: nn.Linear, H: Tensor | None
) -> tuple[Quantised | Tensor, Matrix]:
    W = linear.weight.detach().float().cpu()
    C = W.shape[1]
    solved = solver.solve(W.clone(), torch.zeros(C, C) if H is None else H.clone())
    dense = solved.weight.dense() if isinstance(solved.weight, Quantised) else solved.weight
    error = float("nan") if H is None else relative_error(W, dense, H)
    weight = solved.weight if isinstance(solved.weight, Quantised) else dense.to(linear.weight.dtype)
    return weight, Matrix(name, error, solved.notes)


@contextmanager
def placed(linears: Mapping[str, nn.Linear], parts: Mapping[str, Quantised | Tensor]) -> Iterator[None]:
    """The linear layers with their compressed weights, while the block runs."""
    before = {name: linear.weight.data for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            weight = parts[f"{name}.weight"]
            dense = weight.dense() if isinstance(weight, Quantised) else weight
            linear.weight.data = dense.to(linear.weight)
        yield
    finally:
        for name, linear in linears.items():
            linear.weight.data = before[name]


class _Stop(Exception):
    """Ends a forward pass once its first block's input is known."""


class Stream:
    """The windows' hidden states, moved on a block at a time."""

    def __init__(self, model: Model, calibration: Tensor) -> None:
        self.model, self.blocks = model, [block for block, _ in linears_of(model)]
        self.kwargs = _keywords(model, self.blocks, calibration[:1])
        self.states = self.begin(calibration)

    def begin(self, calibration: Tensor) -> list[Tensor]:
        """The states that go into the first block, for windows of the same length."""
        states: list[Tensor] = []
        with _caught(self.blocks[0], lambda args, kwargs: states.append(_input(args, kwargs))):
            for window in calibration:
                try:
                    self.model.net(input_ids=window[None].to(self.model.device), use_cache=False)
                except _Stop:
                    continue
        return states

    def _forward(self, number: int, state: Tensor) -> Tensor:
        out = self.blocks[number](state, **self.kwargs[number])
        return out if isinstance(out, Tensor) else out[0]

    def hessians(self, number: int, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """H by layer name; layers that read one tensor have the same H."""
        H: dict[str, Tensor] = {}
        last: list[Any] = [None, ""]  # the tensor read last, and the first layer that read it

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0]
                if x is last[0]:
                    H[name] = H[last[1]]
                    return
                if name not in H:
                    H[name] = torch.zeros(x.shape[-1], x.shape[-1])
                accumulate(H[name], x.cpu())
                last[:] = [x, name]

            return see

        handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
        try:
            for state in self.states:
                self._forward(number, state)
                last[:] = [None, ""]
        finally:
            for handle in handles:
                handle.remove()
        return H

    def advance(self, number: int) -> None:
        """Make the states what comes out of the block."""
        for i, state in enumerate(self.states):
            self.states[i] = self._forward(number, state)


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    state: Tensor = args[0] if args else kwargs["hidden_states"]
    return state


@contextmanager
def _caught(block: nn.Module, take: Callable[[tuple[Any, ...], Mapping[str, Any]], None]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args, kwargs)
        raise _Stop

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _keywords(model: Model, blocks: Sequence[nn.Module], window: Tensor) -> list[dict[str, Any]]:
    """What each block is called with beside the hidden states (masks, positions): the same for every window."""
    found: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        if len(found) == len(blocks):
            raise _Stop  # neither the last block nor the head is needed

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        model.net(input_ids=window.to(model.device), use_cache=False)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found
