# SPDX-License-Identifier: Apache-2.0
"""What people type first, and what they are told: command line -> exit code, exact words.  No torch, no model."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fleetune
from fleetune.cli import main
from fleetune.cli import main as cli
from fleetune.cli.console import Ui
from fleetune.common import __version__
from fleetune.common.display import are, counted
from fleetune.common.shell import command, quoted
from fleetune.errors import RecipeError, UsageError

COMMANDS = sorted(cli.COMMANDS.members())
LIGHT = [  # these load neither torch nor transformers
    "",
    "--help",
    "--version",
    "methods",
    "models",
    "plan --help",
    "tune --help",
    "runs",
    "serve --help",
    "tune tiny nofile.jsonl",
    "tune tiny rows.jsonl --lr 1e-4",
    "compress tiny --bits 4",
    "tun",
]


@pytest.fixture(autouse=True)
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n' * 20)
    (tmp_path / "mezo.toml").write_text('model = "m"\ndata = "rows.jsonl"\nmethod = "mezo"\n')
    return tmp_path


def call(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(list(words))
        except SystemExit as end:  # --help, --version
            code = int(str(end.code or 0))
    return code, out.getvalue(), err.getvalue()


TOLD = {  # command line: (exit code, words on stdout or stderr)
    "": (0, "measure a model, a finished run or a compressed one"),
    "--help": (0, "fleetune tune --resume latest"),
    "tune --help": (0, "--partition STR"),
    "--version": (0, f"fleetune {__version__}\n"),
    "tun": (2, "COMMAND tun is none of demo, plan, data, tune"),
    "tunes": (2, "Did you mean 'tune'?"),
    "tune m rows.jsonl --lr 1e-4": (2, "unknown argument '--lr'"),
    "tune m rows.jsonl --lr=1e-4": (2, "fleetune tune --help; a setting of the method: --set NAME=VALUE"),
    "tune m rows.jsonl --set lr 1e-4": (2, "unknown argument '1e-4'"),
    "tune m rows.jsonl more.jsonl": (2, "unknown argument 'more.jsonl'"),
    "tune m rows.jsonl --round 1": (2, "unknown argument '--round'. Did you mean '--rounds'?"),
    "runs --forc": (2, "unknown argument '--forc'. Did you mean '--force'?\n  try: fleetune runs --help\n"),
    "tune m rows.jsonl --zzz --yyy": (2, "unknown argument '--zzz'.\n  unknown argument '--yyy'."),
    "eval m --limit 1,000": (2, "--limit: invalid int value: '1,000'"),
    "tune m rows.jsonl --dtype bfloat16": (
        2,
        "--dtype bfloat16 is none of fp32, bf16, fp16. Did you mean 'bf16'?",
    ),
    "tune m rows.jsonl --rounds 0": (2, "error: rounds = 0: must be at least 1\n"),
    "tune m rows.jsonl --rounds many": (2, "rounds = 'many': must be a valid integer"),
    "tune m rows.jsonl --partition dirichlet:0.5": (2, "it is written dirichlet:ALPHA:COLUMN"),
    "tune m nofile.jsonl": (2, "no file nofile.jsonl"),
    "tune m rowz.jsonl": (2, "did you mean rows.jsonl?"),
    "plan": (2, "the following arguments are required: MODEL\n  try: fleetune plan --help"),
    "plan m --batch": (2, "--batch: expected one argument"),
    "runs shw": (2, "ACTION shw is none of list, show, compare, rm. Did you mean 'show'?"),
    "ledger verfy x": (2, "Did you mean 'verify'?"),
    "chat m why not": (2, "unknown argument 'why'.\n  unknown argument 'not'."),
    "models rm nosuch": (2, "no model named 'nosuch' is in the cache"),
    "models list x": (2, "fleetune models pull x"),
    "eval 0009-mezo-m": (2, "no run '0009-mezo-m' in runs"),
    "eval latest --out 'my runs'": (2, "runs there are: fleetune runs --out 'my runs'"),
}


@pytest.mark.parametrize("line", TOLD)
def test_what_is_typed_is_answered(line: str) -> None:
    code, out, err = call(*shlex.split(line))
    want, words = TOLD[line]
    assert code == want, err
    assert words in (out if want == 0 else err)
    assert (err if want == 0 else out) == ""
    assert "usage:" not in err


@pytest.mark.parametrize("line", ["tun", "plan", "plan m --batch x", "tune m rows.jsonl --set lr 1"])
def test_errors_of_the_command_line_are_events_too(line: str) -> None:
    code, out, err = call(*line.split(), "--json")
    (event,) = [json.loads(text) for text in out.splitlines()]
    assert (code, err) == (2, "")
    assert (event["event"], event["exit_code"]) == ("error", 2)


def interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["parse", "chosen_kernels", "_set_environment"])
def test_ctrl_c_before_a_command_begins_is_no_traceback(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"fleetune.cli.main.{where}", interrupted)
    assert call("methods") == (130, "", "stopped\n")


def test_ctrl_c_before_a_command_begins_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "parse", interrupted)
    code, out, err = call("methods", "--json")
    assert (code, err) == (130, "")
    assert json.loads(out)["event"] == "interrupted"


PROJECT = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
SCRIPT = "import sys; from {} import {} as run; sys.exit(run())".format(
    *PROJECT["scripts"]["fleetune"].split(":")
)  # as pip writes it


@pytest.mark.parametrize("started", [["-m", "fleetune"], ["-c", SCRIPT]], ids=["module", "script"])
def test_ctrl_c_while_the_program_is_loaded_is_no_traceback(started: list[str], at: Path) -> None:
    (at / "sitecustomize.py").write_text(
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fleetune.cli.main':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
    )
    there = os.pathsep.join([str(at), str(Path(fleetune.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, *started, "methods"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": there},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_parses(name: str) -> None:
    page = call(name, "--help")[1]
    lines = page.partition("\nexamples:\n")[2].splitlines()
    typed = [line.strip().partition("   ")[0] for line in lines]
    typed = [
        part.split(" >")[0] for line in typed for part in line.split(" | ") if part.startswith("fleetune ")
    ]
    assert typed
    options = main.command_parsers()[name]
    for line in typed:
        words = shlex.split(line)
        assert words[1] == name
        assert options.parse_known_args(words[2:])[1] == [], line


@pytest.mark.parametrize("name", ["fleet", "ledger", "runs"])
def test_every_verb_is_explained(name: str) -> None:
    page = call(name, "--help")[1]
    (action,) = [a for a in main.command_parsers()[name]._actions if a.dest == "action"]
    for verb in action.choices or ():
        assert any(line.strip().startswith(f"{verb} ") for line in page.splitlines()), verb


def test_light_commands_load_no_torch(at: Path) -> None:
    lines = [line.replace("tiny", str(at)) for line in LIGHT]
    script = (
        "import sys, json, contextlib, io\nfrom fleetune.cli.main import main\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        try: main(line.split())\n"
        "        except SystemExit: pass\n"
        "    heavy = {'torch', 'transformers', 'peft', 'numba'} & set(sys.modules)\n"
        "    assert not heavy, (line, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, json.dumps(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_first_slow_import_is_announced_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(cli, "SLOW", ("wave",))
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal, cli.announcing(Ui(stderr=terminal)):
        __import__("wave")
        said = os.read(leader, 1000).decode()
        assert cli.LOADING in said
        monkeypatch.delitem(sys.modules, "wave")
        __import__("wave")  # once
        terminal.write("end")
        terminal.flush()
        assert cli.LOADING not in os.read(leader, 1000).decode()
    os.close(leader)
    assert not [finder for finder in sys.meta_path if isinstance(finder, cli._Watch)]


def test_off_a_terminal_nothing_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "SLOW", ("wave",))
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    err = io.StringIO()
    with cli.announcing(Ui(stderr=err)):
        __import__("wave")
    assert err.getvalue() == ""


def test_off_a_terminal_a_line_comes_every_half_minute() -> None:
    now, err = [0.0], io.StringIO()
    with Ui(stderr=err, clock=lambda: now[0]).progress(2, 4, 100) as bar:
        for step in range(100):
            now[0] = step * 1.0
            bar.update(client=1, step=step)
    lines = err.getvalue().splitlines()
    assert len(lines) == 3
    assert [line.partition(" · step")[0] for line in lines] == ["rounds 0/2 · client 1/4"] * 3
    assert lines[0] == "rounds 0/2 · client 1/4 · step 30/100 · 13 min left"


def test_what_is_said_anyway_counts_as_a_word() -> None:
    now, err = [0.0], io.StringIO()
    ui = Ui(stderr=err, clock=lambda: now[0])
    with ui.progress(10, 1, 10) as bar:
        for step in range(10):
            now[0] += 20.0
            bar.update(client=1, step=step)
            ui.note("something else")
    assert set(err.getvalue().splitlines()) == {"something else"}


@pytest.mark.parametrize("mode", [{"json": True}, {"quiet": 1}])
def test_no_line_comes_where_less_is_wanted(mode: dict[str, int]) -> None:
    now, err = [0.0], io.StringIO()
    with Ui(stderr=err, stdout=io.StringIO(), clock=lambda: now[0], **mode).count("rows", 9) as bar:
        now[0] = 99.0
        bar.update(3)
    assert err.getvalue() == ""


def test_a_command_can_be_pasted() -> None:
    words = ["eval", "out dir/it's", "$HOME", "a;b", "plain/0001-x"]
    assert shlex.split(command(*words)) == ["fleetune", *words]
    assert command("eval", "plain/0001-x") == "fleetune eval plain/0001-x"
    assert quoted(Path("a b")) == "'a b'"


def test_no_help_ends_in_an_empty_default() -> None:
    assert [name for name in COMMANDS if "(default )" in " ".join(call(name, "--help")[1].split())] == []


def test_a_refused_reply_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from fleetune.cli.commands import tune

    log = logging.getLogger("fleetune.tuning.rounds.replies")
    with tune._said_once(Ui(stderr=io.StringIO())):  # which shows it
        log.warning("refused")
    assert caplog.messages == []
    with tune._said_once(Ui(quiet=1, stderr=io.StringIO())):  # which does not
        log.warning("refused")
    log.warning("later")
    assert caplog.messages == ["refused", "later"]


def test_numbers_have_their_nouns() -> None:
    assert [counted(n, "round") for n in (0, 1, 2, 1200)] == [
        "0 rounds",
        "1 round",
        "2 rounds",
        "1,200 rounds",
    ]
    assert (are(1, "tensor"), are(5, "tensor")) == ("1 tensor is", "5 tensors are")


def test_an_export_says_what_was_rounded_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    from fleetune.cli.commands import export
    from fleetune.common.events import ExportDone
    from fleetune.deploy.export import ExportResult

    for exact, words in (
        (11, "36 rounded as asked, 11 exact, 0 wrong"),
        (47, "47 of 47 tensors hold the source's"),
    ):
        done = ExportDone(to="gguf:q8_0", path="a b.gguf", tensors=47, exact=exact, types={"Q8_0": 47})
        export.show(Ui(), ExportResult(Path("a b.gguf"), done))
        assert words in capsys.readouterr().out


def test_an_error_names_the_run_and_not_the_folder_on_the_way() -> None:
    from fleetune.errors import called

    scratch, run = Path("runs/.export-x/0001-a"), Path("runs/0001-a")
    with pytest.raises(UsageError) as caught, called(scratch, run):
        raise UsageError(f"{scratch} holds plain weights", hint=f"not {scratch}")
    assert (str(caught.value), caught.value.message) == ("runs/0001-a holds plain weights",) * 2
    assert caught.value.hint == "not runs/0001-a"


@pytest.mark.parametrize("options", [{"lr": 1e-4}, {"K": 512}])
def test_a_setting_as_an_option_of_the_python_api_is_answered(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(
        RecipeError, match=f"unknown option '{name}'. It is a setting of the methods .*: settings="
    ) as caught:
        fleetune.tune("m", "rows.jsonl", **options)  # type: ignore[arg-type]
    assert f"settings={{'{name}': {options[name]!r}}}" in str(caught.value)


def test_latest_is_looked_for_where_the_runs_are(at: Path) -> None:
    with pytest.raises(UsageError, match="no run 'latest' in runs"):
        fleetune.open("latest")
    (at / "runs" / "0001-mezo-m").mkdir(parents=True)
    (at / "runs" / "0001-mezo-m" / "run.toml").write_text("")
    assert fleetune.open("latest").folder == Path("runs/0001-mezo-m")  # type: ignore[union-attr]


def test_a_command_ends_without_looking_for_cycles() -> None:
    """With torch loaded that takes a second; a handler that was registered before the command's runs after it."""
    script = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"
        "from fleetune.cli.main import main\n"
        "main(['methods']) if sys.argv[1:] == ['inside'] else main()"
    )
    for words, frozen in ((["methods"], "True"), (["inside"], "False")):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == frozen
