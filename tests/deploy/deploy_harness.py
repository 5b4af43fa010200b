"""Tiny models on grids, as master artefacts on the disk."""

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.models import Model, artefact
from fleetune.models.artefact import ArtefactHead, Quantised
from fleetune.models.families.number_types import CODEBOOKS
from tiny_families import drawn, sizes

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QUICK = shlex.split("--limit 60 --held-out 8 --max-length 160 --samples 0 --rounds 1 --clients 2")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MARKS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "model_max_length": 1024}


def tokenizer(pre: Any = None) -> PreTrainedTokenizerBase:
    """256 bytes, three merges and three marks, splitting text as SmolLM does unless `pre` says otherwise."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll")]
    vocab = {text: i for i, text in enumerate([*letters, *("".join(m) for m in merges)])}
    backend = Tokenizer(BPE(vocab=vocab, merges=merges))
    rules = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre or pre_tokenizers.Sequence(rules)
    backend.decoder = decoders.ByteLevel()
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    others = {"pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **MARKS, **others)


def split(pattern: str = QWEN, behavior: str = "isolated", *, invert: bool = False) -> Any:
    """A rule that splits text, which is Qwen2's unless another is given."""
    first = pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert)
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def piece_tokenizer() -> PreTrainedTokenizerBase:
    """As sentencepiece makes them: letters and merges, bytes for the rest, a space in front of a text."""
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    merges = [("▁", "h"), ("l", "l"), ("e", "l"), ("▁h", "e"), ("▁he", "ll"), ("▁hell", "o")]
    for text in [*("".join(m) for m in merges), "▁", *"hello"]:
        vocab.setdefault(text, len(vocab))
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 1024}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **own)


WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # for super-blocks
ENDS = {"bos_token_id": 260, "eos_token_id": 261, "pad_token_id": 261}


def tiny(kind: str = "llama", seed: int = 0, **changes: Any) -> Model:
    """A random model of architecture `kind`, 64 wide, whose rows blocks of 32 divide."""
    own = sizes(64, 128, 2, 4, 2, head_dim=16, max_position_embeddings=1024, rms_norm_eps=1e-5) | ENDS
    config = AutoConfig.for_model(kind, **own | {"tie_word_embeddings": kind != "qwen2"} | changes)
    words = tokenizer(split() if kind.startswith("qwen") else None)
    return drawn(config, words, kind, seed, 0.1, lambda tensor: tensor.dim() == 1)


def on_grid(W: Tensor, bits: int, group: int, *, zero: int | None = None, scale_bits: int = 11) -> Quantised:
    """Rounding to nearest; the scale has `scale_bits` significant bits, `zero` None: ggml's signed extreme."""
    R, C = W.shape
    parts = W.reshape(R, C // group, group)
    middle, top = 1 << (bits - 1) if zero is None else zero, (1 << bits) - 1
    at = parts.abs().argmax(2, keepdim=True)
    scale = parts.gather(2, at)[..., 0] / -middle if zero is None else parts.abs().amax(2) / (top - middle)
    mantissa, power = torch.frexp(scale)
    scale = torch.ldexp((mantissa * (1 << scale_bits)).round() / (1 << scale_bits), power).half()
    codes = (parts / scale.float()[..., None]).round().add(middle).clamp(0, top)
    zeros = torch.full_like(scale, middle, dtype=torch.uint8)
    return Quantised(codes.reshape(R, C).to(torch.uint8), scale, zeros, bits, group)


def on_codebook(W: Tensor, bits: int, group: int, name: str = "iq4_nl") -> Quantised:
    """Rounding to the nearest value of a codebook; the element of largest magnitude, signed, is code 0."""
    R, C = W.shape
    parts, levels = W.reshape(R, C // group, group), torch.tensor(CODEBOOKS[name]).float()
    scale = (parts.gather(2, parts.abs().argmax(2, keepdim=True))[..., 0] / levels[0]).half()
    codes = (parts[..., None] / scale.float()[..., None, None] - levels).abs().argmin(3)
    zeros = torch.zeros_like(scale, dtype=torch.uint8)
    return Quantised(codes.reshape(R, C).to(torch.uint8), scale, zeros, bits, group, name)


def matrix(codes: list, scale: list, zero: list, bits: int) -> Quantised:
    """Rows of codes, with the scales and zeros of their groups."""
    whole = (torch.tensor(part, dtype=torch.uint8) for part in (codes, zero))
    group = len(codes[0]) // len(scale[0])
    return Quantised(next(whole), torch.tensor(scale).half(), next(whole), bits, group)


def write_codes(model: Model, folder: Path, quantised: Mapping[str, Quantised]) -> Path:
    """Write the artefact of a model of which these matrices are on grids."""
    artefact.write(folder, model, quantised, ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest))
    return folder


def matrices(model: Model) -> dict[str, Tensor]:
    return {n: t for n, t in models.named_tensors(model.net) if n.endswith("proj.weight")}


def put_on(model: Model, folder: Path, grid: Callable[[Tensor], Quantised]) -> dict[str, Quantised]:
    """Write the artefact of `model` with every matrix of the layers on a grid, which `model` takes over."""
    quantised = {name: grid(tensor) for name, tensor in matrices(model).items()}
    write_codes(model, folder, quantised)
    for name, q in quantised.items():
        model.net.get_parameter(name).copy_(q.dense())
    return quantised


def compressed(model: Model, folder: Path, bits: int = 4, group: int = 32, **grid) -> dict[str, Quantised]:
    """Do so with codes of this many bits."""
    rounded = on_codebook if "name" in grid else on_grid
    return put_on(model, folder, lambda tensor: rounded(tensor, bits, group, **grid))


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
    return dataclasses.replace(q, **fields)
