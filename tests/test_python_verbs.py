"""The library in a notebook: lines while it works, sweeps, lists of runs, and answers."""

import ast
import io
import pickle
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import command_line
import fleetune
from fleetune.api import in_python
from fleetune.cli.main import main
from fleetune.common.events import ClientReply, RoundDone, SweepDone, SweepRun
from fleetune.models.net.model import Model
from fleetune.runs import listener
from heard import Heard

PYTHON = True  # errors speak as users of the library hear them
ROWS = [{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(12)]
FEW: dict[str, Any] = command_line.FEW | {"held_out": 2, "method": "mezo", "max_length": 32}


@pytest.fixture(scope="module")
def model(tiny: str) -> Model:
    return fleetune.open(tiny).load()


def tune(tiny: str, out: Path, **given: Any) -> fleetune.TuneResult:
    return fleetune.tune(tiny, ROWS, **{**FEW, "settings": {"tau": 1, "lr": 1e-4}, "out": out, **given})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_run_prints_on_a_terminal_and_nothing_into_a_pipe(tiny, tmp_path, monkeypatch):
    said: dict[str, str] = {}
    for name, stream in (("terminal", Terminal()), ("pipe", io.StringIO())):
        monkeypatch.setattr(sys, "stdout", stream)
        tune(tiny, tmp_path / name)
        said[name] = stream.getvalue()
    assert said["pipe"] == ""
    assert "\x1b" not in said["terminal"]
    lines = said["terminal"].splitlines()
    assert lines[0].startswith("fleetune tune · mezo")
    assert [line.split("  ")[0] for line in lines if line.startswith("round ")] == ["round 0/1", "round 1/1"]
    assert any(line.startswith("done  loss ") for line in lines)
    assert lines[-1].endswith("report.html")


def test_what_is_asked_for_decides(monkeypatch):
    own = fleetune.Silent()
    for stream, usual in ((Terminal(), listener.Progress), (io.StringIO(), fleetune.Silent)):
        monkeypatch.setattr(sys, "stdout", stream)
        assert type(listener.heard_by(None, None)) is usual
        assert type(listener.heard_by(None, True)) is listener.Progress
        assert type(listener.heard_by(None, False)) is fleetune.Silent
        assert listener.heard_by(own, None) is listener.heard_by(own, False) is own


def test_counts_are_printed_every_ten_seconds_and_names_are_made_safe():
    now, stream = [0.0], io.StringIO()
    shown = listener.Progress(stream, clock=lambda: now[0])
    for done in range(30):
        now[0] = float(done)
        shown.progress("blocks", done, 30)
    shown.note("a client\x1b[31m")
    assert stream.getvalue().splitlines() == ["blocks 10/30", "blocks 20/30", "a client\\x1b[31m"]


def test_a_sweep_stops_goes_on_and_is_the_commands_sweep(tiny, tmp_path, capsys, monkeypatch):
    stops = Heard(lambda heard: any(isinstance(event, SweepRun) for event in heard.events))
    given: dict[str, Any] = {**FEW, "settings": {"tau": 1, "lr": 1e-4}, "out": tmp_path}
    with pytest.raises(fleetune.errors.Interrupted) as stopped:
        fleetune.sweep(tiny, ROWS, vary={"lr": [1e-5, 1e-4]}, listener=stops, **given)
    assert "fleetune.resume_sweep(" in stopped.value.hint
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    done = fleetune.resume_sweep("latest", out=tmp_path)
    monkeypatch.undo()
    lines = [line for line in terminal.getvalue().splitlines() if line.startswith("000")]
    assert [line.endswith("done before") for line in lines] == [True, False]
    assert [run.folder.name[:4] for run in done.runs] == ["0001", "0002"]
    assert [cell["values"]["lr"] for cell in done.cells] == [1e-5, 1e-4]
    assert done.page.is_file()
    assert fleetune.list_runs(done.folder) == list(done.runs)
    assert main(["sweep", "--resume", str(done.folder), "--out", str(tmp_path), "--json"]) == 0
    assert capsys.readouterr().out.count('"skipped": true') == 2
    fleetune.resume_sweep(done, out=tmp_path, listener=(late := Heard()))
    assert isinstance(late.events[-1], SweepDone)


def test_finished_runs_are_listed_with_their_results(tiny, tmp_path):
    first, second = tune(tiny, tmp_path), tune(tiny, tmp_path, seed=7)
    (second.folder / "status").write_text("interrupted\n")
    found = fleetune.list_runs(tmp_path)
    assert [run.folder.name for run in found] == [first.folder.name]
    assert found[0].done.tuned == first.done.tuned
    assert fleetune.list_runs(tmp_path / "nowhere") == []


def test_a_model_answers_by_name_and_in_memory(tiny, model):
    asked: dict[str, Any] = {"max_tokens": 6, "system": "Be short."}
    answer = fleetune.generate(model, "hello", **asked)
    assert fleetune.generate(tiny, "hello", **asked) == answer
    drawn = {fleetune.generate(model, "hello", temperature=2.0, seed=s, max_tokens=6) for s in (1, 1, 2)}
    assert len(drawn) == 2


def test_a_notebook_gets_a_bar_for_each_count_until_it_is_full():
    bars = listener.Bars()
    bars.progress("blocks", 2, 3, "mlp")
    assert (bars._bars["blocks"].n, bars._bars["blocks"].total) == (2, 3)
    bars.progress("blocks", 3, 3)
    assert not bars._bars
    bars.progress("clients", 0, 4)
    reply = {"round": 1, "n": 9, "bytes_up": 1, "bytes_down": 1, "seconds": 0.1, "rss": 1}
    bars.event(ClientReply(client=0, loss=2.0, status="ok", reason="", **reply))
    assert bars._bars["clients"].n == 1
    bars.progress("rounds", 0, 3)
    costs = dict.fromkeys(("bytes_up", "bytes_down", "bytes_total", "rss"), 1)
    bars.event(RoundDone(round=1, clients=4, accepted=1, seconds=0.1, **costs))
    assert (bars._bars["rounds"].n, bars._bars["clients"].n) == (1, 0)
    bars.progress("rounds", 3, 3)
    bars.progress("finding lr", 5, 0)  # of how many, nobody knows
    assert bars._bars["finding lr"].total is None
    bars.progress("finding lr", 3, 3)
    assert set(bars._bars) == {"clients"}


HINTS = {
    "fleetune compress RUN --set grid=ggml --set bits=4": "fleetune.compress(RUN, settings={'grid': 'ggml', 'bits': 4})",
    "finish it: fleetune tune --resume 'my runs/0001-a'": "finish it: fleetune.resume_run('my runs/0001-a')",
    "free space, then: fleetune compress --resume runs/2   (nothing is lost)": "free space, then: fleetune.resume_compression('runs/2')   (nothing is lost)",
    "fleetune eval RUN rows.jsonl, or --text FILE": "fleetune.evaluate(RUN, 'rows.jsonl'), or text=FILE",
    "(fleetune export runs/1 --to gguf:f32)": "(fleetune.export('runs/1', to='gguf:f32'))",
    "--set lr=1e-4, fewer --eval-rows or --labels yes,no": "settings={'lr': 1e-4}, fewer eval_rows or labels='yes,no'",
    "fleetune measure latest --kept-gain": "fleetune.measure('latest', kept_gain=True)",
    "--reference MODEL: or leave out --fast": "reference=MODEL: or leave out fast",
    "all: fleetune tune --help; settings: fleetune methods NAME": "all: help(fleetune.Recipe); settings: help('fleetune.tuning.methods.NAME')",
    "is not what fleetune export --to gguf writes of it": "is not what fleetune.export(to='gguf') writes of it",
    "there are: optq (fleetune compress --list)": "there are: optq (fleetune.compressors())",
    "fleetune compress --list llm-pruner": "help('fleetune.compression.methods.llm_pruner')",
    "--fast takes one grid; limit steps with --set clip=..": "fast takes one grid; limit steps with settings={'clip': ..}",
    "--to gguf, or fleetune compress and --to hf": "to='gguf', or fleetune.compress() and to='hf'",
    "--rounds with --resume gives more; a --limit of the rows": "rounds with resume gives more; a limit of the rows",
    "leave out --set; fleetune runs   lists them": "leave out settings; fleetune.list_runs()   lists them",
}
AS_THEY_ARE = (
    *("fleetune tune -c runs/1/run.toml", "fleetune models pull tiny --base mapped", "name it: --from MODEL"),
    *("llama-gguf-split --merge A.gguf B.gguf", "runs/a--b/report.html", "fleetune fleet keys NAME --to DIR"),
)


BAD: dict[str, Callable[[str], object]] = {
    "a setting's value": lambda m: fleetune.tune(m, ROWS, settings={"lr": "fast"}),
    "a setting": lambda m: fleetune.tune(m, ROWS, settings={"rr": 4}),
    "a setting by the recipe's name": lambda m: fleetune.tune(m, ROWS, method="fedit", set={"rr": 4}),
    "settings that are none": lambda m: fleetune.tune(m, ROWS, set=["r=4"]),
    "an option": lambda m: fleetune.tune(m, ROWS, roundz=4),
    "a method": lambda m: fleetune.tune(m, ROWS, method="fedd"),
    "columns of no form": lambda m: fleetune.tune(m, [{"x": 1, "y": 2}] * 12),
    "no such column": lambda m: fleetune.tune(m, ROWS, columns={"prompt": "x"}),
    "clients": lambda m: fleetune.tune(m, ROWS, clients=500),
    "held out": lambda m: fleetune.tune(m, ROWS, held_out=100),
    "quorum": lambda m: fleetune.tune(m, ROWS, quorum=5, clients=2),
    "privacy": lambda m: fleetune.tune(m, ROWS, privacy="client"),
    "epsilon": lambda m: fleetune.tune(m, ROWS, epsilon=3),
    "stragglers": lambda m: fleetune.tune(m, ROWS, stragglers=0.5),
    "memory": lambda m: fleetune.tune(m, ROWS, ram="1kB"),
    "nothing varies": lambda m: fleetune.sweep(m, ROWS),
    "a seed varies": lambda m: fleetune.sweep(m, ROWS, vary={"seed": [3]}),
    "a compressor": lambda m: fleetune.compress(m, method="optqq"),
    "its setting": lambda m: fleetune.compress(m, method="optq", settings={"bitz": 3}),
    "bits": lambda m: fleetune.compress(m, bits=3),
    "bytes and bits": lambda m: fleetune.compress(m, bytes="1MB", bits=4),
    "bits and fast": lambda m: fleetune.compress(m, bits=4, fast=True),
    "calibrating clients": lambda m: fleetune.compress(m, clients=3),
    "a size": lambda m: fleetune.compress(m, bytes="1 zillion"),
    "pruned blocks": lambda m: fleetune.compress(m, method="llm-pruner"),
    "a target": lambda m: fleetune.export(m, to="gguff"),
    "a place": lambda m: fleetune.export(m, to="hf", path="."),
    "a gain": lambda m: fleetune.measure(m, kept_gain=True),
    "temperature": lambda m: fleetune.generate(m, "x", temperature=9.0),
    "a run": lambda m: fleetune.resume_run("9"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_traceback_names_no_options_of_the_command_line(case, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fleetune.errors.FleetuneError) as raised:
        BAD[case](tiny)
    told = "".join(traceback.format_exception_only(raised.value))
    assert not re.search(r"(?<!\w)--\w", told + str(raised.value.hint)), told
    assert "objects" not in told, "rows that were handed over lie in a file that nobody has named"
    for call in re.findall(r"(?:fleetune\.\w+|help)\([^()]*\)", told):
        ast.parse(call)


def test_a_remark_is_python_too(capsys):
    listener.Progress().note("lower the learning rate (--set lr=5e-05)")
    assert capsys.readouterr().out == "lower the learning rate (settings={'lr': 5e-05})\n"
    listener.Progress().header("fleetune measure", [("text", "none (--text FILE)")])
    assert "none (text=FILE)" in capsys.readouterr().out


def test_hints_are_python_where_python_has_a_counterpart(tiny, tmp_path):
    assert {hint: in_python(hint) for hint in HINTS} == HINTS
    assert [in_python(hint) for hint in AS_THEY_ARE] == [*AS_THEY_ARE]
    with pytest.raises(fleetune.errors.UsageError) as raised:
        fleetune.release(tiny, out=tmp_path)
    assert (raised.value.hint, raised.value.__notes__) == (hint := "fleetune.list_runs()", [f"try: {hint}"])
    with pytest.raises(fleetune.errors.FleetuneError) as raised:
        fleetune.open("latestt", out=tmp_path).load()
    assert traceback.format_exception(raised.value)[-1] == f"try: {raised.value.hint}\n"
    assert pickle.loads(pickle.dumps(fleetune.tune)) is fleetune.tune, "for a pool of processes"
