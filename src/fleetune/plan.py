# SPDX-License-Identifier: Apache-2.0
"""What tuning a model will cost, from its configuration alone: memory, traffic, passes and time.

Nothing is loaded and nothing is downloaded.  Peak memory of a device is a sum of parts (bytes; P weights of s
bytes, L layers, N = batch * length tokens a step, V pieces in the vocabulary):

    floor        the process: Python, torch, transformers, the tokenizer, and what the method imports
    weights      P s
    scratch      the piece of moved weights that a zeroth-order forward holds (`seeds/view.py`)
    activations  forward alone: the widest point of one layer, N s (3 I + 2 h) for a llama.  With
                 back-propagation: all that autograd keeps, over all layers, times `HEAP`
    logits       at the scored positions, at most `losses.CHUNK_BYTES` in fp32 at a time, a few arrays of them
    gradients    of what is trained
    optimizer    AdamW's two moments
    adapter      LoRA's own fp32 weights, and the copies on their way from and to the wire

Llama-like decoders (llama, mistral, qwen2, qwen3; grouped-query attention, tied embeddings) are counted from
the configuration itself.  Any other family is instantiated on torch's meta device (no memory) and its layers
are counted there; its parameters are then exact and its activations a fair guess.

Traffic is what `messages.encode` makes of the methods' own payloads.  Time comes from a short measurement of
this machine (`calibrate`), so it is for devices like this one.

State alone (weights, gradients, moments; no activations, no process) is the comparison of MeZO (arXiv
2305.17333) and of Adam's 16 bytes a parameter: 14 GB to run LLaMA-7B in fp16, 112 GB to tune it with Adam.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fleetune import methods
from fleetune.errors import FitError, UsageError
from fleetune.messages import Message, Payload, encode
from fleetune.text import human_bytes, human_count, human_time

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig

MIB: Final = 1 << 20

# Measured: peak resident memory on Linux x86-64, Python 3.11, torch 2.13 (CPU), transformers 5.24, one thread.
FLOOR: Final = 392 * MIB  # python + torch + transformers + fleetune, a model class loaded, no weights
PIECE: Final = 1350  # bytes of a tokenizer for each piece of its vocabulary
KERNELS: Final = 104 * MIB  # numba and its compiled kernels (the very first run, which compiles: 90 MiB more)
PEFT: Final = 14 * MIB  # peft, and its modules around every linear layer
HEAP: Final = 1.7  # back-propagation: memory held for each byte kept (freed blocks between live ones stay)
LOGITS_FORWARD: Final = 2.0  # fp32 arrays of logits alive in a forward: they and their log-softmax
LOGITS_BACKWARD: Final = 5.0  # ... and their gradients, and the first chunk's own
LOGITS_CHUNK: Final = 0.5  # what each further chunk leaves behind (freed blocks, as for `HEAP`)

SIZES: Final[Mapping[str, int]] = {"fp32": 4, "bf16": 2, "fp16": 2}
TIGHT: Final = 0.9  # fuller than this is a tight fit
ROWS: Final = 1000  # rows of a device: decides the width of one integer of its reply
SWEEP: Final = 1.5  # a fused pass over the weights takes as long as so many copies of them
TOUCH: Final = 6  # a forward (or a backward) moves each kept activation through memory about so often
BASE: Final = "base"  # the comparison rows have no method
COMPARISON: Final = ("inference", "full SGD", "full Adam")
METHODS: Final = ("fedkseed", "mezo", "fedit")


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


class Linear(NamedTuple):
    """A linear layer that LoRA adapts: its name in the model, and its weight's shape."""

    name: str
    out: int
    into: int


class Shape(NamedTuple):
    """What of a model's configuration the costs depend on.  Floats are counted a token, over all layers."""

    family: str
    params: int  # tied ones once
    vocab: int
    hidden: int
    linears: tuple[Linear, ...]
    layers: int
    widest: int  # floats alive at the widest point of one layer's forward
    kept: int  # floats that autograd keeps, but for norms and adapters
    norms: int  # floats that norms keep (in fp32 whatever the weights are)
    padded: int  # further floats kept when rows are padded (keys and values repeated for every head)
    largest: int  # elements of the largest tensor

    @property
    def inputs(self) -> int:
        """Inputs of all adapted layers, a token."""
        return sum(linear.into for linear in self.linears)

    def lora(self, r: int) -> int:
        """Parameters of LoRA of rank r on all linear layers."""
        return sum(r * (linear.out + linear.into) for linear in self.linears)


class Rates(NamedTuple):
    """Speed of a machine: matrix products in the weights' dtype, and copies from memory to memory."""

    flops: float  # floating-point operations a second
    copy: float  # bytes copied a second


@dataclass(frozen=True)
class Row:
    """The costs of one way to use a model, a device and round; bytes and seconds."""

    method: str
    tunes: bool  # a method of `fleetune tune` (else a comparison)
    peak: int
    parts: dict[str, int]  # what the peak is made of
    trainable: int
    bytes_up: int | None
    bytes_down: int | None
    passes: int  # times that a step goes through all weights
    seconds: float | None  # computing; None for inference
    sending: float | None  # bytes_up at the stated uplink
    ram: int | None

    @property
    def spare(self) -> int:
        """Bytes of the stated memory left over (negative: missing)."""
        return (self.ram or self.peak) - self.peak

    @property
    def fits(self) -> str:
        """"yes", "yes, tight" (within a tenth), or "no: 3.9 GB short"; "" when no memory was stated."""
        if self.ram is None:
            return ""
        if self.spare < 0:
            return f"no: {human_bytes(-self.spare)} short"
        return "yes" if self.peak <= TIGHT * self.ram else "yes, tight"


# The table ------------------------------------------------------------------------------------------


def table(
    config: PretrainedConfig,
    work: Work,
    *,
    ram: int | None = None,
    uplink: float | None = None,
    rates: Rates | None = None,
) -> list[Row]:
    """The costs of every method and of the comparisons, on one device and for one of its rounds.

    `ram` in bytes, `uplink` in bytes a second.  `rates` None measures this machine, which takes some tenths
    of a second.
    """
    shape = shape_of(config)
    speed = rates or calibrate(work)
    traffic, rank = _traffic(shape, work), _rank()
    weights = shape.params * work.size
    rows = []
    for name in (*METHODS, *COMPARISON):
        up, down = traffic.get(name, (None, None) if name == "inference" else (weights, weights))
        parts = memory(shape, work, name, rank)
        trainable = {"fedit": shape.lora(rank), "inference": 0}.get(name, shape.params)
        seconds = None if name == "inference" else work.steps * _step_seconds(shape, work, name, speed, rank)
        sending = up / uplink if up is not None and uplink else None
        peak = sum(parts.values())
        rows.append(
            Row(name, name in METHODS, peak, parts, trainable, up, down, PASSES[name], seconds, sending, ram)
        )
    return rows


def columns(rows: Sequence[Row]) -> list[str]:
    """The headings of `cells`."""
    heads = ["method", "peak RAM", "up/round", "down/round", "passes/step", "round time"]
    ram = rows[0].ram
    return heads if ram is None else [*heads, f"fits {human_bytes(ram)}"]


def cells(row: Row) -> list[str]:
    """A row as text.  The round's time includes the sending where an uplink was stated."""
    name = f"{row.method} (r={_rank()})" if row.method == "fedit" else row.method
    time = None if row.seconds is None else row.seconds + (row.sending or 0.0)
    shown = [name, human_bytes(row.peak), human_bytes(row.bytes_up), human_bytes(row.bytes_down)]
    return [*shown, str(row.passes), human_time(time), *([row.fits] if row.ram is not None else [])]


def best(rows: Sequence[Row]) -> str:
    """The method to begin with; FitError when none fits.

    FedIT learns most from a step, so it is the one where it fits with room to spare and is not longer at
    sending than at computing; else FedKSeed (and MeZO where nothing but it fits).
    """
    fitting = [row for row in rows if row.tunes and row.spare >= 0]
    if not fitting:
        least = min((row for row in rows if row.tunes), key=lambda row: row.peak)
        raise FitError(
            f"no method fits {human_bytes(least.ram)}: the smallest, {least.method}, needs "
            f"{human_bytes(least.peak)} ({human_bytes(least.parts['weights'])} of it weights)",
            hint="choose a smaller model, or try --dtype bf16, a shorter --length, a smaller --batch",
        )
    for row in fitting:
        if row.method == "fedit" and row.fits != "yes, tight" and (row.sending or 0.0) <= (row.seconds or 0.0):
            return "fedit"
    return fitting[0].method


def describe(config: PretrainedConfig, name: str, work: Work) -> list[tuple[str, str]]:
    """(label, text) lines over the table: the model, the work, and the state alone of running and of tuning it."""
    shape = shape_of(config)
    adam, fp16 = state_bytes(shape.params, "adam"), state_bytes(shape.params, "inference")
    return [
        ("model", f"{name} · {shape.family} · {human_count(shape.params)} parameters · {work.dtype}"),
        ("round", f"{work.steps:,} steps of {work.batch:,} x {work.length:,} tokens on every device"),
        ("state only", f"{human_bytes(fp16)} to run it in fp16 · {human_bytes(adam)} to tune it with Adam (16 bytes a weight)"),
        ("time", "at the speed of this machine, measured just now"),
    ]


def state_bytes(params: int, use: str) -> int:
    """Bytes of state alone: "inference" is fp16 weights; "adam" fp32 weights, gradients and two moments."""
    return params * {"inference": 2, "adam": 16}[use]


# The model ------------------------------------------------------------------------------------------


def shape_of(config: PretrainedConfig) -> Shape:
    """The shape of a configuration's model: by formula for a llama-like one, else counted on the meta device."""
    if config.model_type in BIASES:
        return _llama(config.to_dict(), config.model_type)
    return _counted(config)


# Where each llama-like family has biases (q, k, v), (o), (mlp), or the key that says so; and norms on q and k.
BIASES: Final[Mapping[str, tuple[str | bool, str | bool, str | bool, bool]]] = {
    "llama": ("attention_bias", "attention_bias", "mlp_bias", False),
    "mistral": (False, False, False, False),
    "qwen2": (True, False, False, False),
    "qwen3": ("attention_bias", "attention_bias", False, True),
}


def _llama(c: Mapping[str, Any], family: str) -> Shape:
    h, inner, layers, vocab, heads = (
        int(c[k])
        for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    )
    head = int(c.get("head_dim") or h // heads)
    q, kv = heads * head, int(c.get("num_key_value_heads") or heads) * head
    in_qkv, in_o, in_mlp, head_norms = BIASES[family]
    qkv_bias, o_bias, mlp_bias = (b if isinstance(b, bool) else bool(c.get(b)) for b in (in_qkv, in_o, in_mlp))
    block = {
        "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q), "mlp.gate_proj": (inner, h), "mlp.up_proj": (inner, h), "mlp.down_proj": (h, inner),
    }  # fmt: skip
    biases = (q + 2 * kv) * qkv_bias + h * o_bias + (2 * inner + h) * mlp_bias
    in_layer = sum(out * into for out, into in block.values()) + biases + 2 * h + 2 * head * head_norms
    ends = vocab * h * (1 if c.get("tie_word_embeddings") else 2) + h
    linears = [Linear(f"model.layers.{i}.{name}", *size) for i in range(layers) for name, size in block.items()]
    return Shape(
        family, layers * in_layer + ends, vocab, h, tuple(linears), layers,
        widest=max(3 * inner + 2 * h, 5 * q + 2 * kv + 2 * h),
        kept=layers * (2 * q + 2 * kv + 3 * inner + heads),  # q, k, v, attention's output; gate, its silu, up
        norms=layers * (2 * h + (q + kv) * head_norms),
        padded=layers * 2 * (q - kv),
        largest=max(vocab * h, inner * h, q * h),
    )  # fmt: skip


def _counted(config: PretrainedConfig) -> Shape:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    head, table = net.get_output_embeddings(), net.get_input_embeddings().weight
    linears = []
    for name, module in net.named_modules():
        if module is not head and isinstance(module, torch.nn.Linear | Conv1D):
            a, b = module.weight.shape
            linears.append(Linear(name, b, a) if isinstance(module, Conv1D) else Linear(name, a, b))
    # An input that several layers of one parent share is one tensor.
    shared = {(linear.name.rpartition(".")[0], linear.into) for linear in linears}
    vocab, h = table.shape
    layers = int(config.get_text_config().num_hidden_layers)
    return Shape(
        config.model_type, sum(p.numel() for p in net.parameters()), vocab, h, tuple(linears), layers,
        widest=2 * h + 3 * max(linear.out for linear in linears),
        kept=sum(linear.out for linear in linears) + sum(into for _, into in shared) - 2 * layers * h,
        norms=2 * layers * h, padded=0, largest=max(p.numel() for p in net.parameters()),
    )  # fmt: skip


# Memory ---------------------------------------------------------------------------------------------


def memory(shape: Shape, work: Work, method: str, rank: int = 16) -> dict[str, int]:
    """Bytes of a device's peak by part (see the module's text), for a method or a comparison."""
    imports = {"fedkseed": KERNELS, "mezo": KERNELS, "fedit": PEFT}.get(method, 0)
    parts = {"floor": FLOOR + PIECE * shape.vocab + imports, "weights": shape.params * work.size}
    n, s = work.tokens, work.size
    logits = n * shape.vocab * 4
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

    whole = work.tokens * shape.vocab * 4
    return min(whole, CHUNK_BYTES), max(1.0, whole / CHUNK_BYTES)


def _backward(shape: Shape, work: Work, method: str, rank: int) -> dict[str, int]:
    n, s, lora = work.tokens, work.size, 4 * shape.lora(rank)
    kept = n * (s * shape.kept + 4 * shape.norms)
    if work.batch > 1:  # rows of different lengths: a mask for every layer, keys and values for every head
        kept += n * s * shape.padded + shape.layers * n * work.length * s
    if method == "fedit":
        # an adapted layer keeps its input after dropout, the dropout's noise, and A's output, all in fp32
        kept += 4 * n * (2 * shape.inputs + rank * len(shape.linears))
        own = {"gradients": lora, "optimizer": 2 * lora, "adapter": 4 * lora}
    else:
        # a trained layer keeps its input, a trained norm its result
        kept += n * s * (shape.norms + sum(i for _, i in {(x.name.rpartition(".")[0], x.into) for x in shape.linears}))
        weights = shape.params * s
        own = {"gradients": weights, "optimizer": 2 * weights * (method == "full Adam")}
    chunk, chunks = _logits(shape, work)
    logits = (LOGITS_BACKWARD + LOGITS_CHUNK * (chunks - 1)) * chunk
    left = (HEAP - 1) * max(0, kept - own["gradients"])  # gradients fill what freed activations leave
    return {"activations": int(kept + left), "logits": int(logits), **own}


# Traffic --------------------------------------------------------------------------------------------


def _rank() -> int:
    return next(int(s.default) for s in methods.settings("fedit") if s.name == "r")


def _traffic(shape: Shape, work: Work) -> dict[str, tuple[int, int]]:
    """(bytes up, bytes down) of each method's messages, from its own payloads; sums at their full 32 bits."""
    found = {}
    for name in METHODS:
        method = methods.make(name, {"batch_size": work.batch, "steps" if name == "fedit" else "tau": work.steps})
        state = _adapter_state(shape, _rank()) if name == "fedit" else _ledger_state(name)
        reply = method.expects(state)
        numbers = {n: 0.5 if kind is float else ROWS for n, (kind, _, _) in reply.scalars.items()}
        if "steps" in numbers:
            numbers["steps"] = work.steps
        arrays = {n: (kind, tuple(abs(d or 0) for d in shape)) for n, (kind, shape) in reply.arrays.items()}
        up = message_bytes(arrays, numbers)
        if name == "fedit":  # down is the same adapter; broadcasting it would make it
            found[name] = up, message_bytes(arrays, {"seed": WORD >> 1})
        else:
            down = method.broadcast(state)
            found[name] = up, message_bytes({n: (a.dtype.name, a.shape) for n, a in down.arrays.items()}, down.scalars)
    return found


WORD: Final = (1 << 64) - 1


def _ledger_state(name: str) -> Any:
    import numpy as np

    from fleetune.seeds.ledger import Head, Ledger

    module = methods.module_of(name)
    size = next(int(s.default) for s in methods.settings(name) if s.name == "K")
    head = Head("", "", (), WORD, "pooled", size, 1.0)
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
    total = len(encode(Message(1, bytes(8), Payload({}, scalars)))) + (0 if count < 16 else 2 if count < 1 << 16 else 4)
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


def _step_seconds(shape: Shape, work: Work, method: str, rates: Rates, rank: int) -> float:
    """Matrix products, and everything else as memory traffic."""
    n, s = work.tokens, work.size
    inner = sum(linear.out * linear.into for linear in shape.linears)
    head = 2 * n * shape.vocab * shape.hidden
    forward = 2 * n * inner + head + 4 * n * work.length * shape.hidden * shape.layers
    moved = TOUCH * n * s * (shape.kept + shape.norms) + 3 * n * 4 * shape.vocab
    weights = shape.params * s
    if method in ("fedkseed", "mezo"):  # the head's moved weights are computed anew for each chunk of logits
        swept = weights + (math.ceil(_logits(shape, work)[1]) - 1) * shape.vocab * shape.hidden * s
        return 2 * (forward / rates.flops + (moved + SWEEP * swept) / rates.copy)
    if method == "fedit":
        lora = shape.lora(rank)
        flops = 2 * forward + head + 6 * n * lora
        moved += TOUCH * n * 4 * 2 * shape.inputs
        return flops / rates.flops + (2 * moved + 7 * 4 * lora) / rates.copy
    update = {"full SGD": 2, "full Adam": 6}[method]
    return (3 * forward + head) / rates.flops + (2 * moved + update * weights) / rates.copy


def calibrate(work: Work) -> Rates:
    """This machine's rates with torch's present number of threads: the best of a few repeats, about 0.3 s."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[work.dtype]
    rows, width = max(16, min(work.tokens, 1024)), 1024
    x, w = torch.zeros(rows, width, dtype=dtype), torch.zeros(width, width, dtype=dtype)
    product = _fastest(lambda: torch.mm(x, w))
    source = torch.zeros(16 * MIB)
    target = torch.zeros_like(source)
    copy = _fastest(lambda: target.copy_(source))
    return Rates(2.0 * rows * width * width / product, source.numel() * 4 / copy)


def _fastest(work: Callable[[], object], budget: float = 0.12) -> float:
    """Seconds of the fastest call within about `budget` seconds, after one that warms up."""
    work()
    end, least = time.perf_counter() + budget, math.inf
    while time.perf_counter() < end or least == math.inf:
        began = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - began)
    return least


# Sizes and speeds as people write them ---------------------------------------------------------------

_NUMBER = r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*"
_BYTES = re.compile(_NUMBER + r"(?:([kmgt]i?)?b?)\s*", re.IGNORECASE)
_RATE = re.compile(_NUMBER + r"([kKmMgG]i?)?(bits?|b|B)(?:/s|ps|/sec)\s*")


def parse_bytes(text: str | None) -> int | None:
    """A size as bytes: 4GB, 512 MB, 2GiB, 8e9.  None stays None; UsageError for anything else."""
    if text is None:
        return None
    found = _BYTES.fullmatch(text)
    value = float(found[1]) * _factor(found[2]) if found else 0.0
    if not 1 <= value < math.inf:
        raise UsageError(f"--ram {text!r} is not a size", hint="write 4GB, 512 MB, 2GiB or a number of bytes")
    return int(value)


def parse_rate(text: str | None) -> float | None:
    """A speed as bytes a second: 1Mbps, 500kbit/s, 2 MB/s (b is a bit, B a byte).  None stays None; UsageError else."""
    if text is None:
        return None
    found = _RATE.fullmatch(text)
    value = float(found[1]) * _factor(found[2]) / (1 if found[3] == "B" else 8) if found else 0.0
    if not 0 < value < math.inf:
        raise UsageError(f"--uplink {text!r} is not a speed", hint="write 1Mbps, 500kbit/s or 2 MB/s")
    return value


def _factor(prefix: str | None) -> int:
    """What a prefix stands for: k 1000, Ki 1024, .."""
    if not prefix:
        return 1
    power = "kmgt".index(prefix[0].lower()) + 1
    return int(1024**power if len(prefix) == 2 else 1000**power)
