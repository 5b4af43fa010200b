# SPDX-License-Identifier: Apache-2.0
"""Say, beside the path of a report, that it shows text of people's rows."""

from __future__ import annotations

from pathlib import Path

from fleetune import report
from fleetune.cli.console import Ui
from fleetune.common.display import counted


def say_what_is_shared(ui: Ui, run: Path) -> None:
    """Note how many held-out rows a run's report shows the text of; nothing where it shows none."""
    if count := len(report.samples(run)):
        ui.note(
            f"the report shows the text of {counted(count, 'held-out row')}: share it only with those who may read them "
            "(a run with --no-samples keeps none)"
        )
