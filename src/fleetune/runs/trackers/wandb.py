# SPDX-License-Identifier: Apache-2.0
"""Send the figures of a run to Weights & Biases, or keep them in its offline folder.

WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and WANDB_API_KEY are followed; with `--offline` the mode is offline, and
`wandb sync` sends the folder later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from fleetune.common.settings import Value
from fleetune.runs.trackers import PROJECT, Place

NEEDS: Final = "wandb"
ORDER: Final = 20


class Tracker:
    """One run of wandb; a resumed run goes on in it."""

    def __init__(self, place: Place) -> None:
        import wandb

        known = place.recall("wandb")
        quiet = wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT, name=place.name, config=dict(place.facts),
            dir=str(place.own), id=known, resume="allow" if known else None,
            mode="offline" if place.offline else None, settings=quiet,
        )  # fmt: skip
        place.keep("wandb", str(self._run.id))
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def log(self, values: Mapping[str, float], round: int) -> None:
        """Log the figures, with the round as their axis."""
        self._run.log({"round": round, **values})

    def finish(self, summary: Mapping[str, Value], status: str) -> None:
        """Put the summary into the run, and end it."""
        self._run.summary.update({"status": status, **summary})
        self._run.finish(exit_code=int(status == "failed"))
