# SPDX-License-Identifier: Apache-2.0
"""Pruned llamas, and GGUF files of architecture deci that are not of our own writing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import gguf as package
import numpy as np
import torch
from deploy_harness import tiny

from fleetune.models import Model
from fleetune.models.families import widths
from fleetune.models.families.widths import KeptUnits, Width

IDS: Final = torch.tensor([[260, 12, 200, 7, 256, 258, 31, 90, 261]])
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
FOUND: Final = [Width(4, 2, 128), Width(2, 1, 96), Width(4, 2, 32)]


def logits(net: Any) -> torch.Tensor:
    """Of a few tokens."""
    with torch.no_grad():
        found: torch.Tensor = net(IDS).logits
    return found


def narrowed(found: list[tuple[int, int]], ratio: int = 2, whole: int = 2, **sizes: Any) -> Model:
    """A llama whose blocks have these numbers of key heads and MLP channels, taken from all over."""
    model = tiny(
        num_hidden_layers=len(found), num_attention_heads=ratio * whole, num_key_value_heads=whole, **sizes
    )
    rng = np.random.default_rng(len(found))

    def some(all_of: int, count: int) -> list[int]:
        return sorted(rng.choice(all_of, count, replace=False).tolist())

    widths.cut(
        model.net,
        [KeptUnits(some(whole, heads), some(model.net.config.intermediate_size, c)) for heads, c in found],
    )
    return model


def pruned() -> Model:
    """With the widths of FOUND."""
    return narrowed([(w.num_key_value_heads, w.intermediate_size) for w in FOUND])


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp rotates them: 2 i and 2 i + 1 of a head are the model's i and i + d / 2."""
    out, d = np.empty_like(weight), len(weight) // heads
    for h in range(heads):
        for i in range(d // 2):
            out[h * d + 2 * i], out[h * d + 2 * i + 1] = weight[h * d + i], weight[h * d + d // 2 + i]
    return out


def foreign(
    path: Path, model: Model, found: list[Width], said: Mapping[str, Any] = NOTHING, arch: str = "deci"
) -> Path:
    """A file as llama.cpp's converter writes it, by hand; `said` replaces metadata, None leaves a key out."""
    heads, key_heads, channels = (list(numbers) for numbers in zip(*found, strict=True))
    keys = {
        "block_count": len(found),
        "context_length": 1024,
        "embedding_length": model.net.config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": key_heads,
        "feed_forward_length": channels,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
        "vocab_size": 264,
    }
    writer = package.GGUFWriter(path, arch)
    for key, value in {**keys, **said}.items():
        if value is not None:
            add = {
                int: writer.add_int32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }
            add[type(value)](f"{arch}.{key}", value)
    _add_words(writer, model)
    for name, tensor in model.net.named_parameters():
        stored, heads_of = _place(model, name.removesuffix(".weight"))
        values = np.ascontiguousarray(tensor.numpy())
        writer.add_tensor(stored, interleaved(values, heads_of) if heads_of else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_words(writer: Any, model: Model) -> None:
    words = model.tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*sorted(words, key=words.__getitem__), "[a]", "[b]"])
    writer.add_token_types([1] * 259 + [3] * 3 + [5] * 2)
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(260)
    writer.add_eos_token_id(261)
    writer.add_unk_token_id(259)


def _place(model: Model, name: str) -> tuple[str, int]:
    """A parameter's name in the file, and the heads in which its rows are interleaved (0: they are not)."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if name in ends:
        return f"{ends[name]}.weight", 0
    blocks = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    _, _, i, rest = name.split(".", 3)
    own = model.net.model.layers[int(i)].self_attn
    rotated = {"self_attn.q_proj": own.q_proj, "self_attn.k_proj": own.k_proj}
    heads = rotated[rest].out_features // own.head_dim if rest in rotated else 0
    return f"blk.{i}.{blocks[rest]}.weight", heads
