"""The command line as tests call it, and a run that is short."""

import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest

from fleetune.cli.console import InterruptHandler
from fleetune.cli.main import main

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
FEW: dict[str, Any] = {"clients": 2, "rounds": 1, "held_out": 4, "eval_rows": 4}
FEW |= {"samples": 0, "threads": 1, "device": "cpu"}


def call(capsys: Capture, *args: object) -> tuple[int, str, str]:
    """The exit code of a command, and what it wrote on stdout and stderr."""
    capsys.readouterr()
    code = main([str(a) for a in args])
    return code, *capsys.readouterr()


def call_json(capsys: Capture, *args: object) -> tuple[int, list[dict[str, Any]], str]:
    """The exit code, the events and what was said of a command with --json."""
    code, out, err = call(capsys, *args, "--json")
    return code, [json.loads(line) for line in out.splitlines() if line.startswith("{")], err


def ok(capsys: Capture, *args: object) -> list[dict[str, Any]]:
    """The events of a command that succeeds."""
    code, told, err = call_json(capsys, *args)
    assert code == 0, err
    return told


def said(*words: str, code: int = 0) -> str:
    """What a command says on standard error, without a fixture."""
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()):
        assert main(list(words)) == code, err.getvalue()
    return err.getvalue()


def refused(capsys: Capture, *args: object, code: int = 2) -> str:
    """What is said, with the hint, of a command that cannot be carried out."""
    found, _, err = call(capsys, *args)
    assert found == code, err
    assert len(re.findall(r"^(?:[\d: -]{20})?error: ", err, re.M)) == 1
    assert "Traceback" not in err
    return err


def pressed_when(asked: Callable[[], bool]) -> type[InterruptHandler]:
    """An interrupt handler that reports Ctrl-C as soon as that holds."""

    class Pressed(InterruptHandler):
        requested = property(lambda self: asked(), lambda self, value: None)  # type: ignore[assignment]

    return Pressed


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]
