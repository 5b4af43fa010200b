"""Store a compressed model as the master artefact: codes, scales and zeros as the solver chose them.

A folder with the model's configuration and tokenizer, the digests of all files in `SHA256SUMS`, and

    master.safetensors      NAME.codes   uint8 [R, ceil(C bits / 8)]: a row's codes, bits in little-endian order
                            NAME.scale   float16 [R, C / group], may be negative
                            NAME.zero    uint8 [R, C / group]
                            NAME         every tensor that is not quantised, in its own dtype

for each quantised matrix NAME (a parameter's name, [R, C] = [out, in]), which is, exactly in float32,

    w[r, c] = scale[r, c // group] * (codes[r, c] - zero[r, c // group])

The header (JSON under "master" in the file's metadata) may name for NAME a codebook (zero is 0 then) or a type of super-blocks
(`families/number_types.py`), whose parts are NAME.d, multiples, dmin and minima (`SuperBlocks`) in place of scale and zero.  A
mixture's experts [E, R, C] lie one below another, [E R, C]; the header says how many NAME has, and lists under "transposed" those
that the model holds as [E, C, R] (gpt-oss).  It has no time and no path: the same work gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fleetune.common import sums
from fleetune.common.files import staged
from fleetune.errors import ModelError, VersionError
from fleetune.models.cache.names import MASTER, is_master
from fleetune.models.families.number_types import CODEBOOKS, SUPER_TYPES, SUPER_WIDTH, SuperType
from fleetune.models.families.widths import mark_config
from fleetune.models.net.model import Model, stored_tensors
from fleetune.models.net.saving import write_in_turn

VERSION: Final = 1
AGAIN: Final = "compress the model again"
_OF_MATRICES: Final = ("grids", "shapes", "codebooks", "superblocks", "experts")  # fields of the head by NAME


class SuperBlocks(NamedTuple):
    """The scales of a matrix [R, C] in super-blocks, as the file holds them."""

    kind: str  # of `SUPER_TYPES`
    d: Tensor  # float16 [R, C / 256]
    multiples: Tensor  # int8 [R, C / group]
    dmin: Tensor  # float16 [R, C / 256]; [R, 0] of a type without a minimum
    minima: Tensor  # int8 [R, C / group]; [R, 0] likewise

    @property
    def type(self) -> SuperType:
        """The numbers of the type."""
        return SUPER_TYPES[self.kind]

    @staticmethod
    def joined(parts: Sequence[SuperBlocks]) -> SuperBlocks:
        """Join the super-blocks of some rows each."""
        tensors = (torch.cat(rows) for rows in list(zip(*parts, strict=True))[1:])
        return SuperBlocks(parts[0].kind, *tensors)

    def scale(self) -> Tensor:
        """Return the groups' scales, float32 [R, C / group], exact."""
        return times(self.d, self.multiples)

    def offset(self) -> Tensor | None:
        """Return what is taken off a group's weights, float32 [R, C / group], exact; None where there is no minimum."""
        return times(self.dmin, self.minima) if self.type.minimum else None

    def misfit(self, R: int, C: int) -> str:
        """Say what keeps the parts from being those of a matrix [R, C]; "" where nothing does."""
        of, blocks = self.type, (R, C // SUPER_WIDTH)
        groups, none = (R, C // of.group), (R, 0)
        wanted = (blocks, groups, *((blocks, groups) if of.minimum else (none, none)))
        found = (self.d, self.multiples, self.dmin, self.minima)
        dtypes = (torch.float16, torch.int8, torch.float16, torch.int8)
        if C % SUPER_WIDTH or any(tuple(t.shape) != shape for t, shape in zip(found, wanted, strict=True)):
            return f"parts that are not those of super-blocks of {SUPER_WIDTH} columns"
        if any(t.dtype != dtype for t, dtype in zip(found, dtypes, strict=True)):
            return f"parts of another type than {self.kind}'s"
        if not all(bool(unit.isfinite().all()) for unit in (self.d, self.dmin)):
            return "units that are no finite numbers"
        ends = [(self.multiples, of.low), (self.minima, 0)]
        if any(t.numel() and (int(t.min()) < low or int(t.max()) > of.high) for t, low in ends):
            return f"multiples that {self.kind} has not"
        return ""


def times(unit: Tensor, multiples: Tensor) -> Tensor:
    """Return multiples [R, groups] of the units [R, blocks] that groups share, float32 [R, groups]."""
    each = multiples.shape[1] // max(1, unit.shape[1])
    return unit.float().repeat_interleave(each, 1) * multiples.float()


@dataclass(frozen=True)
class Quantised:
    """A matrix on a grid: w[r, c] = scale[r, c // group] * steps[r, c].

    The steps are codes[r, c] - zero[r, c // group], or a codebook's value for the code.  In super-blocks the scale is a float32
    number, exact, and a group's minimum is taken off (`SuperBlocks`).
    """

    codes: Tensor  # uint8 [R, C], below 2**bits
    scale: Tensor  # float16 [R, C / group]; float32 in super-blocks
    zero: Tensor  # uint8 [R, C / group]; 0 with a codebook
    bits: int
    group: int  # columns that share a scale and a zero
    codebook: str = ""  # of CODEBOOKS; "" where codes are evenly spaced
    blocks: SuperBlocks | None = None  # what `scale` is made of, where it is made of super-blocks' parts
    experts: int = 0  # whose matrices' rows stand one below another; 0 for a single matrix
    transposed: bool = False  # whether the parameter holds each expert's matrix as [in, out]

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape: [R, C], [experts, R / experts, C], or [experts, C, R / experts] where it is transposed."""
        R, C = self.codes.shape
        if not self.experts:
            return R, C
        rows = R // self.experts
        return (self.experts, C, rows) if self.transposed else (self.experts, rows, C)

    def equals(self, other: Quantised) -> bool:
        """Return whether another matrix is the same in all its parts."""
        one, two = ([*vars(q).values(), *(q.blocks or ())] for q in (self, other))
        pairs = [(a, b) for a, b in zip(one, two, strict=False) if not isinstance(a, SuperBlocks)]
        same = all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
        return same and len(one) == len(two)

    @staticmethod
    def of_blocks(codes: Tensor, blocks: SuperBlocks) -> Quantised:
        """Return the matrix with these codes and super-blocks."""
        of = blocks.type
        zero = torch.full_like(blocks.multiples, of.middle, dtype=torch.uint8)
        return Quantised(codes, blocks.scale(), zero, of.bits, of.group, of.codebook, blocks)

    def steps(self) -> Tensor:
        """Return how many scales each weight is away from 0, int16 [R, C]."""
        if self.codebook:
            return torch.tensor(CODEBOOKS[self.codebook], dtype=torch.int16)[self.codes.int()]
        steps = self.codes.to(torch.int16)
        steps.view(len(steps), -1, self.group).sub_(self.zero.to(torch.int16)[..., None])
        return steps

    def step_range(self) -> tuple[int, int]:
        """Return the smallest and the largest of `steps`."""
        one = not self.codebook and bool((self.zero == self.zero[0, 0]).all())  # zero for all
        steps = self.codes if self.codebook or one else self.steps()
        first, last = (int(end) - one * int(self.zero[0, 0]) for end in steps.aminmax())
        values = CODEBOOKS.get(self.codebook)
        return (values[first], values[last]) if values else (first, last)

    def dense(self) -> Tensor:
        """Return the weights, float32, of `shape`."""
        values = self.steps().float()
        groups = values.view(len(values), -1, self.group).mul_(self.scale.float()[..., None])
        if self.blocks is not None and (offset := self.blocks.offset()) is not None:
            groups.sub_(offset[..., None])
        if self.transposed:
            return values.view(self.experts, -1, values.shape[1]).mT.contiguous()
        return values.view(self.shape)


@dataclass(frozen=True)
class ArtefactHead:
    """The header of an artefact: how it was made, and from which base."""

    method: str
    settings: Mapping[str, Any]
    base: str  # digest of the weights that were compressed: the base model's, or a tuned run's
    tokenizer: str  # tokenizer digest
    calibration: Mapping[str, Any] = field(default_factory=dict)  # source, rows, tokens, sha256
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # quantised NAME -> (bits, group)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # quantised NAME -> (R, C)
    version: int = VERSION
    codebooks: Mapping[str, str] = field(default_factory=dict)  # NAME on a codebook -> its name
    superblocks: Mapping[str, str] = field(default_factory=dict)  # NAME in super-blocks -> their type
    experts: Mapping[str, int] = field(default_factory=dict)  # NAME of experts -> how many
    transposed: Sequence[str] = ()  # NAME of experts that the model holds as [in, out]

    def to_json(self) -> str:
        """Return canonical JSON."""
        raw = dataclasses.asdict(self)
        for some in ("codebooks", "superblocks", "experts", "transposed"):
            if not raw[some]:
                del raw[some]
        return json.dumps(raw, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> ArtefactHead:
        """Parse a header; ModelError when it is not that of a master artefact, VersionError for one of another version."""
        try:
            raw = json.loads(text)
            if raw["version"] != VERSION:
                raise VersionError("the artefact")
            pairs = {k: {n: (int(a), int(b)) for n, (a, b) in raw[k].items()} for k in ("grids", "shapes")}
            head = ArtefactHead(**{**raw, **pairs})
            if problem := head._misfit():
                raise ValueError(problem)
            return head
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ModelError(f"the artefact's head is damaged ({error!r})", hint=AGAIN) from error

    def _misfit(self) -> str:
        """Return what of the fields no artefact has; "" for nothing."""
        texts = (self.method, self.base, self.tokenizer, *self.transposed)
        own = (self.settings, self.calibration, self.codebooks, self.superblocks, self.experts)
        if type(self.version) is not int or not all(isinstance(text, str) for text in texts):
            return "fields of other types"
        if not all(isinstance(field, dict) for field in own) or set(self.grids) != set(self.shapes):
            return "fields of other types, or shapes of other matrices than have grids"
        for what, found, known in (
            ("codebook", self.codebooks.values(), CODEBOOKS),
            ("super-block type", self.superblocks.values(), SUPER_TYPES),
            ("matrix without a grid", [*self.codebooks, *self.superblocks, *self.experts], self.grids),
            ("matrix of no experts", self.transposed, self.experts),
        ):
            if odd := sorted(set(found) - set(known)):
                return f"the {what} {odd[0]!r}"
        return (
            "" if all(type(n) is int and n > 0 for n in self.experts.values()) else "its numbers of experts"
        )


def joined(rows: Sequence[Quantised | Tensor]) -> Quantised | Tensor:
    """Join matrices of the same kind, each some rows of one."""
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part in rows if isinstance(part, Tensor)])
    same = [part for part in rows if isinstance(part, Quantised)]
    codes, scale, zero = (torch.cat([getattr(q, n) for q in same]) for n in ("codes", "scale", "zero"))
    blocks = SuperBlocks.joined([q.blocks for q in same if q.blocks is not None]) if first.blocks else None
    return dataclasses.replace(first, codes=codes, scale=scale, zero=zero, blocks=blocks)


def dense(weight: Quantised | Tensor) -> Tensor:
    """Return a weight's values, quantised or not."""
    return weight.dense() if isinstance(weight, Quantised) else weight


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 [R, C] codes below 2**bits into uint8 [R, ceil(C bits / 8)], little-endian bits within a row."""
    planes, size = _planes(codes, 8 // math.gcd(bits, 8)), -(-codes.shape[1] * bits // 8)
    packed = planes.new_zeros(bits // math.gcd(bits, 8), *planes.shape[1:])
    for i, plane in enumerate(planes):
        byte, shift = divmod(bits * i, 8)
        packed[byte] |= plane << shift
        if shift + bits > 8:
            packed[byte + 1] |= plane >> 8 - shift
    return torch.stack(packed.unbind(), 2).flatten(1)[:, :size].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack`."""
    planes, codes = _planes(packed, bits // math.gcd(bits, 8)), list[Tensor]()
    for i in range(8 // math.gcd(bits, 8)):
        byte, shift = divmod(bits * i, 8)
        codes.append(planes[byte] >> shift)
        if shift + bits > 8:
            codes[i] |= planes[byte + 1] << 8 - shift
    return torch.stack(codes, 2).flatten(1)[:, :columns].contiguous().bitwise_and_((1 << bits) - 1)


def _planes(values: Tensor, each: int) -> Tensor:
    """Return values [R, C] as [each, R, ceil(C / each)]: the first of every `each` neighbours, the second, .."""
    whole = torch.nn.functional.pad(values, (0, -values.shape[1] % each))
    return whole.view(len(whole), whole.shape[1] // each, each).movedim(2, 0).contiguous()


def stored(name: str, weight: Quantised | Tensor) -> dict[str, Tensor]:
    """Return the tensors that the file holds for a parameter."""
    if isinstance(weight, Tensor):
        return {name: weight.detach().cpu().contiguous()}
    found = {"codes": pack(weight.codes.cpu(), weight.bits)}
    kind = "" if weight.blocks is None else weight.blocks.kind
    for part in part_names(kind)[1:]:
        found[part] = getattr(weight if weight.blocks is None else weight.blocks, part).cpu().contiguous()
    return {f"{name}.{part}": tensor for part, tensor in found.items()}


def part_names(superblocks: str) -> tuple[str, ...]:
    """Return the names of a quantised matrix's parts in the file; `superblocks` is a type, or "" for none."""
    if not superblocks:
        return ("codes", "scale", "zero")
    minimum = ("dmin", "minima") if SUPER_TYPES[superblocks].minimum else ()
    return ("codes", "d", "multiples", *minimum)


def assembled(
    get: Callable[[str], Tensor],
    bits: int,
    group: int,
    columns: int,
    codebook: str = "",
    superblocks: str = "",
    experts: int = 0,
    transposed: bool = False,
) -> Quantised:
    """Return the matrix whose parts `get` reads by name (`part_names`); ValueError for parts of no such matrix."""
    if group < 1 or not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits in groups of {group}")
    packed, *rest = (get(part) for part in part_names(superblocks))
    R = len(packed)
    if packed.shape != (R, -(-columns * bits // 8)):
        raise ValueError(f"codes that are not {columns} a row")
    if experts and R % experts:
        raise ValueError(f"{R} rows of {experts} experts")
    codes = unpack(packed, bits, columns)
    if superblocks:
        of = SUPER_TYPES[superblocks]
        if (bits, group, codebook) != (of.bits, of.group, ""):
            raise ValueError(f"codes of {bits} bits in groups of {group} for {superblocks}")
        rest += [torch.zeros(R, 0, dtype=torch.float16), torch.zeros(R, 0, dtype=torch.int8)] * (
            not of.minimum
        )
        blocks = SuperBlocks(superblocks, *rest)
        if problem := blocks.misfit(R, columns):
            raise ValueError(problem)
        return dataclasses.replace(Quantised.of_blocks(codes, blocks), experts=experts, transposed=transposed)
    scale, zero = rest
    groups = (R, columns // group)
    if columns % group or scale.shape != groups or zero.shape != groups:
        raise ValueError(f"parts that are not those of groups of {group}")
    if not scale.is_floating_point() or zero.dtype != torch.uint8 or not bool(scale.isfinite().all()):
        raise ValueError("scales that are no finite numbers, or zeros that are no codes")
    return Quantised(codes, scale, zero, bits, group, codebook, experts=experts, transposed=transposed)


def write(folder: Path, model: Model, changed: Mapping[str, Quantised | Tensor], head: ArtefactHead) -> None:
    """Write the artefact of `model`, with the parameters in `changed` replaced; an older artefact is overwritten.

    One parameter is in memory at a time; the bytes are those of safetensors' own writer.
    StorageError when it cannot be written or `folder` holds something else; then `folder` is unchanged.
    """

    def weights() -> Iterator[tuple[str, Quantised | Tensor]]:
        for name, tensor in stored_tensors(model.net):
            yield name, changed.get(name, tensor)

    table, fields = dict[str, tuple[torch.dtype, tuple[int, ...]]](), dict[str, dict[str, Any]]()
    for name, weight in weights():
        table |= {n: (t.dtype, tuple(t.shape)) for n, t in stored(name, weight).items()}
        if isinstance(weight, Quantised):
            kind = "" if weight.blocks is None else weight.blocks.kind
            fields[name] = {
                "grids": (weight.bits, weight.group),
                "shapes": tuple(weight.codes.shape),
                "superblocks": kind,
                "codebooks": "" if kind else weight.codebook,
                "experts": weight.experts,
            }
            head = dataclasses.replace(head, transposed=[*head.transposed, *[name] * weight.transposed])
    of: dict[str, Any] = {key: {n: own[key] for n, own in fields.items() if own[key]} for key in _OF_MATRICES}
    head = dataclasses.replace(head, **of)
    tensors = (item for name, weight in weights() for item in stored(name, weight).items())
    with staged(folder, replace=MASTER) as new:
        write_in_turn(new / MASTER, table, tensors, {"master": head.to_json()})
        write_beside(new, model)
        sums.write(new)


def write_beside(folder: Path, model: Model) -> None:
    """Write what an artefact holds beside its weights: the configuration and the tokenizer."""
    model.net.config.save_pretrained(folder)
    mark_config(folder)
    if model.net.can_generate() and model.net.generation_config is not None:
        model.net.generation_config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


class Master:
    """An artefact on the disk, read one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        """Open it; ModelError when the folder holds no artefact, or a damaged one."""
        self.folder = folder
        if not is_master(folder):
            raise ModelError(
                f"{folder} holds no compressed model ({MASTER})", hint="make one: fleetune compress MODEL"
            )
        try:
            opened: Any = safe_open(folder / MASTER, framework="pt")
            head = (opened.metadata() or {})["master"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(f"{folder / MASTER} is damaged ({error})", hint=AGAIN) from error
        self._file = opened
        self.head = ArtefactHead.from_json(head)
        self._stored = set(self._file.keys())

    @cached_property
    def names(self) -> list[str]:
        """Return the parameters in name order, quantised or not."""
        parts = {
            f"{n}.{part}" for n in self.head.grids for part in part_names(self.head.superblocks.get(n, ""))
        }
        return sorted((self._stored - parts) | set(self.head.grids))

    def quantised(self, name: str) -> Quantised | None:
        """Read the codes of a parameter; None for one that is not quantised.  ModelError for wrong shapes."""
        head, file = self.head, self.folder / MASTER
        if name not in head.grids:
            return None
        (bits, group), (R, C) = head.grids[name], head.shapes[name]
        codebook, kind = head.codebooks.get(name, ""), head.superblocks.get(name, "")
        try:
            if codebook and len(CODEBOOKS[codebook]) != 1 << bits:
                raise ValueError(f"codes of {bits} bits for {codebook}")
            more = head.experts.get(name, 0), name in head.transposed
            read = assembled(
                lambda part: self._file.get_tensor(f"{name}.{part}"), bits, group, C, codebook, kind, *more
            )
            if len(read.codes) != R:
                raise ValueError(f"{len(read.codes)} rows")
            return read
        except SafetensorError as error:
            raise ModelError(f"{file} lacks parts of {name}", hint=AGAIN) from error
        except ValueError as error:
            wanted = f"[{R}, {C}] in groups of {group}"
            raise ModelError(
                f"{file}: the parts of {name} do not fit {wanted} ({error})", hint=AGAIN
            ) from error

    def weight(self, name: str) -> Tensor:
        """Read a parameter's values: float32 for a quantised one, else in the stored dtype."""
        q = self.quantised(name)
        return self._file.get_tensor(name) if q is None else q.dense()

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, values) of every parameter, in name order."""
        for name in self.names:
            yield name, self.weight(name)

    def digest(self) -> str:
        """Return the SHA-256 of the file, which tells the artefact that an export was made from."""
        return sums.sha256(self.folder / MASTER)
