# SPDX-License-Identifier: Apache-2.0
"""List a run's options: first those that are not at their defaults, then the others."""

from __future__ import annotations

from fleetune.runs.report import page
from fleetune.runs.report.page import flat, short_name
from fleetune.runs.report.runlog import RunLog, list_of

PATHS = ("model", "data", "eval_data")  # options that may be paths: their last part is shown


def options(run: RunLog) -> list[tuple[str, str]]:
    """Return the options as text, without this machine's folders."""
    return [(k, short_name(v) if k in PATHS else v) for k, v in flat(run.config)]


def configuration(run: RunLog) -> str:
    """Return the options, those that differ from their defaults first where the run states which these are."""
    found = options(run)
    changed = {str(name) for name in list_of(run.start, "changed")}
    first = [(k, v) for k, v in found if k in changed]
    if not first:
        return page.fact_list(found, "config")
    rest = [(k, v) for k, v in found if k not in changed]
    return (
        f"<h3>Chosen for this run</h3>{page.fact_list(first, 'config chosen')}"
        f"<h3>Left at the default</h3>{page.fact_list(rest, 'config')}"
    )
