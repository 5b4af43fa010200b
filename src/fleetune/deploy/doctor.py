# SPDX-License-Identifier: Apache-2.0
"""Look at this installation: versions, machine, cache, engines, optional extras.  Imports none of them and never fails."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final, TypeVar

from fleetune.common import memory
from fleetune.common.extras import pip_install
from fleetune.common.version import __version__

T = TypeVar("T")

PACKAGES: Final = (
    "torch",
    "transformers",
    "peft",
    "numba",
    "numpy",
    "safetensors",
    "pydantic",
    "gguf",
    "flwr",
)
SERVES: Final = {  # an extra -> what it is for
    "fleet": "fleet serve, fleet join: real devices",
    "parquet": "data in Parquet files",
    "llamacpp": "measure and export --text in llama.cpp",
    "serve": "serve and chat with an engine",
    "completion": "completion in the shell",
    "tensorboard": "tune --tracker tensorboard",
    "wandb": "tune --tracker wandb",
    "lm-eval": "eval --tasks with tasks of lm-evaluation-harness",
}
BESIDE: Final = {  # a package that belongs to no extra -> what it is for
    "compressed-tensors": "export --to compressed-tensors --text",
    "gptqmodel": "export --to gptq --text",
}
ENGINES: Final = {  # an engine of `serve` -> what it runs
    "llama-server": "llama.cpp's own server: .gguf files, fastest",
    "xllamacpp": "llama.cpp from pip: .gguf files",
    "transformers": "transformers' server: models that are no .gguf file",
}
NOT_SHOWN: Final = ("all", "dev", "docs", "test")


@dataclass(frozen=True)
class Extra:
    """An optional part: what it is for, and which of its packages are not installed."""

    name: str
    serves: str
    missing: list[str]
    install: str  # the command that adds it


@dataclass(frozen=True)
class Found:
    """What was found; "" or 0 where it cannot be told."""

    versions: dict[str, str]  # by package; "" for one that is not installed
    python: str
    program: str  # the path of the interpreter
    system: str
    processors: int
    threads: str  # what limits them: OMP_NUM_THREADS, "" for nothing
    memory: int  # bytes that a process may use here
    gpu: str  # the driver's program, "" for none
    cache: str
    cache_bytes: int
    cache_free: int  # bytes on its disk
    cache_writable: bool
    offline: bool  # whether the environment forbids the network
    engines: dict[str, bool]  # by name: whether it is installed
    extras: list[Extra] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def look() -> Found:
    """Look at everything, without a download and without importing torch."""
    from fleetune.models import cache, download

    home = _safe(lambda: cache.cache(), Path("~/.cache/fleetune"))
    versions = {"fleetune": __version__, **{name: _version(name) for name in PACKAGES}}
    writable = _safe(lambda: _writable(home), False)
    none: dict[str, bool] = {}
    engines = _safe(_engines, none)
    found = Found(
        versions=versions, python=platform.python_version(), program=sys.executable,
        system=_safe(lambda: f"{platform.system()} {platform.machine()}", ""), processors=_processors(),
        threads=os.environ.get("OMP_NUM_THREADS", ""), memory=_safe(memory.usable_memory, 0),
        gpu=_safe(lambda: shutil.which("nvidia-smi") or "", ""), cache=str(home),
        cache_bytes=_safe(lambda: _size(home), 0), cache_free=_safe(lambda: _free(home), 0), cache_writable=writable,
        offline=_safe(download.offline_by_environment, False), engines=engines, extras=_safe(_extras, []),
    )  # fmt: skip
    found.problems.extend(_problems(found))
    return found


def _safe(ask: Callable[[], T], otherwise: T) -> T:
    try:
        return ask()
    except Exception:  # whatever is odd here, the rest can still be told
        return otherwise


def _version(package: str) -> str:
    return str(_safe(lambda: metadata.version(package), ""))


def _processors() -> int:
    """Return the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return _safe(lambda: len(os.sched_getaffinity(0)), os.cpu_count() or 0)
    return os.cpu_count() or 0


def _size(folder: Path) -> int:
    from fleetune.models.cache_contents import size

    return size(folder)


def _standing(folder: Path) -> Path:
    """Return the folder, or the one above it that is there."""
    return next((p for p in (folder, *folder.parents) if p.is_dir()), Path("/"))


def _free(folder: Path) -> int:
    return shutil.disk_usage(_standing(folder)).free


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=_standing(folder)):
            return True
    except OSError:
        return False


def _engines() -> dict[str, bool]:
    from fleetune.deploy.serving import engines

    return {engine.name: bool(_safe(engine.available, False)) for engine in engines.ENGINES}


def _extras() -> list[Extra]:
    """Return the extras that the installed package states, then the packages beside them."""
    wanted: dict[str, list[str]] = {name: [] for name in SERVES}
    for line in _safe(lambda: metadata.requires("fleetune"), None) or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        name = re.match(r"[\w.-]+", requirement.strip())
        if extra and name and name[0] != "fleetune" and extra[1] not in NOT_SHOWN:
            wanted.setdefault(extra[1], []).append(name[0])
    found = [
        Extra(n, SERVES.get(n, ""), [p for p in ps if not _version(p)], pip_install(n))
        for n, ps in wanted.items()
        if ps
    ]
    return found + [
        Extra(name, serves, [] if _version(name) else [name], f"pip install {name}")
        for name, serves in BESIDE.items()
    ]


def _problems(found: Found) -> list[str]:
    """Return what stops work: a needed package that is missing, a cache that takes no file."""
    needed: list[Any] = [name for name in PACKAGES if name != "flwr" and not found.versions[name]]
    said = [f"{name} is not installed: {pip_install()}" for name in needed]
    if not found.cache_writable:
        said.append(f"the cache {found.cache} cannot be written: set FLEETUNE_HOME to another folder")
    if not any(found.engines.values()):
        said.append(f"no engine to serve with: {pip_install('serve')}")
    return said
