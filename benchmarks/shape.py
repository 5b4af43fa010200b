"""What everything is measured on: a llama with random weights in the shape of SmolLM2-135M, and random rows.

Time and memory depend on the shape alone, so nothing is downloaded.  `quick` is a llama of 4 M parameters.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fleetune.data import Batch, Encoded
from fleetune.data.encode import collate
from fleetune.models import Model, tiny_tokenizer, tokenizer_digest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(quick: bool) -> LlamaConfig:
    """The configuration of SmolLM2-135M (134.5 M parameters in 272 tensors), or of its small stand-in."""
    width, inner, depth, heads, kv, vocab = (
        (256, 680, 4, 4, 2, 4096) if quick else (576, 1536, 30, 9, 3, 49152)
    )
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.041666,
        rms_norm_eps=1e-5,
        use_cache=False,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )


def model(quick: bool, dtype: str = "fp32") -> Model:
    """A model with random weights; its base digest is made up, as nothing is checked against it."""
    return model_of(config(quick), dtype)


def model_of(config: LlamaConfig, dtype: str = "fp32") -> Model:
    """The same of another configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = LlamaForCausalLM(config).to(DTYPES[dtype])
    net.eval()
    net.requires_grad_(False)
    tokenizer = tiny_tokenizer()
    digest = tokenizer_digest(tokenizer)
    return Model(net, tokenizer, "random-llama", Path("random-llama"), "0" * 64, digest, dtype, "cpu")


def batch(quick: bool, size: int, length: int) -> Batch:
    """One batch of rows of `length` random tokens; the second half is the answer."""
    ids = np.random.default_rng(0).integers(0, config(quick).vocab_size, (size, length), dtype=np.int32)
    return collate([Encoded(row, length // 2) for row in ids], 257, "cpu")
