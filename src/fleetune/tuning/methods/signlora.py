"""Tune a low-rank change in a federation, sending one sign for each row of a matrix, in a ledger (ours).

FFA-LoRA (Sun, Li, Li, Ding: "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313) trains B
alone: the mean of B_k A is then exactly (mean of B_k) A.  Here A is signs that a seed gives, so that it never travels, and B
travels as signs (signSGD: Bernstein et al. 2018, arXiv 1802.04434) with one scale for each matrix.

## Algorithm

In a round, each matrix W [out, in] has directions s_p [in] of +1 and -1, the next r of a pool of P in turn.  A device trains

    W x + sum_p b_p (s_p' x) / sqrt(in),    b_p [out] from 0 on,

by AdamW, and sends sign(b_p) and mean |b_p|.  The server takes the mean over the devices, and writes it as `planes` vectors
of signs, each with a scale: what is left is rounded again.  So every change is integers on one grid,

    w = round( w0 + grid * sum_p B_p s_p' ),

a ledger of the law `outer` (`seeds/noise.py`): rank P, and one bit for a row, a direction and a plane.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from fleetune import adapters
from fleetune.adapters.attachment import Attachment
from fleetune.adapters.lora import factor_names
from fleetune.common.settings import setting
from fleetune.data import Batches
from fleetune.errors import MessageError, ModelError
from fleetune.models.net.model import Model, named_tensors
from fleetune.models.shapes import Shape
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.noise import LOW, OUTER, packed, signs, unpacked
from fleetune.seeds.weights import WeightSlot, layout
from fleetune.tuning.exchange.aggregation import MEAN, Rule, Tensors
from fleetune.tuning.exchange.footprint import Footprint, lora_layers, lora_module
from fleetune.tuning.exchange.messages import Payload, ReplySpec
from fleetune.tuning.methods import Reply, _adapter, _zeroth, norm

KIND = "ledger"
PAPER = "FFA-LoRA: Sun et al., ICLR 2024, arXiv 2403.12313; signs: ours"
SENDS = "one bit a row of each matrix up, two down"

STEP = 1 << 14  # units of the grid in a step of AdamW, for a matrix with one column


class State(NamedTuple):
    """The ledger, the rounds done, and the matrices that are trained: their places among the ledger's tensors."""

    ledger: Ledger
    round: int
    places: np.ndarray  # int64 [matrices]


@dataclass(frozen=True)
class SignLora(adapters.Lora):
    """LoRA whose A is given from outside and stays; the part knows where each matrix begins in a direction."""

    def put_on(self, model: Model, seed: int) -> adapters.LoraPart:
        """Attach it; ModelError for layers whose weights are not a matrix [out, in] of their own."""
        slots = {slot.name: (place, slot) for place, slot in enumerate(layout(named_tensors(model.net)))}
        part = super().put_on(model, seed)
        odd = [n for n, m in part.layers.items() if f"{n}.weight" not in slots or m.fan_in_fan_out]
        if odd:
            part.remove()
            raise ModelError(
                f"{odd[0]} has no matrix [out, in] of its own, which signlora trains",
                hint="use fedit; or name other layers: --set targets=...",
            )
        part.places = {n: slots[f"{n}.weight"] for n in sorted(part.layers)}
        for name, parameter in part.parameters.items():
            parameter.requires_grad_(name.endswith("lora_B.weight"))
        return part


@dataclass(frozen=True)
class Method(_adapter.Trained, _zeroth.OfLedger):
    """Hyper-parameters."""

    law = OUTER
    K = 1
    eps = 0.0
    weight_decay = 0.0
    clip = 0.0
    decay = False

    lr: float = setting(0.05, "η", "AdamW learning rate of B; a weight moves by lr / sqrt(in) in a step")
    epochs: int = setting(1, "E", "local epochs a round", only_if="steps=0")
    batch_size: int = setting(4, "B", "rows a step")
    steps: int = setting(0, "τ", "local steps a round instead of epochs (0: epochs)")
    r: int = setting(1, "r", "directions of each matrix that are trained in a round")
    pool: int = setting(8, "P", "directions of each matrix that are trained in turn: the rank of the change")
    planes: int = setting(2, "q", "vectors of signs that the server writes for each direction and round")
    targets: str = setting("all-linear", "W", "all-linear, query-value, or the layers' names")
    checkpointing: bool = setting(True, "ckpt", "compute activations twice: less memory, more time")

    def __post_init__(self) -> None:
        super().__post_init__()
        _adapter.check_targets(self.targets)
        if not 1 <= self.r <= self.pool <= 1 << 10:
            raise ValueError(
                f"r = {self.r} must be at least 1 and at most pool = {self.pool}, that at most {1 << 10}"
            )
        if not 1 <= self.planes <= 8:
            raise ValueError(f"planes = {self.planes} must be 1 to 8")

    @property
    def grid_lr(self) -> float:
        return self.lr * _zeroth.UNITS / STEP

    def init(self, model: Model, key: int) -> State:
        part = self.attached(model)
        places = np.array([place for place, _ in part.places.values()], np.int64)
        adapters.detach(model)
        return State(self.empty(model, key), 0, places)

    def attached(self, model: Model) -> Any:
        """Return the LoRA part of a model, put on where it is not."""
        if not (
            isinstance(model.attachment, Attachment) and isinstance(model.attachment.spec, SignLora)
        ):
            if model.attachment is not None:
                model.attachment.detach(model)
            adapters.attach(model, SignLora(self.r, self.r, targets=self.targets), seed=0)
        return adapters.attachment_of(model).parts[0]

    def apply(self, model: Model, state: State) -> None:
        if isinstance(model.attachment, Attachment):
            adapters.detach(model)
        super().apply(model, state)

    # What travels

    def trained_in(self, round: int) -> list[int]:
        """Return the directions p of a round, counted from 0."""
        return [(round * self.r + i) % self.pool for i in range(self.r)]

    def rows(self, state: State) -> list[int]:
        """Return the rows of each matrix that is trained."""
        return [state.ledger.head.tensors[place][1][0] for place in state.places.tolist()]

    def broadcast(self, state: State) -> Payload:
        """Send the ledger's entries: for each round and direction `planes` vectors of signs of each matrix."""
        ledger = state.ledger
        order = {place: m for m, place in enumerate(state.places.tolist())}
        index = np.array([order[i] for i in (ledger.ids & np.uint64(LOW)).tolist()], np.int64)
        arrays = {
            "direction": (ledger.ids >> np.uint64(32)).astype(np.uint16),
            "matrix": index.astype(np.uint16),
            "scale": ledger.coefficients,
            "signs": ledger.signs,
            "rows": np.array(self.rows(state), np.uint32),
        }
        return Payload(arrays, {"round": state.round, "run_key": ledger.head.run_key})

    def expects(self, state: State) -> ReplySpec:
        size = sum(-(-rows // 8) for rows in self.rows(state))
        return ReplySpec(
            {"scales": ("uint32", (self.r * len(state.places),)), "signs": ("uint8", (self.r * size,))}
        )

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Train B from 0 on, beside what the ledger has moved; reply with its signs and scales."""
        part, now = self.attached(model), self.trained_in(payload.int("round"))
        run_key = payload.int("run_key")
        part.subtract(self.moved_by(part, payload, run_key))
        for name, (_, slot) in part.places.items():
            b, a = (part.parameters[n] for n in factor_names(name))
            with torch.no_grad():
                a.copy_(torch.from_numpy(self.factor(run_key, slot, now)))
                b.zero_()
        loss = self.train(model, batches, key, {})
        numbers = []
        for name, (_, slot) in part.places.items():
            b = part.parameters[factor_names(name)[0]].detach().cpu().double().numpy()
            numbers += list(b.T / (math.sqrt(slot.tensor.shape[1]) * _zeroth.grid_of(self.grid_lr)))
        scales, bits, _ = plane(numbers)
        return Payload({"scales": scales, "signs": bits}, {"n": batches.n, "loss": loss})

    def factor(self, run_key: int, slot: WeightSlot, directions: Iterable[int]) -> np.ndarray:
        """Return s_p / sqrt(in) of some directions: float32 [p, in]."""
        width = slot.tensor.shape[1]
        return np.stack([signs(run_key, p, slot.start, width) for p in directions]) / np.float32(
            math.sqrt(width)
        )

    def moved_by(self, part: Any, payload: Payload, run_key: int) -> dict[str, torch.Tensor]:
        """Return frozen factors B, A of what the ledger that came has moved so far, negative: LoRA subtracts them."""
        p, m = payload.array("direction"), payload.array("matrix").astype(np.int64)
        scale, bits = payload.array("scale"), payload.array("signs")
        layers = list(part.places.items())
        rows = np.array([slot.tensor.shape[0] for _, (_, slot) in layers])
        if rows.tolist() != payload.array("rows").tolist():
            raise MessageError("the matrices that the run trains are not those of this model")
        if (
            not (len(p) == len(m) == len(scale))
            or m.max(initial=0) >= len(layers)
            or p.max(initial=0) >= self.pool
        ):
            raise MessageError("the ledger's entries that came are not of this run's matrices")
        ends = np.cumsum(-(-rows[m] // 8))
        if len(bits) != (ends[-1] if len(ends) else 0):
            raise MessageError("the ledger's signs that came are not of its entries")
        used = np.unique(p).tolist()
        if not used:
            return {}
        tables = [np.zeros((n, len(used))) for n in rows]
        for at, (direction, matrix, c) in enumerate(zip(p.tolist(), m.tolist(), scale.tolist(), strict=True)):
            begin = ends[at] - -(-rows[matrix] // 8)
            tables[matrix][:, used.index(direction)] += c * unpacked(bits[begin : ends[at]], rows[matrix])
        found = {}
        for (name, (_, slot)), table in zip(layers, tables, strict=True):
            b, a = factor_names(name)
            width, device = slot.tensor.shape[1], part.parameters[b].device
            times = -_zeroth.grid_of(self.grid_lr) * math.sqrt(width)
            found[b] = torch.from_numpy((table * times).astype(np.float32)).to(device)
            found[a] = torch.from_numpy(self.factor(run_key, slot, used)).to(device)
        return found

    # The server

    def begins(self, sent: Payload) -> Tensors:
        return {"b": np.zeros(self.r * int(sent.array("rows").sum(dtype=np.int64)))}

    def moved(self, sent: Payload, reply: Reply) -> Tensors:
        """Return what a reply moves: B of each matrix and direction, in units of the grid."""
        rows = np.repeat(sent.array("rows").astype(np.int64), self.r)
        ends = np.cumsum(-(-rows // 8))
        scales, bits = reply.payload.array("scales").astype(np.int64), reply.payload.array("signs")
        parts = zip(rows.tolist(), ends.tolist(), scales.tolist(), strict=True)
        return {"b": np.concatenate([c * unpacked(bits[end - -(-n // 8) : end], n) for n, end, c in parts])}

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        """Take the mean weighted by rows, and write it as `planes` vectors of signs."""
        sent = Payload({"rows": np.array(self.rows(state))})
        combined = rule.combining(self.begins(sent))
        for reply in replies:
            combined.add(float(reply.payload.int("n")), self.moved(sent, reply))
        if not combined.total:
            return State(state.ledger, state.round + 1, state.places)
        left = np.split(combined.tensors()["b"], np.cumsum(np.repeat(sent.array("rows"), self.r))[:-1])
        now = np.array(self.trained_in(state.round), np.uint64) << np.uint64(32)
        ids = (state.places.astype(np.uint64)[:, None] | now[None, :]).reshape(-1)
        ledger = state.ledger
        for _ in range(self.planes):
            scales, bits, left = plane(left)
            ledger = ledger.append(ids, scales.astype(np.int64), state.round + 1, bits)
        return State(ledger, state.round + 1, state.places)

    def distance(self, state: State, sent: Payload, reply: Reply) -> float:
        """Return how far a device went: root mean square of B, over that of random steps of the learning rate's size."""
        _, walk = self.walked(reply.payload.int("n"))
        return norm(self.moved(sent, reply).values()) / walk

    def sized(self, steps: int, batch_size: int) -> Self:
        return replace(self, steps=steps, batch_size=batch_size)

    def footprint(self, shape: Shape) -> Footprint | None:
        module = lora_module(lora_layers(shape, self.targets), (), self.r)
        return module and Footprint(
            "backward", module, None, checkpointing=self.checkpointing, whole_gradient=False
        )


def plane(vectors: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return (mean |x| of each vector, rounded: uint32 [n]; the signs' bits; what is left of the vectors)."""
    scales = np.array([np.rint(np.abs(x).mean()) for x in vectors])
    scales = np.clip(scales, 0, _zeroth.INT32).astype(np.uint32)
    left = [x - c * np.where(x < 0, -1, 1) for x, c in zip(vectors, scales.astype(np.float64), strict=True)]
    return scales, np.concatenate([packed(x) for x in vectors]), left
