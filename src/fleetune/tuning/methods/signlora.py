"""Tune a low-rank change in a federation, sending one sign for each row of a matrix, in a ledger (ours).

FFA-LoRA (Sun, Li, Li, Ding: "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313) trains B
alone: the mean of B_k A is then exactly (mean of B_k) A.  Here A is signs that a seed gives, so that it never travels, and B
travels as signs (signSGD: Bernstein et al. 2018, arXiv 1802.04434) with one scale for each matrix.

## Algorithm

In a round, each matrix W [out, in] has directions s_p [in] of +1 and -1, the next r of a pool of P in turn.  A device trains

    W x + sum_p b_p (s_p' x) / sqrt(r in),    b_p [out] from 0 on,

by AdamW, and sends sign(b_p) and mean |b_p|.  The server takes the mean over the devices, and writes it as q vectors of
signs with a scale each, every one of what the vector before leaves; what the last leaves is added the next time (error
feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847).  So every change is integers on one grid,

    w = round( w0 + grid * sum_p B_p s_p' ),

a ledger of the law `outer` (`seeds/noise.py`): rank P, and one bit for a row, a direction and a plane.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch

from fleetune import adapters
from fleetune.adapters.attachment import Attachment
from fleetune.adapters.lora import factor_names
from fleetune.common.settings import setting
from fleetune.data import Batches
from fleetune.errors import MessageError, ModelError, UsageError
from fleetune.models.net.layers import head_of
from fleetune.models.net.model import Model, named_tensors
from fleetune.models.shapes import Shape
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.noise import LOW, OUTER, outer_passes, packed, signs, unpacked
from fleetune.seeds.weights import WeightSlot, layout
from fleetune.tuning.exchange.aggregation import FEWEST, MEAN, PRIVATE, Rule, Tensors
from fleetune.tuning.exchange.footprint import Footprint, lora_layers, lora_module, placeholder_ledger
from fleetune.tuning.exchange.messages import NotFiniteError, Payload, ReplySpec, Scalar, narrow
from fleetune.tuning.methods import Reply, _adapter, _zeroth, norm

KIND = "ledger"
PAPER = "FFA-LoRA: Sun et al., ICLR 2024, arXiv 2403.12313; signs: ours"
SENDS = "one bit per row of each matrix up, two down"
RECOMMENDED = 2

ENTRIES = ("rows", "direction", "matrix", "scale", "signs")  # of what a device is sent
STEP = 1 << 14  # units of the grid in a step of AdamW, for a matrix with one column


class State(NamedTuple):
    """The ledger, the rounds done, and what the server remembers of rounding."""

    ledger: Ledger
    round: int
    places: np.ndarray  # int64 [matrices]: those that are trained, among the ledger's tensors
    left: np.ndarray  # float32 [P, rows of all matrices]: of the mean, what was not written yet


@dataclass(frozen=True)
class SignLora(adapters.Lora):
    """LoRA whose A is given from outside and stays; `places` says where each matrix stands in a ledger."""

    places: dict[str, tuple[int, WeightSlot]] = field(default_factory=dict, compare=False)

    def put_on(self, model: Model, seed: int) -> adapters.LoraPart:
        """Attach it; ModelError for layers whose weights are not a matrix [out, in] of their own."""
        if head_of(model.net):
            raise ModelError(
                "signlora trains no classification head",
                hint="use fedpetuning or fedit, which train it whole",
            )
        slots = {slot.name: (place, slot) for place, slot in enumerate(layout(named_tensors(model.net)))}
        part = super().put_on(model, seed)
        odd = [n for n, m in part.layers.items() if f"{n}.weight" not in slots or m.fan_in_fan_out]
        if odd:
            part.remove()
            raise ModelError(
                f"{odd[0]} has no matrix [out, in] of its own, which signlora trains",
                hint="use fedit; or name other layers: --set targets=...",
            )
        self.places.update((n, slots[f"{n}.weight"]) for n in sorted(part.layers))
        for name, parameter in part.parameters.items():
            parameter.requires_grad_(name.endswith("lora_B.weight"))
        return part


@dataclass(frozen=True)
class Method(_adapter.Trained, _zeroth.OfLedger):
    """Hyper-parameters."""

    replies_by: ClassVar[tuple[str, ...]] = ()
    learns_alone: ClassVar[bool] = True

    law = OUTER
    K = 1
    eps = 0.0
    weight_decay = 0.0
    clip = 0.0
    decay = False

    lr: float = setting(
        0.05, "η", "AdamW learning rate of B; a step moves a weight by about η / sqrt(in)", found=True
    )
    epochs: int = setting(1, "E", "local epochs a round", only_if="steps=0")
    batch_size: int = setting(4, "B", "rows a step")
    steps: int = setting(0, "τ", "local steps a round instead of epochs (0: epochs)")
    r: int = setting(1, "r", "directions of each matrix that are trained in a round")
    pool: int = setting(8, "P", "directions of each matrix that are trained in turn: the rank of the change")
    stay: int = setting(2, "T", "rounds in a row in which the same directions are trained")
    share: str = setting(
        "1",
        "m",
        "a device sends every so many-th row of a matrix, others each round; devices in turn, as 1,4",
    )
    planes: int = setting(2, "q", "vectors of signs that the server writes for each direction and round")
    targets: str = setting("all-linear", "W", "all-linear, query-value, or the layers' names")
    checkpointing: str = setting("auto", "ckpt", "activations twice: auto (short memory), true or false")

    def __post_init__(self) -> None:
        super().__post_init__()
        _adapter.check_targets(self.targets)
        if not (self.lr < _zeroth.MOST and _zeroth.grid_of(self.grid_lr)):
            raise ValueError(
                f"lr = {self.lr:g} has no grid of fp32 below {_zeroth.MOST:g}; usual are 0.01 to 0.1"
            )
        if not 1 <= self.r <= self.pool <= 1 << 10:
            raise ValueError(
                f"r = {self.r} must be at least 1 and at most pool = {self.pool}, that at most {1 << 10}"
            )
        if not 1 <= self.planes <= 8 or self.stay < 1:
            raise ValueError(f"planes = {self.planes} must be 1 to 8, and stay = {self.stay} at least 1")
        one = r" *\d{1,4} *"
        if not re.fullmatch(f"{one}(,{one})*", self.share) or not all(1 <= m <= 1 << 10 for m in self.shares):
            raise ValueError(f"share = {self.share!r} must be numbers from 1 to {1 << 10}, as 1,4")

    @property
    def grid_lr(self) -> float:
        return self.lr * _zeroth.UNITS / STEP

    def init(self, model: Model, key: int) -> State:
        places = np.array([place for place, _ in self.attached(model).places.values()], np.int64)
        adapters.detach(model)
        ledger = self.empty(model, key)
        each = [ledger.head.tensors[place][1][0] for place in places.tolist()]
        if len({bytes_of(each, m) for m in self.shares}) < len(set(self.shares)):
            raise UsageError(f"share = {self.share}: replies would be of one size", hint="use other shares")
        rows = sum(each)
        return State(ledger, 0, places, np.zeros((self.pool, rows), np.float32))

    def attached(self, model: Model) -> SignLora:
        """Return the LoRA of a model, put on where it is not."""
        own = SignLora(self.r, self.r, targets=self.targets)
        if not (isinstance(model.attachment, Attachment) and model.attachment.spec == own):
            if model.attachment is not None:
                model.attachment.detach(model)
            adapters.attach(model, own, seed=0)
        spec = adapters.attachment_of(model).spec
        assert isinstance(spec, SignLora)
        return spec

    def apply(self, model: Model, state: State) -> None:
        if isinstance(model.attachment, Attachment):
            adapters.detach(model)
        super().apply(model, state)

    # What travels

    @property
    def shares(self) -> list[int]:
        """Of devices 0, 1, .. in turn: each sends one row of so many."""
        return [int(m) for m in self.share.split(",")]

    @property
    def kind_names(self) -> Sequence[str]:
        return [f"one row of {m}" for m in self.shares] if len(self.shares) > 1 else [""]

    def kind_of(self, client: int) -> int:
        return client % len(self.shares)

    def kinds(self, state: State) -> list[tuple[Payload, ReplySpec]]:
        return [(self.news(state, 0, kind), self.reply_spec(state, m)) for kind, m in enumerate(self.shares)]

    def footprints(self, shape: Shape) -> Sequence[Footprint | None]:
        return [self.footprint(shape)] * len(self.shares)

    def trained_in(self, round: int) -> list[int]:
        """Return the directions p of a round, counted from 0."""
        return [(round // self.stay * self.r + i) % self.pool for i in range(self.r)]

    def rows(self, state: State) -> list[int]:
        """Return the rows of each matrix that is trained."""
        return [state.ledger.head.tensors[place][1][0] for place in state.places.tolist()]

    def broadcast(self, state: State) -> Payload:
        """Send the ledger's entries: for each round and direction `planes` vectors of signs of each matrix."""
        return self.news(state, 0, 0)

    def news(self, state: State, known: int, kind: int) -> Payload:
        """Send the entries that were added from round `known` on."""
        ledger, order = state.ledger, {place: m for m, place in enumerate(state.places.tolist())}
        ledger = ledger.since(known)
        matrices = [order[place] for place in (ledger.ids & np.uint64(LOW)).tolist()]
        arrays: dict[str, np.ndarray] = {
            "rows": np.array(self.rows(state), np.uint32),
            "direction": (ledger.ids >> np.uint64(32)).astype(np.uint16),
            "matrix": np.array(matrices, np.uint16),
            "scale": ledger.coefficients,
            "signs": ledger.signs,
        }
        scalars: dict[str, Scalar] = {"round": state.round, "run_key": ledger.head.run_key, "known": known}
        return Payload(arrays, scalars | {"share": self.shares[kind]})

    def expects(self, state: State) -> ReplySpec:
        return self.reply_spec(state, self.shares[0])

    def reply_spec(self, state: State, share: int) -> ReplySpec:
        """Return what a device replies that sends one row of `share`."""
        size = self.r * bytes_of(self.rows(state), share)
        return ReplySpec({"scales": ("uint32", (self.r * len(state.places),)), "signs": ("uint8", (size,))})

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Train B from 0 on, beside what the ledger has moved; reply with its signs and scales."""
        slots = {name: slot for name, (_, slot) in self.attached(model).places.items()}
        run_key, now = payload.int("run_key"), self.trained_in(payload.int("round"))
        share = payload.int("share")
        if share not in self.shares:
            raise MessageError(f"one row of {share} is not one of the run's shares")
        directions, tables = self.told(payload, memory, slots)
        part = adapters.attachment_of(model).parts[0]
        assert isinstance(part, adapters.LoraPart)
        moved = self.factors(run_key, slots, directions, tables)
        part.subtract({n: torch.from_numpy(t).to(part.parameters[n].device) for n, t in moved.items()})
        zeros = np.zeros((self.r, tables.shape[1]))
        adapters.load_(model, self.factors(run_key, slots, now, zeros))
        loss = self.train(model, batches, key, {})
        vectors = []
        for name, slot in slots.items():
            b = part.parameters[factor_names(name)[0]].detach().cpu().double().numpy().T / self.unit(slot)
            if not np.isfinite(b).all():
                raise NotFiniteError(f"training has made numbers of {name} that are not finite; lower lr")
            vectors += list(b[:, sent_rows(b.shape[1], share, key)])
        scales, bits, _ = plane(vectors)
        reply = Payload({"scales": scales, "signs": bits}, {"n": batches.n, "loss": loss})
        sent = self.matrices(payload, self.moved(payload, Reply(batches.client, key, reply))["b"])
        for name, slot in slots.items():  # the model is then what was sent
            b = np.stack([next(sent) for _ in range(self.r)], axis=1) * self.unit(slot)
            part.parameters[factor_names(name)[0]].data.copy_(torch.from_numpy(b))
        return reply

    def unit(self, slot: WeightSlot) -> float:
        """Return how much of B one unit of the grid is, for a matrix: B s' / sqrt(r in) is what moves it."""
        return _zeroth.grid_of(self.grid_lr) * math.sqrt(self.r * slot.tensor.shape[1])

    def factors(
        self, run_key: int, slots: Mapping[str, WeightSlot], directions: Sequence[int], tables: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return LoRA's factors for tables [directions, rows of all matrices] in units of the grid, as they are subtracted."""
        found, first = {}, 0
        for name, slot in slots.items() if len(directions) else ():
            rows, width = slot.tensor.shape
            b, a = factor_names(name)
            s = np.stack([signs(run_key, p, slot.start, width) for p in directions])
            found[a] = s.astype(np.float32) / np.float32(math.sqrt(self.r * width))
            found[b] = np.float32(-self.unit(slot)) * tables[:, first : first + rows].T.astype(np.float32)
            first += rows
        return found

    def told(
        self, payload: Payload, memory: dict[str, Any], slots: Mapping[str, WeightSlot]
    ) -> tuple[list[int], np.ndarray]:
        """Return the directions that were moved before, and their tables; what came is added to what the device remembers."""
        if any(payload.array(n).ndim != 1 or payload.array(n).dtype.kind not in "iu" for n in ENTRIES):
            raise MessageError("the entries that came are not lists of whole numbers")
        p, m = (payload.array(name).astype(np.uint64) for name in ("direction", "matrix"))
        shapes = [tuple(slot.tensor.shape) for slot in slots.values()]
        if [rows for rows, _ in shapes] != payload.array("rows").tolist():
            raise MessageError("the matrices that the run trains are not those of this model")
        scale, bits = payload.array("scale"), payload.array("signs")
        here = p.max(initial=0) < self.pool and m.max(initial=0) < len(shapes) and bits.dtype == np.uint8
        lengths = len(p) == len(m) == len(scale)
        if not (here and lengths) or len(bits) != sum(-(-shapes[place][0] // 8) for place in m.tolist()):
            raise MessageError("the entries that came are not of this run's matrices and directions")
        came = outer_passes(shapes, p << np.uint64(32) | m, scale, bits)
        tables = dict(zip(came.ids.tolist(), came.tables, strict=True))
        if payload.int("known"):
            if not memory:
                raise MessageError("this device does not remember the rounds before those that came")
            for direction, table in zip(memory["directions"].tolist(), memory["tables"], strict=True):
                tables[direction] = tables.get(direction, 0) + table.astype(np.int64)
        used = sorted(tables)
        whole = np.array([tables[p] for p in used], np.int64).reshape(
            len(used), sum(rows for rows, _ in shapes)
        )
        memory.update(directions=np.array(used, np.int64), tables=narrow(whole))
        return used, whole

    # The server

    def begins(self, sent: Payload) -> Tensors:
        return {"b": np.zeros(self.r * int(sent.array("rows").sum(dtype=np.int64)))}

    def moved(self, sent: Payload, reply: Reply, absent: float = 0.0) -> Tensors:
        """Return what a reply moves: B of each matrix and direction, in units of the grid; rows not sent by `absent`."""
        found = {"b": self.begins(sent)["b"] + absent}
        bits, scales = reply.payload.array("signs"), iter(reply.payload.array("scales").tolist())
        share = self.share_of(sent, reply)
        for vector in self.matrices(sent, found["b"]):
            rows = sent_rows(len(vector), share, reply.key)
            size = -(-len(rows) // 8)
            vector[rows] = len(vector) / len(rows) * next(scales) * unpacked(bits[:size], len(rows))
            bits = bits[size:]
        return found

    def share_of(self, sent: Payload, reply: Reply) -> int:
        """Return of how many rows the device sent one."""
        sizes = {self.r * bytes_of(sent.array("rows").tolist(), m): m for m in self.shares}
        return sizes[len(reply.payload.array("signs"))]

    def matrices(self, sent: Payload, whole: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the part of a vector of all rows that each matrix and direction has."""
        ends = np.cumsum(np.repeat(sent.array("rows").astype(np.int64), self.r))
        return iter(np.split(whole, ends[:-1]))

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        """Take the mean weighted by rows, and write it as `planes` vectors of signs."""
        sent = Payload({"rows": np.array(self.rows(state))})
        combined = rule.combining(self.begins(sent))
        for reply in replies:
            combined.add(float(reply.payload.int("n")), self.moved(sent, reply, rule.absent))
        if not combined.total:
            return state._replace(round=state.round + 1)
        return self.written(state, list(self.matrices(sent, combined.tensors()["b"])))

    def written(self, state: State, vectors: Sequence[np.ndarray]) -> State:
        """Return the state with a round's moves, those of each matrix and direction, as `planes` vectors of signs."""
        now, left, ledger = self.trained_in(state.round), state.left.copy(), state.ledger
        ends = np.cumsum(self.rows(state)).tolist()
        where = [
            (p, slice(end - rows, end)) for rows, end in zip(self.rows(state), ends, strict=True) for p in now
        ]
        vectors = [v + left[place] for v, place in zip(vectors, where, strict=True)]
        ids = state.places.astype(np.uint64)[:, None] | (np.array(now, np.uint64) << np.uint64(32))
        for _ in range(self.planes):
            scales, bits, vectors = plane(vectors)
            ledger = ledger.append(ids.reshape(-1), scales.astype(np.int64), state.round + 1, bits)
        for place, rest in zip(where, vectors, strict=True):
            left[place] = rest
        return State(ledger, state.round + 1, state.places, left)

    def distance(self, state: State, sent: Payload, reply: Reply) -> float:
        """Return how far a device went: root mean square of B, over that of random steps of the learning rate's size."""
        _, walk = self.walked(reply.payload.int("n"))
        return norm(self.moved(sent, reply).values()) / walk / math.sqrt(self.share_of(sent, reply))

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        met = asked / max(self.shares)
        if rule.name not in ("norm-clip", PRIVATE) and max(self.shares) > 1 and met < FEWEST:
            return (
                f"a row of a matrix comes from {met:.1f} of {asked} clients in a round, and {FEWEST} are needed to compare; "
                "lower share, or use aggregation=norm-clip"
            )
        return super().cannot_combine(rule, asked)

    def sized(self, steps: int, batch_size: int) -> Self:
        return replace(self, steps=steps, batch_size=batch_size)

    def footprint(self, shape: Shape) -> Footprint | None:
        layers = lora_layers(shape, self.targets)
        module = lora_module(layers, {}, self.r)
        if module is None or shape.head:
            return None
        tensors = tuple((layer.name, (layer.out, layer.into), "float32") for layer in layers)
        head = replace(placeholder_ledger(1).head, law=OUTER, tensors=tensors)
        rows, widths = (sum(getattr(layer, side) for layer in layers) for side in ("out", "into"))
        module = module._replace(frozen=module.frozen + self.pool * (widths + rows))  # of all directions
        state = State(Ledger(head), 0, np.arange(len(layers)), np.zeros((self.pool, rows), np.float32))
        vectors = [np.ones(layer.out) for layer in layers for _ in range(self.r)]
        return Footprint(
            "backward",
            module,
            self.written(state, vectors),
            checkpointing=self.recomputes,
            whole_gradient=False,
            kept=-(-2 * self.pool // self.r),  # about the tables of all directions and a copy, in int64
        )


def sent_rows(rows: int, share: int, key: int) -> np.ndarray:
    """Return the rows of a matrix that a device sends with the key of a round: int64 [rows / share, rounded down, or 1]."""
    return (key % rows + share * np.arange(max(1, rows // share))) % rows


def bytes_of(matrices: Iterable[int], share: int) -> int:
    """Return the bytes of the signs of matrices of so many rows, of which one of `share` is sent."""
    return sum(-(-max(1, rows // share) // 8) for rows in matrices)


def plane(vectors: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return (mean |x| of each vector, rounded: uint32 [n]; the signs' bits; what is left of the vectors)."""
    scales = np.array([np.rint(np.abs(x).mean()) for x in vectors])
    scales = np.clip(scales, 0, _zeroth.INT32).astype(np.uint32)
    left = [x - c * np.where(x < 0, -1, 1) for x, c in zip(vectors, scales.astype(np.float64), strict=True)]
    return scales, np.concatenate([packed(x) for x in vectors]), left
