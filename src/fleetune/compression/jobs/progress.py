"""Report the steps of a compression, and check memory and disk before it."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.common import memory
from fleetune.common.display import human_bytes, quoted
from fleetune.common.events import StepDone
from fleetune.errors import Interrupted, StorageError
from fleetune.models.families.number_types import WEIGHTS
from fleetune.runs import compression_folder
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from fleetune.evaluation.losses import OnRows
    from fleetune.models.net.model import Model


@dataclass(frozen=True)
class JobResult:
    """The result of a job.

    `done` has all fields of `CompressDone` except `folder`; `sizes` has the bytes of the weights, under the keys `before`,
    `after` and, where there is one, `teacher` or `pruned`.
    """

    done: Mapping[str, Any]
    sizes: Mapping[str, int]


def step_reporter(listener: Listener, folder: Path, what: str) -> Callable[..., None]:
    """Return a callback `(step, steps, loss)` that reports each training step as an event.

    It raises Interrupted when a stop is requested.  About ten times in all, it also notes the mean loss, labelled `what`.
    """
    recent: list[float] = []

    def on_step(step: int, steps: int, loss: float) -> None:
        listener.progress("steps", step, steps, f"{what} {loss:.4f}")
        listener.event(StepDone(step=step, steps=steps, loss=loss))
        recent.append(loss)
        if step == steps or step % max(1, steps // 10) == 0:
            listener.note(f"step {step}/{steps}  {what} {statistics.fmean(recent):.4f}")
            recent.clear()
        stop_if_asked(listener, f"stopped after step {step}; it is kept", resume_command(folder))

    return on_step


def row_reporter(listener: Listener, folder: Path, what: str) -> OnRows:
    """Return a callback that counts the rows of a measurement, and raises Interrupted when a stop is requested."""

    def on_rows(done: int, total: int) -> None:
        listener.progress(what, done, total)
        stop_if_asked(
            listener, "stopped while the model was measured; finished work is kept", resume_command(folder)
        )

    return on_rows


def stop_if_asked(listener: Listener, message: str, hint: str = "") -> None:
    """Raise Interrupted when a stop is requested."""
    if listener.stop_requested:
        raise Interrupted(message, hint=hint)


def resume_command(folder: Path) -> str:
    """Return the command that resumes a stopped compression."""
    return f"fleetune compress --resume {quoted(folder)}"


def warn_of_memory(listener: Listener, planned: int, way: str) -> None:
    """Note when less memory is free than `planned` bytes, less what the process already has.

    `way` is an option that would need less memory, "" for none.
    """
    # it imports torch, which a wrong request is refused without
    from fleetune.planning import compression_cost

    free, more = compression_cost.available(), planned - memory.rss()
    if free is not None and more > free:
        instead = f"; with {way} it takes less" if way else ""
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
    return model.n_params * WEIGHTS[model.dtype].size
