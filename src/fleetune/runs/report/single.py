# SPDX-License-Identifier: Apache-2.0
"""Write the report page of one run into its folder."""

from __future__ import annotations

import shlex
from pathlib import Path

from fleetune.common.display import counted
from fleetune.common.files import PRIVATE, write_atomic
from fleetune.runs.report import page, plots, runlog
from fleetune.runs.report.page import esc
from fleetune.runs.report.runlog import RunLog, kind_of, read
from fleetune.runs.report.sections import configuration, course, fleet, head, rate, result, samples


def write(run: Path) -> Path:
    """Write `report.html`, and its plots as files, into the run folder and return the page's path.

    UsageError when the folder does not exist, StorageError when it cannot be written; an older report is
    then left as it was.
    """
    seen = read(run)
    target = run / "report.html"
    html, tables = _report(seen), plots.numbers(seen)
    text = plots.linked(html, tables)
    write_atomic(target, text.encode("utf-8", "replace"), mode=PRIVATE)  # it has held-out prompts
    plots.write(run, html, tables)
    return target


def sections(run: RunLog) -> dict[str, str]:
    """Return the report's sections as HTML, by name and in order; "" for one that has nothing to show."""
    steps, facts = runlog.steps(run), runlog.summarise(run)
    lost = (
        f"<footer>{counted(run.skipped, 'damaged line')} of metrics.jsonl left out.</footer>"
        if run.skipped
        else ""
    )
    return {
        "head": head.header(run, facts),
        "result": page.section("result", "Result", result.result(run, steps, facts)),
        "course": page.section("course", "Training", course.course(run, steps, facts) + rate.rates(run)),
        "fleet": page.section("fleet", "Fleet", fleet.fleet(run)),
        "samples": page.section("samples", "Samples", samples.samples(run)),
        "configuration": page.section("configuration", "Configuration", configuration.configuration(run)),
        "versions": page.section("versions", "Versions", head.versions(run)),
        "again": page.section("again", "Run it again", _rerun_section(run)),
        "footer": lost,
        "sharing": samples.sharing(run),
    }  # fmt: skip


def _report(run: RunLog) -> str:
    return page.document(f"{run.name} - fleetune", "\n".join(filter(None, sections(run).values())))


def _rerun_section(run: RunLog) -> str:
    where = shlex.quote(run.shown_path)
    lines = [
        (f"fleetune tune -c {shlex.quote(run.shown_path + '/run.toml')}", "the same run, in a new folder")
    ]
    if kind_of(run.status) != "done":
        lines.insert(0, (run.resume, "go on where it stopped"))
    if (run.path / "ledger.safetensors").is_file():
        ledger = shlex.quote(run.shown_path + "/ledger.safetensors")
        lines.append((f"fleetune ledger verify {ledger}", "rebuild the tuned weights and check their digest"))
    lines.append((f"fleetune eval {where}", "measure the result again"))
    rows = "".join(f"<div><dt><code>{esc(line)}</code></dt><dd>{esc(why)}</dd></div>" for line, why in lines)
    return f'<dl class="commands">{rows}</dl>'
