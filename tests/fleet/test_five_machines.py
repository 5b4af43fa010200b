# SPDX-License-Identifier: Apache-2.0
"""The walk over five machines: its slow line keeps its word, and it is refused where it cannot be; `make faults` walks it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # the benchmarks are no package of the wheel

from benchmarks import five_machines, network


def test_a_slow_line_delays_every_frame_and_loses_some() -> None:
    with contextlib.ExitStack() as opened:
        ends = [
            opened.enter_context(one)
            for _ in range(2)
            for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ]
        here, end, there, other = ends
        for one in ends:
            one.settimeout(5)
        line = network.Line((end.fileno(), other.fileno()), delay=0.05, loss=0.2, seed=1)
        line.start()
        for source, target in ((here, there), (there, here)):
            carried, lost, began = line.carried, line.lost, time.monotonic()
            for number in range(100):
                source.send(bytes([number]))
            got = [target.recv(9)]
            assert time.monotonic() - began >= 0.05
            while line.carried < carried + 100:
                time.sleep(0.01)
            while len(got) < 100 - (line.lost - lost):
                got.append(target.recv(9))
            assert 5 < line.lost - lost < 40
            assert got == sorted(got)
        line.over.set()
        line.join(5)


def test_without_root_it_is_said_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    assert five_machines.main([]) == 2
    assert "sudo" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--rounds", "3"], ["--methods", "mezo"], ["--model", "smollm2-135m"], ["--rows", "demo"]]
)
def test_options_that_do_not_belong_together(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        five_machines.main(words)


@pytest.mark.faults
@pytest.mark.skipif(bool(network.why_not()), reason=network.why_not() or "-")
def test_the_walk_ends_in_the_digest_of_the_simulation() -> None:
    assert five_machines.main([]) == 0
