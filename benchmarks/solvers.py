"""OPTQ and SparseGPT: our column loop against the papers' algorithm written plainly, a torch call a column.

Both get the same weights, the same Hessian and grids by the same rule; "plain" is algorithm 1 of arXiv 2210.17323 and
of arXiv 2301.00774 as published: H damped, inverted and factored, blocks of 128 columns, in a block one column after
another.  Inputs have the uneven, correlated spectrum of real ones (that decides what error feedback is worth, not
how long it takes).  Whole blocks are compressed by our driver with our solvers, and as published: Hessians of every
layer for itself, the windows through the block, each layer by the plain loop, the windows through it again.
"""

import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks import shape
from benchmarks.harness import Result, Row, Setting, compare, measure
from fleetune.compression import Solved, Solver
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.activations import HiddenStates
from fleetune.compression.layerwise.grids import Grid
from fleetune.compression.layerwise.hessian import share, trace
from fleetune.compression.methods import optq, sparsegpt
from fleetune.models import Model
from fleetune.models.artefact import Quantised

GROUP, BLOCK, DAMPING = 32, 128, 0.01


def plain(W: Tensor, H: Tensor, pick: Callable[[Tensor, Tensor, int], Callable[[int], Tensor]]) -> Tensor:
    """The published loop: `pick(W1, U1, first)` is asked for every block and gives a column's settled values."""
    C = W.shape[1]
    W, H = W.clone(), H.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    W[:, dead] = 0.0
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    out = torch.zeros_like(W)
    for first in range(0, C, BLOCK):
        last = min(first + BLOCK, C)
        W1, E1, U1 = W[:, first:last].clone(), torch.zeros(len(W), last - first), U[first:last, first:last]
        settle = pick(W1, U1, first)
        for i in range(last - first):
            q = settle(i)
            out[:, first + i] = q
            error = (W1[:, i] - q) / U1[i, i]
            W1[:, i:] -= error.unsqueeze(1).matmul(U1[i, i:].unsqueeze(0))
            E1[:, i] = error
        W[:, last:] -= E1.matmul(U[first:last, last:])
    return out


@dataclass(frozen=True)
class PlainOptq:
    """GPTQ's loop with groups of 32, as a solver of the driver."""

    data: ClassVar[bool] = True
    kind: str = "ggml"

    def check(self, name: str, R: int, C: int) -> str:
        return ""

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        grid, scales, zeros, codes = Grid(self.kind, 4), list[Tensor](), list[Tensor](), list[Tensor]()

        def pick(W1: Tensor, U1: Tensor, first: int) -> Callable[[int], Tensor]:
            def settle(i: int) -> Tensor:
                if (first + i) % GROUP == 0:
                    scale, zero = grid.find(W1[:, i : i + GROUP])
                    scales.append(scale)
                    zeros.append(zero)
                code = grid.codes(W1[:, i : i + 1], scales[-1], zeros[-1])[:, 0]
                codes.append(code)
                return scales[-1] * (code - zeros[-1])

            return settle

        plain(W, H, pick)
        parts = (torch.stack(part, 1) for part in (codes, scales, zeros))
        code, scale, zero = parts
        return Solved(Quantised(code.to(torch.uint8), scale.half(), zero.to(torch.uint8), 4, GROUP))


@dataclass(frozen=True)
class PlainSparse:
    """SparseGPT's loop, half of every block pruned, as a solver of the driver."""

    data: ClassVar[bool] = True

    def check(self, name: str, R: int, C: int) -> str:
        return ""

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        def pick(W1: Tensor, U1: Tensor, first: int) -> Callable[[int], Tensor]:
            score = W1.square() / U1.diagonal().square()
            mask = score <= score.flatten().sort().values[int(score.numel() * 0.5)]
            return lambda i: W1[:, i].masked_fill(mask[:, i], 0.0)

        return Solved(plain(W, H, pick))


OURS: dict[str, Solver] = {"OPTQ": optq.Solver(), "SparseGPT": sparsegpt.Solver()}
PLAIN: dict[str, Solver] = {"OPTQ": PlainOptq(), "SparseGPT": PlainSparse()}


def run(setting: Setting) -> Result:
    """A matrix of each shape, then whole blocks."""
    result = Result()
    for name in OURS:
        for R, C in ((64, 96),) if setting.quick else ((576, 576), (1536, 576), (576, 1536)):
            result.rows += _matrix(setting, result, name, R, C)
        result.rows += _blocks(setting, result, name)
    return result


def problem(R: int, C: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W [R, C] and H [C, C] of 4,096 inputs whose spectrum falls as 1/k, with a few channels far above the others."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(C, C, generator=g)).Q
    X = (torch.randn(4096, C, generator=g) / torch.arange(1, C + 1)) @ mix
    X[:, torch.randperm(C, generator=g)[: C // 100]] *= 20
    return torch.randn(R, C, generator=g) * 0.04, 2 * X.T @ X


def dense(solved: Solved) -> Tensor:
    """The weights of an answer."""
    return solved.weight.dense() if isinstance(solved.weight, Quantised) else solved.weight


def _solve(solver: Solver, W: Tensor, H: Tensor) -> Solved:
    return solver.solve(W.clone(), H.clone())


def _matrix(setting: Setting, result: Result, name: str, R: int, C: int) -> list[Row]:
    W, H = problem(R, C)
    solvers = {"ours": OURS[name], "plain": PLAIN[name]}
    times = measure({k: functools.partial(_solve, s, W, H) for k, s in solvers.items()}, setting.repeats(5))
    result.keep(f"{name} {R}x{C}", times)
    ours, theirs = (share(trace(W - dense(_solve(s, W, H)), H), trace(W, H)) for s in solvers.values())
    of = f"{name}, a matrix of {R} x {C}"
    return [
        compare(f"{of}: time", times["ours"], times["plain"], "cost", 0.5),
        Row(f"{of}: ||WX - QX||² / ||WX||²", ours, theirs, "", ours / theirs, "cost", 1.01),
    ]


def _blocks(setting: Setting, result: Result, name: str) -> list[Row]:
    config = shape.config(setting.quick)
    config.num_hidden_layers, config.intermediate_size = 4, config.intermediate_size // GROUP * GROUP
    model = shape.model_of(config)
    windows = torch.randint(
        0, config.vocab_size, (4 if setting.quick else 16, 256), generator=torch.Generator().manual_seed(0)
    )

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            driver.run(model, OURS[name], windows, Path(folder))

    def theirs() -> None:
        published(model, PLAIN[name], windows)

    times = measure({"ours": ours, "plain": theirs}, setting.repeats(3))
    result.keep(f"{name} blocks", times)
    note = (
        "16 windows of 256 tokens, four blocks of SmolLM2-135M's shape; Hessians and forward passes included"
    )
    return [compare(f"{name}, whole blocks: time", times["ours"], times["plain"], "cost", 0.75, note)]


@torch.inference_mode()
def published(model: Model, solver: Solver, windows: Tensor) -> None:
    """Compress all blocks in the published order; the model is as it was afterwards."""
    stream = HiddenStates(model, windows)
    for number, (_, linears) in enumerate(driver.linears_of(model)):
        H = {n: torch.zeros(m.in_features, m.in_features) for n, m in linears.items()}

        def add(name: str, H: dict[str, Tensor] = H) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]) * math.sqrt(2)
                H[name] += x.T @ x

            return hook

        handles = [m.register_forward_pre_hook(add(n)) for n, m in linears.items()]
        for state in stream.states:
            stream.forward(number, state)
        for handle in handles:
            handle.remove()
        with driver.restored_weights(linears):
            for n, m in linears.items():
                m.weight.data = dense(solver.solve(m.weight.data, H[n]))
            stream.advance(number)
