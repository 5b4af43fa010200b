"""Estimate the peak memory and the seconds of a device's round; `benchmarks/plan_memory.py` holds them against real rounds."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from fleetune.errors import UsageError
from fleetune.evaluation.head_loss import BLOCK, CHUNK_BYTES
from fleetune.models.cache.cache import PLACES
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.net.layers import HEAP, SMALL
from fleetune.models.shapes import Shape
from fleetune.models.stored import KEPT
from fleetune.seeds import chosen_kernels
from fleetune.seeds.descent import PAIRED
from fleetune.seeds.weights import CHUNK
from fleetune.tuning.exchange.footprint import Footprint, Module

MOST_STEPS: Final = 1_000_000  # of a round: a pool of directions holds as many


@dataclass(frozen=True)
class Workload:
    """A device's round: `steps` steps on `batch` rows of `length` tokens, weights in `dtype`, in memory or mapped.

    By default rows are as long as `tune` takes at most, and as many as most methods take a step.
    """

    batch: int = 8
    length: int = 512
    steps: int = 200
    dtype: str = "fp32"
    base: str = "memory"  # or mapped: the base's weights stay in their file

    def __post_init__(self) -> None:
        wrong = [n for n in ("batch", "length", "steps") if getattr(self, n) < 1]
        if wrong:
            raise UsageError(f"--{wrong[0]} {getattr(self, wrong[0])} must be at least 1")
        if self.steps > MOST_STEPS:
            raise UsageError(f"--steps {self.steps} is more than {MOST_STEPS:,}")
        if self.dtype not in WEIGHTS:
            raise UsageError(f"no dtype named '{self.dtype}'", hint="choose one of " + ", ".join(WEIGHTS))
        if self.base not in PLACES:
            raise UsageError(f"no base named '{self.base}'", hint="choose one of " + ", ".join(PLACES))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return WEIGHTS[self.dtype].size


MIB: Final = 1 << 20

# Measured: peak resident memory on Linux x86-64, Python 3.11, torch 2.13 (CPU), transformers 5.24, one thread.
FLOOR: Final = 368 * MIB  # python + torch + transformers + fleetune, a model class loaded, no weights
PIECE: Final = 1350  # bytes of a tokenizer for each piece of its vocabulary
# By `seeds.chosen_kernels`: numba and its compiled kernels (the very first run, which compiles: 90 MiB more), or torch's
# pieces of words and sums.
KERNELS: Final[Mapping[str, int]] = {"auto": 104 * MIB, "numba": 104 * MIB, "torch": 10 * MIB}
# of FLOOR: pages of libraries' files, which the system takes back where memory is short
CODE: Final = 128 * MIB
KERNEL_CODE: Final = 64 * MIB  # ... and of KERNELS
SURE: Final = 0.92  # of a count without weights: no run that was measured took less (docs/memory.md)
PEFT: Final = 14 * MIB  # peft, and its modules around every linear layer
# with checkpoints: a layer's activations, their gradients, and what a few layers leave behind
LAYERS: Final = 1.2
FOLDED: Final = 20  # bytes for each element of a block that is folded: fp32 copy, signs, places and sums
LOGITS_FORWARD: Final = 1.0  # fp32 arrays of the logits of a block of rows alive in a forward
LOGITS_BACKWARD: Final = 5.0  # ... and their gradients, and the first chunk's own
# Of an adapter in fp32 without back-propagation: its own, what came, what goes, and on their way to bytes.  In
# back-propagation only its own: the others are gone before there are moments, or come when these are gone.
COPIES: Final = 4
CURVED: Final = 4.8  # a graph that can be differentiated twice holds so much for each byte kept
EAGER: Final = 5.0  # ... and so many fp32 arrays of all attention weights
LOGITS_CURVED: Final = 3.7  # ... and so many fp32 arrays of all logits
LOGITS_FROZEN: Final = 1.5  # ... of a block of a head that is not trained, with its gradient
LOGITS_CHUNK: Final = 0.5  # what each further chunk leaves behind (freed blocks, as for `HEAP`)

# A pass over the weights, by `seeds.chosen_kernels`, takes as long as so many copies of them.
SWEEP: Final[Mapping[str, float]] = {"auto": 1.5, "numba": 1.5, "torch": 20.0}
STORED: Final = 4.0  # ... and to write a direction out, and to add it twice, as so many more
READ: Final = 3.0  # to read a mapped base once, in fp32
TOUCH: Final = 6  # a forward (or a backward) moves each kept activation through memory about so often
COMPARISON: Final[Mapping[str, Footprint]] = {  # rows of the table that are no methods
    "inference": Footprint("none"),
    "full SGD": Footprint("backward", moments=0),
    "full Adam": Footprint("backward"),
}


class Rates(NamedTuple):
    """Speed of a machine: matrix products in the weights' dtype, and copies from memory to memory."""

    flops: float  # floating-point operations a second
    copy: float  # bytes copied a second


# Memory ---------------------------------------------------------------------------------------------


def memory(shape: Shape, work: Workload, footprint: Footprint) -> dict[str, int]:
    """Return the bytes of a device's peak by part.

    Beside the process and AdamW's moments the peak is a sum (bytes; P weights of s bytes, N = batch * length tokens a step):

        weights      P s; of a mapped base what is kept of its file, and the largest matrix (of a view: a piece) in fp32
        direction    of a method that writes its direction out: P s once more
        scratch      the piece of moved weights that a zeroth-order forward holds (`seeds/view.py`)
        activations  forward alone: the widest point of one layer, N s (3 I + 2 h) for a llama.  With
                     back-propagation: all that autograd keeps, over all layers, times `HEAP`
        logits       at the scored positions, at most `losses.CHUNK_BYTES` in fp32 at a time, a few arrays of them
        gradients    of what is trained; of an adapter's largest tensor where each takes its step in backward; of a block of rows
                     where they are folded on directions (`seeds/descent.py`), and layers are computed again from what enters each
        adapter      its fp32 weights, frozen ones too, and the copies that its training keeps (FedProx, SCAFFOLD), or that travel
        lanczos      the vectors of a measurement of curvature, whose graph is then the peak
    """
    module = footprint.module
    by_seeds = footprint.gradient == "two-point" or footprint.projects
    kernels = KERNELS[chosen_kernels()] * by_seeds
    imports = kernels + PEFT * bool(module.tensors)
    parts = {"floor": FLOOR + PIECE * shape.vocab + imports, "weights": _weights(shape, work, footprint)}
    if footprint.gradient == "backward":
        parts |= _backward(shape, work, footprint)
        curved = parts | _curvature(shape, work, footprint) if footprint.hessian_products else parts
        return max(parts, curved, key=lambda p: sum(p.values()))

    n, s = work.tokens, work.size
    moves_weights = footprint.gradient == "two-point" and not module.tensors
    if footprint.stores_direction:
        parts["direction"] = shape.params * work.size
    both = 1 + (moves_weights and _runs_both_signs(shape, work, footprint))
    if moves_weights:
        parts["scratch"] = both * min(CHUNK, shape.largest) * s
    if module.tensors:
        parts["adapter"] = COPIES * 4 * module.size
    narrow = s / 4 if s < 4 else 0.0  # logits come in the weights' type first
    logits = _logits(shape, work)[0]
    if not shape.labels:  # the head's rows go by in blocks
        logits = min(logits, n * (CHUNK // shape.hidden) * 4)
    logits = int(logits * (1 + narrow if moves_weights else LOGITS_FORWARD + narrow))
    return parts | {"activations": both * n * (s * shape.widest + 8 * module.rank), "logits": both * logits}


def keeps(shape: Shape, work: Workload, footprint: Footprint, ram: int) -> bool:
    """Return whether a device of so much memory keeps a step's activations: where they take at most half of what is free."""
    if not footprint.checkpointing:
        return False
    parts = memory(shape, work, footprint._replace(checkpointing=False))
    return 2 * parts["activations"] <= ram - parts["floor"] - parts["weights"]


def least(shape: Shape, work: Workload, footprint: Footprint, *, in_file: bool) -> int:
    """Return the bytes of a device's peak that cannot be done without: what no file backs, by a count that may be too high.

    `in_file`: a base in memory is a mapping of its file, which has weights of that type.
    """
    parts = memory(shape, work, footprint)
    weights = 0 if in_file or work.base == "mapped" else parts["weights"]
    code = CODE + KERNEL_CODE * (footprint.gradient == "two-point" or footprint.projects)
    return int(SURE * (sum(parts.values()) - parts["weights"])) - code + weights


def _runs_both_signs(shape: Shape, work: Workload, footprint: Footprint) -> bool:
    return work.tokens <= PAIRED and not shape.labels and not footprint.stores_direction


def _weights(shape: Shape, work: Workload, footprint: Footprint) -> int:
    trains_all = footprint.gradient == "backward" and not footprint.module.tensors and not footprint.projects
    if work.base == "memory" or trains_all:
        return shape.params * work.size

    seen = footprint.projects or (footprint.gradient == "two-point" and not footprint.module.tensors)
    largest = max((linear.out * linear.into for linear in shape.linears), default=shape.largest)
    return min(KEPT, shape.params * work.size) + 4 * (min(CHUNK, shape.largest) if seen else largest)


def _logits(shape: Shape, work: Workload) -> tuple[int, float]:
    """Return fp32 bytes of the logits of a chunk, and how many chunks a step's positions make."""
    whole = (work.batch if shape.labels else work.tokens) * shape.outputs * 4
    return min(whole, CHUNK_BYTES), max(1.0, whole / CHUNK_BYTES)


def _backward(shape: Shape, work: Workload, footprint: Footprint) -> dict[str, int]:
    own, weights, moments = 4 * footprint.module.size, shape.params * work.size, footprint.moments
    frozen = footprint.module.frozen
    if own:
        together = (
            own if footprint.whole_gradient else 4 * max(map(math.prod, footprint.module.tensors.values()))
        )
        parts = {
            "gradients": together,
            "optimizer": moments * own,
            "adapter": (1 + footprint.kept) * own + 4 * frozen,
        }
    elif footprint.projects:
        return _projected(shape, work, footprint)
    else:
        parts = {"gradients": weights, "optimizer": moments * weights}
    return {**_graph(shape, work, footprint, parts["gradients"] + parts["optimizer"]), **parts}


def _graph(shape: Shape, work: Workload, footprint: Footprint, beside: int) -> dict[str, int]:
    """Return bytes of what backward needs of a forward pass: activations, of one layer or of all, and the loss's."""
    needed = activation_bytes(shape, work, footprint.module)
    entering = shape.layers * work.tokens * shape.hidden * work.size
    if footprint.checkpointing and entering >= SMALL:
        activations = LAYERS * needed / shape.layers + entering
    else:
        activations = max(needed, HEAP * needed - beside)  # gradients and moments fill what was freed
    chunk, chunks = _logits(shape, work)
    if footprint.module.tensors:  # the head is not trained: its rows go by in blocks
        logits = LOGITS_FROZEN * min(chunk, work.tokens * (BLOCK // shape.hidden) * 4)
    else:
        logits = (LOGITS_BACKWARD + LOGITS_CHUNK * (chunks - 1)) * chunk
    return {"activations": int(activations), "logits": int(logits)}


def _projected(shape: Shape, work: Workload, footprint: Footprint) -> dict[str, int]:
    n, s = work.tokens, work.size
    whole = (work.batch if shape.labels else n) * shape.outputs * 4
    block = whole if shape.labels else min(CHUNK_BYTES, n * (CHUNK // shape.hidden) * 4)
    return {
        "activations": _graph(shape, work, footprint, 0)["activations"],
        "logits": int(LOGITS_FORWARD * min(whole, block)),
        "gradients": min(CHUNK, shape.largest) * (2 * s + FOLDED),
    }


def activation_bytes(shape: Shape, work: Workload, module: Module) -> int:
    """Return the bytes that autograd keeps between a step's forward and its backward, but for the logits."""
    n, s = work.tokens, work.size
    total = n * (s * shape.kept + 4 * shape.norms)
    seen = work.length + module.tokens  # by each token
    # a mask a layer, keys and values for every head
    if work.batch > 1 or (module.tokens and not shape.labels):
        total += n * s * shape.padded + shape.layers * n * seen * s
    if module.tensors and shape.dropped:  # in training: what is dropped, and attention written out
        total += shape.layers * n * (2 * shape.hidden + shape.dropped * seen * (2 * s + 1))
    return total + (_beside(work, module, shape) if module.tensors else n * s * _trained(shape))


def _trained(shape: Shape) -> int:
    """Return floats a token that are kept for weights' own gradients: a layer's input, a norm's result."""
    shared = {(linear.name.rpartition(".")[0], linear.into) for linear in shape.linears}
    same = shape.layers * shape.hidden if shape.labels else 0  # an encoder keeps one of them anyway
    return shape.norms + sum(into for _, into in shared) - same


def _beside(work: Workload, module: Module, shape: Shape) -> int:
    """Return bytes that are kept for a module: a prefix's keys and values for every head, or what LoRA works on.

    That is A's output and its input in fp32: in an fp32 model the layer's own, one for all that read it; else a
    copy for each.  Dropout takes a byte a number, which says what stays.
    """
    if module.tokens:
        numbers = shape.padded + 2 * sum(width for _, width in shape.attention)
        return work.batch * module.tokens * work.size * numbers
    shared = {(x.name.rpartition(".")[0], x.into) for x in module.adapted}
    # as in `_trained`
    same = shape.layers * shape.hidden if shape.labels and len(shared) > shape.layers else 0
    into = sum(into for _, into in shared) - same
    each = sum(x.into for x in module.adapted)
    if work.size < 4:
        into = each
    return work.tokens * (4 * (into + module.rank * len(module.adapted)) + each * module.dropout)


def _curvature(shape: Shape, work: Workload, footprint: Footprint) -> dict[str, int]:
    """Return bytes of the graph that Hessian products go through (a forward and its backward), and of their vectors."""
    work = dataclasses.replace(work, batch=footprint.hessian_rows or work.batch)
    module, positions = footprint.module, work.batch if shape.labels else work.tokens
    numbers = module.size - sum(math.prod(sizes) for sizes in shape.head.values())
    vectors = footprint.hessian_products * 8 * 4 * numbers
    pairs = work.tokens * (work.length + module.tokens)  # of a token and one that it sees
    attention = EAGER * 4 * shape.layers * shape.heads * pairs
    return {
        "activations": int(CURVED * activation_bytes(shape._replace(dropped=0), work, module) + attention),
        "logits": int(LOGITS_CURVED * positions * shape.outputs * 4),
        "lanczos": vectors,
    }


# Time -----------------------------------------------------------------------------------------------


def step_seconds(shape: Shape, work: Workload, footprint: Footprint, rates: Rates) -> float:
    """Return the seconds of a step: matrix products, and everything else as memory traffic."""
    n, s, module = work.tokens, work.size, footprint.module
    inner = sum(linear.out * linear.into for linear in shape.linears)
    scored = work.batch if shape.labels else n
    head = 2 * scored * shape.outputs * shape.hidden
    twice = footprint.checkpointing and shape.layers * n * shape.hidden * s >= SMALL
    forward = 2 * n * inner + head + 4 * n * work.length * shape.hidden * shape.layers
    moved = float(TOUCH * n * s * (shape.kept + shape.norms) + 3 * scored * 4 * shape.outputs)
    weights = shape.params * s
    if work.base == "mapped":  # of a layer forward, again and backward; `moved` counts twice below
        moved += READ * (1.0 if footprint.gradient != "backward" else 1.5) * 4 * shape.params
    if footprint.gradient == "two-point":
        if module.tensors:
            return 2 * (forward / rates.flops + moved / rates.copy)
        stored = STORED * weights * footprint.stores_direction
        sweep = SWEEP[chosen_kernels()] * weights
        return 2 * forward / rates.flops + (2 * (moved + sweep) + stored) / rates.copy
    if module.tensors:
        own = module.size
        flops = (2 + twice) * forward + head + 6 * n * (own + module.frozen) * bool(module.adapted)
        if module.dropout:
            moved += TOUCH * n * 4 * 2 * sum(x.into for x in module.adapted)
        return flops / rates.flops + ((2 + twice) * moved + 7 * 4 * own) / rates.copy
    update = 2 + 2 * footprint.moments  # reads and writes of each weight
    return ((3 + twice) * forward + head) / rates.flops + (
        (2 + twice) * moved + update * weights
    ) / rates.copy


def calibrate(work: Workload) -> Rates:
    """Measure this machine's rates with torch's present number of threads and load: medians, in about 0.3 s."""
    import torch

    dtype = getattr(torch, WEIGHTS[work.dtype].full)
    rows, width = max(16, min(work.tokens, 1024)), 1024
    x, w = torch.zeros(rows, width, dtype=dtype), torch.zeros(width, width, dtype=dtype)
    product = _usual(lambda: torch.mm(x, w))
    source = torch.zeros(16 * MIB)
    target = torch.zeros_like(source)
    copy = _usual(lambda: target.copy_(source))
    return Rates(2.0 * rows * width * width / product, source.numel() * 4 / copy)


def _usual(work: Callable[[], object], budget: float = 0.12) -> float:
    work()
    end = time.perf_counter() + budget
    taken: list[float] = []
    while time.perf_counter() < end or not taken:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
