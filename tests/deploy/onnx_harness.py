# SPDX-License-Identifier: Apache-2.0
"""Read an ONNX file field by field and compute its graph in torch, each operator by its documentation."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

KINDS = {1: np.float32, 2: np.uint8, 6: np.int32, 7: np.int64, 10: np.float16}


def varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (raw[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if raw[at - 1] < 0x80:
            return value, at


def fields(raw: bytes) -> dict[int, list[Any]]:
    """The fields of a protobuf message by their numbers."""
    found, at = defaultdict[int, list[Any]](list), 0
    while at < len(raw):
        key, at = varint(raw, at)
        if key & 7 == 0:
            value, at = varint(raw, at)
            found[key >> 3].append(value - (value >> 63 << 64))
        else:
            size, at = (4, at) if key & 7 == 5 else varint(raw, at)
            found[key >> 3].append(raw[at : at + size])
            at += size
    return found


class Node(NamedTuple):
    kind: str
    inputs: list[str]
    outputs: list[str]
    domain: str
    attributes: dict[str, int | float]


class File(NamedTuple):
    nodes: list[Node]
    tensors: dict[str, Tensor]
    inputs: dict[str, list[int | str]]  # the shapes
    outputs: dict[str, list[int | str]]
    facts: dict[str, str]


def read(path: Path) -> File:
    model = fields(path.read_bytes())
    graph = fields(model[7][0])
    tensors = dict(tensor(raw, path.parent) for raw in graph[5])
    values = [dict(map(value, graph[number])) for number in (11, 12)]
    return File([node(raw) for raw in graph[1]], tensors, *values, entries(model[14]))


def value(raw: bytes) -> tuple[str, list[int | str]]:
    found = fields(raw)
    shape = fields(fields(fields(found[2][0])[1][0])[2][0])
    sizes = [fields(dim) for dim in shape[1]]
    return found[1][0].decode(), [size[1][0] if size[1] else size[2][0].decode() for size in sizes]


def entries(raw: list[bytes]) -> dict[str, str]:
    return {fields(entry)[1][0].decode(): fields(entry)[2][0].decode() for entry in raw}


def node(raw: bytes) -> Node:
    found, attributes = fields(raw), {}
    for each in map(fields, found[5]):
        (kind,), name = each[20], each[1][0].decode()
        attributes[name] = each[3][0] if kind == 2 else struct.unpack("<f", each[2][0])[0]
    inputs, outputs, (kind,) = ([text.decode() for text in found[number]] for number in (1, 2, 4))
    return Node(kind, inputs, outputs, (found[7] or [b""])[0].decode(), attributes)


def tensor(raw: bytes, folder: Path) -> tuple[str, Tensor]:
    found = fields(raw)
    if found[14] == [1]:
        place = entries(found[13])
        with (folder / place["location"]).open("rb") as file:
            file.seek(int(place["offset"]))
            values = file.read(int(place["length"]))
    else:
        values = found[9][0]
    array = np.frombuffer(values, KINDS[found[2][0]]).reshape(found[1])
    return found[8][0].decode(), torch.from_numpy(array.copy())


# Operators ---------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, epsilon: float, axis: int) -> Tensor:
    return x * (x.pow(2).mean(axis, keepdim=True) + epsilon).rsqrt() * weight


def unpacked(packed: Tensor, bits: int) -> Tensor:
    each = [packed >> at & (1 << bits) - 1 for at in range(0, 8, bits)]
    return torch.stack(each, -1).flatten(-2).float()


def matmul_nbits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    K: int,
    N: int,
    bits: int,
    block_size: int,
    **_: int,
) -> Tensor:
    blocks = K // block_size
    assert codes.shape == (N, blocks, block_size * bits // 8)
    steps = unpacked(codes, bits) - unpacked(zeros, bits)[:, :blocks, None]
    return x @ (scales[..., None] * steps).reshape(N, K).T


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, heads, T, width]: the first half with the second."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def grouped_query_attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, last: Tensor, total: Tensor,
    cos: Tensor, sin: Tensor, *, num_heads: int, kv_num_heads: int, scale: float, do_rotary: int, local_window_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, _ = q.shape
    start, end = past_k.shape[2], int(total)
    assert do_rotary == 1
    assert end == start + T == int(last[0]) + 1
    q, k, v = (
        t.reshape(B, T, heads, -1).transpose(1, 2)
        for t, heads in ((q, num_heads), (k, kv_num_heads), (v, kv_num_heads))
    )
    q, k = (turned(t, cos[start:end], sin[start:end]) for t in (q, k))
    keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    wide = [t.repeat_interleave(num_heads // kv_num_heads, 1) for t in (keys, values)]
    ahead = torch.arange(end) - torch.arange(start, end)[:, None]
    seen = (ahead <= 0) & (ahead > -local_window_size if local_window_size > 0 else ahead <= 0)
    scores = (q @ wide[0].transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ wide[1]).transpose(1, 2).flatten(2), keys, values


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[i] if n == 0 else int(n) for i, n in enumerate(shape)])


DTYPES = {1: torch.float32, 6: torch.int32}
OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Cos": torch.cos, "Sin": torch.sin, "Sigmoid": torch.sigmoid,
    "MatMul": torch.matmul, "Transpose": torch.t, "Reshape": reshape, "SimplifiedLayerNormalization": norm,
    "Shape": lambda x: torch.tensor(x.shape),
    "Cast": lambda x, to: x.to(DTYPES[to]),
    "Gather": lambda x, at, axis=0: x[at],
    "ReduceSum": lambda x, axes, keepdims: x.sum(axes.tolist(), keepdim=bool(keepdims)),
    "MatMulNBits": matmul_nbits, "GroupQueryAttention": grouped_query_attention,
}  # fmt: skip
OWN = ("MatMulNBits", "GroupQueryAttention")


def run(file: File, feed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a file for inputs by name; every size of a name is the same, and outputs have the shapes stated."""
    assert sorted(feed) == sorted(file.inputs)
    known = {**file.tensors, **feed}
    for each in file.nodes:
        assert each.domain == ("com.microsoft" if each.kind in OWN else ""), each
        made = OPERATORS[each.kind](*(known[name] for name in each.inputs), **each.attributes)
        known |= zip(each.outputs, made if isinstance(made, tuple) else (made,), strict=True)
    shapes = file.inputs | file.outputs
    sizes = {size for name in shapes for size in zip(shapes[name], known[name].shape, strict=True)}
    assert len(dict(sizes)) == len(sizes), sizes
    return {name: known[name] for name in file.outputs}


# ONNX Runtime's interface ------------------------------------------------------------------------


class Value(NamedTuple):
    name: str
    shape: list[int | str]


class SessionOptions:
    intra_op_num_threads = 0


class InferenceSession:
    def __init__(self, file: str, options: SessionOptions, providers: list[str]) -> None:
        assert options.intra_op_num_threads == 1
        assert providers == ["CPUExecutionProvider"]
        self.file = read(Path(file))

    def get_inputs(self) -> list[Value]:
        return [Value(*item) for item in self.file.inputs.items()]

    def get_outputs(self) -> list[Value]:
        return [Value(*item) for item in self.file.outputs.items()]

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = run(self.file, {name: torch.from_numpy(array) for name, array in feed.items()})
        return [found[name].numpy() for name in names]
