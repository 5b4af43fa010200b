# SPDX-License-Identifier: Apache-2.0
"""Write the figures of a run as TensorBoard's event files, into `trackers/tensorboard` of its folder.

`tensorboard --logdir runs` shows all runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final

from fleetune.common.settings import Value
from fleetune.runs.trackers import Place

NEEDS: Final = "tensorboard"
ORDER: Final = 10


class Tracker:
    """One file of events per sitting; figures after the checkpoint of a resumed run are replaced."""

    def __init__(self, place: Place) -> None:
        board: Any = importlib.import_module("torch.utils.tensorboard")
        folder = place.own / "tensorboard"
        again = {"purge_step": place.next_round} if folder.is_dir() else {}
        self._writer = board.SummaryWriter(str(folder), **again)
        rows = [f"| {name} | {value} |" for name, value in place.facts.items()]
        self._writer.add_text("settings", "\n".join(["| option | value |", "|---|---|", *rows]))

    def log(self, values: Mapping[str, float], round: int) -> None:
        """Write one scalar per figure, with the round as its step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Value], status: str) -> None:
        """Write the summary as a text, and close the file."""
        rows = [f"| {name} | {value} |" for name, value in {"status": status, **summary}.items()]
        self._writer.add_text("summary", "\n".join(["| figure | value |", "|---|---|", *rows]))
        self._writer.close()
