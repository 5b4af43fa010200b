# SPDX-License-Identifier: Apache-2.0
"""Report the steps of a compression, and check memory and disk before it."""

from __future__ import annotations

import math
import re
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from fleetune.common.display import counted, human_bytes, human_time
from fleetune.common.events import BlockSolved, MatrixSolved, StepDone
from fleetune.common.shell import quoted
from fleetune.errors import Interrupted, StorageError
from fleetune.runs import compression_folder
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from fleetune.compression.layerwise.blocks import BlockResult
    from fleetune.evaluation.losses import OnRows
    from fleetune.models.net.model import Model


class OnStep(Protocol):
    """Callback after every training step."""

    def __call__(self, step: int, steps: int, loss: float, reward: float | None = None, /) -> None:
        """Report a step; Interrupted ends the training after its checkpoint is written."""


def step_reporter(listener: Listener, folder: Path, what: str) -> OnStep:
    """Return a callback that reports each step as an event, and raises Interrupted when a stop is requested.

    About ten times in all, it also reports the mean loss, labelled `what`, as a remark.
    """
    recent: list[float] = []

    def on_step(step: int, steps: int, loss: float, reward: float | None = None, /) -> None:
        listener.progress("steps", step, steps, f"{what} {loss:.4f}")
        listener.event(StepDone(step=step, steps=steps, loss=loss, reward=reward))
        recent.append(loss)
        if step == steps or step % max(1, steps // 10) == 0:
            listener.note(f"step {step}/{steps}  {what} {statistics.fmean(recent):.4f}")
            recent.clear()
        if listener.stop_requested:
            raise Interrupted(f"stopped after step {step}; it is kept", hint=resume_command(folder))

    return on_step


def row_reporter(listener: Listener, folder: Path, what: str) -> OnRows:
    """Return a callback that counts the rows of a measurement, and raises Interrupted when a stop is requested."""

    def on_rows(done: int, total: int) -> None:
        listener.progress(what, done, total)
        if listener.stop_requested:
            raise Interrupted(
                "stopped while the model was measured; finished work is kept", hint=resume_command(folder)
            )

    return on_rows


def resume_command(folder: Path) -> str:
    """Return the command that resumes a stopped compression."""
    return f"fleetune compress --resume {quoted(folder)}"


def warn_of_memory(listener: Listener, planned: int, ways: Sequence[str]) -> None:
    """Remark when less memory is free than `planned` bytes, less what the process already has.

    `ways` are options that would need less memory; the remark names them.
    """
    from fleetune.common.memory import rss
    from fleetune.planning import compression_cost

    free, more = compression_cost.available(), planned - rss()
    if free is not None and more > free:
        instead = f"; {' or '.join(ways)} it takes less" if ways else ""
        listener.note(f"this takes {human_bytes(more)} more, {human_bytes(free)} of memory are free{instead}")


def check_disk(folder: Path, need: int, what: str) -> None:
    """Raise StorageError unless the disk of `folder` has room for `need` bytes, less what `folder` already holds.

    `what` names in the message what would be written.
    """
    more = need - compression_folder.size(folder)
    if more > (left := shutil.disk_usage(folder).free):
        raise StorageError(
            f"{what} take {human_bytes(more)}, {folder} has {human_bytes(left)} free",
            hint=f"free some space, then: {resume_command(folder)}",
        )


def weight_bytes(model: Model) -> int:
    """Return the bytes of a model's weights in the dtype that they are loaded in."""
    from fleetune.models.families.number_types import WEIGHTS

    return model.n_params * WEIGHTS[model.dtype].size


# what `layerwise.experts` notes of a tensor
_FEW: Final = re.compile(r"(\d+) of (\d+) experts saw fewer than \d+ tokens \(the least (\d+)\)")


def is_of_few(note: str) -> bool:
    """Tell whether a note is on experts that saw few tokens."""
    return _FEW.match(note) is not None


def of_few(notes: Iterable[str]) -> str:
    """Return one line for the notes of all layers on experts that saw few tokens; "" without any."""
    found = [tuple(map(int, seen.groups())) for note in notes if (seen := _FEW.match(note))]
    if not found:
        return ""
    few, every, tokens = zip(*found, strict=True)
    return (
        f"{sum(few)} of {sum(every)} matrices of experts, in {len(found)} tensors, saw fewer tokens than they have columns "
        f"(the least {min(tokens)}): solved on all tokens of their layer. More --windows give them more"
    )


def report_block(listener: Listener, block: BlockResult, blocks: int) -> None:
    """Report a finished block as an event, and what a solver remarked on its layers, but for experts that saw few tokens."""
    matrices = [MatrixSolved(name=m.name, error=m.error, notes=list(m.notes)) for m in block.matrices]
    listener.event(BlockSolved(block=block.number, blocks=blocks, seconds=block.seconds, matrices=matrices))
    for matrix in block.matrices:
        for note in matrix.notes:
            if not is_of_few(note):
                listener.note(f"{matrix.name}: {note}")


def summary(blocks: Sequence[BlockResult], ends: bool) -> str:
    """Return a line on all blocks: how many, the errors of their layers, the time that solving took.

    `ends` tells whether the last one is embedding and head.
    """
    errors = errors_of(blocks)
    told = f"  error {statistics.fmean(errors):.4f}, at most {max(errors):.4f}" if errors else ""
    what = counted(len(blocks) - ends, "block") + ", embedding and head" * ends
    return f"{what}{told}  {human_time(sum(block.seconds for block in blocks))}"


def mean_error(errors: Sequence[float]) -> dict[str, float]:
    """Return the mean of the errors as the field of an event; {} for none."""
    return {"error": statistics.fmean(errors)} if errors else {}


def errors_of(blocks: Sequence[BlockResult]) -> list[float]:
    """Return the errors of all layers, without those that are not a number."""
    return [m.error for b in blocks for m in b.matrices if not math.isnan(m.error)]


def notes_of(blocks: Sequence[BlockResult]) -> dict[str, list[str]]:
    """Return what a solver remarked, by layer."""
    return {m.name: list(m.notes) for b in blocks for m in b.matrices if m.notes}
