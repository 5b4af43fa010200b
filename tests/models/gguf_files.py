"""Tiny nets as GGUF files, as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fleetune import models
from tiny_families import sizes


def write_gguf(
    path: Path,
    net: Any,
    architecture: str,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    drop: str = "",
    extra: str = "",
    pre: str = "smollm",
    rope: str = "",
) -> None:
    """The net as llama.cpp's converter writes it: its names, q and k of llama interleaved, its metadata."""
    config = net.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if rope:
        writer.add_string(f"{architecture}.rope.scaling.type", rope)
    tokens = [*models.tiny_tokenizer().get_vocab(), "he"]
    tokens.sort(key=(models.tiny_tokenizer().get_vocab() | {"he": 258}).__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<|") else 1 for t in tokens])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template(models.tiny_tokenizer().chat_template)
    arch = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in net.named_parameters():
        if name == drop:
            continue
        values = tensor.numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            half = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
            values = half.swapaxes(1, 2).reshape(values.shape)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        use = kind if values.ndim == 2 and values.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(values), use), raw_dtype=use)
    if extra:
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def qwen(config: Any, kind: Any) -> Any:
    small = sizes(32, 64, 2, 4, 2, head_dim=8, max_position_embeddings=256)
    net = kind(config(**small, tie_word_embeddings=config is Qwen2Config)).requires_grad_(False)
    for name, tensor in models.named_tensors(net):
        tensor.copy_(torch.from_numpy(models.uniform(name, tuple(tensor.shape), 0.3)))
    return net


NETS = {
    "llama": lambda: models.tiny_llama().net,
    "qwen2": lambda: qwen(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": lambda: qwen(Qwen3Config, Qwen3ForCausalLM),  # untied
}
