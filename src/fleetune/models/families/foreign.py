"""Turn what goes wrong with a file from elsewhere into one error that names it.

Other packages' readers may raise anything for a damaged or hostile file: TypeError, RecursionError, a panic of Rust code.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fleetune.common.memory import is_out_of_memory
from fleetune.errors import FleetuneError, ModelError

AGAIN: Final = "fetch the model again"
LARGEST_WEIGHT: Final = 1e9  # trained weights are far below; products of such stay finite in fp32
PANIC: Final = "PanicException"  # of pyo3: what a Rust package raises for a fault of its own; no Exception


@contextmanager
def foreign_file(path: Path, what: str = "cannot be used", *, hint: str = AGAIN) -> Iterator[None]:
    """Raise ModelError "PATH WHAT (REASON)" for any error in the block that is not one of ours.

    A lack of memory and an interruption pass: they say nothing about the file.
    """
    try:
        yield
    except FleetuneError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == PANIC
        if is_out_of_memory(error) or not (panic or isinstance(error, Exception)):
            raise
        raise ModelError(f"{path} {what} ({reason(error)})", hint=hint) from error


def reason(error: BaseException) -> str:
    """Return what an error says, with its class where the words alone do not tell."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    said = short_error(error)
    plain = isinstance(error, OSError | ValueError | RuntimeError) or type(error) is Exception
    return said if plain or said == type(error).__name__ else f"{type(error).__name__}: {said}"


def short_error(error: BaseException) -> str:
    """Return an error's first line (with the next where it ends in a colon), cut to a length that fits a message."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return (f"{first} {more[0].strip()}" if more and first.endswith(":") else first)[:300]


def check_blocks(blocks: object, tensors: int, file: Path) -> None:
    """Raise ModelError when a configuration claims more blocks than there are tensors."""
    if isinstance(blocks, int) and blocks > tensors:
        raise ModelError(f"{file} says {blocks:,} blocks, but there are {tensors:,} tensors", hint=AGAIN)


def check_range(low: float, high: float, name: str, path: Path, hint: str = AGAIN) -> None:
    """Raise ModelError unless a tensor's least and largest values are finite and small enough to compute with."""
    if not -LARGEST_WEIGHT <= low <= high <= LARGEST_WEIGHT:  # also for NaN
        what = (
            "are no numbers in places"
            if math.isnan(low) or math.isnan(high)
            else f"go from {low:.3g} to {high:.3g}"
        )
        raise ModelError(
            f"{path}: the weights of {name} {what}; no step can be computed with such", hint=hint
        )
