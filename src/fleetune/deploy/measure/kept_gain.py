# SPDX-License-Identifier: Apache-2.0
"""Say whether the kept gain of a model can be measured at all; nothing heavy is imported for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fleetune.common.shell import quoted
from fleetune.errors import UsageError
from fleetune.runs import compression_folder
from fleetune.runs.compression_folder import FLEET
from fleetune.subject import Compressed, Run, Subject


def check(subjects: Sequence[Subject]) -> None:
    """Raise UsageError when these are no compression of a tuned run, or one whose base cannot be compressed the same way."""
    if len(subjects) > 1:
        raise UsageError("--kept-gain is of one compressed run", hint="name its folder alone")
    (found,) = subjects
    if not isinstance(found, Compressed) or found.folder is None:
        raise UsageError("--kept-gain is of a compressed run's folder", hint=_hint(found))
    request = compression_folder.request_of(found.folder)
    if not request.run:
        raise UsageError(
            f"{found.folder} was made from a model, not from a run: no tuning, no gain to keep",
            hint="fleetune compress RUN",
        )
    if request.calibrate == FLEET:
        raise UsageError(
            f"{found.folder} was calibrated by devices, so the base would have to be calibrated by them as well",
            hint="leave out --kept-gain; or compress with --calibrate clients, which simulates the devices",
        )
    if request.bytes or request.bpw:
        raise UsageError(
            f"the grids of {found.folder} were chosen for its weights within a size, and the base's would be others",
            hint="leave out --kept-gain; or compress with one grid: --set grid=iq4_nl",
        )
    compression_folder.model_in(found.folder)


def _hint(found: Subject) -> str:
    """Name the newest compression of a run, or how to make one."""
    if not isinstance(found, Run):
        return "fleetune compress RUN"
    run = found.folder.resolve()
    for folder in reversed(compression_folder.listing(run.parent)):
        request = compression_folder.request_of(folder)
        if request.run and Path(request.model).resolve() == run:
            shown = found.folder.parent / folder.name
            return f"measure what was compressed from it: fleetune measure {quoted(shown)} --kept-gain"
    return f"compress it first: fleetune compress {quoted(found.folder)}"
