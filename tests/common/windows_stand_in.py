"""A process without what Windows lacks: `python windows_stand_in.py SCRIPT ARGS..` runs SCRIPT in it.

No /proc, no symbolic links, no fork, groups or affinity of processes, and for Fleetune no `fcntl` and no `resource`;
instead `msvcrt.locking`, which checks what it is given as Microsoft describes it, and what psutil tells there.
Paths, open files, signals and all below Python are Linux's, and so are the other packages, which go by `sys.platform`.
"""

import builtins
import ctypes
import errno
import fcntl
import os
import runpy
import subprocess  # noqa: F401  (it takes a system with `msvcrt` for Windows: it must come first)
import sys
import types
from typing import Any

import psutil

NOW, PEAK = 123 << 20, 456 << 20  # bytes that the counters tell
MISSING = ("fcntl", "resource")


def locking(handle: int, mode: int, count: int) -> None:
    """Lock `count` bytes from where the file stands; here the whole file."""
    assert (mode, count, os.lseek(handle, 0, os.SEEK_CUR)) == (2, 1, 0)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


class Process:
    """A process as psutil tells of it on Windows; Linux' own reads /proc as soon as it is made."""

    def memory_info(self) -> Any:
        return types.SimpleNamespace(rss=NOW, peak_wset=PEAK)


def main() -> None:
    sys.modules["msvcrt"] = types.ModuleType("msvcrt")
    vars(sys.modules["msvcrt"]).update(locking=locking, LK_NBLCK=2)
    vars(ctypes)["WinDLL"] = lambda name: None  # who finds msvcrt may ask for it
    vars(psutil)["Process"] = Process
    for name in ("fork", "killpg", "pread", "sched_getaffinity", "setsid"):
        delattr(os, name)
    real, found = builtins.open, builtins.__import__

    def imported(name: str, within: Any = None, *args: Any, **kwargs: Any) -> Any:
        if name in MISSING and str((within or {}).get("__name__")).startswith("fleetune"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return found(name, within, *args, **kwargs)

    def opened(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", file)
        return real(file, *args, **kwargs)

    def symlink(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EINVAL, "A required privilege is not held by the client")

    builtins.open, builtins.__import__, os.symlink = opened, imported, symlink
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
