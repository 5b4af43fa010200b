"""What the contract suite runs every compressor on: matrices with Hessians, a tiny random llama, and a few rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fleetune import compression, models
from fleetune.compression import Pruner, Solved, Solver, Trainer
from fleetune.compression.layerwise import hessian
from fleetune.data import Encoded
from fleetune.errors import Interrupted
from fleetune.models import Model
from fleetune.models.artefact import dense

STEPS = {"steps": 4, "batch_size": 3, "save_every": 3}
# Settings with which a method runs on the tiny model in a second.  A method that is not named here runs with its defaults.
QUICK: dict[str, dict[str, Any]] = {
    "gkd": {"teacher": "another", "max_new_tokens": 6} | STEPS,
    "llm-pruner": {"first": 0, "last": 0, "round_to": 4, "ratio": 0.4} | STEPS,
}
# Options that change what is computed keep the contract too.
VARIANTS = [
    "optq:grid=asymmetric,bits=3",
    "optq:group=0",
    "rtn:grid=universal",
    "sparsegpt:n=2",
    "sparsegpt:bits=4",
    "sparsegpt:sparsity=0",
    "gkd:lmbda=1",
    "gkd:lmbda=0,seq_kd=true,beta=0",
    "llm-pruner:importance=mixed,scope=global",
]


def values(case: str) -> dict[str, Any]:
    """The settings of a case such as `optq` or `optq:group=0,bits=3`."""
    name, _, changes = case.partition(":")
    return QUICK.get(name, {}) | dict(pair.split("=") for pair in changes.split(",") if pair)


def method(case: str) -> Any:
    return compression.make(case.partition(":")[0], values(case))


def solver(case: str) -> Solver:
    made = method(case)
    assert isinstance(made, Solver)
    return made


def trainer(case: str) -> Trainer:
    made = method(case)
    assert isinstance(made, Trainer)
    return made


def pruner(case: str) -> Pruner:
    made = method(case)
    assert isinstance(made, Pruner)
    return made


def matrix(R: int, C: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(W float32 [R, C], H float32 [C, C] of inputs whose variances fall as those of language models do)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * C, C, generator=g) * torch.arange(1, C + 1) ** -0.7
    H = torch.zeros(C, C)
    hessian.accumulate(H, x)
    return torch.randn(R, C, generator=g), hessian.mirrored(H)


def solved(solver: Solver, W: Tensor, H: Tensor) -> tuple[Tensor, Solved]:
    """The dense result, and the whole answer, of copies."""
    answer = solver.solve(W.clone(), H.clone())
    return dense(answer.weight), answer


def loss(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) in float64."""
    D = W.double() - Q.double()
    return float(torch.trace(D @ H.double() @ D.T))


def rows(count: int = 12, seed: int = 0) -> list[Encoded]:
    """Short texts of a few letters, with an end token."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt, answer = rng.integers(60, 70, rng.integers(2, 8)), rng.integers(60, 70, rng.integers(1, 16))
        made.append(Encoded(np.array([256, *prompt, *answer, 257], np.int32), 1 + len(prompt)))
    return made


def whole() -> Model:
    return models.tiny_llama(0, layers=4)


def bits(model: Model) -> str:
    return models.digest(models.named_tensors(model.net))


def stop_at(last: int, seen: list[int]) -> Callable[..., None]:
    """A callback that notes every step or row, and raises Interrupted in `last`."""

    def on(done: int, total: int, *_: object) -> None:
        seen.append(done)
        if done == last:
            raise Interrupted("stopped")

    return on


def distilled(case: str, folder: Path, on_step: Callable[..., None]) -> tuple[Model, Model]:
    """(student, teacher) after the training of a case."""
    chosen, teacher = trainer(case), models.tiny_llama(1, layers=4)
    student = chosen.student(whole())
    chosen.train(student, teacher, rows(), 7, folder, on_step)
    return student, teacher


def pruned(case: str, folder: Path, on_row: Callable[..., None], on_step: Callable[..., None]) -> Model:
    """The model of a case after pruning and recovery."""
    chosen, model = pruner(case), whole()
    small = chosen.prune(model, rows(), on_row)
    return chosen.train(small, rows(), 7, folder, on_step)
