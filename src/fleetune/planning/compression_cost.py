"""Estimate the peak memory and disk of a compression, from the model's configuration alone.

Block by block the peak is a sum (bytes; weights of s bytes, blocks with matrices W [R, C]): the process, the weights (with
`--low-memory` a block or the embedding), the windows' states in front of the next block, and the largest stage:

    solving   the block's Hessians, 4 C^2 for each distinct input; copies of one matrix (4 R C each) and of its Hessian; the
              results so far, a byte a weight or, where they stay floats, s; of experts also what a layer's read
    running   a window through the block: length * s * (its widest point), its scores where attention is not
              fused (4 heads length^2, twice), and the block's compressed weights
    choosing  grids for a byte budget, or training scales: a window forward and back, layer by layer
    measuring the model on rows or text: activations and logits of a batch

Constants are measured as in `device_cost`.
"""

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from fleetune.evaluation.head_loss import CHUNK_BYTES
from fleetune.models.shapes import Linear, Shape
from fleetune.planning import device_cost
from fleetune.planning.device_cost import FLOOR, KERNELS, PIECE
from fleetune.tuning.exchange.footprint import Footprint

MATRICES: Final = 4.0  # copies of a matrix while it is solved: W, its transpose, what it was, the answer
FACTORS: Final = 4.0  # copies of a Hessian: damped, lower factor, inverse, upper factor
EVALUATED: Final = (8, 512)  # rows of a batch when measuring, and tokens of a row
SCORES: Final = 2.0  # copies of attention's scores: as they are, and their softmax
BACKWARD: Final = 4  # widest activations of a layer alive together in a backward pass
LOGITS: Final = 3 * 4 * (1 << 23)  # logits, probabilities and gradient of a piece of tokens
STEP: Final = 512  # tokens of a step of training scales, or one window
SCALE: Final = 24  # bytes for each scale that is trained
END_ROWS: Final = 8192  # of embedding or head that are solved together
WRITTEN: Final = 2.0  # a finished block on its way to the disk: tensors and bytes


class CompressionSize(NamedTuple):
    """The quantities that memory and disk of a compression depend on."""

    windows: int  # 0: the solver needs none
    length: int
    size: int = 4  # bytes of a weight in memory
    bits: int = 4  # of a code; 0: the result stays floats
    group: int = 32
    low_memory: bool = False
    measured: bool = False
    clients: int = 0  # that calibrate in turn; the hidden states of one are in memory
    heads: int = 0  # whose attention scores are stored; 0 for fused attention
    budget: bool = False  # grids are chosen for a byte budget
    trained: bool = False  # the scales are trained afterwards
    dense: bool = False  # the windows go through the dense model as well (`Corrector`)


def _experts(shape: Shape, block: list[Linear]) -> list[Linear]:
    front = ".".join(block[0].name.split(".")[:3])
    return [x for x in shape.experts if x.name.startswith(f"{front}.")]


def memory(shape: Shape, work: CompressionSize) -> dict[str, int]:
    """Return the bytes of the peak by part; see the module's text."""
    # after pruning they differ, and the first ones of a mixture may have no experts
    block, experts = max(
        ((block, _experts(shape, block)) for block in blocks(shape).values()),
        key=lambda both: _weights(both[0]) + _weights(both[1]),
    )
    inner = _weights(block) + _weights(experts)
    ends = shape.largest * work.size
    whole = shape.params * work.size
    stages = {"solving": _solving(block, work), "running": 0, "measuring": 0}
    if experts:
        stages["solving"] += 2 * _weights(experts) * (work.size if not work.bits else 1)
        stages["solving"] += 4 * work.windows * work.length * shape.hidden
    if work.windows:
        scores = SCORES * work.heads * work.length**2 * 4
        stages["running"] = int(work.length * work.size * shape.widest + scores)
        stages["running"] += 2 * inner * 4
    if work.budget:
        stages["choosing"] = max(_backward(shape, work) + _sensitivity(shape, work), _ends(shape))
    if work.trained:
        step = work._replace(length=max(work.length, STEP))
        stages["training"] = _backward(shape, step) + _scales(shape, work)
        # of the compressed model, in its place
        stages["training"] += work.size * _weights(list(shape.experts))
    if work.measured:
        rows, length = EVALUATED
        stages["measuring"] = rows * length * work.size * shape.widest + 2 * CHUNK_BYTES
    return {
        "floor": FLOOR + PIECE * shape.vocab + KERNELS["numba"],
        "weights": max(inner * work.size, ends) if work.low_memory else whole,
        "states": (1 + work.dense)
        * work.windows
        // max(1, work.clients)
        * work.length
        * shape.hidden
        * work.size,
        "work": int(max(stages.values())),
    }


def training(student: Shape, batch: int, length: int, beside: int) -> dict[str, int]:
    """Return the bytes of the peak by part: all weights of `student` trained in fp32 on batches of `length` tokens a row.

    Of each layer's activations, only its input is kept (`models/net/layers.py`).
    `beside` are the bytes of the other models in memory: a teacher, and what the student was made of.
    """
    work = device_cost.Workload(batch=batch, length=length)
    footprint = Footprint("backward", checkpointing=True)
    return device_cost.memory(student, work, footprint) | {"beside": beside}


def training_disk(student: Shape, states: int) -> int:
    """Return the bytes that must be free: the result and a state, or a state beside the one it replaces.

    A state is weights and two moments.
    """
    weights = 4 * student.params
    return 3 * weights + max(weights, 3 * weights * (states > 1))


def blocks(shape: Shape) -> Mapping[str, list[Linear]]:
    """Return the linear layers of each decoder block, by its name."""
    found: dict[str, list[Linear]] = {}
    for linear in shape.linears:
        found.setdefault(".".join(linear.name.split(".")[:3]), []).append(linear)
    return found


def _weights(linears: Iterable[Linear]) -> int:
    return sum(x.out * x.into for x in linears)


def hessians(block: list[Linear]) -> int:
    """Return the bytes of a block's Hessians: one for each distinct input."""
    return sum(4 * into * into for into in _inputs(block))


def _inputs(block: list[Linear]) -> list[int]:
    inputs = {(x.name.rpartition(".")[0], x.name.endswith(("o_proj", "down_proj")), x.into) for x in block}
    return [into for _, _, into in inputs]


def _solving(block: list[Linear], work: CompressionSize) -> float:
    kept = work.size if not work.bits else 1
    done = _weights(block) * kept
    own = max(
        4 * (MATRICES * x.out * x.into + (FACTORS * x.into * x.into if work.windows else 0)) for x in block
    )
    written = WRITTEN * done * (work.bits / 8 if work.bits else 1)
    sums = (1 + work.dense) * hessians(block) if work.windows else 0
    return sums + done + max(own, written)


def _backward(shape: Shape, work: CompressionSize) -> int:
    """Return the bytes of a window's backward pass: what enters each layer, one layer's activations, logits by pieces."""
    layers = len(blocks(shape))
    entering = layers * shape.hidden
    return work.length * work.size * (entering + BACKWARD * shape.widest) + LOGITS


def _sensitivity(shape: Shape, work: CompressionSize) -> int:
    entering = (
        work.length * work.size * shape.hidden * len({x.name.rpartition(".")[0] for x in shape.experts})
    )
    return entering + 8 * sum(x.out for x in shape.experts)


def _scales(shape: Shape, work: CompressionSize) -> int:
    """Return the bytes of training scales: whole numbers of a byte, and for each scale its move, gradient and two moments.

    Beside them a matrix as it is used, with its gradient.
    """
    inner = _weights(shape.linears)
    one = max(x.out * x.into for x in shape.linears)
    return int(inner * (1 + SCALE / (work.group or 256)) + 4 * MATRICES * one)


def _ends(shape: Shape) -> int:
    rows = 4 * MATRICES * END_ROWS * shape.hidden + 4 * FACTORS * shape.hidden**2
    return int(rows + (4 + WRITTEN) * shape.vocab * shape.hidden)


def disk(shape: Shape, work: CompressionSize) -> int:
    """Return the bytes that must be free: the artefact, finished blocks beside it, waiting clients' states."""
    inner = _weights(shape.linears) + _weights(shape.experts)
    weight = work.bits / 8 + 3 / (work.group or 1 << 30) if work.bits else float(work.size)
    states = work.windows * work.length * shape.hidden * work.size if work.clients else 0
    return int(2 * inner * weight + (shape.params - inner) * work.size) + states


def available() -> int | None:
    """Return the bytes of memory that the system can still give; None where it does not say."""
    try:
        with open("/proc/meminfo", "rb") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"MemAvailable"))
    except (OSError, StopIteration):
        return None
