# SPDX-License-Identifier: Apache-2.0
"""What each method trains and sends, as names and sizes: counted from a configuration, nothing is made.

Bytes are those of real messages: a method's own `expects` says what a reply holds, its own `broadcast` what
goes down, and `messages` how they are written.  Two things change from round to round and are taken as they
are in most rounds: of FedPepTAO all layers travel (as in its first round; later those that it chose), and of
FwdLLM's ranked seeds none (400 of them, 3 kB, in every second round).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fleetune.planning.shapes import Linear, Shape
from fleetune.tuning import methods
from fleetune.tuning.messages import Message, Payload, encode

if TYPE_CHECKING:
    from fleetune.planning.workload import Workload

# The setting of each method that is its number of steps in a round.
STEPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "fedkseed": "tau", "mezo": "tau", "onebyte": "directions", "zosgd": "tau", "fwdllm": "P",
        "fedit": "steps", "fedpetuning": "steps", "fedpeptao": "steps",
    }
)  # fmt: skip
METHODS: Final = tuple(STEPS)
ROWS: Final = 1000  # rows of a device: decides the width of one integer of its reply
BIG: Final = (1 << 64) - 1  # a 64-bit key at its full width on the wire

Sizes = dict[str, tuple[int, ...]]


class Module(NamedTuple):
    """What a method trains beside frozen weights, with its default settings; no tensors: every weight."""

    note: str
    tensors: Mapping[str, tuple[int, ...]]  # what is trained and travels, by name
    adapted: tuple[Linear, ...] = ()  # linear layers with LoRA
    rank: int = 0
    tokens: int = 0  # virtual tokens of each layer
    dropout: bool = False  # on what goes into an adapted layer
    lanczos: int = 0  # Hessian products that a device makes in its first rounds

    @property
    def size(self) -> int:
        """Trained numbers."""
        return sum(math.prod(sizes) for sizes in self.tensors.values())


def module(shape: Shape, name: str) -> Module | None:
    """The module of a method on a model; None where the model's family has no place for it."""
    default = {s.name: s.default for s in methods.settings(name)} if name in METHODS else {}
    if name in ("fedit", "fedpetuning", "fwdllm"):
        adapted = shape.linears if name == "fedit" else shape.query_value
        rank = int(default.get("r", 16))  # fedpetuning's size 0 is this
        dropout = bool(default.get("dropout", 0.0))
        tensors = _lora(adapted, rank) | dict(shape.head)
        return Module(f"r={rank}", tensors, adapted, rank, dropout=dropout) if adapted else None
    if name == "fedpeptao":
        tokens, tensors = int(default["tokens"]), dict(shape.head)
        for layer, width in shape.attention:
            tensors |= {f"{layer}.prefix.{which}": (tokens, width) for which in ("key", "value")}
        products = int(default["lanczos"])
        return Module(f"T={tokens}", tensors, tokens=tokens, lanczos=products) if shape.attention else None
    return Module("", {})


def _lora(adapted: tuple[Linear, ...], rank: int) -> Sizes:
    tensors: Sizes = {}
    for linear in adapted:
        tensors[f"{linear.name}.lora_A.weight"] = (rank, linear.into)
        tensors[f"{linear.name}.lora_B.weight"] = (linear.out, rank)
    return tensors


def traffic(shape: Shape, work: Workload, name: str) -> tuple[int, int]:
    """(bytes up, bytes down) of a method's messages in one round; sums at their full 32 bits."""
    tensors = (module(shape, name) or Module("", {})).tensors
    method = _method(name, work)
    reply = method.expects(_state(name, method, shape, tensors))
    numbers = {n: 0.5 if kind is float else ROWS for n, (kind, _, _) in reply.scalars.items()}
    if "steps" in numbers:
        numbers["steps"] = work.steps
    arrays = {n: (kind, tuple(abs(d or 0) for d in sizes)) for n, (kind, sizes) in reply.arrays.items()}
    down = method.broadcast(
        _state(name, method, shape, {})
    )  # the module would be copied, so it is added after
    sent = {n: (a.dtype.name, a.shape) for n, a in down.arrays.items()}
    sent |= {n: ("float32", sizes) for n, sizes in tensors.items()}
    return message_bytes(arrays, numbers), message_bytes(sent, down.scalars)


def _method(name: str, work: Workload) -> Any:
    values = {"batch_size": work.batch, STEPS[name]: work.steps}
    if name == "onebyte":  # whose pool holds at least the directions of a step
        values["K"] = max(4096, 1 << (work.steps - 1).bit_length())
    return methods.make(name, values)


def _state(name: str, method: Any, shape: Shape, tensors: Mapping[str, tuple[int, ...]]) -> Any:
    """What a method's `expects` and `broadcast` look at, in the round after the first; arrays of no memory."""
    import numpy as np

    from fleetune.seeds.ledger import Ledger, LedgerHead

    size = int(getattr(method, "K", 1))
    ledger = Ledger(LedgerHead("", "", (), BIG, "pooled", size, 1.0))
    arrays = {n: np.broadcast_to(np.float32(0), sizes) for n, sizes in tensors.items()}
    return SimpleNamespace(
        ledger=ledger.append(np.zeros(1, np.uint64), np.array([1 << 20]), 1), step=size, round=0,
        tensors=arrays, seed=BIG >> 1, start={}, c={}, seeds=np.zeros(0, np.uint64), batch=0,
        warmup=0, scores=np.zeros(shape.layers),
    )  # fmt: skip


def message_bytes(arrays: Mapping[str, tuple[str, tuple[int, ...]]], scalars: Mapping[str, Any]) -> int:
    """`len(messages.encode(..))` of a payload with these arrays (dtype, shape), without making them.

    What an array adds is what an empty one adds, its values, and the wider length of its bytes and sizes.
    """
    import msgpack
    import numpy as np

    def packed(value: object) -> int:
        return len(msgpack.packb(value))

    count = len(arrays)
    total = len(encode(Message(1, bytes(8), Payload({}, scalars)))) + (
        0 if count < 16 else 2 if count < 1 << 16 else 4
    )
    for name, (kind, shape) in arrays.items():
        raw = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        prefix = 2 if raw < 1 << 8 else 3 if raw < 1 << 16 else 5
        total += packed([name, 0, list(shape)]) + prefix + raw
    return total
