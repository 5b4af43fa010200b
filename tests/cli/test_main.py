"""What people type first, and what they are told: command line -> exit code, exact words.  No torch, no model."""

import contextlib
import io
import json
import logging
import os
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import fleetune
from fleetune.cli import main
from fleetune.cli.console import Ui
from fleetune.common import __version__
from fleetune.errors import UsageError, called

COMMANDS = sorted(main.COMMANDS.members())
LIGHT = ["", *shlex.split("--help --version methods models recipes runs tun"), "plan --help", "tune --help"]
LIGHT += ["data check rows.jsonl", "export 3 --to nonsense", "export 3 --to gguf --path rows.jsonl"]


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
            code = main.main(list(words))
        except SystemExit as end:  # --help, --version
            code = int(str(end.code or 0))
    return code, out.getvalue(), err.getvalue()


TOLD = {  # command line: exit code, words on stdout or stderr
    "": (0, "measure a model, a finished run or a compressed one"),
    "--help": (0, "fleetune tune --resume latest"),
    "tune --help": (0, "--partition STR"),
    "--version": (0, f"fleetune {__version__}\n"),
    "tunes": (2, "Did you mean 'tune'?"),
    "tune m rows.jsonl --lrr=1e-4": (2, "fleetune tune --help; a setting of the method: --set NAME=VALUE"),
    "tune m rows.jsonl more.jsonl": (2, "unknown argument 'more.jsonl'"),
    "tune m rows.jsonl --round 1": (2, "unknown argument '--round'. Did you mean '--rounds'?"),
    "eval m --limit 1,000": (2, "--limit: invalid int value: '1,000'"),
    "tune m rows.jsonl --dtype bf61": (2, "is not one of fp32, bf16, fp16. Did you mean 'bf16'?"),
    "tune m rows.jsonl --rounds many": (2, "rounds = 'many': must be a valid integer"),
    "plan": (2, "the following arguments are required: MODEL\n  try: fleetune plan --help"),
    "models rm nosuch": (2, "no model named 'nosuch' is in the cache"),
    "eval latest --out 'my runs'": (2, "runs there are: fleetune runs --out 'my runs'"),
    "recipes fedkit": (2, "Did you mean 'fedit'?"),
}


@pytest.mark.parametrize("line", TOLD)
def test_what_is_typed_is_answered(line):
    code, out, err = call(*shlex.split(line))
    want, words = TOLD[line]
    assert code == want, err
    assert words in (out if want == 0 else err)
    assert (err if want == 0 else out) == ""
    assert "usage:" not in err


def test_a_traceback_drives_no_terminal():
    shown = logging.StreamHandler(written := io.StringIO())
    shown.setFormatter(main._Formatter("%(levelname)s: %(message)s"))
    log = logging.Logger("a server's words")
    log.addHandler(shown)
    try:
        raise ValueError(f"\x1b[2J\x1b]0;x\x07\nconnected\n{' ' * 90}error: run\u2028this")
    except ValueError:
        log.exception("failed")
    head, *lines = written.getvalue().splitlines()
    assert head == "ERROR: failed"
    assert all(line.startswith("  ") for line in lines)
    assert written.getvalue().replace("\n", "").isprintable()
    assert "    raise ValueError(" in written.getvalue()
    assert lines[-1] == r"        error: run\u2028this"


@pytest.mark.parametrize("line", ["tun", "methods nosuch"])
def test_errors_of_the_command_line_are_events_too(line):
    code, out, err = call(*line.split(), "--json")
    (event,) = [json.loads(text) for text in out.splitlines()]
    assert (code, err) == (2, "")
    assert (event["event"], event["exit_code"]) == ("error", 2)


def interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["parse", "_set_environment"])
def test_ctrl_c_before_a_command_begins_is_no_traceback(where, monkeypatch):
    monkeypatch.setattr(f"fleetune.cli.main.{where}", interrupted)
    assert call("methods") == (130, "", "stopped\n")


PROJECT = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
MODULE, FUNCTION = PROJECT["scripts"]["fleetune"].split(":")
SCRIPT = f"import sys; from {MODULE} import {FUNCTION} as run; sys.exit(run())"  # as pip writes it


@pytest.mark.parametrize("started", [["-m", "fleetune"], ["-c", SCRIPT]], ids=["module", "script"])
def test_ctrl_c_while_the_program_is_loaded_is_no_traceback(started, at):
    (at / "sitecustomize.py").write_text(
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fleetune.cli.main':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
    )
    there = os.pathsep.join([str(at), str(Path(fleetune.__file__).parents[1])])
    words, env = [sys.executable, *started, "methods"], {**os.environ, "PYTHONPATH": there}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_parses(name):
    page = call(name, "--help")[1]
    lines = page.partition("\nexamples:\n")[2].splitlines()
    parts = [part for line in lines for part in line.strip().partition("   ")[0].split(" | ")]
    typed = [part.split(" >")[0] for part in parts if part.startswith("fleetune ")]
    assert typed
    options = main.command_parsers()[name]
    for line in typed:
        words = shlex.split(line)
        assert words[1] == name
        assert options.parse_known_args(words[2:])[1] == [], line


def test_without_extras_help_is_there_and_a_fleet_says_what_to_install():
    extras = "cryptography httpx prometheus_client starlette uvicorn flwr dp_accounting openpyxl"
    script = (
        f"import sys\nsys.modules.update(dict.fromkeys('{extras}'.split()))\nfrom fleetune.cli.main import main\n"
        f"for line in {[*(f'{name} --help' for name in COMMANDS), 'help', 'help tune', 'help dataerror']}:\n"
        "    try: code = main(line.split())\n"
        "    except SystemExit as end: code = end.code or 0\n"
        "    assert code == 0 or line == 'help tune', line\n"
        "sys.exit(main('fleet keys new k'.split()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "pip install 'fleetune[fleet]'" in done.stderr


def test_light_commands_load_no_torch_and_help_is_quick(at):
    """In seconds of the processor, since a machine may be busy."""
    script = (
        "import sys, json, time, contextlib, io\nfrom fleetune.cli.main import main\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        try: main(line.split())\n"
        "        except SystemExit: pass\n"
        "    heavy = {'torch', 'transformers', 'peft', 'numba'} & set(sys.modules)\n"
        "    assert not heavy, (line, heavy)\n"
        "print(time.process_time())"
    )
    for lines, most in ((LIGHT, 60), (["--help"], 0.5)):
        for _ in range(3):
            words = [sys.executable, "-c", script, json.dumps(lines)]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            if float(done.stdout) < most:
                break
        else:
            raise AssertionError(done.stdout)


def test_off_a_terminal_a_line_comes_soon_and_then_every_half_minute():
    now, err = [0.0], io.StringIO()
    with Ui(stderr=err, clock=lambda: now[0]).bar("rows") as bar:
        for step in range(100):
            now[0] = step * 1.0
            bar.update(step, 200)
    lines = err.getvalue().splitlines()
    assert [line.partition(" · ")[0] for line in lines] == [f"rows {n}/200" for n in (4, 34, 64, 94)]
    assert lines[1].endswith(" · 3 min left")


def test_off_a_terminal_work_that_counts_nothing_is_named(monkeypatch):
    monkeypatch.setattr("fleetune.cli.console.BEAT", 0.001)
    now, err = [0.0], io.StringIO()
    with Ui(stderr=err, clock=lambda: now[0]).bar("getting ready") as bar:

        def waits_for(*lines: str) -> None:
            for _ in range(5000):
                if err.getvalue().splitlines() == list(lines):
                    return
                time.sleep(0.001)
            raise AssertionError(err.getvalue())

        now[0] = 5.0
        waits_for("getting ready")
        bar.show("loading the model", 0)
        now[0] = 10.0
        waits_for("getting ready", "loading the model")
        now[0] = 39.0
        time.sleep(0.02)
        waits_for("getting ready", "loading the model")
        now[0] = 40.0
        waits_for("getting ready", "loading the model", "loading the model")


def test_an_error_names_the_run_and_not_the_folder_on_the_way():
    scratch, run = Path("runs/.export-x/0001-a"), Path("runs/0001-a")
    with pytest.raises(UsageError) as caught, called(scratch, run):
        raise UsageError(f"{scratch} holds plain weights", hint=f"not {scratch}")
    assert (str(caught.value), caught.value.message) == ("runs/0001-a holds plain weights",) * 2
    assert caught.value.hint == "not runs/0001-a"


def completed(line: str, at: Path) -> list[str]:
    """What a Tab after `line` offers, from the process that the shell would start."""
    found = at / "found"
    shell = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE": "1"}
    shell |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(found), "_ARGCOMPLETE_IFS": "\n"}
    script = "import sys; from fleetune.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    env = {**os.environ, **shell}
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=60)
    return [word.strip() for word in found.read_text().split("\n") if word.strip()]


def test_words_are_completed(at):
    assert completed("fleetune pl", at) == ["plan"]
    assert completed("fleetune tune --part", at) == ["--participation", "--partition"]
    assert completed("fleetune tune m d --dtype b", at) == ["bf16"]
