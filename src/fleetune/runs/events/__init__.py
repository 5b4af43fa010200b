# SPDX-License-Identifier: Apache-2.0
"""Every event that Fleetune reports: what `--json` prints a line each, and what a `Listener` is given.

A line is one JSON object: `"v": 1`, `"event"` (the name below), then the fields.  A name is unique within one command,
not among all: `done` of `tune` and `done` of `compress` have different fields.  A required field is always in the line.
An optional field is left out when it is None.  A number that is not finite is printed as null.  Events of a tuning run
are also the lines of its `metrics.jsonl`, with the time `t` (seconds since 1970).

Units: bytes, seconds, nats for losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Final

from fleetune.common.settings import Value
from fleetune.runs.events import (
    checks,
    compression,
    endings,
    evaluation,
    export,
    fleet,
    ledger,
    lists,
    measure,
    plan,
    runs,
    serving,
    sweep,
    tuning,
)
from fleetune.runs.events.base import VERSION, Event, Measures, Recorded, as_dict
from fleetune.runs.events.checks import DataChecked, Lengths, RowShown, TuneChecked
from fleetune.runs.events.compression import (
    BlockSolved,
    BudgetMeasured,
    BudgetSpent,
    CalibrationReply,
    CompressChecked,
    CompressDone,
    CompressStart,
    MatrixSolved,
    ModelPruned,
    StepDone,
)
from fleetune.runs.events.endings import Failed, Stopped
from fleetune.runs.events.evaluation import EvalDone, TaskScore, evaluated
from fleetune.runs.events.export import ExportChecked, ExportDone, ExportPushed, PatchApplied, PatchMade
from fleetune.runs.events.fleet import DeviceEvaluated, FleetEvaluated
from fleetune.runs.events.ledger import (
    DigestFound,
    LedgerDifference,
    LedgerShown,
    LedgerVerified,
    LedgerWritten,
)
from fleetune.runs.events.lists import (
    DoctorReport,
    FilesVerified,
    MethodListed,
    ModelCached,
    ModelListed,
    ModelPulled,
    ModelRemoved,
    RecipeListed,
    SettingListed,
    TextShown,
)
from fleetune.runs.events.measure import Measured, MeasureDone
from fleetune.runs.events.plan import PlanRow, PlanSettings
from fleetune.runs.events.runs import (
    CompressionListed,
    DeviceShown,
    FleetShown,
    RunListed,
    RunRemoved,
    SweepListed,
)
from fleetune.runs.events.serving import Answered, Serving, ThreadsChosen
from fleetune.runs.events.sweep import SweepDone, SweepPlanned, SweepRun, SweepStart
from fleetune.runs.events.tuning import (
    ClientReply,
    Diverging,
    RateFound,
    RoundDone,
    RoundEvaluated,
    TuneDone,
    TuneStart,
    round_evaluated,
)

# The files of this folder under the headings of docs/events.md, in order.
SECTIONS: Final[Mapping[str, tuple[ModuleType, ...]]] = {
    "Tuning": (checks, tuning),
    "Sweeps and runs": (sweep, runs),
    "Compression": (compression,),
    "Export and measurement": (export, measure, evaluation),
    "A fleet of real devices": (fleet,),
    "Planning, lists, ledgers, serving": (plan, lists, ledger, serving, endings),
}


def classes() -> list[type[Event]]:
    """Every event, in the order of `SECTIONS`."""
    files = [file for section in SECTIONS.values() for file in section]
    return [
        c
        for file in files
        for c in vars(file).values()
        if isinstance(c, type) and issubclass(c, Event) and c.event
    ]


__all__ = [
    "SECTIONS",
    "VERSION",
    "Answered",
    "BlockSolved",
    "BudgetMeasured",
    "BudgetSpent",
    "CalibrationReply",
    "ClientReply",
    "CompressChecked",
    "CompressDone",
    "CompressStart",
    "CompressionListed",
    "DataChecked",
    "DeviceEvaluated",
    "DeviceShown",
    "DigestFound",
    "Diverging",
    "DoctorReport",
    "EvalDone",
    "Event",
    "ExportChecked",
    "ExportDone",
    "ExportPushed",
    "Failed",
    "FilesVerified",
    "FleetEvaluated",
    "FleetShown",
    "LedgerDifference",
    "LedgerShown",
    "LedgerVerified",
    "LedgerWritten",
    "Lengths",
    "MatrixSolved",
    "MeasureDone",
    "Measured",
    "Measures",
    "MethodListed",
    "ModelCached",
    "ModelListed",
    "ModelPruned",
    "ModelPulled",
    "ModelRemoved",
    "PatchApplied",
    "PatchMade",
    "PlanRow",
    "PlanSettings",
    "RateFound",
    "RecipeListed",
    "Recorded",
    "RoundDone",
    "RoundEvaluated",
    "RowShown",
    "RunListed",
    "RunRemoved",
    "Serving",
    "SettingListed",
    "StepDone",
    "Stopped",
    "SweepDone",
    "SweepListed",
    "SweepPlanned",
    "SweepRun",
    "SweepStart",
    "TaskScore",
    "TextShown",
    "ThreadsChosen",
    "TuneChecked",
    "TuneDone",
    "TuneStart",
    "Value",
    "as_dict",
    "classes",
    "evaluated",
    "round_evaluated",
]  # fmt: skip
