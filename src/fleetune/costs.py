# SPDX-License-Identifier: Apache-2.0
"""What a device's round costs: peak memory, bytes on the wire, passes over the weights, seconds.

Peak memory of a device is a sum of parts (bytes; P weights of s bytes, N = batch * length tokens a step):

    floor        the process: Python, torch, transformers, the tokenizer, and what the method imports
    weights      P s
    scratch      the piece of moved weights that a zeroth-order forward holds (`seeds/view.py`)
    activations  forward alone: the widest point of one layer, N s (3 I + 2 h) for a llama.  With
                 back-propagation: all that autograd keeps, over all layers, times `HEAP`
    logits       at the scored positions, at most `losses.CHUNK_BYTES` in fp32 at a time, a few arrays of them
    gradients    of what is trained
    optimizer    AdamW's two moments
    adapter      LoRA's own fp32 weights, and the copies on their way from and to the wire

The constants are measured; `benchmarks/plan_memory.py` holds the sums against real rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fleetune import methods
from fleetune.errors import UsageError
from fleetune.messages import Message, Payload, encode
from fleetune.shapes import Shape

if TYPE_CHECKING:
    import numpy as np

MIB: Final = 1 << 20

# Measured: peak resident memory on Linux x86-64, Python 3.11, torch 2.13 (CPU), transformers 5.24, one thread.
FLOOR: Final = 392 * MIB  # python + torch + transformers + fleetune, a model class loaded, no weights
PIECE: Final = 1350  # bytes of a tokenizer for each piece of its vocabulary
KERNELS: Final = 104 * MIB  # numba and its compiled kernels (the very first run, which compiles: 90 MiB more)
PEFT: Final = 14 * MIB  # peft, and its modules around every linear layer
HEAP: Final = 1.7  # back-propagation holds so much for each byte kept: glibc gives freed blocks back late
LOGITS_FORWARD: Final = 2.0  # fp32 arrays of logits alive in a forward: they and their log-softmax
LOGITS_BACKWARD: Final = 5.0  # ... and their gradients, and the first chunk's own
LOGITS_CHUNK: Final = 0.5  # what each further chunk leaves behind (freed blocks, as for `HEAP`)

SIZES: Final[Mapping[str, int]] = {"fp32": 4, "bf16": 2, "fp16": 2}
ROWS: Final = 1000  # rows of a device: decides the width of one integer of its reply
BIG: Final = (1 << 64) - 1  # a 64-bit key at its full width on the wire
SWEEP: Final = 1.5  # a fused pass over the weights takes as long as so many copies of them
TOUCH: Final = 6  # a forward (or a backward) moves each kept activation through memory about so often
METHODS: Final = ("fedkseed", "mezo", "fedit")
COMPARISON: Final = ("inference", "full SGD", "full Adam")  # not methods of ours


@dataclass(frozen=True)
class Work:
    """A device's round: `steps` steps on `batch` rows of `length` tokens, weights in `dtype`."""

    batch: int = 1
    length: int = 256
    steps: int = 200
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        wrong = [n for n in ("batch", "length", "steps") if getattr(self, n) < 1]
        if wrong:
            raise UsageError(f"--{wrong[0]} {getattr(self, wrong[0])} must be at least 1")
        if self.dtype not in SIZES:
            raise UsageError(f"no dtype named '{self.dtype}'", hint="choose one of " + ", ".join(SIZES))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return SIZES[self.dtype]


class Rates(NamedTuple):
    """Speed of a machine: matrix products in the weights' dtype, and copies from memory to memory."""

    flops: float  # floating-point operations a second
    copy: float  # bytes copied a second


# Memory ---------------------------------------------------------------------------------------------


def memory(shape: Shape, work: Work, method: str, rank: int = 16) -> dict[str, int]:
    """Bytes of a device's peak by part (see the module's text), for a method or a comparison."""
    imports = {"fedkseed": KERNELS, "mezo": KERNELS, "fedit": PEFT}.get(method, 0)
    parts = {"floor": FLOOR + PIECE * shape.vocab + imports, "weights": shape.params * work.size}
    n, s = work.tokens, work.size
    if method in ("fedkseed", "mezo", "inference"):
        from fleetune.seeds.view import CHUNK

        scratch = 0 if method == "inference" else min(CHUNK, shape.largest) * s
        return parts | {
            "scratch": scratch,
            "activations": n * s * shape.widest,
            "logits": int((LOGITS_FORWARD + (s / 4 if s < 4 else 0)) * _logits(shape, work)[0]),
        }
    return parts | _backward(shape, work, method, rank)


def _logits(shape: Shape, work: Work) -> tuple[int, float]:
    """fp32 bytes of the logits of a chunk, and how many chunks a step's positions make."""
    from fleetune.losses import CHUNK_BYTES

    whole = work.tokens * shape.outputs * 4
    return min(whole, CHUNK_BYTES), max(1.0, whole / CHUNK_BYTES)


def _backward(shape: Shape, work: Work, method: str, rank: int) -> dict[str, int]:
    lora, weights = 4 * shape.lora(rank), shape.params * work.size
    if method == "fedit":
        own = {"gradients": lora, "optimizer": 2 * lora, "adapter": 4 * lora}
    else:
        own = {"gradients": weights, "optimizer": 2 * weights * (method == "full Adam")}
    needed = kept(shape, work, method, rank)
    left = (HEAP - 1) * max(0, needed - own["gradients"])  # gradients fill what freed activations leave
    chunk, chunks = _logits(shape, work)
    logits = (LOGITS_BACKWARD + LOGITS_CHUNK * (chunks - 1)) * chunk
    return {"activations": int(needed + left), "logits": int(logits), **own}


def kept(shape: Shape, work: Work, method: str, rank: int) -> int:
    """Bytes that autograd keeps between a step's forward and its backward, but for the logits."""
    n, s = work.tokens, work.size
    total = n * (s * shape.kept + 4 * shape.norms)
    if work.batch > 1:  # rows of different lengths: a mask for every layer, keys and values for every head
        total += n * s * shape.padded + shape.layers * n * work.length * s
    if method == "fedit":
        # an adapted layer keeps its input after dropout, the dropout's noise, and A's output, all in fp32
        return total + 4 * n * (2 * shape.inputs + rank * len(shape.linears))
    # a trained layer keeps its input, a trained norm its result
    shared = {(linear.name.rpartition(".")[0], linear.into) for linear in shape.linears}
    return total + n * s * (shape.norms + sum(into for _, into in shared))


# Traffic --------------------------------------------------------------------------------------------


def lora_rank() -> int:
    """The rank that FedIT has unless told otherwise."""
    return next(int(s.default) for s in methods.settings("fedit") if s.name == "r")


def traffic(shape: Shape, work: Work) -> dict[str, tuple[int, int]]:
    """(bytes up, bytes down) of each method's messages, from its own payloads; sums at their full 32 bits."""
    found: dict[str, tuple[int, int]] = {}
    for name in METHODS:
        method = methods.make(
            name, {"batch_size": work.batch, "steps" if name == "fedit" else "tau": work.steps}
        )
        state = _adapter_state(shape, lora_rank()) if name == "fedit" else _ledger_state(name)
        reply = method.expects(state)
        numbers = {n: 0.5 if kind is float else ROWS for n, (kind, _, _) in reply.scalars.items()}
        if "steps" in numbers:
            numbers["steps"] = work.steps
        arrays = {n: (kind, tuple(abs(d or 0) for d in shape)) for n, (kind, shape) in reply.arrays.items()}
        up = message_bytes(arrays, numbers)
        if name == "fedit":  # down is the same adapter; broadcasting it would make it
            found[name] = up, message_bytes(arrays, {"seed": BIG >> 1})
        else:
            down = method.broadcast(state)
            found[name] = (
                up,
                message_bytes({n: (a.dtype.name, a.shape) for n, a in down.arrays.items()}, down.scalars),
            )
    return found


def _ledger_state(name: str) -> Any:
    import numpy as np

    from fleetune.seeds.ledger import Head, Ledger

    module = methods.module_of(name)
    size = next(int(s.default) for s in methods.settings(name) if s.name == "K")
    head = Head("", "", (), BIG, "pooled", size, 1.0)
    ledger = Ledger(head).append(np.zeros(1, np.uint64), np.array([1 << 20]), 1)
    if name == "mezo":
        return module.State(ledger, size, 1)
    return module.State(ledger, 1, np.zeros(size), np.zeros(size, np.int64))


def _adapter_state(shape: Shape, rank: int) -> Any:
    import numpy as np

    def no_memory(*size: int) -> np.ndarray:
        return np.broadcast_to(np.float32(0), size)

    tensors = {}
    for linear in shape.linears:
        tensors[f"{linear.name}.lora_A.weight"] = no_memory(rank, linear.into)
        tensors[f"{linear.name}.lora_B.weight"] = no_memory(linear.out, rank)
    return methods.module_of("fedit").State(tensors, 0, 0.0)


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


# Time -----------------------------------------------------------------------------------------------

# Times that a step goes through all weights: two moved forwards; a forward and a backward; and an update.
PASSES: Final[Mapping[str, int]] = {
    "fedkseed": 2, "mezo": 2, "fedit": 2, "inference": 1, "full SGD": 3, "full Adam": 3,
}  # fmt: skip


def step_seconds(shape: Shape, work: Work, method: str, rates: Rates, rank: int) -> float:
    """Matrix products, and everything else as memory traffic."""
    n, s = work.tokens, work.size
    inner = sum(linear.out * linear.into for linear in shape.linears)
    head = 2 * n * shape.outputs * shape.hidden
    forward = 2 * n * inner + head + 4 * n * work.length * shape.hidden * shape.layers
    moved = TOUCH * n * s * (shape.kept + shape.norms) + 3 * n * 4 * shape.outputs
    weights = shape.params * s
    if method in ("fedkseed", "mezo"):  # the head's moved weights are computed anew for each chunk of logits
        swept = weights + (math.ceil(_logits(shape, work)[1]) - 1) * shape.outputs * shape.hidden * s
        return 2 * (forward / rates.flops + (moved + SWEEP * swept) / rates.copy)
    if method == "fedit":
        lora = shape.lora(rank)
        flops = 2 * forward + head + 6 * n * lora
        moved += TOUCH * n * 4 * 2 * shape.inputs
        return flops / rates.flops + (2 * moved + 7 * 4 * lora) / rates.copy
    update = {"full SGD": 2, "full Adam": 6}[method]
    return (3 * forward + head) / rates.flops + (2 * moved + update * weights) / rates.copy


def calibrate(work: Work) -> Rates:
    """This machine's rates with torch's present number of threads and load: medians, in about 0.3 s."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[work.dtype]
    rows, width = max(16, min(work.tokens, 1024)), 1024
    x, w = torch.zeros(rows, width, dtype=dtype), torch.zeros(width, width, dtype=dtype)
    product = _usual(lambda: torch.mm(x, w))
    source = torch.zeros(16 * MIB)
    target = torch.zeros_like(source)
    copy = _usual(lambda: target.copy_(source))
    return Rates(2.0 * rows * width * width / product, source.numel() * 4 / copy)


def _usual(work: Callable[[], object], budget: float = 0.12) -> float:
    """The median seconds of the calls within about `budget` seconds, after one that warms up."""
    work()
    end = time.perf_counter() + budget
    taken: list[float] = []
    while time.perf_counter() < end or not taken:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
