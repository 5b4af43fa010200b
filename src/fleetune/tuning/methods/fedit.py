# SPDX-License-Identifier: Apache-2.0
"""Tune LoRA adapters on instructions in a federation, averaged by FedAvg (FedIT).

Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen: "Towards Building the Federated GPT: Federated Instruction
Tuning", ICASSP 2024, arXiv 2305.05644 (Algorithm 1; its code is "Shepherd").

## Algorithm

A round: the server sends the adapter; a device trains it for some epochs on its own rows with a fresh AdamW
and sends it back; the server averages, weighted by rows: A <- sum_k p_k A_k and B <- sum_k p_k B_k.

## Differences from the paper

- LoRA on all linear layers (the code: q_proj only; its README: q, k, v, o; here `targets=q_proj,k_proj,v_proj,o_proj`), and the
  loss on the answer alone.
- Only trainable numbers travel, in fp16 if `wire=fp16`; the evaluation is real (theirs is a print).

## Options

`average=product` averages the products of the factors, sum_k p_k B_k A_k, instead of A and B apart
(`averaging.product_mean`).  Then devices may also have unlike ranks: with `ranks=4,8,16` device k has the
(k modulo 3)-th of them, is sent the strongest directions of the global adapter (of rank r), up to its rank,
and sends as many back; the average is exact over all of them.

A device's rate is `lr` in every step, unless `warmup` lets it rise in the first steps of a round (of w: lr / (w + 1),
2 lr / (w + 1), ..) and `decay` lets it fall to 0 in those that follow.  Both begin anew every round, as AdamW does.
`weight_decay` and `clip` (of the whole gradient's norm) are as in other trainers, and off.

Where A and B start is the server's choice (`start`), and every device gets it from the server:

| start | A and B |
|---|---|
| default | A uniform, B zero, as in PEFT |
| gaussian | A normal with deviation 1/r, B zero |
| shared | A a signed sketch with orthonormal rows, equal bits on every machine; B zero (ours) |
| orthogonal | both random, with B A = 0; r must be even |
| pissa, olora | the strongest directions (or the first of Q R) of each weight W0; what they hold of it is taken out |
| eva | A the directions that explain most of what the layer sees on rows of the server's (`start_data`); B zero |

Sources and formulas: `adapters/lora_init.py`, `adapters/lora_init_eva.py`.  The base is never written to: for pissa and olora
the start itself, B0 A0, is subtracted beside each layer, so it goes down with every broadcast (twice the bytes
down, none up), and the saved adapter is a plain LoRA of rank 2 r on the plain base.

For devices of unlike data: `mu` (FedProx), `scaffold`, and a server that steps along the mean instead of
taking it (`server`: FedAvgM, FedAdagrad, FedYogi, FedAdam); their papers are in `methods/_adapter.py` and
`server_rules.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fleetune import adapters
from fleetune.common.settings import setting
from fleetune.data import Batches
from fleetune.errors import MessageError
from fleetune.models.model import Model
from fleetune.models.shapes import Shape
from fleetune.tuning import server_rules
from fleetune.tuning.averaging import cut, product_mean
from fleetune.tuning.footprint import Footprint, lora_layers, lora_module
from fleetune.tuning.messages import Payload, ReplySpec
from fleetune.tuning.methods import Reply, _adapter, _lora_start
from fleetune.tuning.methods._adapter import State, Training
from fleetune.tuning.robust import MEAN, Rule

log = logging.getLogger(__name__)

KIND = "adapter"
PAPER = "Zhang et al., ICASSP 2024, arXiv 2305.05644"
SENDS = "the LoRA adapter, up and down"
RECOMMENDED = 1


@dataclass(frozen=True)
class Method:
    """Hyper-parameters with the defaults of the paper's code (Shepherd)."""

    r: int = setting(16, "r", "rank of the adapters")
    alpha: int = setting(16, "α", "LoRA scale; the update is (alpha / r) B A")
    dropout: float = setting(0.05, "p", "LoRA dropout")
    targets: str = setting("all-linear", "W", "all-linear, query-value, or the layers' names")
    lr: float = setting(3e-4, "η", "AdamW learning rate", found=True)
    epochs: int = setting(1, "E", "local epochs a round (Shepherd's code: 10)", only_if="steps=0")
    batch_size: int = setting(8, "B", "rows a step")
    steps: int = setting(0, "τ", "local steps a round instead of epochs (0: epochs)")
    warmup: int = setting(0, "w", "steps at the beginning of a round in which the rate rises")
    decay: bool = setting(False, "decay", "the rate falls to 0 within the round (linear)")
    weight_decay: float = setting(0.0, "λ", "AdamW weight decay")
    clip: float = setting(0.0, "C", "largest norm of a gradient (0: any)")
    average: str = setting("separate", "avg", "separate: A and B (as published); product: B A")
    ranks: str = setting("", "r_k", "the devices' ranks in turn, as 4,8,16 (average=product; none: r)")
    start: str = setting(
        "default", "A₀, B₀", "where A and B start: default, gaussian, shared, orthogonal, pissa, olora, eva"
    )
    start_data: str = setting(
        "demo", "X", "start=eva: rows the server has, a file or demo (32 are read)", only_if="start=eva"
    )
    wire: str = setting("fp32", "wire", "fp32, or fp16 to halve the traffic")
    server: str = setting("avg", "server", "the server's rule: avg, avgm, adagrad, yogi, adam")
    server_lr: float = setting(0.0, "η_s", "the server's learning rate (0: 1 for avg and avgm, else 1e-3)")
    mu: float = setting(0.0, "μ", "FedProx: pull towards the global adapter (0.01 is usual)")
    scaffold: bool = setting(False, "c", "SCAFFOLD: correct a device's drift (its c goes down too)")
    checkpointing: bool = setting(True, "ckpt", "compute activations twice: less memory, more time")

    def __post_init__(self) -> None:
        self.training().check()
        server_rules.check(self.server, lr=self.server_lr)
        if self.r < 1 or self.alpha < 1:
            raise ValueError(f"r = {self.r} and alpha = {self.alpha} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must be in [0, 1)")
        self.check_start()
        _lora_start.check_targets(self.targets)
        _lora_start.check_ranks(self.ranks, self.r)
        if self.ranks and (self.average != "product" or self.start == "orthogonal"):
            raise ValueError(
                "ranks needs average=product (A and B of unlike ranks have no mean of their own), and a start "
                "other than orthogonal, whose B A is only zero as a whole"
            )
        if self.average not in ("separate", "product"):
            raise ValueError(f"average = {self.average!r} is none of separate, product")
        if self.average == "product" and (self.server != "avg" or self.server_lr or self.scaffold):
            raise ValueError(
                "average=product turns the factors every round, so that what server, server_lr and scaffold "
                "remember of them would not fit; use average=separate with these"
            )

    def written_out(self) -> Method:
        """Return the method with the server's own rate in place."""
        return replace(self, server_lr=server_rules.rate(self.server, self.server_lr))

    def check_start(self) -> None:
        """Raise ValueError for a start that does not go with the rest."""
        _lora_start.check(
            self.start, self.r, dropout=self.dropout, wire=self.wire, start_data=self.start_data
        )
        if self.start in _lora_start.FROM_WEIGHTS and self.average == "product":
            raise ValueError(
                f"average=product keeps the strongest directions, which after start={self.start} are the base's "
                "own and not what was learned; use average=separate"
            )

    def training(self) -> Training:
        """Return how a device trains."""
        return Training(
            lr=self.lr, epochs=self.epochs, steps=self.steps, batch_size=self.batch_size, warmup=self.warmup,
            decay=self.decay, clip=self.clip, weight_decay=self.weight_decay, mu=self.mu, scaffold=self.scaffold,
            checkpointing=self.checkpointing, wire=self.wire,
        )  # fmt: skip

    def init(self, model: Model, key: int) -> State:
        seed = key >> 1  # fits a signed 64-bit scalar
        self.attach(model, seed, self.r, self.start)
        if self.start == "eva":
            _lora_start.see(model, self.start_data)
        return _adapter.begin(model, seed, self.wire)

    def attach(self, model: Model, seed: int, r: int, start: str = "default") -> None:
        """Give `model` an adapter of rank `r`, unless it has one.  (A device is sent the start's numbers.)"""
        if model.attachment is not None:
            spec = adapters.attachment_of(model).spec
            if isinstance(spec, adapters.Lora) and (spec.r, spec.targets) == (r, self.targets):
                return
            adapters.detach(model)
        alpha = self.alpha if r == self.r else self.alpha * r / self.r  # alpha / r is the same for all
        init = start if start in adapters.INITS else "default"
        spec = adapters.Lora(r, alpha, self.dropout, self.targets, init)
        adapters.attach(model, spec, seed=seed)

    def broadcast(self, state: State) -> Payload:
        return _adapter.broadcast(state, self.wire)

    def expects(self, state: State) -> ReplySpec:
        return _adapter.expects(state, self.wire)

    @property
    def kind_names(self) -> Sequence[str]:
        return [f"rank {rank}" for rank in _lora_start.each_rank(self.ranks, self.r)]

    def kind_of(self, client: int) -> int:
        return client % len(self.kind_names)

    def kinds(self, state: State) -> list[tuple[Payload, ReplySpec]]:
        """Send each rank the strongest directions of the adapter, and expect as many back."""
        pairs = adapters.pairs(state.tensors)
        cuts = [
            state._replace(tensors=cut(state.tensors, pairs, rank))
            for rank in _lora_start.each_rank(self.ranks, self.r)
        ]
        return [(self.broadcast(part), self.expects(part)) for part in cuts]

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Do epochs (or steps) of AdamW on the adapter, of the rank that came, moments fresh every round."""
        came = {a.shape[:1] for n, a in payload.arrays.items() if n.endswith(".lora_A.weight")}
        rank = next((k for k in _lora_start.each_rank(self.ranks, self.r) if came == {(k,)}), None)
        if rank is None:
            raise MessageError("the adapter that came has none of the run's ranks")
        self.attach(model, payload.int("seed"), rank)
        return _adapter.local(model, payload, batches, key, memory, self.training())

    def distance(self, state: State, reply: Reply) -> float:
        return _adapter.distance(state.tensors, reply, self.training())

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        """Average the adapters (A and B apart) or their products; then take the server's step."""
        if self.average == "separate":
            return _adapter.aggregate(state, replies, self.training(), self.server, self.server_lr, rule)
        taken = ((float(r.payload.int("n")), r.payload.arrays) for r in replies)
        tensors, left_out = product_mean(taken, adapters.pairs(state.tensors), state.tensors)
        if not tensors:
            return state
        log.info("the rank-%d cut of the mean product left out %.3g of its squared norm", self.r, left_out)
        return state._replace(tensors=tensors, cut=left_out)

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        if self.average == "product":
            return "average=product has no coordinates to compare; use average=separate"
        return _adapter.cannot_combine(rule)

    def report(self, state: State) -> dict[str, float]:
        """Return what the last average had to leave out."""
        return {"cut": state.cut} if self.average == "product" else {}

    def apply(self, model: Model, state: State) -> None:
        self.attach(model, state.seed, self.r)
        _adapter.apply(model, state)

    def check_files(self) -> None:
        _lora_start.check_files(self.start, self.start_data)

    def local_steps(self, rows: int) -> int:
        return self.training().count(rows)

    def sized(self, steps: int, batch_size: int) -> Method:
        warmup = self.training().warmup_in(steps)
        return replace(self, steps=steps, batch_size=batch_size, warmup=warmup)

    def footprint(self, shape: Shape) -> Footprint | None:
        return self._footprint(shape, self.r)

    def footprints(self, shape: Shape) -> Sequence[Footprint | None]:
        return [self._footprint(shape, rank) for rank in _lora_start.each_rank(self.ranks, self.r)]

    def _footprint(self, shape: Shape, rank: int) -> Footprint | None:
        layers = lora_layers(shape, self.targets)
        module = lora_module(layers, shape.head, rank, dropout=self.dropout > 0)
        return _adapter.footprint(module, self.training())
