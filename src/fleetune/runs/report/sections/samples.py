# SPDX-License-Identifier: Apache-2.0
"""Show the model's answers to fixed prompts, before and after tuning."""

from __future__ import annotations

from collections.abc import Mapping

from fleetune.runs.report.page import counted, esc
from fleetune.runs.report.runlog import RunLog, list_of

SHOWN_SAMPLES = 8
NOTE = (
    "This page shows the text of {} of the clients, with the model's answers. Share it only with those who may read them; "
    "a run with --no-samples has none."
)


def samples(run: RunLog) -> str:
    """Return the prompts with their answers; those past the first eight are folded away."""
    samples = [s for s in list_of(run.final, "samples") if isinstance(s, dict)]
    drawn = [_sample(s, i + 1) for i, s in enumerate(samples)]
    shown, more = "".join(drawn[:SHOWN_SAMPLES]), "".join(drawn[SHOWN_SAMPLES:])
    rest = f"<details><summary>{len(drawn) - SHOWN_SAMPLES} more</summary>{more}</details>" if more else ""
    return shown + rest


def sharing(run: RunLog) -> str:
    """Return the note in the foot for who shares the page: how many held-out rows are on it; nothing for none."""
    count = len([s for s in list_of(run.final, "samples") if isinstance(s, dict)])
    return f"<footer>{esc(NOTE.format(counted(count, 'held-out row')))}</footer>" if count else ""


def _sample(sample: Mapping[str, object], number: int) -> str:
    owner = sample.get("client")
    title = f"Prompt {number}" + (f" · client {owner}" if owner not in (None, "") else "")
    parts = [
        f"<div><h4>{esc(label)}</h4><p>{esc(sample.get(key) or '(nothing)')}</p></div>"
        for key, label in (("base", "before"), ("tuned", "after"), ("reference", "reference"))
        if sample.get(key) is not None
    ]
    prompt = esc(sample.get("prompt") or "")
    return (
        f'<article class="sample"><h3>{esc(title)}</h3><p class="prompt">{prompt}</p>'
        f'<div class="answers">{"".join(parts)}</div></article>'
    )
