# SPDX-License-Identifier: Apache-2.0
"""Training a pruned model's LoRA on rows, so that it finds back to what it was (LLM-Pruner, section 3.3).

The loss is the cross-entropy of the responses (of plain text: of all tokens).  The factors are trained in fp32 by
AdamW on frozen weights and folded into them at the end, so memory is the model, one batch's activations, and little
more.  Dropout, order and start are functions of the seed and the step, so a training that goes on from its kept steps
ends where the whole one does, bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from fleetune.adapters import Lora, attach, detach, merge, trainable, training
from fleetune.compression.distillation.training_state import restore, store
from fleetune.data import Batches, Encoded
from fleetune.data.encode import Batch
from fleetune.errors import FleetuneError, Interrupted
from fleetune.evaluation.losses import pad_id
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.model import Model

CLIP = 1.0  # of the gradient's norm


@dataclass(frozen=True)
class LoraRecovery:
    """How a LoRA is trained."""

    lora: Lora
    steps: int
    batch_size: int
    rates: Sequence[float]  # the learning rate of each step
    save_every: int

    def train(
        self,
        model: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        on_step: Callable[[int, int, float], None],
    ) -> None:
        """Train in place and fold the factors in; goes on with what `folder` holds.

        `on_step(step, steps, loss)` is called after every step and may raise Interrupted, which keeps the step; then
        the weights are what they were.  FleetuneError when the loss or its gradient is not finite any more.
        """
        origin = self._origin(model, rows, seed)
        attach(model, self.lora, seed=seed)
        try:
            self._steps(model, rows, seed, folder, origin, on_step)
        except BaseException:
            detach(model)
            raise
        merge(model)

    def _steps(
        self,
        model: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        origin: str,
        on_step: Callable[[int, int, float], None],
    ) -> None:
        parameters = trainable(model)
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=0.0)
        done = restore(folder, origin, parameters, optimizer)
        batches = Batches(rows, pad_id(model), seed, model.device).steps(self.steps, self.batch_size)
        for t, batch in enumerate(itertools.islice(batches, done, None), done):
            with training(model, _dropout_key(seed, t)):
                loss = self._update(model, batch, optimizer, parameters, t)
            if (t + 1) % self.save_every == 0 or t + 1 == self.steps:
                store(folder, origin, t + 1, parameters, optimizer)
            try:
                on_step(t + 1, self.steps, loss)
            except Interrupted:
                store(folder, origin, t + 1, parameters, optimizer)
                raise

    def _update(
        self,
        model: Model,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        t: int,
    ) -> float:
        loss = loss_tensor(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise FleetuneError(
                f"the loss is {loss.item()} in step {t + 1}, its gradient's norm {norm.item()}",
                hint="give a lower lr, or --dtype fp32",
            )
        optimizer.param_groups[0]["lr"] = self.rates[t]
        optimizer.step()
        return float(loss.item())

    def _origin(self, model: Model, rows: Sequence[Encoded], seed: int) -> str:
        """SHA-256 of all that the result is a function of."""
        sha = hashlib.sha256(json.dumps([asdict(self), seed, model.digest], sort_keys=True).encode())
        for row in rows:
            sha.update(f"{len(row.ids)} {row.n_prompt} ".encode() + row.ids.tobytes())
        return sha.hexdigest()


def _dropout_key(seed: int, t: int) -> int:
    """64 bits for the dropout of step t."""
    return int.from_bytes(hashlib.sha256(f"recovery/{seed}/{t}".encode()).digest()[:7])
