# SPDX-License-Identifier: Apache-2.0
"""Find out whether losses of runs compare: those of one base model on the same validation rows, cut in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fleetune.runs.report.runlog import RunLog, text_of

APART = "their losses do not compare directly"
ROWS = ("data", "eval_data", "limit", "held_out", "partition", "seed", "eval_rows", "max_length")
NO_MATTER = ("data", "limit", "held_out", "partition", "seed")  # where rows are given to validate on


def caveats(runs: Sequence[RunLog]) -> list[str]:
    """Say why the losses of these runs do not compare, in the words after "These runs"; [] where they do."""
    bases = [text_of("digest", run.start, run.config) or None for run in runs]
    found = ["have different base models"] if _differ(bases) else []
    names = _options(runs)
    stated = [text_of("held_out_digest", run.start) for run in runs]
    if _differ(stated) if all(stated) else bool(names):
        why = ", ".join(names) or "the data changed between them"
        found.append("have different data" if "data" in names else f"are measured on different rows ({why})")
    return found


def _options(runs: Sequence[RunLog]) -> list[str]:
    """List those options that decide the validation rows and are not the same in all runs."""
    given = all(text_of("eval_data", run.config) for run in runs)
    return [
        name for name in ROWS if not (given and name in NO_MATTER) and _differ(_value(r, name) for r in runs)
    ]


def _value(run: RunLog, name: str) -> str | None:
    """Return an option as text; None where the run does not state it."""
    if name not in run.config:
        return None
    value = str(run.config[name])
    if name == "partition":  # of it only the column decides, whose values all give their share
        return value.split(":")[-1] if ":" in value else ""
    return value


def _differ(values: Iterable[str | None]) -> bool:
    return len({*values} - {None}) > 1
