# SPDX-License-Identifier: Apache-2.0
"""State in a run's env.json what it was made with: versions, machine, and the digests of model and tokenizer."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from fleetune.common import __version__
from fleetune.common.files import read_json
from fleetune.common.shell import quoted
from fleetune.errors import StorageError

ENVIRONMENT: Final = "env.json"


def made_on(path: Path) -> dict[str, str]:
    """The digests of the "base" and the "tokenizer" that a run was made on, by env.json; StorageError when it is damaged."""
    hint = f"fleetune tune --resume {quoted(path)}   writes it anew"
    stated = read_json(path / ENVIRONMENT, hint)
    found = {what: stated.get(f"{what}_digest") for what in ("base", "tokenizer")}
    for what, digest in found.items():
        if not isinstance(digest, str):
            raise StorageError(f"{path / ENVIRONMENT} is damaged (it states no {what}_digest)", hint=hint)
    return {what: str(digest) for what, digest in found.items()}


def base_digest(path: Path) -> str:
    """The digest of the base model that a run was made on; StorageError when env.json is damaged."""
    return made_on(path)["base"]


def environment(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and machine, for env.json."""
    packages = (
        "torch",
        "transformers",
        "tokenizers",
        "peft",
        "numba",
        "numpy",
        "safetensors",
        "jinja2",
        "msgpack",
        "pyarrow",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    machine = {"system": platform.system(), "machine": platform.machine(), "processors": os.cpu_count()}
    return {"fleetune": __version__, "python": platform.python_version(), **versions, **machine, **extra}
