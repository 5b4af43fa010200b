"""Write to the terminal: headers, tables, remarks, bars, errors and JSON lines; no other module does.

Results go to stdout, progress and remarks to stderr; off a terminal (a pipe, `NO_COLOR`, `TERM=dumb`) there are no bars and no
escape codes.  In JSON mode stdout carries one object a line, each with `"v": 1`, and nothing else.  Names and messages may come
from strangers' models and data: control characters are taken out of every text, and no text is read as markup.  rich is imported
when something is first drawn: `fleetune --help` must answer at once.

A job is shown, and gets Ctrl-C: the first stops it where it can resume, the second at once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import UnsupportedOperation
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Final, TextIO, cast

from fleetune.common import display
from fleetune.common.display import clean, counted, improved, is_noise, message_text, metric, one_line, show
from fleetune.common.events import VERSION, Event, Failed, Stopped, as_dict
from fleetune.common.files import finite
from fleetune.errors import FleetuneError, Interrupted
from fleetune.runs.listener import TIME

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

SOON, SILENCE = 4.0, 30.0  # seconds without a word off a terminal: before something new is named, and after
STOPS = (signal.SIGINT, signal.SIGTERM)
BEAT: Final = 1.0  # seconds between two looks whether it is time for a word
_PLAIN: Final = str.maketrans(
    {"▼": "v", "▲": "^", "─": "-", "·": "|", "…": "~", "−": "-", "┊": ":", "┃": "|", "±": "+-"}
)


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
        self.fancy = raw is not None and raw.isatty() and not plain  # whether bars and colours may be drawn
        self.timed = False  # whether each line begins with the time, off a terminal

    def write(self, text: str) -> int:
        """Write and flush a text; return its length, also where nobody reads it."""
        if self.ended or self.raw is None:
            return len(text)
        if self.timed and not self.fancy:
            now = time.strftime(TIME)
            text = "".join(f"{now} {line}" for line in text.splitlines(keepends=True))
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            text = text.translate(_PLAIN).encode(self.encoding, "replace").decode(self.encoding)
        try:
            self.raw.write(text)
            self.raw.flush()
        except OSError as error:
            self.ended = True
            with suppress(OSError, ValueError):  # what is buffered would raise again when the process exits
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.raw.fileno())
                os.close(null)
            if not isinstance(error, BrokenPipeError):
                self.lost(error)
        return len(text)

    def flush(self) -> None:
        """Nothing to do: every write is flushed."""

    def isatty(self) -> bool:
        """Tell rich whether colours and a live bar may be drawn."""
        return self.fancy

    def fileno(self) -> int:
        """Return the descriptor; UnsupportedOperation where the process was started without the stream."""
        if self.raw is None:
            raise UnsupportedOperation("the process has no such stream")
        return self.raw.fileno()


class Bar:
    """A transient bar on a terminal with a fraction and a text; without a console the text is kept up to date alone."""

    def __init__(
        self,
        label: str,
        console: Console | None,
        clock: Callable[[], float],
        say: Callable[[str, str], None] | None = None,
        number: Callable[[float | None], str] = display.human_count,
    ) -> None:
        """`say` is given the text now and then, where there is no console to draw on; `number` writes counts."""
        self.label, self.console, self.clock, self.say = clean(label), console, clock, say
        self.number = number
        self.fraction, self.text = 0.0, ""
        self.began: tuple[float, float] | None = None
        self.drawn: Progress | None = None
        self.over = threading.Event()

    def start(self) -> None:
        """Draw the bar."""
        if self.say is not None:
            threading.Thread(target=self._beat, daemon=True).start()
        if self.console is None:
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.drawn = Progress(
            SpinnerColumn("line"),
            TextColumn(" {task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        task = self.drawn.add_task(self.label, total=1.0, text=self.text)
        self.drawn.update(task, completed=self.fraction)
        self.drawn.start()

    def stop(self) -> None:
        """Take the bar away."""
        self.over.set()
        if self.drawn is not None:
            self.drawn.stop()
            self.drawn = None

    def _beat(self) -> None:
        """Name what is at work although nothing is counted."""
        while not self.over.wait(BEAT):
            assert self.say is not None
            self.say(self.label, self.text)

    def relabel(self, label: str, text: str = "") -> None:
        """Begin another count under another name."""
        self.label, self.began, self.fraction, self.text = clean(label), None, 0.0, text
        if self.drawn is not None:
            self.drawn.update(self.drawn.task_ids[0], description=self.label, completed=0.0, text=text)

    def show(self, what: str, done: int, total: int = 0, note: str = "") -> None:
        """Show a count, which may be another than before."""
        if self.label != clean(what):
            self.relabel(what)
        self.update(done, total, note)

    def update(self, done: int, total: int = 0, note: str = "") -> None:
        """Show a plain count, `done` of `total` where that is known, with a word on what is at work."""
        counts = f"{self.number(done)}/{self.number(total)}" if total else self.number(done) if done else ""
        self.set(done / total if total else 0.0, [counts, note])

    def set(self, fraction: float, parts: Sequence[str]) -> None:
        """Move the bar and say `parts` and the time left, reckoned from the pace since the first call."""
        self.fraction, now = min(max(fraction, 0.0), 1.0), self.clock()
        self.began = self.began or (now, self.fraction)
        left = _left(now - self.began[0], self.fraction - self.began[1], 1.0 - self.fraction)
        self.text = " · ".join(clean(part) for part in (*parts, left) if part)
        if self.say is not None:
            self.say(self.label, self.text)
        if self.drawn is not None:
            self.drawn.update(self.drawn.task_ids[0], completed=self.fraction, text=self.text)


def _left(elapsed: float, done: float, ahead: float) -> str:
    if done <= 0 or elapsed <= 0 or ahead <= 0:
        return ""
    seconds = elapsed * ahead / done
    if seconds < 59.5:
        return f"{math.ceil(seconds)} s left"
    minutes = round(seconds / 60)
    return f"{minutes} min left" if minutes < 60 else f"{display.human_time(seconds)} left"


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
        self._bar: Bar | None = None
        self._before: float | None = None
        self._headed = False
        self._spoke = clock()  # when a line was last written
        self._named = ""  # what was last said to be at work
        self._turn = threading.Lock()

    def _lose(self, error: OSError) -> None:
        self.output_lost = True
        why = error.strerror or str(error)
        self._say(self._err, f"stdout cannot be written ({why}); the work goes on without it", "bold red")

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
        aside = self._bar if stream is not self._err else None
        if aside is not None:
            aside.stop()
        self._console(stream).print(what, markup=False, soft_wrap=whole)
        if aside is not None:
            aside.start()

    def _say(self, stream: Stream, text: str, style: str = "") -> None:
        """Write one or more lines of plain text, with a style where the stream is a terminal; never wrapped."""
        text = clean(text)
        self._spoke = self.clock()
        if not stream.fancy:
            stream.write(text + "\n")
            return
        from rich.text import Text

        self._draw(stream, Text(text, style=style))

    @property
    def _results(self) -> bool:
        return self.quiet < 2 and not self.json

    # What is said

    def log(self, results: bool = False) -> None:
        """From now on, begin each line (on stdout for `results`) with the time, but on a terminal and in the journal."""
        self._err.timed = "JOURNAL_STREAM" not in os.environ
        self._out.timed = self._err.timed and results and not self.json
        for handler in logging.getLogger().handlers if self._err.timed and not self._err.fancy else ():
            if (own := handler.formatter) is not None and type(own).__module__.startswith("fleetune."):
                handler.setFormatter(type(own)("%(asctime)s %(levelname)s: %(message)s", TIME))

    def event(self, event: Event) -> None:
        """In JSON mode write one object on one line of stdout, with "v": 1; else nothing."""
        if self.json:
            self._out.write(line_of(as_dict(event)) + "\n")

    def note(self, text: str) -> None:
        """Show a remark on stderr, above a live bar if there is one."""
        if self.quiet < 1:
            self._say(self._err, message_text(text))

    def _still_at(self, label: str, text: str) -> None:
        """Say what is at work, and how far it is, where nothing was said for a while."""
        with self._turn:
            if self.clock() - self._spoke >= (SILENCE if label == self._named else SOON):
                self._named = label
                self.note(f"{label} {text}".rstrip())

    def text(self, piece: str) -> None:
        """Show a piece of a text that grows, on stdout, without an end of line."""
        if self._results:
            self._out.write(clean(piece))

    def document(self, text: str) -> None:
        """Show a page in Markdown on stdout: laid out on a terminal, as it is written off it."""
        if not (self._results and self._out.fancy):
            self.text(text)
            return
        from rich.markdown import Markdown

        self._draw(self._out, Markdown(clean(text)), whole=False)

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
        self._draw(self._err, Panel(grid, title=Text(title), title_align="left", width=width), whole=False)

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
        """Show one finished round (0 is the base model) on stderr.

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
        costs = [display.human_bytes(sent), display.human_bytes(received), display.human_time(seconds)]
        up, down, took = ("" if cost == "-" else cost for cost in costs)
        if self._err.fancy:
            if not self._headed:
                self._say(self._err, " round   val loss    change   sent/client   received     time", "dim")
                self._headed = True
            arrow = "" if change is None else f"{'▼▲'[change > 0] if change else '='} {abs(change):.3f}"
            line = f" {round:5d} {show('loss', loss):>10}{arrow:>10}{up:>14}{down:>11}{took:>9}   {note}"
            self._say(self._err, line.rstrip(), "green" if change and change < 0 else "")
            return
        of = f"/{rounds}" if rounds else ""
        parts = [f"round {round}{of}", f"val loss {show('loss', loss)}"]
        parts += [f"change {change:+.3f}"] if change is not None else []
        named = (("sent/client", up), ("received/client", down), ("time", took))
        parts += [f"{name} {cost}" for name, cost in named if cost]
        self._say(self._err, "  ".join([*parts, note] if note else parts))

    @contextmanager
    def bar(self, label: str, number: Callable[[float | None], str] = display.human_count) -> Iterator[Bar]:
        """Show a live bar on stderr while the block runs: how far it is, and the time left."""
        told = self.quiet < 1 and not self.json
        drawn = told and self._err.fancy and self._bar is None
        console = self._console(self._err) if drawn else None
        bar = Bar(
            label, console, self.clock, self._still_at if told and not self._err.fancy else None, number
        )
        self._bar = bar if drawn else self._bar
        bar.start()
        try:
            yield bar
        finally:
            bar.stop()
            self._bar = None if drawn else self._bar

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
        """Show base, tuned and change of every measure, then `costs` as (label, value, remark), then remarks, on stdout.

        `errors` are the standard errors of those changes where they are known.
        `rows` is the number of held-out rows behind the measures, `answered` those behind Rouge-L.
        """
        if not self._results:
            return
        lines: list[tuple[str, str, str, str, bool | None]] = []
        for name in [n for n in tuned if base.get(n) is not None or tuned[n] is not None]:
            count = answered if name == "rouge_l" else rows
            told = count and (not lines or name == "rouge_l")
            label = metric(name).label + (f", {counted(count, 'held-out row')}" if told else "")
            b, t, error = base.get(name), tuned[name], (errors or {}).get(name)
            diff = display.change(name, b, t, error) + (", noise" if is_noise(name, b, t, error) else "")
            lines.append((label, show(name, b), show(name, t), diff, improved(name, b, t, error)))
        wide = max([30, *(len(line[0]) for line in lines), *(len(label) for label, _, _ in costs)])
        room = max([9, *(len(line[3]) + 2 for line in lines)])
        self._say(self._out, f" {'':{wide}}{'base':>9}{'tuned':>9}{'change':>{room}}", "dim")
        self._say(self._out, " " + "─" * (wide + 18 + room), "dim")
        for label, b_text, t_text, diff, better in lines:
            style = "" if better is None else "green" if better else "yellow"
            self._say(self._out, f" {clean(label):{wide}}{b_text:>9}{t_text:>9}{diff:>{room}}", style)
        for label, value, remark in costs:
            self._say(self._out, f" {clean(label):{wide}}{clean(value):>18}   {clean(remark)}".rstrip())
        for text in remarks:
            self._say(self._out, f" note: {clean(text)}", "yellow")

    def paths(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show where things are and what to do next, on stdout: ("report", path), ("next", command), ...

        Lines are never wrapped, so that a path or command can be copied whole.
        """
        for label, text in rows if self._results else ():
            self._say(self._out, f" {clean(label):9} {message_text(text)}")

    def code(self, drawn: str) -> None:
        """Show a QR code on stdout, where that is a terminal wide enough for it."""
        wide = drawn.find("\n")
        if not (self._results and self._out.fancy) or wide < 1:
            return
        if self._console(self._out).width < wide:
            self.note(f"as a QR code it needs a terminal of {wide} columns")
        else:
            self._draw(self._out, drawn)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, align: str = "", spare: int = 0
    ) -> None:
        """Show a list on stdout.  `align` has an l or r for each column; without it columns of numbers go right.

        On a terminal long cells fold within their column, and the last `spare` columns are left out where they would not fit with
        whole words (of 24 letters) and three lines per cell; off it every row is one line.
        """
        if not self._results:
            return
        cells = [["" if cell is None else one_line(str(cell)) for cell in row] for row in rows]
        sides = align or "".join(_side([row[i] for row in rows]) for i in range(len(columns)))
        if self._out.fancy:
            from rich import box
            from rich.table import Table
            from rich.text import Text

            table = Table(box=box.SIMPLE_HEAD, header_style="dim", show_edge=False, pad_edge=True)
            room, shown = self._console(self._out).width, len(columns)
            least = [
                max(max(len(cell) // 3, *(min(len(word), 24) for word in cell.split()), 0) for cell in column)
                for column in zip(columns, *cells, strict=True)
            ]
            while shown > len(columns) - spare and sum(least[:shown]) + 3 * shown > room:
                shown -= 1
            for name, side in zip(columns[:shown], sides, strict=False):
                table.add_column(
                    Text(clean(name)), justify="left" if side == "l" else "right", overflow="fold"
                )
            for filled in cells:
                table.add_row(*map(Text, filled[:shown]))
            self._draw(self._out, table, whole=False)
            if shown < len(columns):
                self._say(self._out, f" a wider terminal shows: {', '.join(columns[shown:])}", "dim")
            return
        wide = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        marks = ["<" if side == "l" else ">" for side in sides]
        for row in [columns, ["-" * w for w in wide], *cells]:
            text = "   ".join(f"{cell:{m}{w}}" for cell, m, w in zip(row, marks, wide, strict=True))
            self._say(self._out, f" {text}".rstrip())

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
    """Return an event as one line of strict JSON; "v" comes first, numbers that are not finite become null."""
    return json.dumps({"v": VERSION, **finite(event)})


class InterruptHandler:
    """While a `with` block runs, Ctrl-C or SIGTERM sets `requested` and says so; a second one raises KeyboardInterrupt.

    So does the first one while `at_once` is set: as long as there is nothing to lose.
    """

    at_once = False

    def __init__(self, ui: Ui) -> None:
        self.ui = ui
        self.requested = False

    def __enter__(self) -> InterruptHandler:
        self.before = {number: signal.signal(number, self._request) for number in STOPS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested or self.at_once:
            raise KeyboardInterrupt
        self.requested = True
        again = "Ctrl-C" if signum == signal.SIGINT else "the signal"
        self.ui.note(f"stopping after this step ({again} again: at once)")


class ConsoleListener:
    """A `runs.listener.Listener` for jobs that count one thing at a time: blocks, steps, rows.

    From the first count on, Ctrl-C asks the job to stop where it can be resumed; before that, and where nothing `resumes`, it
    ends the command.
    """

    def __init__(self, ui: Ui, stack: ExitStack, *, resumes: bool, begins: str = "loading") -> None:
        self.resumes = resumes
        self.ui, self.stack, self.bars = ui, stack, stack.enter_context(ExitStack())
        self.interrupt: InterruptHandler | None = None
        self.what = begins
        self.bar: Bar | None = self.bars.enter_context(ui.bar(begins)) if begins else None
        self.last: Event | None = None

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show the panel over the job."""
        self.ui.header(title, rows)

    def event(self, event: Event) -> None:
        """Print the event in JSON mode, and keep it as the last."""
        self.last = event
        self.ui.event(event)

    def note(self, text: str) -> None:
        """Show a remark."""
        self.ui.note(text)

    def step(self, client: int, step: int) -> None:
        """Do nothing: these jobs have no rounds."""

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Move the bar of `what`; the bar of something else ends."""
        if self.resumes and self.interrupt is None:
            self.interrupt = self.stack.enter_context(InterruptHandler(self.ui))
        if self.bar is None or what != self.what:
            self.bars.close()
            self.what = what
            self.bar = self.bars.enter_context(self.ui.bar(what))
        self.bar.update(done, total, text)

    @property
    def stop_requested(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self.interrupt is not None and self.interrupt.requested


@contextmanager
def console_listener(ui: Ui, *, resumes: bool = True, begins: str = "loading") -> Iterator[ConsoleListener]:
    """A listener on `ui` for the time of the block; `resumes`: whether the job can be resumed where it is stopped.

    `begins` is what it does before something is counted, "" where a person is spoken with.
    """
    with ExitStack() as stack:
        yield ConsoleListener(ui, stack, resumes=resumes, begins=begins)
