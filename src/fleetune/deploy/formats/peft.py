# SPDX-License-Identifier: Apache-2.0
"""Copy a run's adapter as it is: a directory that PEFT and its readers load."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors import safe_open

from fleetune.common.shell import quoted
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Report
from fleetune.errors import UsageError
from fleetune.models.net.saving import damaged

TARGETS: Final = {"peft": "a run's adapter as it is, a directory for PEFT"}
TAKES: Final = "adapter"
ORDER: Final = 70


def check(adapter: Path, kind: str | None) -> None:
    """Raise UsageError when the run has no adapter."""
    if not adapter.is_dir():
        run = adapter.parent
        raise UsageError(
            f"{run} has no adapter",
            hint=f"its result is full-parameter: fleetune export {quoted(run)} --to hf",
        )


def write(
    adapter: Path, base: Checkpoint | None, out: Path, kind: str | None, made: Mapping[str, str]
) -> Report:
    """Copy the folder `adapter` to the empty folder `out`, and compare every file."""
    check(adapter, kind)
    shutil.copytree(adapter, out, dirs_exist_ok=True)
    files = sorted(file for file in out.rglob("*") if file.is_file())
    for file in files:
        if file.read_bytes() != (adapter / file.relative_to(out)).read_bytes():
            raise damaged(file, "it is not what the run holds")
    types = Counter(dtype for file in files if file.suffix == ".safetensors" for dtype in _types(file))
    return Report(
        path=out,
        to="peft",
        bytes=sum(file.stat().st_size for file in files),
        tensors=types.total(),
        exact=types.total(),
        types=dict(types),
        files=len(files),
    )


def _types(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return [str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()]  # noqa: SIM118
