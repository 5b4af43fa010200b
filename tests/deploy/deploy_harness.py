"""Tiny models on grids, as master artefacts on the disk."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.models import Model, artefact
from fleetune.models.artefact import ArtefactHead, Quantised
from fleetune.models.families.number_types import CODEBOOKS
from tiny_families import drawn

LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QUICK = shlex.split("--limit 60 --held-out 8 --max-length 512 --samples 0 --rounds 1 --clients 2")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tokenizer(pre: Any = None) -> PreTrainedTokenizerBase:
    """256 bytes, three merges and three marks, splitting text as SmolLM does unless `pre` says otherwise."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll")]
    vocab = {text: i for i, text in enumerate([*letters, *("".join(m) for m in merges)])}
    backend = Tokenizer(BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre or pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
        model_max_length=1024,
    )


def qwen_split() -> Any:
    """Qwen2's rule that splits text."""
    from tokenizers import Regex

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def piece_tokenizer() -> PreTrainedTokenizerBase:
    """As sentencepiece makes them: letters and merges, bytes for the rest, a space in front of a text."""
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    merges = [("▁", "h"), ("l", "l"), ("e", "l"), ("▁h", "e"), ("▁he", "ll"), ("▁hell", "o")]
    for text in [*("".join(m) for m in merges), "▁", *"hello"]:
        vocab.setdefault(text, len(vocab))
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=1024
    )


def tiny(kind: str = "llama", seed: int = 0, **sizes: Any) -> Model:
    """A random model of architecture `kind`, 64 wide, whose rows blocks of 32 divide."""
    if kind == "llama":
        from transformers import LlamaConfig as Config
    else:
        Config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind]
    config = Config(
        **{
            "vocab_size": 264,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": kind != "qwen2",
            "bos_token_id": 260,
            "eos_token_id": 261,
            "pad_token_id": 261,
            "rms_norm_eps": 1e-5,
        }
        | sizes
    )
    words = tokenizer(qwen_split() if kind.startswith("qwen") else None)
    return drawn(config, words, kind, seed, 0.1, lambda tensor: tensor.dim() == 1)


def on_grid(
    weight: torch.Tensor, bits: int, group: int, *, zero: int | None = None, scale_bits: int = 11
) -> Quantised:
    """Rounding to nearest; the scale has `scale_bits` significant bits, `zero` None: ggml's signed extreme."""
    R, C = weight.shape
    parts = weight.reshape(R, C // group, group)
    middle = 1 << (bits - 1) if zero is None else zero
    at = parts.abs().argmax(2, keepdim=True)
    scale = (
        parts.gather(2, at)[..., 0] / -middle
        if zero is None
        else parts.abs().amax(2) / ((1 << bits) - 1 - middle)
    )
    mantissa, power = torch.frexp(scale)
    scale = torch.ldexp((mantissa * (1 << scale_bits)).round() / (1 << scale_bits), power).half()
    codes = (parts / scale.float()[..., None]).round().add(middle).clamp(0, (1 << bits) - 1)
    return Quantised(
        codes.reshape(R, C).to(torch.uint8),
        scale,
        torch.full_like(scale, middle, dtype=torch.uint8),
        bits,
        group,
    )


def on_codebook(weight: torch.Tensor, bits: int, group: int, name: str = "iq4_nl") -> Quantised:
    """Rounding to the nearest value of a codebook; the element of largest magnitude, signed, is code 0."""
    R, C = weight.shape
    parts, levels = weight.reshape(R, C // group, group), torch.tensor(CODEBOOKS[name]).float()
    scale = (parts.gather(2, parts.abs().argmax(2, keepdim=True))[..., 0] / levels[0]).half()
    codes = (parts[..., None] / scale.float()[..., None, None] - levels).abs().argmin(3)
    return Quantised(
        codes.reshape(R, C).to(torch.uint8),
        scale,
        torch.zeros_like(scale, dtype=torch.uint8),
        bits,
        group,
        name,
    )


def write_codes(model: Model, folder: Path, quantised: Mapping[str, Quantised]) -> Path:
    """Write the artefact of a model of which these matrices are on grids."""
    artefact.write(folder, model, quantised, ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest))
    return folder


def compressed(
    model: Model, folder: Path, bits: int = 4, group: int = 32, **grid: Any
) -> dict[str, Quantised]:
    """Write the artefact of `model` with every matrix of the layers on a grid, which `model` takes over."""
    quantised, rounded = {}, on_codebook if "name" in grid else on_grid
    for name, tensor in models.named_tensors(model.net):
        if name.split(".")[-2] in LAYER and tensor.dim() == 2:
            quantised[name] = rounded(tensor, bits, group, **grid)
    write_codes(model, folder, quantised)
    for name, tensor in models.named_tensors(model.net):
        if name in quantised:
            tensor.copy_(quantised[name].dense())
    return quantised


def gguf_of(folder: Path, kind: str = "Q4_0", model: Model | None = None) -> Path:
    """Write a tiny model as the GGUF file `m.gguf` of these blocks."""
    compressed(model or tiny(), folder / "codes", **BLOCKS[kind])
    report = export(folder / "codes", "gguf", folder / "m.gguf")
    assert kind in report.types
    return report.path


# what makes `compressed` fit each of GGUF's formats whose scales can be trained
BLOCKS: dict[str, dict[str, Any]] = {
    "Q4_0": {},
    "Q4_1": {"zero": 6, "scale_bits": 7},
    "Q5_0": {"bits": 5},
    "Q8_0": {"bits": 8},
    "Q5_1": {"bits": 5, "zero": 12, "scale_bits": 6},
    "IQ4_NL": {"name": "iq4_nl"},
}


def changed(q: Quantised, **fields: Any) -> Quantised:
    """A copy with other fields."""
    return dataclasses.replace(q, **fields)
