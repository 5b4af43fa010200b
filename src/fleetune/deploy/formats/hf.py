"""Write plain Hugging Face directories (`--to hf`), and what the formats with codes in such directories share.

In fp32 the weights of a quantised matrix are exact: scale * (code - zero) has at most 11 + 9 bits, and super-blocks' weights are
float32 numbers by definition.  In fp16 and bf16 they are rounded once, and the report counts those that kept their values.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from fleetune.common.display import are
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Misfit, Report, _gguf_vocabulary, rounded_to
from fleetune.errors import UsageError
from fleetune.models.artefact import Quantised, pack
from fleetune.models.families.widths import has_block_widths
from fleetune.models.loading import DTYPES
from fleetune.models.net.saving import Tensors, compare, damaged, head_of, write_tensors

TARGETS: Final = {
    "hf": "a plain directory for transformers: fp32 from codes, else as stored",
    "hf:fp32": "the same, in fp32",
    "hf:bf16": "the same, in bf16",
    "hf:fp16": "the same, in fp16",
}
BLOCK_WIDTHS: Final = True
RUNTIME: Final = "transformers"
ORDER: Final = 60

Parts = Callable[[str, Quantised], Iterator[tuple[str, Tensor]]]
Layers = Callable[[str, Quantised | Tensor], Iterator[tuple[str, Quantised | Tensor]]]

NO_FILES: Final[Mapping[str, str]] = MappingProxyType({})
FILE: Final = "model.safetensors"
METADATA: Final[Mapping[str, str]] = MappingProxyType({"format": "pt"})
COMPANIONS: Final = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def check(model: Checkpoint, kind: str | None) -> None:
    """Do nothing: every model has a place.  (`write` refuses values beyond fp16's range.)"""


def exact_target(model: Checkpoint) -> str:
    """Return "hf", which holds every model without loss."""
    return "hf"


def write(model: Checkpoint, folder: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write `model` into the empty `folder` in dtype `kind` (fp32, bf16, fp16).

    None is fp32 for a master artefact, else the stored dtype.  UsageError, before anything is written, when values are
    beyond fp16's range; FleetuneError when the file does not hold what was written.
    """
    fallback = torch.float32 if model.compressed else model.dtype
    dtype = fallback if kind is None else DTYPES[kind]
    changed: set[str] = set()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in model.names:
            weight = cast = model.weight(name)
            if name not in model.buffers and weight.dtype != dtype:
                cast = rounded_to(name, weight, dtype, str(kind), hint="use --to hf:bf16 or hf:fp32")
                if bool((cast.float() != weight.float()).any()):
                    changed.add(name)
            yield name, cast

    notes = write_folder(model, folder, tensors, {"dtype": str(dtype).removeprefix("torch.")})
    to = "hf" if kind is None else f"hf:{kind}"
    notes += [f"{are(len(changed), 'tensor')} rounded to {kind}"] if changed else []
    if has_block_widths(model.config):
        notes.append("its blocks differ in width: fleetune loads it, transformers does not")
    return report(model, folder, to, len(changed), notes)


# ---------------------------------------------------------------- for all formats that are directories


def write_folder(model: Checkpoint, folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> list[str]:
    """Write weights, tokenizer and configuration into `folder`; `config` replaces keys of config.json.

    Returns notes on what runtimes will do differently.  The weights are read back; FleetuneError when they differ.
    OSError when the disk is full.
    """
    if model.again is not None:
        model.again.compare_tensors(FILE, tensors(), partial(head_of, metadata=METADATA))
    else:
        write_tensors(folder / FILE, tensors, METADATA)
        compare(folder / FILE, tensors)
    raw = json.loads((model.folder / "config.json").read_bytes())
    raw.pop("torch_dtype", None)  # the older name of "dtype"
    text = json.dumps(raw | config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    for pattern in COMPANIONS:
        for file in sorted(model.folder.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    return _gguf_vocabulary.add_template(model.folder, folder)


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 [R, C] codes into int32 [R, ceil(C bits / 32)], little-endian bits within a row."""
    packed = pack(codes, bits)
    wide = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return wide.contiguous().view(torch.int32)


def unwords(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Invert `words` by shifts of whole words instead of bytes, as runtimes' kernels do."""
    at = torch.arange(columns) * bits
    first, shift = at // 32, at % 32
    rows = []
    step = max(1, (1 << 22) // max(1, columns))
    for start in range(0, len(packed), step):
        wide = packed[start : start + step].to(torch.int64) & 0xFFFFFFFF
        wide = torch.nn.functional.pad(wide, (0, 1))
        both = wide[:, first] | wide[:, first + 1] << 32
        rows.append((both >> shift & ((1 << bits) - 1)).to(torch.uint8))
    return torch.cat(rows)


def as_it_is(name: str, weight: Quantised | Tensor) -> Iterator[tuple[str, Quantised | Tensor]]:
    """Yield a parameter as a layer of its own name."""
    yield name, weight


def write_codes(
    model: Checkpoint,
    folder: Path,
    to: str,
    parts: Parts,
    decode: Callable[[Any, str, Quantised], Tensor],
    config: Mapping[str, Any],
    *,
    notes: Sequence[str] = (),
    files: Mapping[str, str] = NO_FILES,
    layers: Layers = as_it_is,
    experts: bool = False,
) -> Report:
    """Write a compressed model into `folder`, and decode every quantised layer from it as a runtime would.

    `parts` gives the tensors of a quantised layer, `decode` its weights from the opened file; `config` replaces keys of
    config.json, `files` are further files, `layers` gives the file's layers of a parameter.  With `experts` their codes are
    written too.  FleetuneError when a layer does not decode to the source's weights.
    """
    rounded: set[str] = set()
    tensors = partial(packed, model, parts, rounded, layers=layers, experts=experts)
    of_runtimes = write_folder(model, folder, tensors, config)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    left = model.again is None and _check_codes(model, folder / FILE, decode, layers, experts)
    more = [f"{are(len(rounded), 'dense tensor')} rounded to fp16"] if rounded else []
    if left:
        more.append(
            f"experts are in 16 bits: the codes of {to} are of linear layers; GGUF and MLX hold theirs"
        )
    return report(model, folder, to, len(rounded), [*of_runtimes, *more, *notes])


def _check_codes(
    model: Checkpoint,
    path: Path,
    decode: Callable[[Any, str, Quantised], Tensor],
    layers: Layers,
    experts: bool,
) -> bool:
    """Decode what `write_codes` wrote; return whether codes of experts were left out."""
    left = False
    with safe_open(path, framework="pt") as file:
        for name in model.names:
            if (q := model.quantised(name)) is None:
                continue
            if q.experts and not experts:
                left = True
                continue
            for tensor, part in layers(name, q):
                assert isinstance(part, Quantised)
                layer = tensor.removesuffix(".weight")
                if not torch.equal(decode(file, layer, part), part.dense()):
                    raise damaged(path, f"{layer} does not decode to its weights")
    return left


def packed(
    model: Checkpoint, parts: Parts, rounded: set[str], *, layers: Layers = as_it_is, experts: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file: the `parts` of what is quantised, buffers as they are, the rest in 16 bits.

    `rounded` gets what changed; `layers` and `experts` are those of `write_codes`.
    """
    for name in model.names:
        q = codes_of(model, name, experts)
        for layer, weight in layers(name, model.weight(name) if q is None else q):
            if isinstance(weight, Quantised):
                yield from parts(layer, weight)
                continue
            if name not in model.buffers and weight.dtype != torch.bfloat16:
                full = weight
                weight = rounded_to(name, full, torch.float16, "fp16", hint="export with --to hf")
                if bool((weight.float() != full.float()).any()):
                    rounded.add(name)
            yield layer, weight


def codes_of(model: Checkpoint, name: str, experts: bool = False) -> Quantised | None:
    """Return the codes of a matrix; None for a dense one, and for experts where a format holds them in 16 bits."""
    q = model.quantised(name)
    return None if q is None or (q.experts and not experts) else q


def matrices(model: Checkpoint, to: str, *, experts: bool = False) -> dict[str, Quantised]:
    """Return the grids of the quantised matrices, without their codes, for the target `to`.

    UsageError when nothing is quantised, Misfit when something else than linear layers (and with `experts` theirs) is, where
    values are not evenly spaced, and for super-blocks.
    """
    grids = dict[str, Quantised]()
    for name in model.names:
        if (q := codes_of(model, name, experts)) is None:
            continue
        if name not in model.linears and not q.experts:
            raise Misfit(
                f"{to} holds quantised linear layers; {name} is none",
                remedy="compress again with one grid: --set grid=asymmetric",
            )
        if q.blocks is not None or q.codebook:
            what = f"{to} holds evenly spaced values; those of {name} are of the grid {q.codebook}"
            if q.blocks is not None:
                what = f"{to} holds groups with a scale of their own; those of {name} are of {q.blocks.kind}'s super-blocks"
            raise Misfit(what, remedy="compress again on another grid (--set grid=ggml)")
        grids[name] = replace(q, codes=q.codes[:0], scale=q.scale[:0])
    if not grids:
        raise UsageError(
            f"{model.folder} holds plain weights, and {to} is for compressed ones",
            hint="compress it first (fleetune compress), or use --to hf",
        )
    return grids


def group_size(q: Quantised, grids: Mapping[str, Quantised]) -> int:
    """Return the matrix's group; -1, a whole row, when every matrix has one group per row, however long."""
    return -1 if all(other.zero.shape[1] == 1 for other in grids.values()) else q.group


def report(model: Checkpoint, folder: Path, to: str, inexact: int, notes: list[str]) -> Report:
    """Report what was written; `inexact` parameters have other values than the source."""
    with safe_open((model.again.path if model.again else folder) / FILE, framework="pt") as file:
        names = list(file.keys())
        types = dict(Counter(file.get_slice(name).get_dtype() for name in names))
    return Report(
        path=folder,
        to=to,
        bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        tensors=len(model.names),
        exact=len(model.names) - inexact,
        types=types,
        notes=tuple(notes),
    )
