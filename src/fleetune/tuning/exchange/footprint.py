"""Declare what a method trains and whether a step back-propagates, so that `fleetune plan` can count its cost."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from fleetune import adapters
from fleetune.common.ggml import BLOCK, HALVES
from fleetune.models.shapes import Linear, Shape
from fleetune.seeds.ledger import Ledger, LedgerHead

WIDE: Final = (1 << 64) - 1  # a 64-bit key at its full width in a message
Sizes = Mapping[str, tuple[int, ...]]


class Module(NamedTuple):
    """Tensors that are trained beside frozen weights; with none, every weight is trained."""

    note: str = ""  # its size, shown in the table
    tensors: Sizes = MappingProxyType({})  # by name: what is trained, and travels
    adapted: tuple[Linear, ...] = ()  # linear layers with LoRA
    rank: int = 0  # of LoRA
    tokens: int = 0  # virtual tokens of each layer
    dropout: bool = False  # on the input of an adapted layer
    frozen: int = 0  # further numbers, which stay

    @property
    def size(self) -> int:
        """Number of trained numbers."""
        return sum(math.prod(sizes) for sizes in self.tensors.values())


class Footprint(NamedTuple):
    """The work of a device on one model.

    `gradient` is how a step is computed: "two-point" is two forward passes along a direction, "backward" is
    back-propagation with AdamW, "none" is inference.
    """

    gradient: Literal["two-point", "backward", "none"]
    module: Module = Module()
    state: Any = None  # a State of an average round, of placeholders, with the module in `state.tensors`
    stores_direction: bool = False  # two-point: the direction is written out, one number a weight
    moments: int = 2  # backward: the optimizer's numbers for each trained one
    projects: bool = False  # backward: weights and gradients exist a block of rows at a time
    checkpointing: bool = False  # backward: where memory is short, only what enters a layer is kept of it
    whole_gradient: bool = True  # backward: all gradients are there before the first step
    kept: int = 0  # backward: further fp32 copies of the module that are there through the training
    hessian_products: int = 0  # backward: of a Lanczos iteration, whose vectors are in memory together
    hessian_rows: int = 0  # rows that they are taken on; 0 for those of a step

    @property
    def passes(self) -> int:
        """Number of times that a step goes through all weights: a forward, a backward or an update of all of them."""
        trains_all = self.gradient == "backward" and not self.module.tensors
        return 1 if self.gradient == "none" else 3 if trains_all else 2


def lora_layers(shape: Shape, targets: str) -> tuple[Linear, ...]:
    """Return the layers that LoRA is put on, by the `targets` of `adapters.Lora`."""
    if targets in (adapters.ALL_LINEAR, adapters.QUERY_VALUE):
        return shape.linears if targets == adapters.ALL_LINEAR else shape.query_value
    ends = tuple("." + target.strip() for target in targets.split(","))
    return tuple(linear for linear in shape.linears if f".{linear.name}".endswith(ends))


def lora_module(
    adapted: tuple[Linear, ...], head: Sizes, rank: int, *, dropout: bool = False, variant: str = "lora"
) -> Module | None:
    """Return LoRA of this rank on these layers, with a classifier's head; None where there are no such layers."""
    tensors: dict[str, tuple[int, ...]] = {}
    (trained, stay), frozen = adapters.VARIANTS[variant], 0
    for linear in adapted:
        sizes = {"A": (rank, linear.into), "B": (linear.out, rank), "R": (rank, rank)}
        tensors |= {f"{linear.name}.lora_{side}.weight": sizes[side] for side in trained}
        frozen += sum(math.prod(sizes[side]) for side in stay)
    made = Module(f"r={rank}", tensors | dict(head), adapted, rank, dropout=dropout, frozen=frozen)
    return made if adapted else None


def scales_module(shape: Shape) -> Module | None:
    """Return the scales of the linear layers that have some; None where none has.

    Where the model's file is not known, all have two a block, which is the most (Q4_1, Q5_1).
    """
    counts = shape.scales or dict.fromkeys((x.name for x in shape.linears), max(HALVES.values()))
    layers = tuple(x for x in shape.linears if x.name in counts)
    tensors = {f"{x.name}.scales": (x.out, x.into // BLOCK, counts[x.name]) for x in layers}
    return Module("scales", tensors, layers) if tensors else None


def placeholders(module: Module) -> dict[str, np.ndarray]:
    """Return the module's tensors as zeros that share one number's memory."""
    return {name: np.broadcast_to(np.float32(0), sizes) for name, sizes in module.tensors.items()}


def placeholder_ledger(K: int) -> Ledger:
    """Return a ledger of a pool of K directions whose sums need their full 32 bits."""
    ledger = Ledger(LedgerHead("", "", (), WIDE, "hashed", K, 1.0))
    return ledger.append(np.zeros(1, np.uint64), np.array([1 << 20]), 1)
