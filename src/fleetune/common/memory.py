"""Measure and limit this process's memory on Linux, macOS and Windows, without heavy imports."""

import contextlib
import ctypes
import gc
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

# torch's words where the CPU has not enough memory, Linux' own (ENOMEM), and its loader's
NO_MEMORY: Final = "can't allocate memory|not enough memory|Cannot allocate memory|failed to map segment"
M_TRIM_THRESHOLD: Final = -1  # of glibc's malloc.h
M_MMAP_THRESHOLD: Final = -3
# limits of the user, in the environment
OWN_LIMITS: Final = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
LARGE: Final = 1 << 23  # smaller pieces are used again: the system clears what it hands out, which takes time
STACKS: Final = 1 << 24  # bytes of address space that threads of a core may take
KEPT: Final = 1 << 25  # bytes of them at the end of the heap that are not given back


def peak_rss() -> int:
    """Return the most bytes of memory this process had since its start, or since `release_memory`."""
    return _status("VmHWM") or _peak_without_proc()


def rss() -> int:
    """Return the bytes of memory this process has now."""
    return int(psutil.Process().memory_info().rss)


def total_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return int(psutil.virtual_memory().total)


def usable_memory(process: Path = Path("/proc/self"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory that this process may use.

    That is the least of the machine's memory, the limits of the process's control group and of those above it
    (`docker --memory`, systemd's `MemoryMax=` and `MemoryHigh=`), and what `ulimit -v` leaves.
    """
    found = [total_memory(), *_group_limits(process, groups), _address_space(process)]
    return min((limit for limit in found if limit > 0), default=0)


def free_memory(most: int = 0) -> int:
    """Return the bytes that this process may still take of `most` (0: `usable_memory`), and that the machine has free."""
    give_back()
    free = int(psutil.virtual_memory().available)
    most = most or usable_memory()
    return max(0, min(free, most - rss())) if most else free


def _group_limits(process: Path, groups: Path) -> Iterator[int]:
    """Yield the limits that a process's control groups state, from its own up: of version 2, and of 1's memory controller.

    In a container the names may be the host's, and the files of its own group lie at the top: what is not there is passed by.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (process / "cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = groups / "memory" if controllers else groups
        own = top / name.lstrip("/")
        for group in (own, *own.parents[: len(own.parts) - len(top.parts)]):
            for file in ("memory.limit_in_bytes",) if controllers else ("memory.max", "memory.high"):
                with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                    yield int((group / file).read_text())


def _address_space(process: Path) -> int:
    """Return the bytes that the limit on addresses (`ulimit -v`) leaves for memory; 0 where there is none.

    Libraries and stacks of threads take more addresses than memory.  Addresses that are mapped but not in memory are
    unavailable.
    """
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        mapped, resident = map(int, (process / "statm").read_text().split()[:2])
    except (ImportError, OSError, ValueError):  # Windows; macOS
        return 0
    return 0 if limit == resource.RLIM_INFINITY else max(1, limit - (mapped - resident) * mmap.PAGESIZE)


@contextlib.contextmanager
def at_most(total: int) -> Iterator[None]:
    """Let this process have about `total` bytes of its own while the block runs: MemoryError, or torch's, for more (Linux).

    Bounded are the private pages that can be written to (RLIMIT_DATA).  Those that are there without being in memory, such
    as a mapped model's, come on top, and so do stacks of threads.
    """
    if not total or sys.platform != "linux":
        yield
        return
    import resource

    mapped, own = (_status(name) for name in ("VmData", "RssAnon"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = mapped + max(0, total - own) + total // 8 + STACKS * (os.cpu_count() or 1) + LARGE
    limits = [most, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _status(name: str) -> int:
    """Return a number of bytes in /proc/self/status; 0 where it is not there."""
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as file:
        lines = (line.split() for line in file)
        return next((int(words[1]) * 1024 for words in lines if words[0] == f"{name}:".encode()), 0)
    return 0


def release_memory() -> None:
    """Give freed memory back to the system and restart `peak_rss`, where possible (Linux, glibc)."""
    gc.collect()
    give_back()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def give_back() -> None:
    """Give freed memory back to the system, where possible (Linux, glibc)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows has no library without a name
        ctypes.CDLL(None).malloc_trim(0)


def return_large_pieces() -> None:
    """Have freed pieces of `LARGE` bytes and more given back at once from now on, where possible (glibc).

    By itself glibc raises its limit to the largest piece freed so far, up to 32 MB, and keeps what is below it. Activations of
    many tokens then leave holes that others do not fit: a llama of 1.07 B weights took 0.2 GB more for 16 x 64 tokens.

    Limits that the user has set in the environment stay.  The limit for the end of the heap is set as well: with only one
    limit set, glibc leaves the other at 128 kB and returns smaller pieces again and again, which takes time.
    """
    if any(name in os.environ for name in OWN_LIMITS):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that led to it, says that memory did not suffice.

    torch has a RuntimeError for it on the CPU; a library that cannot be mapped is an OSError.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, MemoryError) or type(found).__name__ == "OutOfMemoryError":
            return True
        if isinstance(found, RuntimeError | OSError) and re.search(NO_MEMORY, str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


def _peak_without_proc() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
