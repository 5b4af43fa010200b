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

For devices of unlike data: `mu` (FedProx), `scaffold`, and a server that steps along the mean instead of
taking it (`server`: FedAvgM, FedAdagrad, FedYogi, FedAdam); their papers are in `methods/_adapter.py` and
`servers.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fleetune import adapters, servers
from fleetune.aggregate import product_mean
from fleetune.data import Batches
from fleetune.messages import Payload, Spec
from fleetune.methods import Reply, _adapter
from fleetune.methods._adapter import State, Training
from fleetune.models import Model

log = logging.getLogger(__name__)

KIND = "adapter"
PAPER = "Zhang et al., ICASSP 2024, arXiv 2305.05644"
SENDS = "the LoRA adapter, up and down"


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
    server: str = field(
        default="avg",
        metadata={
            "symbol": "server",
            "help": "what the server does with the mean: " + ", ".join(servers.ETA),
        },
    )
    server_lr: float = field(
        default=0.0,
        metadata={"symbol": "η_s", "help": "the server's learning rate (0: 1 for avg and avgm, else 1e-3)"},
    )
    mu: float = field(
        default=0.0,
        metadata={"symbol": "μ", "help": "FedProx: pull towards the global adapter (0.01 is usual)"},
    )
    scaffold: bool = field(
        default=False,
        metadata={"symbol": "c", "help": "SCAFFOLD: correct a device's drift (its c goes down too)"},
    )
    checkpointing: bool = field(
        default=False,
        metadata={"symbol": "ckpt", "help": "recompute activations: less memory, a third more time"},
    )

    def __post_init__(self) -> None:
        self.training().check()
        servers.check(self.server, lr=self.server_lr)
        if self.r < 1 or self.alpha < 1:
            raise ValueError(f"r = {self.r} and alpha = {self.alpha} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must be in [0, 1)")
        if self.average not in ("separate", "product"):
            raise ValueError(f"average = {self.average!r} is none of separate, product")
        if self.average == "product" and (self.server != "avg" or self.server_lr or self.scaffold):
            raise ValueError(
                "average=product turns the factors every round, so that what server, server_lr and scaffold "
                "remember of them would not fit; use average=separate with these"
            )

    def training(self) -> Training:
        """A device's round."""
        return Training(
            lr=self.lr, epochs=self.epochs, steps=self.steps, batch_size=self.batch_size, mu=self.mu,
            scaffold=self.scaffold, checkpointing=self.checkpointing, wire=self.wire,
        )  # fmt: skip

    def init(self, model: Model, key: int) -> State:
        seed = key >> 1  # fits a signed 64-bit scalar
        self.attach(model, seed)
        return State(adapters.export(model), seed)

    def attach(self, model: Model, seed: int) -> None:
        """Give `model` its adapter, unless it has it; every device derives the same start from the seed."""
        if model.attachment is None:
            adapters.attach_lora(model, r=self.r, alpha=self.alpha, dropout=self.dropout, seed=seed)

    def broadcast(self, state: State) -> Payload:
        return _adapter.broadcast(state, self.wire)

    def expects(self, state: State) -> Spec:
        return _adapter.expects(state, self.wire)

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Epochs (or steps) of AdamW on the adapter, moments fresh every round."""
        self.attach(model, payload.int("seed"))
        return _adapter.local(model, payload, batches, key, memory, self.training())

    def aggregate(self, state: State, replies: Iterable[Reply]) -> State:
        """FedAvg of the adapters (A and B apart), or of their products; then the server's rule."""
        if self.average == "separate":
            return _adapter.aggregate(state, replies, self.training(), self.server, self.server_lr)
        taken = [(float(r.payload.int("n")), r.payload.arrays) for r in replies]
        if not taken:
            return state
        tensors, cut = product_mean(taken, adapters.pairs(state.tensors))
        log.info("the rank-%d cut of the mean product left out %.3g of its squared norm", self.r, cut)
        return state._replace(tensors=tensors, cut=cut)

    def apply(self, model: Model, state: State) -> None:
        self.attach(model, state.seed)
        adapters.load_(model, state.tensors)
