# SPDX-License-Identifier: Apache-2.0
"""FedIT: federated instruction tuning of LoRA adapters by FedAvg.

Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen: "Towards Building the Federated GPT: Federated Instruction
Tuning", ICASSP 2024, arXiv 2305.05644 (Algorithm 1; its code is "Shepherd").

A round: the server sends the adapter; a device trains it for some epochs on its own rows with a fresh AdamW
and sends it back; the server averages, weighted by rows: A <- sum_k p_k A_k and B <- sum_k p_k B_k.

What differs from the paper's code, and why:
- LoRA on all linear layers (the code: q_proj only; its README: q, k, v, o), and the loss on the answer alone.
- `average=product` averages what the adapters mean, sum_k p_k B_k A_k, instead of A and B apart.
- Only trainable numbers travel, in fp16 if `wire=fp16`; the evaluation is real (theirs is a print).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from fleetune import adapters
from fleetune.aggregate import product_mean, weighted_mean
from fleetune.data import Batches
from fleetune.messages import Payload, Spec
from fleetune.methods import Reply
from fleetune.models import Model
from fleetune.objectives import loss_tensor

log = logging.getLogger(__name__)

KIND = "adapter"
PAPER = "Zhang et al., ICASSP 2024, arXiv 2305.05644"
SENDS = "the LoRA adapter, up and down"


class State(NamedTuple):
    """The global adapter, how it was started, and what the last product average had to leave out."""

    tensors: dict[str, np.ndarray]  # float32, by parameter name
    seed: int
    cut: float


@dataclass(frozen=True)
class Method:
    """Hyper-parameters with the defaults of the paper's code (Shepherd)."""

    r: int = field(default=16, metadata={"symbol": "r", "help": "rank of the adapters"})
    alpha: int = field(
        default=16, metadata={"symbol": "α", "help": "LoRA scale; the update is (alpha / r) B A"}
    )
    dropout: float = field(default=0.05, metadata={"symbol": "p", "help": "LoRA dropout"})
    lr: float = field(default=3e-4, metadata={"symbol": "η", "help": "AdamW learning rate"})
    epochs: int = field(
        default=1, metadata={"symbol": "E", "help": "local epochs a round (Shepherd's code: 10)"}
    )
    batch_size: int = field(default=8, metadata={"symbol": "B", "help": "rows a step"})
    steps: int = field(
        default=0, metadata={"symbol": "τ", "help": "local steps a round instead of epochs (0: epochs)"}
    )
    average: str = field(
        default="separate",
        metadata={"symbol": "avg", "help": "separate: A and B (as published); product: B A"},
    )
    wire: str = field(
        default="fp32", metadata={"symbol": "wire", "help": "fp32, or fp16 to halve the traffic"}
    )

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1 or self.batch_size < 1 or self.epochs < 1 or self.steps < 0:
            raise ValueError("r, alpha, batch_size and epochs must be at least 1, steps 0 or more")
        if not 0 <= self.dropout < 1 or self.lr <= 0:
            raise ValueError(f"dropout = {self.dropout} must be in [0, 1) and lr = {self.lr} positive")
        if self.average not in ("separate", "product") or self.wire not in DTYPE:
            raise ValueError(f"average = {self.average!r} or wire = {self.wire!r} is not one of its choices")

    def init(self, model: Model, key: int) -> State:
        seed = key >> 1  # fits a signed 64-bit scalar
        self.attach(model, seed)
        return State(adapters.export(model), seed, 0.0)

    def attach(self, model: Model, seed: int) -> None:
        """Give `model` its adapter, unless it has it; every device derives the same start from the seed."""
        if model.attachment is None:
            adapters.attach_lora(model, r=self.r, alpha=self.alpha, dropout=self.dropout, seed=seed)

    def broadcast(self, state: State) -> Payload:
        return Payload(
            {n: t.astype(DTYPE[self.wire]) for n, t in state.tensors.items()}, {"seed": state.seed}
        )

    def expects(self, state: State) -> Spec:
        arrays = {n: (np.dtype(DTYPE[self.wire]).name, t.shape) for n, t in state.tensors.items()}
        return Spec(arrays, {"n": (int, 1, 1 << 31), "loss": (float, -1e9, 1e9)})

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Epochs (or steps) of AdamW on the adapter, moments fresh every round."""
        self.attach(model, payload.int("seed"))
        adapters.load_(model, {n: a.astype(np.float32) for n, a in payload.arrays.items()})
        optimizer = torch.optim.AdamW(adapters.trainable(model).values(), lr=self.lr, weight_decay=0.0)
        losses = []
        taken = (
            batches.steps(self.steps, self.batch_size)
            if self.steps
            else batches.epochs(self.epochs, self.batch_size)
        )
        with adapters.training(model, key):
            for batch in taken:
                loss = loss_tensor(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
        arrays = {n: a.astype(DTYPE[self.wire]) for n, a in adapters.export(model).items()}
        adapters.load_(
            model, {n: a.astype(np.float32) for n, a in arrays.items()}
        )  # what was sent is where it is
        return Payload(arrays, {"n": batches.n, "loss": float(np.mean(losses))})

    def aggregate(self, state: State, replies: Iterable[Reply]) -> State:
        """FedAvg of the adapters (A and B apart), or of their products."""
        weighted = ((float(r.payload.int("n")), r.payload.arrays) for r in replies)
        if self.average == "separate":
            mean = weighted_mean(weighted)
            return state._replace(tensors=mean) if mean else state
        taken = list(weighted)
        if not taken:
            return state
        tensors, cut = product_mean(taken, adapters.pairs(state.tensors))
        log.info("the rank-%d cut of the mean product left out %.3g of its squared norm", self.r, cut)
        return state._replace(tensors=tensors, cut=cut)

    def apply(self, model: Model, state: State) -> None:
        self.attach(model, state.seed)
        adapters.load_(model, state.tensors)


DTYPE = {"fp32": np.float32, "fp16": np.float16}
