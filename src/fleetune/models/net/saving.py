"""Write a model as a Hugging Face directory, and safetensors files one tensor at a time; compare what the disk gives back."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from fleetune.common.files import staged
from fleetune.errors import FleetuneError, ModelError, StorageError
from fleetune.models.families.foreign import short_error
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.families.widths import ALONE, mark_config

ONE_FILE: Final = "1000TB"  # of weights: never several files


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers, in one thread at a time: what it loaded is checked here."""
    logs = transformers.utils.logging
    with ALONE:
        shown, level = logs.is_progress_bar_enabled(), logs.get_verbosity()
        logs.disable_progress_bar()
        logs.set_verbosity_error()
        try:
            yield
        finally:
            logs.set_verbosity(level)
            if shown:
                logs.enable_progress_bar()


def save(
    net: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    path: str | Path,
    *,
    card: str | None = None,
    replace: bool = True,
    weights: bool = True,
) -> None:
    """Write a Hugging Face directory: configuration, safetensors, tokenizer, chat template, README (`card`).

    Tied weights are written once, and without `weights` none; file modes follow the umask.  Whole or not at all: an
    existing model directory is replaced when the new one is complete.  StorageError when the disk is full or not writable,
    or `path` holds something that is not a model (without `replace`: is there).
    """
    path = Path(path)
    if any(".base_layer." in name for name, _ in net.named_parameters()):
        raise ModelError("the model still carries adapters", hint="merge or detach them before saving")
    with staged(path, replace="config.json" if replace else None) as folder, disk_errors(path), quiet():
        net.save_pretrained(folder, max_shard_size=ONE_FILE, **({} if weights else {"state_dict": {}}))
        mark_config(folder)
        tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")


def written(net: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights that `save` writes, by the names that they have in the file."""
    state = remove_tied_weights_from_state_dict(net.state_dict(), net)
    found: dict[str, Tensor] = revert_weight_conversion(net, state)
    return found


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of safetensors, and those of tokenizers for a full disk, into a StorageError."""
    try:
        yield
    except Exception as error:
        full = "No space left" in str(error) or "os error 28" in str(error)
        if not isinstance(error, SafetensorError) and (isinstance(error, OSError) or not full):
            raise
        raise StorageError(
            f"cannot write {path}: {'the disk is full' if full else short_error(error)}",
            hint="free some space, or choose another folder with --out",
        ) from error


Tensors = Callable[[], Iterator[tuple[str, Tensor]]]
Table = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

TYPES: Final[Mapping[torch.dtype, str]] = MappingProxyType(
    {
        **{getattr(torch, dtype.full): dtype.tag for dtype in WEIGHTS.values()},
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.int32: "I32",
        torch.uint32: "U32",
        torch.int64: "I64",
    }
)
# the order that safetensors' own writer has
_RANK: Final = ("U8", "I8", "F16", "BF16", "I32", "U32", "F32", "I64")


def write_pieces(
    path: Path,
    table: Table,
    tensors: Iterable[tuple[str, Iterable[Tensor]]],
    metadata: Mapping[str, str],
    *,
    aligned: int = 64,
) -> None:
    """Write a safetensors file whose values lie in the order of `table`; they come in any order, each in pieces."""
    raw, starts = _laid_out(table, metadata, aligned)
    with path.open("wb") as file:
        file.write(raw)
        for name, pieces in tensors:
            file.seek(starts[name])
            for piece in pieces:
                file.write(bytes_of(piece).numpy().data)


def _laid_out(table: Table, metadata: Mapping[str, str], aligned: int) -> tuple[bytes, dict[str, int]]:
    """Return the head of a safetensors file whose values lie in the order of `table`, and where each begins."""
    head, end = dict[str, Any]({"__metadata__": dict(metadata)}), 0
    for name, (dtype, shape) in table.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        head[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": (start, end)}
    raw = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(len(raw) + 8) % aligned)
    return len(raw).to_bytes(8, "little") + raw, {
        name: 8 + len(raw) + head[name]["data_offsets"][0] for name in table
    }


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; wide dtypes come first, so that all values are aligned."""
    table = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors()}
    pieces = ((name, [tensor]) for name, tensor in tensors())
    write_pieces(path, _by_width(table), pieces, metadata)


def head_of(table: Table, metadata: Mapping[str, str]) -> bytes:
    """Return the head that `write_tensors` writes."""
    return _laid_out(_by_width(table), metadata, 64)[0]


def _by_width(table: Table) -> Table:
    return {name: table[name] for name in sorted(table, key=lambda name: (-table[name][0].itemsize, name))}


def write_in_turn(
    path: Path, table: Table, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write what `safetensors.torch.save_file` would, byte for byte, with one tensor in memory at a time.

    `table` gives every tensor's dtype and shape.  (Only one key of metadata, since that writer's order of several varies.)
    """
    write_pieces(path, _by_rank(table), ((name, [tensor]) for name, tensor in tensors), metadata, aligned=8)


def head_in_turn(table: Table, metadata: Mapping[str, str]) -> bytes:
    """Return the head that `write_in_turn` writes."""
    return _laid_out(_by_rank(table), metadata, 8)[0]


def _by_rank(table: Table) -> Table:
    order = sorted(table, key=lambda name: (-_RANK.index(TYPES[table[name][0]]), name))
    return {name: table[name] for name in order}


def compare(path: Path, tensors: Tensors) -> None:
    """Raise FleetuneError unless the file holds these tensors and no others, bit for bit."""
    try:
        with safe_open(path, framework="pt") as file:
            left = set(file.keys())
            for name, tensor in tensors():
                found = file.get_tensor(name)
                same = (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                if not same or not torch.equal(bytes_of(found), bytes_of(tensor)):
                    raise damaged(path, f"{name} does not hold what was written")
                left.remove(name)
    except SafetensorError as error:
        raise damaged(path, str(error)) from error
    if left:
        raise damaged(path, f"{min(left)} was not written")


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's values, row by row."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def damaged(path: Path, what: str) -> FleetuneError:
    """Return the error for a file that does not give back what was written."""
    return FleetuneError(
        f"the file just written to {path} is wrong: {what}",
        hint="try again on another disk; if it stays, report it as a fault of Fleetune",
    )
