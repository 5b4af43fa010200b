"""Hold a model in memory, and identify it by the digest of its weights.

The base digest is SHA-256 over all parameters in name order (tied tensors once, under the first of their names), for each

    name, NUL, dtype ("float32", "bfloat16", ..), NUL, shape ("576,1536"), NUL, raw little-endian values

of the weights as loaded, so another dtype is another base.  A net with a ledger's view or an adapter attached holds its base's
weights; `refuse_copies` lets it refuse `state_dict`, `copy.deepcopy` and the like, which would give the base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fleetune.common.display import human_count
from fleetune.common.hearing import heard
from fleetune.common.memory import free_memory
from fleetune.errors import ModelError
from fleetune.models.lazy import LazyWeight
from fleetune.models.net import saving
from fleetune.models.net.chat_template import is_plain

CHUNK: Final = 1 << 24  # bytes that a digest brings to the CPU at a time


@dataclass(repr=False)
class Model:
    """A model in memory with its tokenizer: the handle that everything passes around."""

    net: PreTrainedModel  # eval mode, requires_grad False everywhere
    tokenizer: PreTrainedTokenizerBase
    name: str  # as the user gave it
    path: Path  # the directory it was loaded from (a tiny model: its name, no directory)
    digest: str  # base digest, 64 hex digits
    tokenizer_digest: str
    dtype: str  # "fp32", "bf16" or "fp16"
    device: str  # "cpu", "cuda" or "mps"
    attachment: Any = None  # what a method hung on the net: a view of moved weights, or an adapter
    labels: tuple[
        str, ...
    ] = ()  # an encoder's label words, in the order of its outputs (else it writes text)
    new_head: bool = False  # whether an encoder's head is not the checkpoint's: nothing has trained it yet
    ram: int = 0  # bytes that the work may take; 0: all that this process may use
    recomputes: bool = False  # whether the last back-propagation computed activations twice
    trains: str = "weights"  # what methods with directions move: weights, or the scales of a quantised base
    columns: str = ""  # of the rows that it is tuned on, as `data.read` takes them

    def __post_init__(self) -> None:
        for module in [self.net, *blocks_of(self.net)]:
            if _hear not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_hear)

    def __repr__(self) -> str:
        held = f", {self.attachment.words}" if self.attachment is not None else ""
        added = getattr(self.attachment, "added", 0)
        return (
            f"<Model {self.name}: {type(self.net).__name__}, {human_count(self.n_params - added)} parameters, {self.dtype} on "
            f"{self.device}, base {self.digest[:8]}{held}>"
        )

    @property
    def n_params(self) -> int:
        """Return the number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.net.parameters())

    def room(self) -> int:
        """Return the bytes that the activations of a step may take: half of what is free."""
        if self.device == "cuda":
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            return int(torch.cuda.mem_get_info()[0] + unused) // 2
        if self.device == "mps":
            return (torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) // 2
        return free_memory(self.ram) // 2

    def merge(self) -> Model:
        """Put what is attached into the stored weights, for good, and return this model, a plain one.

        `digest` is then that of the tuned weights.  ModelError, with nothing changed, for an adapter that is more than other
        weights (a prefix, a soft prompt, bottleneck adapters).
        """
        if self.attachment is not None:
            self.attachment.merge(self)
            self.digest = digest(named_tensors(self.net))
        return self

    def save(self, folder: str | Path) -> Path:
        """Merge, and write the model as a new Hugging Face directory, which transformers loads; return its path.

        ModelError, with nothing changed, when the folder exists, or as for `merge`.
        """
        place = Path(folder)
        if place.exists():
            raise ModelError(f"{place} exists already", hint="choose a new place: nothing is overwritten")
        self.merge()
        saving.save(self.net, self.tokenizer, place, replace=False)
        return place


def _hear(module: nn.Module, args: object) -> None:
    heard()


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """Return what a net runs one after the other: the members of its lists of modules."""
    return [block for stack in net.modules() if isinstance(stack, nn.ModuleList) for block in stack]


def named_tensors(net: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Return the parameters in name order; tied ones once, under the first of their names."""
    return _once(net.named_parameters(remove_duplicate=False))


def stored_tensors(net: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Return what a checkpoint holds, as `named_tensors` does: the parameters, and the buffers that are no function of the
    configuration (the bias by which a router chooses experts, say).
    """
    return _once(net.state_dict(keep_vars=True).items())


def _once(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in sorted(named, key=lambda item: item[0]):
        first.setdefault(id(tensor), (name, tensor))
    return list(first.values())


class Pieces(NamedTuple):
    """A tensor that comes a piece at a time: 1-D CPU tensors in row-major order, of which the next may overwrite the last."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[Tensor]


def digest(tensors: Iterable[tuple[str, Tensor | Pieces]]) -> str:
    """Return the SHA-256 (hex) over name, dtype, shape and raw values of each tensor, in the order of the names.

    Streams: tensors may come from a generator, and a tensor may be `Pieces`.  At most 16 MiB are copied at a time, nothing
    when they lie contiguous on the CPU.  ValueError when the names are not in ascending order.
    """
    sha = hashlib.sha256()
    last = ""
    for name, tensor in tensors:
        if name <= last:
            raise ValueError(f"digest needs tensors in name order, '{name}' came after '{last}'")
        last = name
        kind = str(tensor.dtype).removeprefix("torch.")
        sha.update(f"{name}\0{kind}\0{','.join(map(str, tensor.shape))}\0".encode())
        for piece in _pieces(tensor):
            sha.update(piece.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _pieces(tensor: Tensor | Pieces) -> Iterator[Tensor]:
    """Yield the values in row-major order as flat CPU tensors of about CHUNK bytes."""
    heard()
    if isinstance(tensor, Pieces):
        yield from tensor.parts
        return
    if isinstance(tensor, LazyWeight):
        yield from (part for _, part in tensor.pieces())
        return
    tensor = tensor.detach()
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    width = rows.element_size() * (rows[0].numel() if rows.shape[0] else 0)
    step = max(1, CHUNK // max(1, width))
    for start in range(0, rows.shape[0], step):
        flat = rows[start : start + step].contiguous().cpu().reshape(-1)
        if flat.stride(0) != 1:  # a single value
            flat = flat.clone(memory_format=torch.contiguous_format)
        yield flat


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 (hex) of the tokenizer: its tokenizer.json in canonical form, and its chat template.

    Canonical: keys sorted, no padding or truncation state; so saving and loading keeps the digest.  The template
    that an export of ours gives a tokenizer without one does not count (`chat_template.py`).
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.update(padding=None, truncation=None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    whole = {"tokenizer": rules, "chat_template": None if is_plain(tokenizer) else tokenizer.chat_template}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def uniform(key: str, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """Draw fp32 values uniform in [-bound, bound), a function of `key` alone: Philox words, 24 bits of each.

    Only raw words are used, which numpy promises never to change, so the bits are equal everywhere.
    """
    word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=word).random_raw(int(np.prod(shape, dtype=np.int64)))
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return ((unit * np.float32(2) - np.float32(1)) * np.float32(bound)).reshape(shape)


HINT: Final = (
    "model.save(FOLDER) writes the tuned model; model.merge() puts the tuning into the weights, for good, and then "
    "every way works"
)
HOOK: Final = "_fleetune_unmerged"
CALLS: Final = {
    "save_pretrained": "save_pretrained",
    "__deepcopy__": "copy.deepcopy",
    "__reduce_ex__": "torch.save",
}


def refuse_copies(net: nn.Module) -> None:
    """Let the net and all modules of it refuse these calls until `allow_copies`."""

    def refusal(call: str) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise ModelError(f"{call} would lose the tuning, which is not in the stored weights", hint=HINT)

        return refuse

    allow_copies(net)
    for module in net.modules():
        register: Any = module.register_state_dict_pre_hook  # torch leaves it untyped
        module.__dict__[HOOK] = register(refusal("state_dict"))
        calls = {n: call for n, call in CALLS.items() if n != "save_pretrained" or hasattr(module, n)}
        module.__dict__.update({name: refusal(call) for name, call in calls.items()})


def allow_copies(module: nn.Module) -> None:
    """Take the refusals off a module and all within it; does nothing where there are none."""
    for inside in module.modules():
        if (hook := inside.__dict__.pop(HOOK, None)) is not None:
            hook.remove()
            for name in CALLS:
                inside.__dict__.pop(name, None)
