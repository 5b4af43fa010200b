# SPDX-License-Identifier: Apache-2.0
"""Run an exported file in the runtime that it is made for, and compare its perplexity with the source's.

A format states its runtime, and what that needs besides; `ENGINES` are the runtimes that Fleetune can run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

from transformers import AutoTokenizer

from fleetune import data, models
from fleetune.deploy import targets
from fleetune.deploy.measure import executorch_runtime, harness, llamacpp, mlx_lm, onnx_runtime
from fleetune.deploy.measure.harness import Row
from fleetune.models.families import widths

WINDOWS: Final = 8  # of the text that an export is checked on
LENGTH: Final = 512  # tokens of one


class Runtime(NamedTuple):
    """A runtime that reads the files of a target."""

    kind: str  # of harness.KINDS
    name: str
    modules: tuple[str, ...]  # that must be installed
    install: str


ENGINES: Final[Mapping[str, Runtime]] = MappingProxyType(
    {
        "llama.cpp": Runtime("gguf", "llama.cpp", (llamacpp.MODULE,), llamacpp.INSTALL),
        "ONNX Runtime": Runtime("onnx", "ONNX Runtime", (onnx_runtime.MODULE,), onnx_runtime.INSTALL),
        "ExecuTorch": Runtime("pte", "ExecuTorch", (executorch_runtime.MODULE,), executorch_runtime.INSTALL),
        "mlx-lm": Runtime("mlx", "mlx-lm", mlx_lm.MODULES, mlx_lm.INSTALL),
        "transformers": Runtime("transformers", "transformers", (), ""),
    }
)


def runtime_of(target: str) -> Runtime | None:
    """Return the runtime that reads the files of a target, with all that it needs; None when Fleetune can run none."""
    found = targets.find(target)
    format = found.format
    engine = ENGINES.get(format.text("RUNTIME"))
    if engine is None or "NEEDS" not in format.constants:
        return engine
    modules = (*engine.modules, *format.constants["NEEDS"])
    return engine._replace(modules=modules, install=found.install)


def missing(runtime: Runtime) -> bool:
    """Return whether something that the runtime needs is not installed."""
    return any(importlib.util.find_spec(module) is None for module in runtime.modules)


def obstacle(target: str, out: Path) -> str:
    """Return why an export cannot be run here, "" when it can: no runtime, one not installed, or not a plain model."""
    runtime = runtime_of(target)
    if runtime is None:
        return f"nothing here runs {target}"
    if missing(runtime):
        return f"{runtime.name} for {target}: {runtime.install}"
    if runtime.kind == "transformers" and widths.has_block_widths(models.load_config(str(out))):
        return (
            f"{runtime.name} does not load blocks of different widths; llama.cpp does, a llama's: --to gguf"
        )
    return ""


def longest(folder: Path) -> int:
    """Return the tokens that the model of a directory is made for; 2,048 where its configuration does not say."""
    return int(getattr(models.load_config(str(folder)), "max_position_embeddings", None) or 2048)


@dataclass(frozen=True)
class Comparison:
    """Perplexity of the same tokens by the source in torch, and by the file in its runtime."""

    runtime: str
    source: float
    file: float
    tokens: int  # predicted

    @property
    def ratio(self) -> float:
        """1 for the same."""
        return self.file / self.source


def windows_of(text: str, folder: Path, length: int = LENGTH, count: int = WINDOWS) -> list[Row]:
    """Return the first windows of a text file in the tokens of the model in `folder`, no longer than it is made for.

    DataError for a text without two tokens.
    """
    words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [words(part, verbose=False)["input_ids"] for part in data.read_text(text)]
    return harness.windows(ids, min(length, longest(folder)), count)


def compare(
    source: Path, out: Path, runtime: Runtime, rows: list[Row], *, offline: bool = False
) -> Comparison:
    """Run an export `out` and its `source` (a run, an artefact or a plain directory), each in its own process.

    ModelError or UsageError when the runtime does not take the file.
    """
    kind = "run" if (source / "run.toml").is_file() else "artefact"

    def perplexity(kind: str, path: Path) -> float:
        job = harness.MeasureJob(kind, str(path), threads=1, offline=offline, repeats=0, windows=rows)
        return harness.measured(job).values["perplexity"]

    tokens = sum(len(row) - 1 for row, _ in rows)
    return Comparison(runtime.name, perplexity(kind, source), perplexity(runtime.kind, out), tokens)
