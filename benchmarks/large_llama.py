# SPDX-License-Identifier: Apache-2.0
"""Write a llama of 1.07 B random weights as a Q4_0 GGUF file (605 MB), a block of rows at a time.

    python -m benchmarks.large_llama llama-1b.gguf

Its shape is TinyLlama-1.1B's with SmolLM2's vocabulary, tied; tokenizer and chat template are those of the built-in model.
For memory and time alone: it has learned nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

from fleetune.models import cache

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, CONTEXT = 2048, 5632, 22, 32, 4, 2048
SCALE: Final = np.float16(0.02 / 4.6)  # so that weights have a standard deviation of 0.02
LLAMA: Final = "llama."


def write(path: Path) -> None:
    """Write the file, the same at every call."""
    source = gguf.GGUFReader(
        cache.pull_builtin(cache.SMOLLM2_135M, source="index", bases=("mapped",)) / cache.GGUF
    )
    tokens = len(source.fields["tokenizer.ggml.tokens"].data)
    out = gguf.GGUFWriter(path, "llama")
    for name, field in source.fields.items():
        if name.startswith("tokenizer."):
            kind, *inner = field.types
            out.add_key_value(name, field.contents(), kind, inner[0] if inner else None)
    width = HIDDEN // HEADS
    out.add_block_count(LAYERS)
    out.add_context_length(CONTEXT)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(INNER)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_rope_dimension_count(width)
    out.add_rope_freq_base(10_000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(tokens)
    matrices = {"token_embd": (tokens, HIDDEN)}
    for i in range(LAYERS):
        matrices |= {
            f"blk.{i}.attn_q": (HIDDEN, HIDDEN), f"blk.{i}.attn_k": (KV_HEADS * width, HIDDEN),
            f"blk.{i}.attn_v": (KV_HEADS * width, HIDDEN), f"blk.{i}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate": (INNER, HIDDEN), f"blk.{i}.ffn_up": (INNER, HIDDEN), f"blk.{i}.ffn_down": (HIDDEN, INNER),
        }  # fmt: skip
    norms = ["output_norm", *(f"blk.{i}.{n}" for i in range(LAYERS) for n in ("attn_norm", "ffn_norm"))]
    q4 = gguf.GGMLQuantizationType.Q4_0
    for name, (rows, columns) in matrices.items():
        size = rows * columns // 32 * 18
        out.add_tensor_info(f"{name}.weight", (rows, columns // 32 * 18), np.dtype(np.uint8), size, q4)
    for name in norms:
        out.add_tensor_info(f"{name}.weight", (HIDDEN,), np.dtype(np.float32), 4 * HIDDEN)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for rows, columns in matrices.values():
        out.write_tensor_data(_codes(rng, rows * columns // 32).reshape(rows, -1))
    for _ in norms:
        out.write_tensor_data(np.ones(HIDDEN, np.float32))
    out.close()


def _codes(rng: Any, blocks: int) -> np.ndarray:
    data = rng.integers(0, 256, (blocks, 18), dtype=np.uint8)
    data[:, :2] = np.array([SCALE]).view(np.uint8)
    return data  # type: ignore[no-any-return]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        "benchmarks.large_llama", description="Write a llama of 1.07 B random weights."
    )
    parser.add_argument("path", type=Path)
    write(parser.parse_args().path)
