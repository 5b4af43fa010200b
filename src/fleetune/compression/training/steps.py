# SPDX-License-Identifier: Apache-2.0
"""Run AdamW steps with a learning-rate schedule, gradient clipping, and checkpoints to resume from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fleetune.compression.training.checkpoint import restore, store
from fleetune.data.encode import Batch
from fleetune.errors import FleetuneError, Interrupted

Result = TypeVar("Result")


@dataclass(frozen=True)
class Checkpoints:
    """The folder of a training's checkpoints, and how often they are written."""

    folder: Path
    origin: str  # the fingerprint of the training
    every: int  # steps between two checkpoints; the last step is always saved

    def run(
        self,
        batches: Iterable[Batch],
        steps: int,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        step: Callable[[int, Batch], Result],
        report: Callable[[int, Result], None],
    ) -> None:
        """Call `step(t, batch)`, t from 0, for every step that the checkpoint does not have yet.

        `report(t + 1, result)` is called after each.  It may raise Interrupted, which saves the step.
        """
        done = restore(self.folder, self.origin, parameters, optimizer)
        for t, batch in enumerate(itertools.islice(batches, done, None), done):
            result = step(t, batch)
            if (t + 1) % self.every == 0 or t + 1 == steps:
                store(self.folder, self.origin, t + 1, parameters, optimizer)
            try:
                report(t + 1, result)
            except Interrupted:
                store(self.folder, self.origin, t + 1, parameters, optimizer)
                raise


def learning_rate(t: int, steps: int, highest: float, warmup: float) -> float:
    """Return the learning rate of step t, from 0: a linear rise over the share `warmup`, then a linear fall to 0."""
    rise = math.ceil(warmup * steps)
    return highest * ((t + 1) / rise if t < rise else (steps - t) / (steps - rise))


def clipped_step(
    loss: Tensor,
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    t: int,
    rate: float,
    clip: float,
    hint: str,
) -> None:
    """Clip the gradients of `loss`, which are there already, to the norm `clip`, and take step t at this learning rate.

    FleetuneError, with `hint`, when the loss or the norm is not finite; the weights are unchanged then.
    """
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        raise FleetuneError(
            f"the loss is {loss.item()} in step {t + 1}, its gradient's norm {norm.item()}", hint=hint
        )
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


@contextmanager
def all_trainable(net: nn.Module) -> Iterator[None]:
    """Compute gradients of all weights while the block runs."""
    net.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        net.zero_grad(set_to_none=True)
        net.requires_grad_(False)
