"""Tune LoRA adapters on instructions in a federation, averaged by FedAvg (FedIT).

Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen: "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
arXiv 2305.05644 (Algorithm 1; its code is "Shepherd").

## Algorithm

A round: the server sends the adapter; a device trains it for some epochs on its own rows with a fresh AdamW and sends it back;
the server averages, weighted by rows: A <- sum_k p_k A_k and B <- sum_k p_k B_k.  Differences from the paper: LoRA is on all
linear layers (the code: q_proj alone), the loss on the answer alone, and only trainable numbers travel.

## Options

- `average=product` averages sum_k p_k B_k A_k (`aggregation.product_mean`).  Then devices may have unlike `ranks`: a device is
  sent the strongest directions of the global adapter, up to its rank, and sends as many back; the average is exact.
- `warmup` and `decay` of the rate (of w steps: lr / (w + 1), 2 lr / (w + 1), ..) begin anew every round, as AdamW does.
- `start` is where A and B start (`adapters/lora_init.py`).  For pissa and olora the start B0 A0 is subtracted beside each layer,
  so a device is sent it once (twice the bytes down); the saved adapter is a plain LoRA of rank 2 r.
- `variant=ffa` trains and averages B alone (FFA-LoRA: Sun et al., ICLR 2024, arXiv 2403.12313, section 4): the mean of B_k A is
  (mean of B_k) A.  A is drawn from the seed, or sent once, where the start is not.
- `variant=sb` trains R [r, r] between A and B (Fed-SB: Singhal et al., arXiv 2502.15436, section 3): the mean of B R_k A is exact
  too.  A and B are those of start=gradient (LoRA-SB: arXiv 2411.19557; of rows that the server has, R from 0), or pissa
  (LoRA-XS: arXiv 2405.17604), and sent once.  The saved adapter is the LoRA of B R and A.
- For devices of unlike data: `mu` (FedProx) and `scaffold` (`methods/_adapter.py`), `server` (`exchange/aggregation.py`).
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetune import adapters
from fleetune.common.settings import setting
from fleetune.data import Batches
from fleetune.errors import MessageError
from fleetune.models.net.model import Model
from fleetune.models.shapes import Shape
from fleetune.tuning.exchange.aggregation import MEAN, Rule, cut, product_mean
from fleetune.tuning.exchange.footprint import Footprint, lora_layers, lora_module
from fleetune.tuning.exchange.messages import Payload, ReplySpec
from fleetune.tuning.methods import Reply, _adapter
from fleetune.tuning.methods._adapter import State

log = logging.getLogger(__name__)

KIND = "adapter"
PAPER = "Zhang et al., ICASSP 2024, arXiv 2305.05644"
SENDS = "the LoRA adapter, up and down"
RECOMMENDED = 1


@dataclass(frozen=True)
class Method(_adapter.Averaged):
    """Hyper-parameters with the defaults of the paper's code (Shepherd, with 10 local epochs)."""

    learns_alone: ClassVar[bool] = True

    r: int = setting(16, "r", "rank of the adapters")
    alpha: int = setting(16, "α", "LoRA scale; the update is (alpha / r) B A")
    dropout: float = setting(0.05, "p", "LoRA dropout")
    decay: bool = setting(False, "decay", "the rate falls to 0 within the round (linear)")
    average: str = setting("separate", "avg", "separate: A and B (as published); product: B A")
    variant: str = setting("lora", "variant", "lora; ffa: B alone is trained; sb: R [r, r] between A and B")
    ranks: str = setting("", "r_k", "the devices' ranks in turn, as 4,8,16 (average=product; none: r)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1 or self.alpha < 1:
            raise ValueError(f"r = {self.r} and alpha = {self.alpha} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must be in [0, 1)")
        _adapter.check_start(
            self.start,
            self.r,
            dropout=self.dropout,
            wire=self.wire,
            start_data=self.start_data,
            variant=self.variant,
        )
        one = r" *\d+ *"
        if self.ranks and not (
            re.fullmatch(f"{one}(,{one})*", self.ranks) and all(1 <= k <= self.r for k in self.each_rank)
        ):
            raise ValueError(f"ranks = {self.ranks!r} must be numbers from 1 to r = {self.r}, as 4,8,16")
        if self.ranks and (self.average != "product" or self.start == "orthogonal"):
            raise ValueError(
                "ranks needs average=product (A and B of unlike ranks have no mean of their own), and a start "
                "other than orthogonal, whose B A is only zero as a whole"
            )
        if self.average not in ("separate", "product"):
            raise ValueError(f"average = {self.average!r} is none of separate, product")
        product = self.average == "product"
        if self.variant not in adapters.VARIANTS:
            raise ValueError(f"variant = {self.variant!r} is none of {', '.join(adapters.VARIANTS)}")
        if product and self.variant != "lora":
            raise ValueError(
                f"variant={self.variant} has one rank, and its mean is that of the products; use average=separate, and no ranks"
            )
        if product and self.start in adapters.lora_init.FROM_WEIGHTS:
            raise ValueError(
                f"average=product keeps the strongest directions, which after start={self.start} are the base's "
                "own and not what was learned; use average=separate"
            )
        if product and self.wire != "fp32":
            raise ValueError(
                "average=product turns the factors every round, so that their change says nothing of them; use wire=fp32"
            )
        if product and (self.server != "avg" or self.server_lr or self.scaffold):
            raise ValueError(
                "average=product turns the factors every round, so that what server, server_lr and scaffold "
                "remember of them would not fit; use average=separate with these"
            )

    def attach(self, model: Model, seed: int, start: str = "default", rank: int = 0) -> None:
        """Give `model` an adapter of a rank (0: r), unless it has one."""
        r = rank or self.r
        if model.attachment is not None:
            spec, part = (found := adapters.attachment_of(model)).spec, found.parts[0]
            own = (r, self.targets, self.variant)
            if isinstance(spec, adapters.Lora) and (spec.r, spec.targets, spec.variant) == own:
                assert isinstance(part, adapters.LoraPart)
                if not part.frozen or part.seed == seed:
                    return
            adapters.detach(model)
        alpha = self.alpha if r == self.r else self.alpha * r / self.r  # alpha / r is the same for all
        if self.variant != "lora" and self.start in _adapter.SAME_EVERYWHERE:
            start = self.start  # whose A is not sent
        init = start if start in adapters.INITS else "default"
        spec = adapters.Lora(r, alpha, self.dropout, self.targets, init, self.variant)
        adapters.attach(model, spec, seed=seed)

    @property
    def each_rank(self) -> list[int]:
        """The ranks of devices 0, 1, .. in turn."""
        return [int(rank) for rank in self.ranks.split(",")] if self.ranks else [self.r]

    @property
    def kind_names(self) -> Sequence[str]:
        return [f"rank {rank}" for rank in self.each_rank]

    def kind_of(self, client: int) -> int:
        return client % len(self.each_rank)

    def kinds(self, state: State) -> list[tuple[Payload, ReplySpec]]:
        """Send each rank the strongest directions of the adapter, and expect as many back."""
        pairs = adapters.pairs(state.tensors)
        cuts = [state._replace(tensors=cut(state.tensors, pairs, rank)) for rank in self.each_rank]
        return [(self.broadcast(part), self.expects(part)) for part in cuts]

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Train the adapter of the rank that came."""
        came = {a.shape[:1] for n, a in payload.arrays.items() if n.endswith(".lora_A.weight")}
        rank = next((k for k in self.each_rank if came == {(k,)}), None)
        if rank is None and self.ranks:
            raise MessageError("the adapter that came has none of the run's ranks")
        self.attach(model, payload.int("seed"), rank=rank or 0)
        return self.trained(model, payload, batches, key, memory)

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        """Average the adapters (A and B apart) or their products; then take the server's step."""
        if self.average == "separate":
            return super().aggregate(state, replies, rule)
        taken = ((float(r.payload.int("n")), r.payload.arrays) for r in replies)
        tensors, left_out = product_mean(taken, adapters.pairs(state.tensors), state.tensors)
        if not tensors:
            return state
        log.info("the rank-%d cut of the mean product left out %.3g of its squared norm", self.r, left_out)
        return state._replace(tensors=tensors, cut=left_out)

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        if self.average == "product":
            return "average=product has no coordinates to compare; use average=separate"
        return super().cannot_combine(rule, asked)

    def report(self, state: State) -> dict[str, float]:
        return {"cut": state.cut} if self.average == "product" else {}

    def footprint(self, shape: Shape) -> Footprint | None:
        return self.of_rank(shape, self.r)

    def footprints(self, shape: Shape) -> Sequence[Footprint | None]:
        return [self.of_rank(shape, rank) for rank in self.each_rank]

    def of_rank(self, shape: Shape, rank: int) -> Footprint | None:
        """Return the work of a device of this rank."""
        layers, dropout = lora_layers(shape, self.targets), self.dropout > 0
        module = lora_module(layers, shape.head, rank, dropout=dropout, variant=self.variant)
        return self.work_on(module)
