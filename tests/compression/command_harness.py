"""What the tests of `fleetune compress` share: settings of a quick run, and its call."""

import shlex

import pytest

from command_line import ok

ZEROTH = ("--method", "fedkseed", "--set", "tau=4", "--set", "K=16", "--set", "lr=1e-2")
QUICK = shlex.split("--limit 30 --held-out 8 --max-length 128 --samples 0 --rounds 1 --clients 2")
LORA = ("--method", "fedit", "--set", "r=2", "--set", "lr=1e-1", "--set", "steps=2")


def tuned(capsys: pytest.CaptureFixture[str], model: str, method: tuple[str, ...] = ZEROTH) -> None:
    """Tune a tiny model for one round."""
    ok(capsys, "tune", model, "demo", *QUICK, *method)
