"""Convert a GGUF file to a Hugging Face directory with the same numbers, a few rows in memory at a time.

The weights are written in fp32, since 16-bit floats cannot hold the values of all quantised types.  llama's q and k rows are
interleaved pair-wise in the file and put back in transformers' half-split order; rescaled rotary frequencies that Llama 3's rule
does not give (`rope.py`) are refused.  Names and shapes come from a model on the meta device; every tensor of it must be found in
the file and vice versa.

The tokenizer has exactly the file's tokens, where transformers adds some:

    gpt2    byte-level BPE: merges, and the rule that the file names
    llama   pieces with scores: two pieces join where the result is a piece, the highest score first, so the merges
            are all such pairs in the order of falling scores; bytes for the rest
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fleetune.errors import ModelError
from fleetune.models.families import rope, table, widths
from fleetune.models.families.foreign import check_blocks, check_range, foreign_file
from fleetune.models.gguf import header
from fleetune.models.net.saving import disk_errors, write_pieces
from fleetune.models.stored import MappedFile, Stored, write_places

log = logging.getLogger(__name__)

ANOTHER: Final = "fetch the file again, or give another one"
INSTEAD: Final = "use the model's hub id or a Hugging Face directory of it"
RESCALED: Final = "rescales its rotary frequencies, which transformers cannot express"
SLAB: Final = 1 << 22  # elements dequantised at a time (16 MiB of fp32)
# those that were verified
ARCHITECTURES: Final = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
READ: Final = frozenset({"F32", "F16", *(kind.name for kind in gguf.quants._type_traits)})  # types of tensors
SIZES: Final[Mapping[str, str]] = MappingProxyType(  # keys of an architecture -> names in a configuration
    {
        "context_length": "max_position_embeddings",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "embedding_length": "hidden_size",
        "rope.freq_base": "rope_theta",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "vocab_size": "vocab_size",
    }
)


def load_config(path: Path) -> Any:
    """Return the transformers configuration that a GGUF file's metadata describes; no weights are read.

    ModelError for a damaged file, an architecture not in `ARCHITECTURES`, blocks that no class has a place for, or
    rescaled rotary frequencies.
    """
    return _config(path, header.check_whole(path))


def convert(
    path: Path, folder: Path, *, weights: bool = True, progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Write the model of the GGUF file `path` into the existing `folder` as a Hugging Face directory.

    fp32 safetensors, configuration, generation defaults, tokenizer with chat template and special tokens.  Without `weights`
    these stay in the file, and where they are is written instead (`stored.py`).  ModelError as in `load_config`, or
    when names or shapes do not fit the architecture; OSError when the disk is full.
    """
    head = header.check_whole(path)
    config = _config(path, head)
    tensors = _tensors(path, head, config)
    tokenizer = _tokenizer(path, head, config)
    if weights:
        table = {name: (torch.float32, tensor.shape) for name, tensor in tensors.items()}
        pieces = _pieces(path, tensors, progress)
        write_pieces(folder / "model.safetensors", table, pieces, {"format": "pt"})
    else:
        write_places(folder, tensors)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    with disk_errors(folder):
        tokenizer.save_pretrained(folder)


def _config(path: Path, head: header.GgufHeader) -> Any:
    with foreign_file(path, "has unusable metadata", hint=INSTEAD):  # a text may be in no encoding
        architecture = _checked_architecture(path, head)
        config = _described(architecture, head)
        if (width := head.values.get(f"{architecture}.attention.key_length")) is not None:
            config.head_dim = int(width)  # transformers does not read it for every architecture
        _take_factors(path, head, config)
        # metadata hold fp32: 1e-05 comes back as 9.999999747378752e-06
        config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    return config


def _checked_architecture(path: Path, head: header.GgufHeader) -> str:
    """Return the architecture of the metadata; ModelError for one that is not read, and for sizes that no model has."""
    architecture = str(head.values.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{path} holds architecture '{architecture}'; GGUF files are read for {known}", hint=INSTEAD
        )
    if head.values.get(f"{architecture}.expert_count"):
        raise ModelError(
            f"{path} holds a mixture of experts; GGUF files are read for dense models", hint=INSTEAD
        )
    scaling = head.values.get(f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") and (architecture, scaling) != ("gemma3", "linear"):
        raise ModelError(f"{path} {RESCALED}", hint=INSTEAD)
    check_blocks(head.values.get(f"{architecture}.block_count"), len(head.tensors), path)
    return architecture


def _described(architecture: str, head: header.GgufHeader) -> Any:
    """Return the configuration of metadata and tensor names; a configuration class may raise anything for a wrong value."""
    names = {tensor.name for tensor in head.tensors}
    ids = {
        f"{name}_token_id": head.values.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()
    }
    if architecture.startswith("gemma"):
        config = _gemma(architecture, _Fields(head, architecture))
        del ids["unk_token_id"]
        config.update(ids)
    else:
        keys = dict(SIZES) | ({"rope.dimension_count": "head_dim"} if architecture == "llama" else {})
        values = ids | {name: head.values.get(f"{architecture}.{key}") for key, name in keys.items()}
        if values["vocab_size"] is None:
            values["vocab_size"] = len(head.values["tokenizer.ggml.tokens"])
        values["tie_word_embeddings"] = "output.weight" not in names
        config = AutoConfig.for_model(architecture, **{n: v for n, v in values.items() if v is not None})
    if config.model_type == "llama":
        config.tie_word_embeddings = "output.weight" not in names
        config.attention_bias = "blk.0.attn_q.bias" in names
        config.mlp_bias = "blk.0.ffn_up.bias" in names
    return config


class _Fields:
    """The metadata of an architecture by their keys without its name."""

    def __init__(self, head: header.GgufHeader, architecture: str) -> None:
        self._head, self._front = head, architecture

    def __call__(self, key: str) -> Any:
        """Return a value, or None."""
        value = self._head.values.get(f"{self._front}.{key}")
        if key == "vocab_size" and value is None:
            return len(self._head.values.get("tokenizer.ggml.tokens") or [])
        return value

    def need(self, key: str) -> Any:
        """Return a value; KeyError where there is none."""
        if (value := self(key)) is None:
            raise KeyError(key)
        return value

    def rotary(self, base: str = "rope.freq_base") -> dict[str, Any]:
        """Return the settings of a rotary embedding that is not rescaled."""
        return {"rope_type": "default", "rope_theta": float(self(base) or 10000.0)}


def _gemma(architecture: str, fields: _Fields) -> Any:
    """Return the configuration of a gemma, gemma2 or gemma3, which transformers cannot read, or not their caps and bases.

    KeyError for a key that is required; ValueError when the values make no sense.
    """
    need, own = fields.need, fields.rotary()
    made: dict[str, Any] = {
        name: int(need(key)) for key, name in SIZES.items() if not key.endswith(("base", "epsilon"))
    }
    made["head_dim"] = int(need("attention.key_length"))
    made["rms_norm_eps"] = need("attention.layer_norm_rms_epsilon")
    if architecture == "gemma":
        return GemmaConfig(**made, rope_parameters=own)
    made["sliding_window"] = int(need("attention.sliding_window"))
    if architecture == "gemma2":
        caps = {key: float(need(key)) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
        config: Any = Gemma2Config(**made, **caps, rope_parameters=own)
    else:
        if fields("rope.scaling.type") == "linear":
            own |= {"rope_type": "linear", "factor": float(need("rope.scaling.factor"))}
        both = {"full_attention": own, "sliding_attention": fields.rotary("rope.freq_base_swa")}
        config = Gemma3TextConfig(**made, rope_parameters=both)
    config.query_pre_attn_scalar = table.query_scalar(config)
    return config


def _take_factors(path: Path, head: header.GgufHeader, config: Any) -> None:
    """Set Llama 3's rescaled frequencies in the configuration; ModelError for factors that are not Llama 3's."""
    found = [tensor for tensor in head.tensors if tensor.name.startswith("rope_")]
    if not found:
        return
    rescaled = None
    if config.model_type == "llama" and [tensor.name for tensor in found] == [rope.TENSOR]:
        theta, width = float(config.rope_parameters["rope_theta"]), rope.head_dim(config)
        rescaled = rope.parameters(
            head.bytes(found[0]).view(np.float32), head.values.get(rope.KEY), theta, width
        )
    if rescaled is None:
        raise ModelError(f"{path} {RESCALED}", hint=INSTEAD)
    config.rope_parameters = rescaled


def _tensors(path: Path, head: header.GgufHeader, config: Any) -> dict[str, Stored]:
    """Return for each tensor of the model where it is in the file, and how its rows lie there."""
    with foreign_file(path, "describes a model that cannot be made", hint=ANOTHER):
        net = widths.build(config)
        config.architectures = [type(net).__name__]
        shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}  # tied tensors once
        architecture = str(head.values.get("general.architecture"))
        arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        left = {tensor.name: tensor for tensor in head.tensors if tensor.name != rope.TENSOR}
        file, tensors = MappedFile(path), dict[str, Stored]()
        for name, shape in shapes.items():
            place = left.pop(str(names.get_name(name, try_suffixes=(".weight", ".bias"))), None)
            if place is None:
                raise ModelError(f"{path} has no tensor for {name}", hint=ANOTHER)
            if place.shape != shape:
                raise ModelError(
                    f"{path}: {place.name} has shape {place.shape}, {name} needs {shape}", hint=ANOTHER
                )
            if place.kind not in READ:
                raise ModelError(
                    f"{path}: {place.name} is of type {place.kind}, which is not read", hint=ANOTHER
                )
            order = table.row_order(config, place.name, shape[0])
            back = None if order is None else np.argsort(order)
            shifted = table.is_shifted(config, place.name)
            tensors[name] = Stored(file, place.offset, place.size, place.kind, shape, back, shifted)
    if left:
        raise ModelError(
            f"{path} has {len(left)} tensors that architecture '{architecture}' does not: "
            + ", ".join(left)[:200],
            hint=INSTEAD,
        )
    return tensors


def _pieces(
    source: Path, tensors: Mapping[str, Stored], progress: Callable[[str, int, int], None] | None
) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
    """Yield each tensor's values in fp32, a slab at a time; ModelError for values of `source` that are not finite."""

    def slabs(name: str, tensor: Stored) -> Iterator[torch.Tensor]:
        step = max(1, SLAB * tensor.shape[0] // tensor.numbers) * (tensor.numbers // tensor.shape[0])
        for first in range(0, tensor.numbers, step):
            values = tensor.read(first, min(first + step, tensor.numbers), torch.float32)
            check_range(float(values.min()), float(values.max()), name, source, ANOTHER)
            yield values

    done, whole = 0, sum(4 * tensor.numbers for tensor in tensors.values())
    for name, tensor in tensors.items():
        yield name, slabs(name, tensor)
        done += 4 * tensor.numbers
        if progress is not None:
            progress("convert to safetensors", done, whole)


def _tokenizer(path: Path, head: header.GgufHeader, config: Any) -> Any:
    with foreign_file(path, "has a tokenizer that cannot be read", hint=INSTEAD):
        tokenizer: Any = build_tokenizer(head.values.get)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.padding_side = "right"
    return tokenizer


_SHORT: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = (_WORDS + r"\p{N}{1,3}" + _REST, "bytes")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(short: str, digits: str) -> tuple[str, ...]:
    """Return the steps of a rule that also splits a word where capitals follow small letters."""
    front = r"[^\r\n\p{L}\p{N}]?"
    words = f"{front}{_UPPER}*{_LOWER}+{short}|{front}{_UPPER}+{_LOWER}*{short}|"
    return (words + digits + _REST.replace(r"[\r\n]*", r"[\r\n/]*"), "bytes")


# llama.cpp's name for a rule (llama-vocab.cpp) -> the steps of the pre_tokenizer that does the same; a step is "digit" (one
# by one), "bytes", "bytes+words" (GPT-2's rule) or a regular expression
RULES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "gpt-2": ("bytes+words",),
        "smollm": ("digit", "bytes+words"),
        "llama-bpe": _LLAMA3,
        "smaug-bpe": _LLAMA3,
        "qwen2": (_WORDS + r"\p{N}" + _REST, "bytes"),
        "tekken": _cased("", r"\p{N}"),
        "gpt-4o": _cased(_SHORT + "?", r"\p{N}{1,3}"),
    }
)
# rules with which llama.cpp takes a word that is a token without merging
WHOLE: Final = ("llama-bpe", "tekken")
# rules with which llama.cpp parts a letter from a combining mark that follows
MARKS: Final = ("tekken", "gpt-4o")
# transformers' name -> the one in GGUF's key
SPECIAL: Final[Mapping[str, str]] = MappingProxyType(
    {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
)
UNKNOWN: Final = "tokenizer.ggml.unknown_token_id"
_JOINED: Final = (gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED)

Field = Callable[[str], Any]


def build_tokenizer(field: Field) -> PreTrainedTokenizerBase:
    """Return the tokenizer that metadata describe; `field` gives a value by its key, or None.

    ValueError for a kind that is neither; ValueError, KeyError or TypeError when the metadata make no sense.
    """
    kind = field("tokenizer.ggml.model")
    if kind not in KINDS:
        raise ValueError(f"tokenizer of kind {kind!r}; {' and '.join(KINDS)} are read")
    backend = KINDS[kind](field)
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    _add_marks(backend, tokens, types)
    special = {
        name: tokens[int(i)]
        for name, key in SPECIAL.items()
        if (i := field(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    _add_ends(backend, field, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=field("tokenizer.chat_template"),
        **{f"{name}_token": text for name, text in special.items()},
    )


def _used(field: Field) -> dict[str, int]:
    types = field("tokenizer.ggml.token_type")
    tokens = enumerate(field("tokenizer.ggml.tokens"))
    return {text: i for i, text in tokens if types[i] != gguf.TokenType.UNUSED}


def _bytes(field: Field) -> Tokenizer:
    name = field("tokenizer.ggml.pre")
    merges = [(left, right) for left, right in (m.split(" ", 1) for m in field("tokenizer.ggml.merges"))]
    vocab = _used(field)
    if as_transformers := field(UNKNOWN) is not None:
        vocab = {text: i for i, text in enumerate(field("tokenizer.ggml.tokens"))}
    model = BPE(vocab=vocab, merges=merges, ignore_merges=name in WHOLE)
    if as_transformers:  # its reader has such a vocabulary, with what is not used, to the same digest
        model.continuing_subword_prefix = model.end_of_word_suffix = ""
    backend = Tokenizer(model)
    if name not in RULES:
        log.warning("no rule for tokenizer '%s'; some text may be split differently", name)
    backend.pre_tokenizer = pre_tokenizers.Sequence([_step(s) for s in RULES.get(name, ("bytes+words",))])
    backend.decoder = decoders.ByteLevel()
    return backend


def _step(step: str) -> Any:
    if step == "digit":
        return pre_tokenizers.Digits(individual_digits=True)
    if step.startswith("bytes"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "bytes+words")
    return pre_tokenizers.Split(Regex(step), behavior="isolated", invert=False)


def _scored(field: Field) -> Tokenizer:
    vocab, types = _used(field), field("tokenizer.ggml.token_type")
    scores = field("tokenizer.ggml.scores")
    joined = {text: i for text, i in vocab.items() if types[i] in _JOINED}
    unknown = next((text for text, i in vocab.items() if types[i] == gguf.TokenType.UNKNOWN), None)
    backend = Tokenizer(
        BPE(vocab=vocab, merges=_merges(joined, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = field("tokenizer.ggml.add_space_prefix") is not False
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(joined: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make a piece, by the piece's falling score and then its id."""
    found = []
    for text in sorted(joined, key=lambda text: (-scores[joined[text]], joined[text])):
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        found += [pair for pair in pairs if pair[0] in joined and pair[1] in joined]
    return found


def _add_marks(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Add special tokens and added words, in the order of their ids."""
    kinds = gguf.TokenType
    for text, kind in zip(tokens, types, strict=True):
        if kind in (kinds.CONTROL, kinds.UNKNOWN):
            backend.add_special_tokens([AddedToken(text, normalized=False)])
        elif kind == kinds.USER_DEFINED:
            backend.add_tokens([AddedToken(text, normalized=False)])


def _add_ends(backend: Tokenizer, field: Field, special: Mapping[str, str]) -> None:
    """Set what goes before and after every text: pieces have a start token unless the file says otherwise."""
    pieces = field("tokenizer.ggml.model") == "llama"
    start = field("tokenizer.ggml.add_bos_token")
    before = special.get("bos") if (pieces if start is None else start) else None
    after = special.get("eos") if field("tokenizer.ggml.add_eos_token") else None
    marks = [mark for mark in (before, after) if mark is not None]
    if marks:
        one = f"{before + ' ' if before else ''}$A{' ' + after if after else ''}"
        backend.post_processor = processors.TemplateProcessing(
            single=one,
            pair=f"{one} {one.replace('$A', '$B')}",
            special_tokens=[(mark, backend.token_to_id(mark)) for mark in dict.fromkeys(marks)],
        )


KINDS: Final[Mapping[str, Callable[[Field], Tokenizer]]] = MappingProxyType(
    {"gpt2": _bytes, "llama": _scored}
)
