"""Define the contract of an export format.  A file of this folder is one format: `formats/mlx.py` writes `--to mlx`.

Another package registers its module under the entry-point group `fleetune.targets`.  Constants, read without an import:

    TARGETS       {"mlx": "one line of help", ..}: the names of `--to` that it writes; after a colon stands the kind
    TAKES         "model" (any model, the default), "codes" (compressed models alone) or "adapter" (of a tuned run)
    SUFFIX        ".gguf" for a file of that name; "", the default, for a folder
    BLOCK_WIDTHS  True where blocks of different widths have a place (default False: they are refused)
    PROVENANCE    True where the file says where the model comes from (`export.py`; default False)
    RUNTIME       what `--text` runs the result in: "llama.cpp", "mlx-lm" or "transformers"; left out for none
    NEEDS         the modules that this takes besides Fleetune's own dependencies
    INSTALL       the command that installs them, or EXTRA, the extra of Fleetune that does
    ORDER         place in listings (default: last)

Functions, in which `kind` is what follows the colon of the target, None for none:

    check(model: Checkpoint, kind) -> None
        Raise Misfit, or UsageError with a hint of its own, for a model that has no place in the format.
    write(model: Checkpoint, out: Path, kind, made: Mapping[str, str]) -> Report
        Write the model to `out`, a new file or an empty folder; read it back and compare it with the source (FleetuneError).
        `made` says where the model comes from.  What `check` raises comes before anything is written.
        With `model.again`, a format may compare that, as it makes them, with what it would write, and not write them
        (`again.py`); where it writes all the same, that is compared.
    exact_target(model: Checkpoint) -> str | None
        Optional: the target that holds the model without loss, which hints name where another format refuses it.

For TAKES = "adapter" these are check(adapter: Path, kind) and write(adapter: Path, base: Checkpoint, out, kind, made).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Report:
    """A written export; every tensor of it was read back and compared with the source."""

    path: Path
    to: str  # the target
    bytes: int  # of all files
    tensors: int
    exact: int  # tensors whose values in the file are the source's, bit for bit
    types: Mapping[str, int]  # how many tensors are of which type
    notes: tuple[str, ...] = ()  # fallbacks and warnings, for the user


class Misfit(UsageError):
    """The format has no place for the model; `remedy` is what helps besides another target.

    A format does not know the others: `export` adds the hint that names the targets which hold the model.
    """

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


def rounded_to(
    name: str, weight: "torch.Tensor", dtype: "torch.dtype", words: str, *, hint: str
) -> "torch.Tensor":
    """Return a tensor in another type, called `words`; UsageError where that makes a value infinite."""
    values = weight.to(dtype)
    ends = values.aminmax() if values.numel() else ()
    if any(bool(end.isinf()) for end in ends) and not bool(weight.isinf().any()):
        raise UsageError(f"{name} has values beyond {words}'s range", hint=hint)
    return values
