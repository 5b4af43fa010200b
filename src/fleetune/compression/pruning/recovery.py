# SPDX-License-Identifier: Apache-2.0
"""Train a pruned model with LoRA, to recover what pruning lost (LLM-Pruner, section 3.3).

The loss is the cross-entropy of the responses (of plain text: of all tokens).  AdamW trains the factors in fp32 on
frozen weights, and they are merged into the weights at the end.  So memory is the model, the activations of one batch,
and little more.  Dropout, the order of rows and the initial factors depend only on the seed and the step, so a training
resumed from a checkpoint ends with the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from fleetune.adapters import Lora, attach, detach, merge, trainable, training
from fleetune.compression.training.checkpoint import fingerprint
from fleetune.compression.training.steps import Checkpoints, clipped_step
from fleetune.data import Batches, Encoded
from fleetune.data.encode import Batch
from fleetune.evaluation.losses import pad_id
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import Model

CLIP = 1.0  # of the gradient's norm


@dataclass(frozen=True)
class LoraRecovery:
    """The LoRA and how it is trained."""

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
        """Train in place and merge the factors; resume from the checkpoint in `folder`.

        `on_step(step, steps, loss)` is called after every step.  It may raise Interrupted, which saves the step and
        leaves the weights unchanged.  FleetuneError when the loss or its gradient is not finite.
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

        def step(t: int, batch: Batch) -> float:
            with training(model, _dropout_key(seed, t)), by_layer(model.net):
                return self._update(model, batch, optimizer, parameters, t)

        batches = Batches(rows, pad_id(model), seed, model.device).steps(self.steps, self.batch_size)
        checkpoints = Checkpoints(folder, origin, self.save_every)
        checkpoints.run(
            batches, self.steps, parameters, optimizer, step, lambda t, loss: on_step(t, self.steps, loss)
        )

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
        clipped_step(
            loss,
            parameters.values(),
            optimizer,
            t=t,
            rate=self.rates[t],
            clip=CLIP,
            hint="give a lower lr, or --dtype fp32",
        )
        return float(loss.item())

    def _origin(self, model: Model, rows: Sequence[Encoded], seed: int) -> str:
        return fingerprint(json.dumps([asdict(self), seed, model.digest], sort_keys=True), rows)


def _dropout_key(seed: int, t: int) -> int:
    """Return the 64-bit key of the dropout of step t."""
    return int.from_bytes(hashlib.sha256(f"recovery/{seed}/{t}".encode()).digest()[:7])
