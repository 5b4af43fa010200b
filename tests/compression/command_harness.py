"""What the tests of `fleetune compress` share: a call of the command line, a quick run, and an interrupt after so many looks."""

import shlex

import pytest

from command_line import ok

ZEROTH = ("--method", "fedkseed", "--set", "tau=4", "--set", "K=16", "--set", "lr=1e-2")
QUICK = shlex.split("--limit 30 --held-out 8 --max-length 128 --samples 0 --rounds 1 --clients 2")
LORA = ("--method", "fedit", "--set", "r=2", "--set", "lr=1e-1", "--set", "steps=2")


def tuned(capsys: pytest.CaptureFixture[str], model: str, method: tuple[str, ...] = ZEROTH) -> None:
    """Tune a tiny model for one round."""
    ok(capsys, "tune", model, "demo", *QUICK, *method)


def pulled_after(count: int) -> type:
    """An interrupt handler that reports Ctrl-C after it was asked so many times."""
    asked = iter([False] * count + [True] * 99)

    class Pulled:
        def __init__(self, ui: object) -> None:
            pass

        def __enter__(self) -> "Pulled":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        @property
        def requested(self) -> bool:
            return next(asked)

    return Pulled
