# SPDX-License-Identifier: Apache-2.0
"""The bars of the console: how far a run or a count is, and the time left by the pace so far.

A bar draws on a rich console, if it has one; what it says is kept up to date without one too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fleetune.common.display import clean, human_time

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Live:
    """A transient bar on a terminal with a fraction and a text; nothing is drawn without a console."""

    def __init__(
        self,
        label: str,
        console: Console | None,
        clock: Callable[[], float],
        say: Callable[[str], None] | None = None,
    ) -> None:
        """`say` is given the text at every move, where there is no console to draw on."""
        self.label, self.console, self.clock, self.say = clean(label), console, clock, say
        self.fraction, self.text = 0.0, ""
        self.began: tuple[float, float] | None = None
        self.bar: Progress | None = None

    def start(self) -> None:
        if self.console is None:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn(" {task.description}", markup=False), BarColumn(bar_width=30))
        detail = TextColumn("{task.fields[text]}", markup=False)
        self.bar = Progress(
            *columns, detail, console=self.console, transient=True, refresh_per_second=4, expand=False
        )
        task = self.bar.add_task(self.label, total=1.0, text=self.text)
        self.bar.update(task, completed=self.fraction)
        self.bar.start()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def relabel(self, label: str) -> None:
        """Begin another count under another name."""
        self.label, self.began = clean(label), None
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], description=self.label)

    def set(self, fraction: float, parts: Sequence[str]) -> None:
        """Move the bar and say `parts` and the time left, reckoned from the pace since the first call."""
        self.fraction = min(max(fraction, 0.0), 1.0)
        now = self.clock()
        if self.began is None:
            self.began = (now, self.fraction)
        left = _left(now - self.began[0], self.fraction - self.began[1], 1.0 - self.fraction)
        self.text = " · ".join([clean(part) for part in parts if part] + ([left] if left else []))
        if self.say is not None:
            self.say(f"{self.label} {self.text}")
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.fraction, text=self.text)


def _left(elapsed: float, done: float, ahead: float) -> str:
    if done <= 0 or elapsed <= 0 or ahead <= 0:
        return ""
    seconds = elapsed * ahead / done
    if seconds < 59.5:
        return f"{math.ceil(seconds)} s left"
    minutes = round(seconds / 60)
    return f"{minutes} min left" if minutes < 60 else f"{human_time(seconds)} left"


class RoundBar:
    """Progress of a run: `round` counts finished rounds, `client` is the one at work (from 1), `step` its
    finished steps.  `text` is what the bar says; it is kept up to date off a terminal too."""

    def __init__(self, live: Live, rounds: int, clients: int, steps: int) -> None:
        self.live, self.rounds, self.clients, self.steps = live, rounds, clients, steps
        self.round = self.client = self.step = 0

    @property
    def text(self) -> str:
        return self.live.text

    def update(
        self,
        *,
        round: int | None = None,
        client: int | None = None,
        step: int | None = None,
        clients: int | None = None,
        steps: int | None = None,
    ) -> None:
        """Change what is given; a new round resets client and step, a new client resets step."""
        self.clients = self.clients if clients is None else clients
        self.steps = self.steps if steps is None else steps
        if round is not None and round != self.round:
            self.round, self.client, self.step = round, 0, 0
        if client is not None and client != self.client:
            self.client, self.step = client, 0
        self.step = self.step if step is None else step
        within = min(self.step / self.steps, 1.0) if self.steps else 0.0
        inside = (max(self.client - 1, 0) + within) / self.clients if self.clients else 0.0
        parts = [f"{self.round}/{self.rounds}"]
        if self.client:
            parts.append(f"client {self.client}/{self.clients}")
            parts.append(f"step {self.step}/{self.steps}" if self.steps else "")
        self.live.set((self.round + min(inside, 1.0)) / self.rounds if self.rounds else 0.0, parts)


class CountBar:
    """Progress of a plain count: layers of a model, bytes of a download."""

    def __init__(self, live: Live, total: int, text: Callable[[float | None], str]) -> None:
        self.live, self.total, self.show = live, total, text

    @property
    def text(self) -> str:
        return self.live.text

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """`done` of `total` (where it changed), with a word on what is at work."""
        self.total = self.total if total is None else total
        parts = [f"{self.show(done)}/{self.show(self.total)}" if self.total else self.show(done), note]
        self.live.set(done / self.total if self.total else 0.0, parts)
