# SPDX-License-Identifier: Apache-2.0
"""Add the flags that `serve` and `chat` share, and end both on a signal with all that they opened."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


def add(sub: argparse.ArgumentParser, engines: Sequence[str]) -> None:
    """Add the subject and the engine's flags."""
    sub.add_argument("subject", metavar="RUN|FOLDER|MODEL", help="also a .gguf file, or latest")
    sub.add_argument(
        "--engine",
        default="auto",
        choices=["auto", *engines],
        help="what runs the model (default: the first installed)",
    )
    sub.add_argument("--threads", type=int, help="threads of the engine (default: measured)")
    sub.add_argument(
        "--context", type=int, default=4096, help="tokens of a conversation at most (default 4096; llama.cpp)"
    )


class Signalled(SystemExit):
    """The end of a command that a signal asked for."""


@contextmanager
def exit_on_signals(code: int) -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP leave it as an exit with `code`, so that what it opened is closed.

    One that is ignored stays so: under `nohup` the command survives a closed terminal.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise Signalled(code)

    found = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in found if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
