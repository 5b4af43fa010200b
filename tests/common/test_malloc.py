# SPDX-License-Identifier: Apache-2.0
"""Large pieces that are freed go back to the system, also from between others that stay; smaller ones are used again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fleetune.common import memory

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


def freed(how: str, **limits: str) -> int:
    env = {name: value for name, value in os.environ.items() if name not in memory.OWN_LIMITS} | limits
    done = subprocess.run(
        [sys.executable, "-c", HELD, how], capture_output=True, text=True, check=True, env=env
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_pieces_are_given_back_at_once() -> None:
    assert freed("keep") < 2 * 12e6, "else glibc does so by itself, and nothing is to be set"
    assert freed("return") > 7 * 12e6
    assert freed("return", MALLOC_MMAP_THRESHOLD_=str(1 << 25)) < 2 * 12e6, "a limit of the user's own stays"


USED_AGAIN = """
import resource, torch
from fleetune.common import memory
memory.return_large_pieces()
x = torch.ones(4 << 18)  # 4 MB: 1024 pages of 4 KB
y = (x * 2 + 1).relu()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    y = (x * 2 + 1).relu()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_smaller_pieces_are_not_fetched_from_the_system_each_time() -> None:
    done = subprocess.run([sys.executable, "-c", USED_AGAIN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5 * 1024, (
        "pages that the system had to clear: those of every result would be 150 * 1024"
    )
