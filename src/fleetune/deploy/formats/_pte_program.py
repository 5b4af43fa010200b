# SPDX-License-Identifier: Apache-2.0
"""Turn a decoder into an ExecuTorch program: linear layers on codes for XNNPACK, keys and values inside the program.

The method `forward(tokens int64 [1, n], input_pos int64 [1])` returns logits fp32 [1, n, V] of tokens at the positions input_pos,
input_pos + 1, .., and keeps their keys and values: ExecuTorch's runner of language models calls it so.  A linear layer is
written as quantised inputs (8 bits, a scale and a zero for each token), dequantised weights and a product, which XNNPACK's
partitioner recognises and replaces by its own 4-bit (groups) or 8-bit (rows) product.

The packages executorch and torchao are imported where they are used: `fleetune[executorch]`.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fleetune.models.families import rope

ATTENTION: Final = "fleetune_grouped"  # the name that transformers calls `attend` by
SIGNED: Final = {4: (-8, 7), 8: (-128, 127)}  # smallest and largest code by bits


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the two packages warn of while they are imported and used from the user: it is about themselves."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


class CodedLinear(nn.Module):
    """x W' + b of codes int8 [R, C] about 0, whose scales are fp32 [R, C / group]."""

    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bits: int, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros_like(scale, dtype=torch.int8))
        self.register_buffer("bias", bias)
        self.range, self.group = SIGNED[bits], codes.shape[1] // scale.shape[1]
        with quiet():
            importlib.import_module("torchao.quantization.quant_primitives")  # registers the operators

    def forward(self, x: Tensor) -> Tensor:
        """Multiply as the runtime does: the inputs are rounded to 8 bits.

        The operators are called as they are: torchao's functions of the same names turn gradients off and on again, which
        torch.export takes the square of the number of layers to undo.
        """
        ops, (low, high), token = torch.ops.torchao, SIGNED[8], [*[1] * (x.dim() - 1), x.shape[-1]]
        scale, zero = ops.choose_qparams_affine(
            x, "ASYMMETRIC", token, torch.int8, low, high, zero_point_dtype=torch.int8
        )
        codes = ops.quantize_affine(x, token, scale, zero, torch.int8, low, high)
        x = ops.dequantize_affine(codes, token, scale, zero, torch.int8, low, high)
        weight = ops.dequantize_affine(
            self.codes, [1, self.group], self.scale, self.zero, torch.int8, *self.range
        )
        return nn.functional.linear(x, weight, self.bias)


class HalfEmbedding(nn.Module):
    """An embedding that is stored in 16 bits and read as fp32."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids`."""
        return nn.functional.embedding(ids, self.weight).float()


class KeysValues:
    """The cache that transformers' blocks write to: whole tensors of `room` positions."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], positions: Tensor) -> None:
        self.keys, self.values, self.positions = keys, values, positions

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [1, heads, n, width] of block `layer_idx`; return those of all positions."""
        self.keys[layer_idx].index_copy_(2, self.positions, keys.contiguous())
        self.values[layer_idx].index_copy_(2, self.positions, values.contiguous())
        return self.keys[layer_idx], self.values[layer_idx]


class Decoder(nn.Module):
    """The net with its cache inside."""

    def __init__(self, net: PreTrainedModel, room: int) -> None:
        """`room` is the number of positions that a text may have."""
        super().__init__()
        AttentionInterface.register(ATTENTION, attend)
        net.set_attn_implementation(ATTENTION)
        config: Any = net.config
        self.net, self.room, self.blocks = net, room, config.num_hidden_layers
        takes = inspect.signature(net.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # transformers renamed it
        shape = (1, config.num_key_value_heads, room, rope.head_dim(config))
        for i in range(self.blocks):
            self.register_buffer(f"keys_{i}", torch.zeros(shape))
            self.register_buffer(f"values_{i}", torch.zeros(shape))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Return the logits of tokens [1, n] that begin at the position input_pos [1]: fp32 [1, n, V]."""
        keys, values = ([getattr(self, f"{of}_{i}") for i in range(self.blocks)] for of in ("keys", "values"))
        positions = torch.arange(tokens.shape[1]) + input_pos
        later = torch.arange(self.room) > positions[:, None]
        mask = torch.zeros(later.shape).masked_fill(later, float("-inf"))[None, None]
        kept: dict[str, Any] = {self.cache_name: KeysValues(keys, values, positions)}
        out = self.net(
            input_ids=tokens, position_ids=positions[None], attention_mask=mask, use_cache=True, **kept
        )
        logits: Tensor = out.logits
        return logits


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend with query heads [1, H, n, d] to groups of key heads [1, K, S, d], which are not repeated; [1, n, H, d]."""
    H, n, d = query.shape[1:]
    K, S = key.shape[1:3]
    scale = d**-0.5 if scaling is None else scaling
    G = H // K
    packed = query.reshape(K, G * n, d)
    scores = torch.bmm(packed, key[0].transpose(1, 2)).view(K, G, n, S) * scale
    shares = (scores + attention_mask[0]).softmax(3).view(K, G * n, S)
    out = torch.bmm(shares, value[0]).view(K, G, n, d).view(1, H, n, d)  # in two steps: export knows each
    return out.transpose(1, 2).contiguous(), None


def on_codes(net: PreTrainedModel, coded: Mapping[str, tuple[Tensor, Tensor]], table: Tensor) -> None:
    """Put codes and scales (by the names of weights) in the place of the net's linear layers, 8 bits in the head's.

    `table` is the embedding in 16 bits.
    """
    for name, (codes, scale) in coded.items():
        layer = name.removesuffix(".weight")
        net.set_submodule(layer, CodedLinear(codes, scale, 4, net.get_submodule(layer).bias))
    head = net.get_output_embeddings()
    if isinstance(head, nn.Linear):
        net.set_output_embeddings(CodedLinear(*eight_bits(head.weight.data), 8, head.bias))
    net.set_input_embeddings(HalfEmbedding(table))


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows [R, C] to 8 bits: codes int8 [R, C] and scales fp32 [R, 1]."""
    top = SIGNED[8][1]
    scale = (weight.float().abs().amax(1, keepdim=True) / top).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight.float() / scale).round().clamp(-top, top).to(torch.int8), scale


def lower(decoder: Decoder, at_once: int, facts: Mapping[str, Any]) -> bytes:
    """Return the program of a decoder that reads up to `at_once` tokens in a call; `facts` become methods."""
    with quiet(), torch.no_grad():
        exir = importlib.import_module("executorch.exir")
        xnnpack = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        example = (torch.zeros(1, min(8, at_once), dtype=torch.int64), torch.tensor([0]))
        length = torch.export.Dim("n", min=1, max=at_once)
        exported = torch.export.export(
            decoder.eval(), example, dynamic_shapes=({1: length}, None), strict=False
        )
        edge = exir.to_edge_transform_and_lower(
            exported,
            partitioner=[xnnpack.XnnpackDynamicallyQuantizedPartitioner()],
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=dict(facts),
        )
        program: bytes = edge.to_executorch(exir.ExecutorchBackendConfig(run_reinplace_pass=True)).buffer
    return program


class Program:
    """A program in ExecuTorch's runtime."""

    def __init__(self, file: Path) -> None:
        with quiet():
            runtime = importlib.import_module("executorch.runtime")
        self._loaded = runtime.Runtime.get().load_program(file)  # the method needs it as long as it is called
        self._method = self._loaded.load_method("forward")

    def forward(self, tokens: Tensor, at: int) -> Tensor:
        """Read tokens int64 [1, n] from position `at` on; return their logits, fp32 [1, n, V]."""
        logits: Tensor = self._method.execute([tokens, torch.tensor([at])])[0]
        return logits.clone()  # the runtime writes the next ones to the same place

    def fact(self, name: str) -> Any:
        """Return what a method without inputs gives."""
        return self._loaded.load_method(name).execute([])[0]
