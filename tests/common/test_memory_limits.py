"""The memory that a process may use: the least of the machine's and of the limits that are set on it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from fleetune.common import memory

MB = 1 << 20


def usable(tmp_path: Path, groups_of_process: str, limits: Mapping[str, object]) -> int:
    """What a process may use whose /proc has these lines, in a tree with these files."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cgroup").write_text(groups_of_process)
    for name, limit in limits.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    return memory.usable_memory(tmp_path / "proc", tmp_path / "groups")


SERVICE = "0::/system.slice/fleetune.service\n"
UNIT = "system.slice/fleetune.service"
OLD = "9:name=systemd:/x\n4:memory:/docker/3f\n3:cpu,cpuacct:/docker/3f\n0::/\n"


@pytest.mark.parametrize(
    ("lines", "limits", "least"),
    [
        (SERVICE, {f"{UNIT}/memory.max": 800 * MB, "system.slice/memory.max": "max"}, 800 * MB),
        (SERVICE, {f"{UNIT}/memory.max": 800 * MB, "system.slice/memory.max": 500 * MB}, 500 * MB),
        (SERVICE, {f"{UNIT}/memory.max": 800 * MB, f"{UNIT}/memory.high": 600 * MB}, 600 * MB),
        # a container's own, at the top
        (SERVICE, {f"{UNIT}/memory.max": "max", "memory.max": 300 * MB}, 300 * MB),
        (SERVICE, {"system.slice/other.service/memory.max": MB}, None),
        ("0::/\n", {"memory.max": 700 * MB}, 700 * MB),
        ("0::/../sibling\n", {"memory.max": 700 * MB}, 700 * MB),  # of a group outside of the container's
        (OLD, {"memory/docker/3f/memory.limit_in_bytes": 400 * MB}, 400 * MB),
        # the container's group is mounted at the top
        (OLD, {"memory/memory.limit_in_bytes": 400 * MB}, 400 * MB),
        (OLD, {"memory/docker/3f/memory.limit_in_bytes": 9223372036854771712}, None),
        (OLD, {"cpu,cpuacct/docker/3f/memory.limit_in_bytes": MB}, None),
        ("", {"memory.max": MB}, None),
    ],
)
def test_the_least_limit_of_a_process_group_and_of_those_above_it_counts(lines, limits, least, tmp_path):
    assert usable(tmp_path, lines, limits) == (memory.total_memory() if least is None else least)


def test_without_limits_it_is_the_machines(tmp_path: Path) -> None:
    assert memory.usable_memory(tmp_path, tmp_path) == memory.total_memory() > 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a limit on addresses is Linux'")
def test_a_limit_on_addresses_counts_less_what_is_mapped_and_not_in_memory() -> None:
    code = (
        "import mmap, resource; from fleetune.common import memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); before = memory.usable_memory()\n"
        "held = mmap.mmap(-1, 1 << 30); print(before, memory.usable_memory())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert 1.8 * 2**30 < before < 2**31, "the interpreter alone maps little"
    assert before - after == pytest.approx(2**30, abs=16 * MB)


HELD = """
import resource, sys
import numpy as np
from fleetune.common import memory
ones = lambda megabytes: np.ones(megabytes << 18, np.float32)
if sys.argv[1] == "return":
    memory.return_large_pieces()
ones(30)  # 31 MB: by itself glibc then keeps what is smaller
parts = [(ones(12), ones(1)) for _ in range(8)]  # 12 MB, and 1 MB behind each
small = [small for _, small in parts]
before = memory.rss()
del parts
print(before - memory.rss())
x = ones(4)  # 4 MB: 1024 pages of 4 KB
y = np.maximum(x * 2 + 1, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    y = np.maximum(x * 2 + 1, 0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def freed(how: str, **limits: str) -> tuple[int, int]:
    """(bytes of large pieces that are given back, pages that smaller ones have the system clear)."""
    env = {name: value for name, value in os.environ.items() if name not in memory.OWN_LIMITS} | limits
    told = subprocess.check_output([sys.executable, "-c", HELD, how], text=True, env=env)
    given_back, cleared = map(int, told.split())
    return given_back, cleared


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_pieces_are_given_back_at_once_and_smaller_ones_are_not_fetched_anew() -> None:
    assert freed("keep")[0] < 2 * 12e6, "else glibc does so by itself, and nothing is to be set"
    given_back, cleared = freed("return")
    assert given_back > 7 * 12e6
    assert cleared < 5 * 1024, "those of every result would be 150 * 1024"
    assert freed("return", MALLOC_MMAP_THRESHOLD_=str(1 << 25))[0] < 2 * 12e6, "the user's own limit stays"
