# SPDX-License-Identifier: Apache-2.0
"""Write the report page of one run into its folder."""

from __future__ import annotations

import shlex
from pathlib import Path

from fleetune.common.files import PRIVATE, write_atomic
from fleetune.runs.report import page, runlog
from fleetune.runs.report.page import esc, flat
from fleetune.runs.report.runlog import RunLog, kind_of, read
from fleetune.runs.report.sections import course, fleet, head, result, samples


def write(run: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    UsageError when the folder does not exist, StorageError when it cannot be written; an older report is
    then left as it was.
    """
    seen = read(run)
    target = run / "report.html"
    write_atomic(target, _report(seen).encode("utf-8", "replace"), mode=PRIVATE)  # it has held-out prompts
    return target


def _report(run: RunLog) -> str:
    steps, facts = runlog.steps(run), runlog.summarise(run)
    parts = [
        head.header(run, facts),
        page.section("result", "Result", result.result(run, steps, facts)),
        page.section("course", "Course", course.course(run, steps, facts)),
        page.section("fleet", "Fleet", fleet.partition(run) + fleet.replies(run)),
        page.section("samples", "Samples", samples.samples(run)),
        page.section("configuration", "Configuration", page.fact_list(flat(run.config), "config")),
        page.section("versions", "Versions", page.fact_list(flat(run.env), "config")),
        page.section("again", "Run it again", _rerun_section(run)),
    ]
    if run.skipped:
        parts.append(f"<footer>{run.skipped} damaged line(s) of metrics.jsonl left out.</footer>")
    return page.document(f"{run.name} - fleetune", "\n".join(parts))


def _rerun_section(run: RunLog) -> str:
    where = shlex.quote(run.shown_path)
    lines = [
        (f"fleetune tune -c {shlex.quote(run.shown_path + '/run.toml')}", "the same run, in a new folder")
    ]
    if kind_of(run.status) != "done":
        lines.insert(0, (f"fleetune tune --resume {where}", "go on where it stopped"))
    if (run.path / "ledger.safetensors").is_file():
        ledger = shlex.quote(run.shown_path + "/ledger.safetensors")
        lines.append((f"fleetune ledger verify {ledger}", "rebuild the tuned weights and check their digest"))
    lines.append((f"fleetune eval {where}", "measure the result again"))
    rows = "".join(f"<div><dt><code>{esc(line)}</code></dt><dd>{esc(why)}</dd></div>" for line, why in lines)
    return f'<dl class="commands">{rows}</dl>'
