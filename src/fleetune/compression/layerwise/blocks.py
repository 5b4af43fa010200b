"""Write each compressed block to a file, and read the weights of finished blocks from there."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fleetune.common.files import write_atomic
from fleetune.compression.training import head_of, metadata
from fleetune.models.artefact import Quantised, assembled, stored


@dataclass(frozen=True)
class MatrixResult:
    """The result of one linear layer."""

    name: str
    error: float  # ||WX - QX||^2 / ||WX||^2 on the calibration windows; NaN without windows
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BlockResult:
    """The result of one decoder block."""

    number: int
    matrices: tuple[MatrixResult, ...]
    seconds: float


def block_file(folder: Path, number: int) -> Path:
    """Return the file of a finished block."""
    return folder / f"block-{number:04d}.safetensors"


def described(q: Quantised) -> list[Any]:
    """Return what `assembled` needs beside the parts, as far as there is any.

    Bits, group and columns; then codebook, super-block type, number of experts, and whether these are transposed.
    """
    if q.experts:
        kind = "" if q.blocks is None else q.blocks.kind
        transposed = [True] if q.transposed else []
        return [q.bits, q.group, q.codes.shape[1], q.codebook * (not kind), kind, q.experts, *transposed]
    if q.blocks is not None:
        return [q.bits, q.group, q.codes.shape[1], "", q.blocks.kind]
    return [q.bits, q.group, q.codes.shape[1], *([q.codebook] if q.codebook else [])]


class FinishedBlocks(Mapping[str, "Quantised | Tensor"]):
    """The weights of finished blocks by parameter name, read from disk on access."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # by parameter name: (block, `described`, or None for floats)
        self._where: dict[str, tuple[int, list[Any] | None]] = {}
        self.blocks: list[BlockResult] = []
        self.adjust: dict[str, Callable[[Quantised], Quantised]] = {}  # what is done to a weight that is read

    def open(self, number: int) -> bool:
        """Add the file of a block; False when it is missing or damaged."""
        if (head := head_of(block_file(self.folder, number))) is None:
            return False
        self._where |= {name: (number, grid) for name, grid in head["weights"].items()}
        matrices = (MatrixResult(n, float(e), tuple(notes)) for n, e, notes in head["matrices"])
        self.blocks.append(BlockResult(number, tuple(matrices), head["seconds"]))
        return True

    def put(self, block: BlockResult, weights: Mapping[str, Quantised | Tensor]) -> None:
        """Write a finished block.  StorageError when it cannot be written."""
        grids = {n: described(w) if isinstance(w, Quantised) else None for n, w in weights.items()}
        matrices = [[m.name, m.error, m.notes] for m in block.matrices]
        head = {"weights": grids, "matrices": matrices, "seconds": block.seconds}
        tensors = {k: v for n, w in weights.items() for k, v in stored(n, w).items()}
        write_atomic(block_file(self.folder, block.number), save(tensors, metadata=metadata(head, tensors)))
        self.open(block.number)

    def __getitem__(self, name: str) -> Quantised | Tensor:
        number, grid = self._where[name]
        with safe_open(block_file(self.folder, number), framework="pt") as opened:
            if grid is None:
                floats: Tensor = opened.get_tensor(name)
                return floats
            weight = assembled(lambda part: opened.get_tensor(f"{name}.{part}"), *grid)
        return self.adjust[name](weight) if name in self.adjust else weight

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
