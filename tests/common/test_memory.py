# SPDX-License-Identifier: Apache-2.0
"""Large pieces that are freed go back to the system, also from between others that stay."""

from __future__ import annotations

import subprocess
import sys

import pytest

HELD = """
import sys, torch
from fleetune.common import memory
if sys.argv[1] == "return":
    memory.return_large_pieces()
torch.ones(30 << 18)  # 31 MB: by itself glibc then keeps what is smaller
parts = [(torch.ones(12 << 18), torch.ones(1 << 18)) for _ in range(8)]  # 12 MB, and 1 MB behind each
small = [small for _, small in parts]
before = memory.rss()
del parts
print(before - memory.rss())
"""


def freed(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", HELD, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_pieces_are_given_back_at_once() -> None:
    assert freed("keep") < 2 * 12e6, "else glibc does so by itself, and nothing is to be set"
    assert freed("return") > 7 * 12e6
