# SPDX-License-Identifier: Apache-2.0
"""Read a finished run: its measures, the history of its rounds, its model, its ledger or adapter.

`TuneResult` is for users: `fleetune.tune` returns it.  `finished.py`, below it, has the functions that load a run's model
again; commands and compression use those as well.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetune.common.events import TuneDone
from fleetune.common.shell import quoted
from fleetune.errors import UsageError
from fleetune.runs import rundir
from fleetune.tuning.result import finished

if TYPE_CHECKING:
    from torch import Tensor

    from fleetune.models.net.model import Model
    from fleetune.seeds.ledger import Ledger

COLUMNS: Final = (
    "loss",
    "accuracy",
    "objective",
    "rouge_l",
    "clients",
    "accepted",
    "bytes_up",
    "bytes_down",
    "bytes_total",
    "seconds",
    "rss",
)


@dataclass(frozen=True)
class TuneResult:
    """A finished run.  `done` is its last event: measures before and after, bytes, seconds, digest."""

    folder: Path
    done: TuneDone

    @property
    def path(self) -> Path:
        """The ledger file, or the adapter's directory."""
        return Path(self.done.result)

    @property
    def digest(self) -> str:
        """SHA-256 of the tuned weights (a ledger's run) or of the adapter's."""
        return self.done.digest

    @property
    def report(self) -> Path:
        """The run's page."""
        return self.folder / "report.html"

    @property
    def history(self) -> dict[str, list[Any]]:
        """The history of the rounds, as columns of equal length that `pandas.DataFrame` takes.

        `round` counts from 0, the base model; a column has None where a round was not evaluated (losses in nats, bytes
        and seconds of the round).  Columns without any value are left out.
        """
        rows: dict[int, dict[str, Any]] = {}
        for event in rundir.events(self.folder):
            if event["event"] in ("round", "eval"):
                rows.setdefault(int(event["round"]), {}).update(event)
        found = {c: [rows[r].get(c) for r in sorted(rows)] for c in COLUMNS}
        used = {c: values for c, values in found.items() if any(v is not None for v in values)}
        return {"round": sorted(rows), **used}

    def model(self, *, device: str = "cpu", offline: bool = False) -> Model:
        """Load the tuned model; its stored weights stay the base's."""
        return finished.load(self.folder, device=device, offline=offline)

    def ledger(self) -> Ledger:
        """Read the seed ledger; UsageError for a run that leaves an adapter."""
        return finished.ledger_of(self.folder)

    def adapter(self) -> dict[str, Tensor]:
        """Read the adapter's tensors, by PEFT's names; UsageError for a run that leaves a ledger."""
        from safetensors.torch import load_file

        found = finished.result_of(self.folder)
        if not found.is_dir():
            raise UsageError(
                f"{self.folder} leaves a ledger, no adapter",
                hint="its tuned model: .model(), or export to hf",
            )
        tensors: dict[str, Tensor] = load_file(found / "adapter_model.safetensors")
        return tensors


def read(folder: Path) -> TuneResult:
    """Return the result of a finished run; UsageError when it is not finished."""
    known = {name for name in TuneDone.__dataclass_fields__ if name != "event"}
    for event in rundir.events(folder):
        if event["event"] == "done":
            done = TuneDone(**{n: v for n, v in event.items() if n in known})
            result = str(folder / Path(done.result).name)  # as it is found from here
            return TuneResult(folder, dataclasses.replace(done, run=str(folder), result=result))
    raise UsageError(f"{folder} is not finished", hint=f"fleetune tune --resume {quoted(folder)}")


def finished_in(out: Path) -> list[TuneResult]:
    """Return the results of the finished runs under a folder, in order of number."""
    return [read(path) for path in rundir.listing(out) if rundir.status_of(path) == "done"]
