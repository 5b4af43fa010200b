# SPDX-License-Identifier: Apache-2.0
"""Write the ONNX graph of a decoder in the operators of ONNX Runtime (domain com.microsoft), and the file's protobuf.

The graph has the inputs and outputs that ONNX Runtime GenAI binds: token ids, the attention mask and the keys and values
of each block.  Tensors are in another file (`Stored`).  A file is made of fields (onnx.proto, IR version 10); the few that
are needed are written here, so that no other package is.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from fleetune.models.families.rope import head_dim

OWN: Final = "com.microsoft"
FLOAT, INT32, INT64 = 1, 6, 7  # TensorProto.DataType
TYPES: Final[Mapping[str, int]] = {"F32": FLOAT, "U8": 2, "F16": 10, "BF16": 16}
IR_VERSION: Final = 10
FP32: Final = 1  # accuracy_level of MatMulNBits; with 4 the inputs are rounded to 8 bits
OPSETS: Final = (("", 21), (OWN, 1))
PAST, PRESENT = "past_key_values.%d.", "present.%d."
INVERSE, POSITIONS = "rotary.inverse_frequencies", "rotary.positions"

Attribute = int | float


class Stored(NamedTuple):
    """A tensor in the data file: bytes [offset, offset + size)."""

    kind: str  # of TYPES
    shape: tuple[int, ...]
    offset: int
    size: int


class Matrix(NamedTuple):
    """How the codes of a linear layer of shape [R, C] are stored."""

    bits: int
    block: int  # columns with a scale and a zero
    R: int
    C: int


@dataclass
class Graph:
    """A graph under construction; values are named by text."""

    file: str  # of the tensors
    stored: Mapping[str, Stored]
    facts: Mapping[str, str]  # where the model comes from
    nodes: list[bytes] = field(default_factory=list)
    constants: dict[str, bytes] = field(default_factory=dict)

    def op(
        self,
        kind: str,
        *inputs: str,
        domain: str = "",
        out: Sequence[str] = (),
        **attributes: Attribute,
    ) -> str:
        """Add a node and return its first output, which is named by its number unless `out` names them all."""
        number = len(self.nodes)
        names = out or (f"{kind}_{number}",)
        self.nodes.append(
            b"".join(_text(1, name) for name in inputs)
            + b"".join(_text(2, name) for name in names)
            + _text(3, f"{kind}/{number}")
            + _text(4, kind)
            + b"".join(_bytes(5, _attribute(name, value)) for name, value in sorted(attributes.items()))
            + (_text(7, domain) if domain else b"")
        )
        return names[0]

    def integers(self, *values: int) -> str:
        """Add a vector of constants."""
        name = f"constant{list(values)}"
        raw = np.array(values, "<i8").tobytes()
        self.constants[name] = _int(1, len(values)) + _int(2, INT64) + _text(8, name) + _bytes(9, raw)
        return name

    def to_bytes(self, inputs: Sequence[bytes], outputs: Sequence[bytes]) -> bytes:
        """Return the file."""
        held = [_external(name, tensor, self.file) for name, tensor in self.stored.items()]
        graph = (
            b"".join(_bytes(1, node) for node in self.nodes)
            + _text(2, "decoder")
            + b"".join(_bytes(5, tensor) for tensor in [*self.constants.values(), *held])
            + b"".join(_bytes(11, value) for value in inputs)
            + b"".join(_bytes(12, value) for value in outputs)
        )
        opsets = b"".join(_bytes(8, _text(1, domain) + _int(2, version)) for domain, version in OPSETS)
        return (
            _int(1, IR_VERSION) + _text(2, "fleetune") + _bytes(7, graph) + opsets + _entries(14, self.facts)
        )


# The decoder -------------------------------------------------------------------------------------


class Decoder:
    """The graph of a llama, mistral, qwen2 or qwen3 whose tensors have transformers' names."""

    def __init__(self, graph: Graph, config: Any, matrices: Mapping[str, Matrix]) -> None:
        """`matrices` are the quantised layers by the names of their weights."""
        self.g, self.config, self.matrices = graph, config, matrices

    def to_bytes(self) -> bytes:
        """Return the ONNX file."""
        g, config = self.g, self.config
        width, keys = head_dim(config), config.num_key_value_heads
        ones = g.op("ReduceSum", "attention_mask", g.integers(1), keepdims=0)
        last = g.op("Cast", g.op("Sub", ones, g.integers(1)), to=INT32)
        length = g.op("Gather", g.op("Shape", "attention_mask"), g.integers(1), axis=0)
        total = g.op("Cast", length, to=INT32)
        turns = g.op("Mul", POSITIONS, INVERSE)
        rotary = [last, total, *(self._scaled(g.op(kind, turns)) for kind in ("Cos", "Sin"))]
        x = g.op("Cast", g.op("Gather", "model.embed_tokens.weight", "input_ids"), to=FLOAT)
        for i in range(config.num_hidden_layers):
            at = f"model.layers.{i}."
            x = g.op("Add", x, self._attention(i, self._norm(x, f"{at}input_layernorm"), rotary))
            x = g.op("Add", x, self._mlp(f"{at}mlp.", self._norm(x, f"{at}post_attention_layernorm")))
        self._linear("lm_head", self._norm(x, "model.norm"), out=("logits",))
        past: list[Any] = ["batch", keys, "past_length", width]
        cache = [*past[:2], "total_length", width]
        blocks = [(i, part) for i in range(config.num_hidden_layers) for part in ("key", "value")]
        return g.to_bytes(
            [
                _value("input_ids", INT64, ["batch", "length"]),
                _value("attention_mask", INT64, ["batch", "total_length"]),
                *(_value(PAST % i + part, FLOAT, past) for i, part in blocks),
            ],
            [
                _value("logits", FLOAT, ["batch", "length", config.vocab_size]),
                *(_value(PRESENT % i + part, FLOAT, cache) for i, part in blocks),
            ],
        )

    def _scaled(self, table: str) -> str:
        return self.g.op("Mul", table, "rotary.scaling")

    def _norm(self, x: str, name: str) -> str:
        epsilon = float(self.config.rms_norm_eps)
        return self.g.op("SimplifiedLayerNormalization", x, f"{name}.weight", axis=-1, epsilon=epsilon)

    def _linear(self, name: str, x: str, out: Sequence[str] = ()) -> str:
        """x W' + bias, of codes where the layer has them."""
        g, weight, bias = self.g, f"{name}.weight", f"{name}.bias"
        last = () if bias in g.stored else out
        if (of := self.matrices.get(weight)) is not None:
            parts = [f"{name}.{part}" for part in ("codes", "scales", "zeros")]
            y = g.op(
                "MatMulNBits", x, *parts, domain=OWN, out=last,
                K=of.C, N=of.R, bits=of.bits, block_size=of.block, accuracy_level=FP32,
            )  # fmt: skip
        else:
            held = weight if weight in g.stored else "model.embed_tokens.weight"  # a tied head
            y = g.op("MatMul", x, g.op("Transpose", g.op("Cast", held, to=FLOAT)), out=last)
        return g.op("Add", y, bias, out=out) if bias in g.stored else y

    def _attention(self, i: int, x: str, rotary: Sequence[str]) -> str:
        g, config, at = self.g, self.config, f"model.layers.{i}.self_attn."
        width, heads, keys = head_dim(config), config.num_attention_heads, config.num_key_value_heads
        q, k, v = (self._linear(f"{at}{part}_proj", x) for part in "qkv")
        if f"{at}q_norm.weight" in g.stored:
            q, k = self._norm_heads(q, f"{at}q_norm", heads), self._norm_heads(k, f"{at}k_norm", keys)
        past, present = ([name % i + part for part in ("key", "value")] for name in (PAST, PRESENT))
        y = g.op(
            "GroupQueryAttention", q, k, v, *past, *rotary, domain=OWN, out=(f"attention_{i}", *present),
            num_heads=heads, kv_num_heads=keys, scale=width**-0.5, do_rotary=1, local_window_size=self._window(i),
        )  # fmt: skip
        return self._linear(f"{at}o_proj", y)

    def _window(self, i: int) -> int:
        """The last positions that block i sees; -1 for all."""
        kinds = getattr(self.config, "layer_types", None) or ["sliding_attention"] * (i + 1)
        window = getattr(self.config, "sliding_window", None)
        return int(window) if window and kinds[i] == "sliding_attention" else -1

    def _norm_heads(self, x: str, name: str, heads: int) -> str:
        g, width = self.g, head_dim(self.config)
        each = self._norm(g.op("Reshape", x, g.integers(0, -1, width)), name)
        return g.op("Reshape", each, g.integers(0, -1, heads * width))

    def _mlp(self, at: str, x: str) -> str:
        g, gate = self.g, self._linear(f"{at}gate_proj", x)
        silu = g.op("Mul", gate, g.op("Sigmoid", gate))
        return self._linear(f"{at}down_proj", g.op("Mul", silu, self._linear(f"{at}up_proj", x)))


# Fields of a protobuf ----------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    value, out = value & 0xFFFFFFFFFFFFFFFF, bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _text(number: int, value: str) -> bytes:
    return _bytes(number, value.encode())


def _attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, float):
        return _text(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _int(20, 1)
    return _text(1, name) + _int(3, value) + _int(20, 2)


def _entries(number: int, texts: Mapping[str, str]) -> bytes:
    return b"".join(_bytes(number, _text(1, key) + _text(2, value)) for key, value in texts.items())


def _external(name: str, tensor: Stored, file: str) -> bytes:
    place = {"location": file, "offset": str(tensor.offset), "length": str(tensor.size)}
    dims = b"".join(_int(1, size) for size in tensor.shape)
    return dims + _int(2, TYPES[tensor.kind]) + _text(8, name) + _entries(13, place) + _int(14, 1)


def _value(name: str, kind: int, shape: Sequence[int | str]) -> bytes:
    """An input or output; a size of any length has a name."""
    dims = b"".join(_bytes(1, _text(2, n) if isinstance(n, str) else _int(1, n)) for n in shape)
    return _text(1, name) + _bytes(2, _bytes(1, _int(1, kind) + _bytes(2, dims)))
