"""The console: results on stdout, talk on stderr, no escape codes off a terminal, strict JSON on request."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from fleetune.cli.console import Ui, line_of
from fleetune.common.display import clean, human_bytes, message_text, one_line
from fleetune.common.events import RunRemoved
from fleetune.errors import FitError, Interrupted, RecipeError, UsageError

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(json: bool = False, quiet: int = 0) -> tuple[Ui, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Ui(quiet, json, out, err, Clock()), out, err


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Ui, Terminal, Terminal]]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "86")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def make(json: bool = False, clock: Clock | None = None) -> tuple[Ui, Terminal, Terminal]:
        out, err = Terminal(), Terminal()
        return Ui(0, json, out, err, clock or Clock()), out, err

    return make


def everything(ui: Ui) -> None:
    ui.header("fleetune tune", [("model", "smollm2-135m @ 9f2c"), ("run", "runs/0007 · seed 42")])
    ui.round_line(0, 2.914, rounds=2)
    with ui.bar("rounds") as bar:
        ui.event(RunRemoved(run="1"))
        bar.update(1, 2)
    ui.round_line(1, 2.861, sent=1200, received=16400, seconds=124, rounds=2, note="7 of 8 clients")
    ui.note("a remark")
    costs = [("bytes over the fleet", "2.8 MB", "(FedIT here: 2.9 GB)")]
    ui.final_table({"loss": 2.914, "rouge_l": 12.6}, {"loss": 2.377, "rouge_l": 24.9}, rows=200, costs=costs)
    ui.paths([("report", "runs/0007/report.html"), ("next", "fleetune chat runs/0007")])
    ui.table(["method", "rounds"], [["fedkseed", 20], ["mezo", 5]])
    ui.error(UsageError("no method named 'fedkseeed'", hint="fleetune methods"))


def test_off_a_terminal_there_is_no_escape_code_and_one_line_a_round():
    ui, out, err = plain()
    everything(ui)
    assert not {"\x1b", "\r"} & set(out.getvalue() + err.getvalue())
    lines = [line for line in err.getvalue().splitlines() if line.startswith("round ")]
    assert lines == [
        "round 0/2  val loss 2.914",
        "round 1/2  val loss 2.861  change -0.053  sent/client 1.2 kB  received/client 16.4 kB  time 2m04s"
        "  7 of 8 clients",
    ]
    assert "report    runs/0007/report.html\n" in out.getvalue()
    assert "round" not in out.getvalue().replace("rounds", "")
    assert " model   smollm2-135m @ 9f2c\n" in err.getvalue()


def test_on_a_terminal_there_is_a_panel_a_table_and_a_bar(terminal):
    ui, out, err = terminal()
    everything(ui)
    drawn = ESCAPE.sub("", err.getvalue())
    assert "\x1b[" in err.getvalue()
    assert "╭─ fleetune tune " in drawn
    assert " round   val loss    change   sent/client   received     time\n" in drawn
    assert "     1      2.861   ▼ 0.053        1.2 kB    16.4 kB    2m04s   7 of 8 clients\n" in drawn
    assert re.search(r" rounds [━╸╺]+ 1/2", drawn)
    assert drawn.count(" round   val loss") == 1
    assert "validation loss, 200 held-out rows    2.914    2.377  -18.4 %\n" in ESCAPE.sub("", out.getvalue())
    assert err.getvalue().count("\x1b[?25l") == err.getvalue().count("\x1b[?25h")  # the cursor comes back


def test_names_are_neither_markup_nor_escape_codes(terminal):
    ui, out, err = terminal()
    bad = "[red]m[/red]\x1b[2J\x07\u202e"
    ui.header(bad, [(bad, bad)])
    ui.note(bad)
    ui.round_line(1, 2.0, note=bad)
    ui.table([bad], [[bad]])
    ui.paths([(bad, bad)])
    with ui.bar(bad) as bar:
        bar.update(1, 2, note=bad)
    text = out.getvalue() + err.getvalue()
    assert not [bad for bad in ("\x1b[2J", "\x07", "\u202e") if bad in text]
    plain = ESCAPE.sub("", text)
    assert plain.count("[red]m[/red][2J") >= 6
    assert plain.count(r"[red]m[/red]\x1b[2J\x07\u202e") >= 2
    assert clean("a\tb\nc\x00\x9b") == "a\tb\nc"
    assert message_text("a\tb\n  c\x00\nd\u2028") == "a\tb\n  c\\x00\\nd\\u2028"
    marks = "\u061c\u200e\u200f"
    assert (clean(marks), message_text(marks), one_line(marks)) == ("", *[r"\u061c\u200e\u200f"] * 2)


def test_json_mode_puts_events_and_nothing_else_on_stdout():
    ui, out, err = plain(json=True)
    everything(ui)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["removed", "error"]
    assert all(e["v"] == 1 and next(iter(e)) == "v" for e in events)
    said = {"type": "UsageError", "message": "no method named 'fedkseeed'", "hint": "fleetune methods"}
    assert events[1] == {"v": 1, "event": "error", "exit_code": 2, **said}
    assert "remark" in err.getvalue()
    assert "report.html" not in err.getvalue()


def test_json_is_strict_whatever_the_numbers_are():
    event = {"event": "x", "a": float("nan"), "b": np.float32(0.5), "c": np.int64(7)}
    line = line_of(event | {"d": [float("inf"), "\n\ud800"], "e": {"f": True, "g": None, 3: (1, 2)}})
    assert "\n" not in line
    back = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert back["a"] is None
    assert (back["b"], back["c"], back["d"][0]) == (0.5, 7, None)
    assert back["e"] == {"f": True, "g": None, "3": [1, 2]}
    assert type(back["c"]) is int


def test_errors_say_what_failed_and_what_to_try():
    ui, out, err = plain(quiet=2)
    ui.error(UsageError("no method named 'fedkseeed'", hint="fleetune methods"))
    ui.error(RecipeError(["a is wrong", "b is wrong"]))
    ui.error(FitError("3.9 GB short"))
    assert out.getvalue() == ""
    assert err.getvalue() == (
        "error: no method named 'fedkseeed'\n  try: fleetune methods\n  see: fleetune help usageerror\n"
        "error: a is wrong\n  b is wrong\n  see: fleetune help recipeerror\n"
        "error: 3.9 GB short\n  see: fleetune help fiterror\n"
    )


def test_an_interrupt_is_no_error_but_says_how_to_resume():
    ui, _, err = plain()
    stop = Interrupted("stopped after round 7; nothing lost", hint="fleetune tune --resume runs/0007")
    ui.error(stop)
    said = "stopped after round 7; nothing lost\n  resume: fleetune tune --resume runs/0007\n"
    assert err.getvalue() == said
    ui, out, _ = plain(json=True)
    ui.error(stop)
    assert json.loads(out.getvalue())["event"] == "interrupted"
    assert json.loads(out.getvalue())["exit_code"] == 130


@pytest.mark.parametrize(("quiet", "on_out", "on_err"), [(1, True, False), (2, False, False)])
def test_quiet(quiet, on_out, on_err):
    ui, out, err = plain(quiet=quiet)
    everything(ui)
    assert bool(out.getvalue()) is on_out
    assert ("remark" in err.getvalue()) is on_err
    assert "error: " in err.getvalue()


def test_the_bar_knows_where_it_is_and_how_long_it_takes():
    clock = Clock()
    ui = Ui(0, False, io.StringIO(), io.StringIO(), clock)
    with ui.bar("rounds") as bar:
        bar.update(0, 20)
        assert bar.text == "0/20"
        clock.now += 240
        bar.update(2, 20)
        assert (bar.fraction, bar.text) == (pytest.approx(0.1), "2/20 · 36 min left")
        bar.relabel("of a run that is resumed")
        bar.update(18, 20)
        clock.now += 30
        bar.update(19, 20)
        assert re.fullmatch(r"19/20 · 3[01] s left", bar.text)
        bar.update(20, 20)
        assert bar.text == "20/20"
    with ui.bar("fetch", human_bytes) as bar:
        bar.update(135_000_000, 270_000_000, note="model.gguf")
        assert bar.text == "135 MB/270 MB · model.gguf"


def test_bars_end_when_the_work_fails(terminal):
    ui, _, err = terminal()
    with pytest.raises(KeyboardInterrupt), ui.bar("rounds"):
        raise KeyboardInterrupt
    assert err.getvalue().count("\x1b[?25l") == err.getvalue().count("\x1b[?25h") == 1
    with ui.bar("rounds") as bar:
        bar.update(1, 3)
    assert err.getvalue().count("\x1b[?25h") == 2


def test_tables_put_numbers_right_and_keep_rows_whole():
    ui, out, _ = plain()
    ui.table(["run", "rounds", "note"], [["0007-a", 3, "x" * 200], ["0008", 12, None]])
    lines = out.getvalue().splitlines()
    assert lines[0].rstrip() == " run      rounds   note"
    assert lines[2] == " 0007-a        3   " + "x" * 200
    assert lines[3] == " 0008         12"
    ui, out, _ = plain()
    ui.table(["method", "peak"], [["mezo", "1.4 GB"]], align="lr")
    assert out.getvalue().splitlines()[2] == " mezo     1.4 GB"
    ui.table(["run"], [])
    assert out.getvalue().splitlines()[-2:] == [" run", " ---"]


def test_a_terminal_without_unicode_is_not_an_error():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Ui(0, False, out, io.StringIO()).paths([("next", "a · b — 温 ┊ ┃ ± 2")])
    assert raw.getvalue() == b" next      a | b ? ? : | +- 2\n"


def test_a_narrow_terminal_drops_spare_columns_and_breaks_no_word(terminal, monkeypatch):
    columns, row = (
        ["model", "about", "licence", "source"],
        ["smollm2-135m", "small " * 9, "apache-2.0", "o/" * 11],
    )
    for width, left in ((86, []), (60, ["source"]), (40, ["licence", "source"]), (30, ["licence", "source"])):
        monkeypatch.setenv("COLUMNS", str(width))
        ui, out, _ = terminal()
        ui.table(columns, [row], spare=2)
        shown = out.getvalue()
        assert (f"a wider terminal shows: {', '.join(left)}" in shown) == bool(left)
        assert [word in shown for word in row[2:]] == [name not in left for name in columns[2:]]


SCRIPT = """
import sys
from fleetune.cli.console import Ui
from fleetune.common.events import RoundDone, RoundEvaluated, RunRemoved
ui = Ui(json={json})
sys.stdin.readline()
for i in range(3000):
    ui.event(RunRemoved(run=str(i)))
    ui.table(["a"], [["b" * 100]])
ui.note("still here")
"""


@pytest.mark.parametrize("json_mode", [False, True])
def test_a_closed_pipe_ends_the_output_not_the_work(json_mode):
    pipe = subprocess.PIPE
    script = SCRIPT.format(json=json_mode)
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as run:
        run.stdout.close()
        run.stdout = None
        _, err = run.communicate("go\n", timeout=60)
    assert run.returncode == 0
    assert err.endswith("still here\n")
    assert "Error" not in err
    assert "Traceback" not in err


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("json_mode", [False, True])
def test_a_full_disk_ends_the_output_not_the_work_and_is_said_once(json_mode):
    err = io.StringIO()
    ui = Ui(2, json_mode, Full(), err)
    for _ in range(3):
        ui.event(RunRemoved(run="1"))
        ui._say(ui._out, "a result")
    said = "stdout cannot be written (No space left on device); the work goes on without it\n"
    assert err.getvalue() == said
    assert ui.output_lost


@pytest.mark.skipif(os.name != "posix", reason="a shell closes it")
def test_a_closed_stdout_is_no_error():
    line = f'exec "{sys.executable}" -m fleetune methods >&-'
    run = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_final_table_counts_the_answers_and_ends_with_remarks(capsys):
    base, tuned = {"loss": 2.0, "rouge_l": 1.0}, {"loss": 1.0, "rouge_l": 2.0}
    Ui().final_table(base, tuned, rows=200, answered=20, remarks=["so"])
    lines = capsys.readouterr().out.splitlines()
    assert "validation loss, 200 held-out rows" in lines[2]
    assert "Rouge-L, 20 held-out rows" in lines[3]
    assert lines[4] == " note: so"


def test_a_log_has_the_time_at_each_line_off_a_terminal_and_not_in_the_journal(terminal, monkeypatch):
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    ui, out, err = plain()
    ui.note("before")
    ui.log()
    everything(ui)
    lines = err.getvalue().splitlines()
    assert lines[0] == "before"
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines[1:])
    assert not re.match(r"\d{4}-", out.getvalue())
    ui.log(results=True)
    at = out.tell()
    ui.paths([("digest", "0f"), ("next", "fleetune runs")])
    assert all(re.match(r"\d{4}-", line) for line in out.getvalue()[at:].splitlines())
    events, stream, _ = plain(json=True)
    events.log(results=True)
    events.event(RunRemoved(run="1"))
    assert stream.getvalue().startswith('{"v"')
    shown, _, screen = terminal()
    shown.log(results=True)
    shown.note("here")
    assert not re.match(r"\d{4}-", screen.getvalue())
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    ui, _, err = plain()
    ui.log()
    ui.note("kept by the journal")
    assert err.getvalue() == "kept by the journal\n"


def test_a_qr_code_is_drawn_where_it_fits(terminal):
    ui, out, err = terminal()
    ui.code("█▀\n▄▄\n")
    assert "█▀" in out.getvalue()
    ui.code("█" * 200 + "\n")
    assert "terminal of 200 columns" in err.getvalue()
    ui, plain_out, _ = plain()
    ui.code("█▀\n▄▄\n")
    assert plain_out.getvalue() == ""
