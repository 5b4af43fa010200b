# SPDX-License-Identifier: Apache-2.0
"""Memory and CPU time of processes and of those that they have started, from /proc: Linux only."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tree(pid: int) -> list[int]:
    """Return a process and all that it has started."""
    found, parents = [pid], _parents()
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def memory_of(pids: Iterable[int]) -> int:
    """Return the bytes of memory that processes take, what they share counted once for each (RSS)."""
    return sum(int(f[1]) for pid in pids if (f := _read(f"{pid}/statm"))) * os.sysconf("SC_PAGE_SIZE")


def cpu_of(pids: Iterable[int]) -> float:
    """Return the seconds of CPU time of processes, with that of those they have waited for."""
    fields = [_stat(pid) for pid in pids]
    return sum(sum(map(int, f[11:15])) for f in fields if f) / os.sysconf("SC_CLK_TCK")


def _parents() -> dict[int, int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {pid: int(f[1]) for pid in pids if (f := _stat(pid))}


def _stat(pid: int) -> list[str]:
    """Return the fields of a process after its name: state, parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _read(path: str) -> list[str]:
    try:
        return Path("/proc", path).read_text().split()
    except OSError:
        return []
