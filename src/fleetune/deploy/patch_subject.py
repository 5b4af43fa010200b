# SPDX-License-Identifier: Apache-2.0
"""Find what the arguments of `fleetune patch make` mean: the base may be a compression, as where it is tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fleetune import subject as subjects
from fleetune.common.ggml import PARTS
from fleetune.common.shell import command
from fleetune.common.sums import sha256
from fleetune.deploy import patch_make
from fleetune.errors import FleetuneError, LedgerError, ModelError, UsageError
from fleetune.subject import Compressed, Run, Subject


def run_of(name: str, runs: str | Path) -> Subject | None:
    """Return what RUN means; None for a file, which is a ledger."""
    return None if Path(name).is_file() else subjects.open(name, runs)


def model_of(name: str, run: str, out: Path, runs: str | Path, note: Callable[[str], None]) -> str:
    """Return the model that BASE means: of a compression its GGUF file, as `tunable_file.of`; any other as it is.

    UsageError where BASE is a run: the hint is the command with the run's model, or with the two the other way round.
    """
    patch_make.check_order(name, run, out)
    if Path(name).is_file():
        return name
    base, other = subjects.open(name, runs), run_of(run, runs)
    if isinstance(base, Run):
        if isinstance(other, Run):
            right = command("patch", "make", other.recipe.model, run, "--to", out)
        else:
            right = command("patch", "make", run, name, "--to", out)
        raise UsageError(f"{name} is a run: the model comes first, then the run", hint=right)
    if not isinstance(base, Compressed):
        return name
    from fleetune.deploy import tunable_file

    part = other.recipe.train if isinstance(other, Run) else PARTS[0]
    if part not in PARTS:
        return name
    return str(tunable_file.of(base, part, note))


@contextmanager
def base_hinted(base: Path, run: str, out: Path, runs: str | Path, *, offline: bool) -> Iterator[None]:
    """Name the command with the run's own model where the block fails on a base that is another file."""
    try:
        yield
    except (LedgerError, ModelError) as error:
        found = run_of(run, runs)
        if isinstance(found, Run):
            with suppress(FleetuneError):
                own = patch_make.file_of(found.recipe.model, offline=offline)
                if sha256(own) != sha256(base):
                    right = command("patch", "make", found.recipe.model, run, "--to", out)
                    error.hint = f"the run was tuned on another file: {right}"
        raise
