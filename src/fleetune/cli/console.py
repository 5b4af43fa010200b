# SPDX-License-Identifier: Apache-2.0
"""Write to the terminal: headers, tables, remarks, bars, errors and JSON lines; no other module does.

Results go to stdout, progress and everything said on the way to stderr.  On a terminal there is a header
panel, one line a round and a live bar with the time left; off a terminal (a pipe, `NO_COLOR`, `TERM=dumb`)
there are no bars and no escape codes, one line a round.  In JSON mode stdout carries one object a line, each
with `"v": 1`, and nothing else.  A reader that closes the pipe ends the output, not the work; so does a disk that takes no more,
which is said once on stderr and is exit code 1.

Names and messages may come from strangers' models and data: control characters are taken out of every text,
and no text is read as markup.  rich is imported when something is first drawn on a terminal, since
`fleetune --help` must answer at once.  A bar says how far a run or a count is, and the time left by the pace so far.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import UnsupportedOperation
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO, cast

from fleetune.common.display import (
    change,
    clean,
    human_bytes,
    human_count,
    human_time,
    improved,
    is_noise,
    message_text,
    metric,
    one_line,
    show,
)
from fleetune.common.events import VERSION, Event, Failed, Stopped, as_dict
from fleetune.errors import FleetuneError, Interrupted

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
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


SILENCE: Final = 30.0  # seconds without a word, off a terminal
_PLAIN: Final = str.maketrans({"▼": "v", "▲": "^", "─": "-", "·": "|", "…": "~", "−": "-"})


class Stream:
    """A text stream that outlives its reader and never fails on a character its encoding lacks.

    `raw` is None where the process was started without the stream.  `lost` is called once, when it cannot be written
    for another reason than that nobody reads it.
    """

    def __init__(self, raw: TextIO | None, lost: Callable[[OSError], None] = lambda error: None) -> None:
        self.raw, self.lost = raw, lost
        self.ended = raw is None
        self.encoding = (raw and raw.encoding) or "utf-8"
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.fancy = raw is not None and raw.isatty() and not plain

    def write(self, text: str) -> int:
        """Write and flush a text; return its length, also where nobody reads it."""
        if self.ended or self.raw is None:
            return len(text)
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            text = text.translate(_PLAIN).encode(self.encoding, "replace").decode(self.encoding)
        try:
            self.raw.write(text)
            self.raw.flush()
        except OSError as error:
            self._detach(self.raw)
            if not isinstance(error, BrokenPipeError):
                self.lost(error)
        return len(text)

    def flush(self) -> None:
        """Nothing to do: every write is flushed."""

    def isatty(self) -> bool:
        """Tell whether colours and a live bar may be drawn."""
        return self.fancy

    def fileno(self) -> int:
        """Return the descriptor; UnsupportedOperation where the process was started without the stream."""
        if self.raw is None:
            raise UnsupportedOperation("the process has no such stream")
        return self.raw.fileno()

    def _detach(self, raw: TextIO) -> None:
        # What is still buffered would raise again when the interpreter exits: let it go to the null device.
        self.ended = True
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, raw.fileno())
            os.close(null)


class Ui:
    """The console of one command.

    `quiet` 0 says all; 1 leaves out header, rounds, bars and notes; 2 also results: errors alone (and
    the events of JSON mode) remain.  Streams default to the process's own.
    """

    def __init__(
        self,
        quiet: int = 0,
        json: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet, self.json, self.clock = quiet, json, clock
        self.output_lost = False  # whether a part of the results could not be written
        self._out = Stream(sys.stdout if stdout is None else stdout, self._lose)
        self._err = Stream(sys.stderr if stderr is None else stderr)
        self._consoles: dict[bool, Console] = {}
        self._live: Live | None = None
        self._before: float | None = None
        self._headed = False
        self._spoke = clock()  # when a line was last written

    def _lose(self, error: OSError) -> None:
        self.output_lost = True
        why = error.strerror or str(error)
        self._say(self._err, f"stdout cannot be written ({why}); the work goes on without it", "bold red")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    # Where things go

    def _console(self, stream: Stream) -> Console:
        from rich.console import Console

        key = stream is self._out
        if key not in self._consoles:
            self._consoles[key] = Console(file=cast(TextIO, stream), force_terminal=True, highlight=False)
        return self._consoles[key]

    def _draw(self, stream: Stream, what: RenderableType, *, whole: bool = True) -> None:
        # The bar lives on stderr: it steps aside while stdout of the same terminal is written.  `whole`
        # lines are neither wrapped nor cut at the width of the terminal.
        aside = self._live if stream is not self._err else None
        if aside is not None:
            aside.stop()
        self._console(stream).print(what, markup=False, soft_wrap=whole)
        if aside is not None:
            aside.start()

    def _say(self, stream: Stream, text: str, style: str = "") -> None:
        """One or more lines of plain text, with a style where the stream is a terminal; never wrapped."""
        text = clean(text)
        self._spoke = self.clock()
        if not stream.fancy:
            stream.write(text + "\n")
            return
        from rich.text import Text

        self._draw(stream, Text(text, style=style))

    @property
    def on_terminal(self) -> bool:
        """Whether what is said on the way is read on a terminal."""
        return self._err.fancy

    @property
    def _results(self) -> Stream:
        return self._err if self.json else self._out

    # What is said

    def event(self, event: Event) -> None:
        """In JSON mode one object on one line of stdout, with "v": 1; else nothing."""
        if self.json:
            self._out.write(line_of(as_dict(event)) + "\n")

    def note(self, text: str) -> None:
        """A remark on stderr, above a live bar if there is one."""
        if self.quiet < 1:
            self._say(self._err, message_text(text))

    def _still_at(self, text: str) -> None:
        """Say how far it is, where nothing was said for SILENCE seconds."""
        if self.clock() - self._spoke >= SILENCE:
            self.note(text)

    def text(self, piece: str) -> None:
        """A piece of a text that grows, on stdout, without an end of line."""
        if self.quiet < 2:
            self._results.write(clean(piece))

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show what is about to run: a panel of label and value on stderr (plain lines off a terminal)."""
        if self.quiet >= 1:
            return
        title, rows = one_line(title), [(one_line(a), one_line(b)) for a, b in rows]
        wide = max((len(label) for label, _ in rows), default=0)
        if not self._err.fancy:
            self._err.write("".join([title + "\n"] + [f" {a:{wide}}   {b}\n" for a, b in rows]))
            return
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 3, 0, 0))
        grid.add_column(min_width=8, no_wrap=True)
        grid.add_column(overflow="fold")
        for label, value in rows:
            grid.add_row(Text(label, style="dim"), Text(value))
        width = min(self._console(self._err).width, 86)
        panel = Panel(grid, title=Text(title), title_align="left", width=width)
        self._draw(self._err, panel, whole=False)

    def round_line(
        self,
        round: int,
        loss: float | None,
        *,
        sent: float | None = None,
        received: float | None = None,
        seconds: float | None = None,
        rounds: int | None = None,
        change: float | None = None,
        note: str = "",
    ) -> None:
        """One finished round (0 is the base model) on stderr.

        `sent` and `received` are bytes per client, `change` the difference of the loss to the line before
        (taken from that line when it is not given), `note` a remark such as "9 of 10 clients".
        """
        if round == 0:
            self._before = None  # another run begins
        if change is None and loss is not None and self._before is not None:
            change = loss - self._before
        self._before = self._before if loss is None else loss
        if self.quiet >= 1:
            return
        if self._err.fancy:
            self._round_row(round, loss, change, (sent, received, seconds), note)
            return
        of = f"/{rounds}" if rounds else ""
        parts = [f"round {round}{of}", f"val loss {show('loss', loss)}"]
        parts += [f"change {change:+.3f}"] if change is not None else []
        parts += [f"sent/client {human_bytes(sent)}"] if sent is not None else []
        parts += [f"received/client {human_bytes(received)}"] if received is not None else []
        parts += [f"time {human_time(seconds)}"] if seconds is not None else []
        self._say(self._err, "  ".join([*parts, note] if note else parts))

    def _round_row(
        self,
        round: int,
        loss: float | None,
        change: float | None,
        costs: tuple[float | None, float | None, float | None],
        note: str,
    ) -> None:
        from rich.text import Text

        if not self._headed:
            self._say(self._err, " round   val loss    change   sent/client   received     time", "dim")
            self._headed = True
        sent, received, seconds = costs
        arrow = (
            "" if change is None else f"{'▼' if change < 0 else '▲' if change > 0 else '='} {abs(change):.3f}"
        )
        line = Text(f" {round:5d} {show('loss', loss):>10}")
        good = "green" if change is not None and change < 0 else "yellow"
        line.append(f"{arrow:>10}", style=good)
        blank = [human_bytes(v) if v is not None else "" for v in (sent, received)]
        line.append(f"{blank[0]:>14}{blank[1]:>11}{human_time(seconds) if seconds is not None else '':>9}")
        line.append(f"   {clean(note)}" if note else "", style="yellow")
        line.rstrip()
        self._draw(self._err, line)

    @contextmanager
    def progress(
        self, rounds: int, clients: int = 0, steps: int = 0, *, label: str = "rounds"
    ) -> Iterator[RoundBar]:
        """A live bar on stderr while the block runs: round, client, step, time left."""
        with self._bar(label) as live:
            yield RoundBar(live, rounds, clients, steps)

    @contextmanager
    def count(self, label: str, total: int, *, size: bool = False) -> Iterator[CountBar]:
        """A live bar for a plain count (`size`: of bytes) while the block runs."""
        with self._bar(label) as live:
            yield CountBar(live, total, human_bytes if size else human_count)

    @contextmanager
    def _bar(self, label: str) -> Iterator[Live]:
        shown = self._err.fancy and self.quiet < 1 and not self.json and self._live is None
        told = not self._err.fancy and self.quiet < 1 and not self.json
        live = Live(
            label, self._console(self._err) if shown else None, self.clock, self._still_at if told else None
        )
        self._live = live if shown else self._live
        live.start()
        try:
            yield live
        finally:
            live.stop()
            self._live = None if shown else self._live

    def final_table(
        self,
        base: Mapping[str, float | None],
        tuned: Mapping[str, float | None],
        *,
        rows: int | None = None,
        answered: int | None = None,
        costs: Sequence[tuple[str, str, str]] = (),
        remarks: Sequence[str] = (),
        errors: Mapping[str, float] | None = None,
    ) -> None:
        """Base, tuned and change of every measure, then `costs` as (label, value, remark), then remarks, on stdout.

        `errors` are the standard errors of those changes where they are known.
        `rows` is the number of held-out rows behind the measures, `answered` those behind Rouge-L.
        """
        if self.quiet >= 2:
            return
        lines: list[tuple[str, str, str, str, bool | None]] = []
        for name in [n for n in tuned if base.get(n) is not None or tuned[n] is not None]:
            count = answered if name == "rouge_l" else rows
            told = count and (not lines or name == "rouge_l")
            label = metric(name).label + (
                f", {count:,} held-out {'row' if count == 1 else 'rows'}" if told else ""
            )
            b, t, error = base.get(name), tuned[name], (errors or {}).get(name)
            better = improved(name, b, t, error)
            diff = change(name, b, t, error) + (", noise" if is_noise(name, b, t, error) else "")
            lines.append((label, show(name, b), show(name, t), diff, better))
        wide = max([30, *(len(line[0]) for line in lines), *(len(label) for label, _, _ in costs)])
        room = max([9, *(len(line[3]) + 2 for line in lines)])
        stream = self._results
        self._say(stream, f" {'':{wide}}{'base':>9}{'tuned':>9}{'change':>{room}}", "dim")
        self._say(stream, " " + "─" * (wide + 18 + room), "dim")
        for label, b_text, t_text, diff, better in lines:
            style = "" if better is None else "green" if better else "yellow"
            self._say(stream, f" {clean(label):{wide}}{b_text:>9}{t_text:>9}{diff:>{room}}", style)
        for label, value, remark in costs:
            self._say(stream, f" {clean(label):{wide}}{clean(value):>18}   {clean(remark)}".rstrip())
        for text in remarks:
            self._say(stream, f" note: {clean(text)}", "yellow")

    def paths(self, rows: Sequence[tuple[str, str]]) -> None:
        """Where things are and what to do next, on stdout: ("report", path), ("next", command), ...

        Lines are never wrapped, so that a path or command can be copied whole.
        """
        if self.quiet >= 2:
            return
        for label, text in rows:
            self._say(self._results, f" {clean(label):9} {message_text(text)}")

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        align: str = "",
        spare: Sequence[int] = (),
    ) -> None:
        """A list on stdout.  `align` has an l or r for each column; without it columns of numbers go right.

        On a terminal long cells fold within their column; off it every row is one line.  `spare` are the numbers of
        columns that are left out, one after the other, where a terminal is too narrow for the row.
        """
        if self.quiet >= 2:
            return
        cells = [["" if cell is None else one_line(str(cell)) for cell in row] for row in rows]
        sides = align or "".join(_side([row[i] for row in rows]) for i in range(len(columns)))
        if self._results.fancy:
            kept = self._fitting(columns, cells, spare)
            self._rich_table(
                [columns[i] for i in kept],
                [[row[i] for i in kept] for row in cells],
                [sides[i] for i in kept],
            )
            return
        wide = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        marks = ["<" if side == "l" else ">" for side in sides]
        for row in [columns, ["-" * w for w in wide], *cells]:
            text = "   ".join(f"{cell:{m}{w}}" for cell, m, w in zip(row, marks, wide, strict=True))
            self._say(self._results, f" {text}".rstrip())

    def _fitting(
        self, columns: Sequence[str], cells: Sequence[Sequence[str]], spare: Sequence[int]
    ) -> list[int]:
        """Return the columns that stay: all, or fewer where the terminal is too narrow."""
        wide = [max(map(len, column)) + 3 for column in zip(columns, *cells, strict=True)]
        kept, room = list(range(len(columns))), self._console(self._results).width
        for number in spare:
            if sum(wide[i] for i in kept) > room:
                kept.remove(number)
        return kept

    def _rich_table(
        self, columns: Sequence[str], cells: Sequence[Sequence[str]], sides: Sequence[str]
    ) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, header_style="dim", show_edge=False, pad_edge=True)
        for name, side in zip(columns, sides, strict=True):
            table.add_column(Text(clean(name)), justify="left" if side == "l" else "right", overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        self._draw(self._results, table, whole=False)

    def error(self, err: FleetuneError) -> None:
        """Print what failed and what to try on stderr; in JSON mode print an event with the exit code."""
        stopped = isinstance(err, Interrupted)
        if self.json:
            kind = Stopped if stopped else Failed
            self.event(
                kind(type=type(err).__name__, message=err.message, hint=err.hint, exit_code=err.exit_code)
            )
            return
        message = message_text(err.message)
        self._say(self._err, message if stopped else f"error: {message}", "" if stopped else "bold red")
        if err.hint:
            self._say(self._err, f"  {'resume' if stopped else 'try'}: {message_text(err.hint)}")
        if not stopped:
            self._say(self._err, f"  see: {err.page}", "dim")


def _side(column: Sequence[object]) -> str:
    filled = [cell for cell in column if cell not in (None, "")]
    return "r" if filled and all(isinstance(cell, int | float) for cell in filled) else "l"


def line_of(event: Mapping[str, object]) -> str:
    """An event as one line of strict JSON; "v" comes first, numbers that are not finite become null."""
    return json.dumps({"v": VERSION, **cast(dict[str, object], _strict(event))}, allow_nan=False)


def _strict(value: object) -> object:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(float(value)) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value)
