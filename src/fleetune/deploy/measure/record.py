# SPDX-License-Identifier: Apache-2.0
"""What `fleetune measure` has measured: the lines of its table, as they are told and written beside a compression."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fleetune.cli.console import Ui
from fleetune.common.display import human_bytes, metric, show

if TYPE_CHECKING:
    from fleetune.deploy.measure.harness import Kept, Measured


@dataclass(frozen=True)
class Line:
    """A line of the table: a model in an engine."""

    name: str
    kind: str  # of deploy.measure.KINDS
    path: str
    weights: Path  # whose bits are counted
    bytes: int  # on the disk
    dtype: str = "fp32"

    @property
    def engine(self) -> str:
        """Who runs it."""
        return "llama.cpp" if self.kind == "gguf" else "torch"


class Done(NamedTuple):
    """A line, the measures of its quality, and all that is told of it."""

    line: Line
    values: Mapping[str, float]
    facts: Mapping[str, Any]


def facts(line: Line, result: Measured) -> dict[str, Any]:
    """All that is told of a line."""
    from fleetune.deploy.measure.harness import bits

    linear, whole = bits(line.weights)
    found = asdict(result)
    return {
        "name": line.name, "engine": line.engine, "path": line.path, "bytes": line.bytes, "bits_linear": linear,
        "bits": whole, **{k: v for k, v in found.items() if k != "values"}, **result.values,
    }  # fmt: skip


def write(args: argparse.Namespace, folder: Path, done: Sequence[Done], kept: Mapping[str, Kept]) -> None:
    """The result beside what was measured; a kept gain that is known stays known."""
    from fleetune.cli.commands import compress
    from fleetune.common.files import write_atomic
    from fleetune.deploy.measure.harness import FILE
    from fleetune.models.artefact import Master, is_master

    model = compress.artefact(folder)
    digest = Master(model).digest() if is_master(model) else ""
    told: dict[str, Any] = {name: asdict(k) for name, k in kept.items()}
    if not told:
        with suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or a damaged one
            before = json.loads((folder / FILE).read_text(encoding="utf-8"))
            told = before["kept"] if before["digest"] == digest else {}
    record = {
        "v": 1, "digest": digest, "threads": args.threads, "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens, "repeats": args.repeats, "text": args.text, "windows": args.windows,
        "length": args.length, "data": args.data, "limit": args.limit,
        "rows": [d.facts for d in done], "kept": told,
    }  # fmt: skip
    write_atomic(folder / FILE, json.dumps(record, indent=1) + "\n")


def tell(ui: Ui, done: Sequence[Done], kept: Mapping[str, Kept], folder: Path | None) -> None:
    """The table, what is kept of the gain, and where the result is."""
    from fleetune.deploy.measure.harness import FILE

    every = [d.facts for d in done]
    measures = list(dict.fromkeys(name for d in done for name in d.values))
    rows = [
        [f["name"], f["engine"], human_bytes(f["bytes"]), f"{f['bits_linear']:.2f}", f"{f['bits']:.2f}",
         human_bytes(f["peak_rss"]), *(f"{f[k]:.1f}" if f[k] else "" for k in ("prefill", "generate")),
         *(show(name, f[name]) if name in f else "" for name in measures)]
        for f in every
    ]  # fmt: skip
    ui.event({
        "event": "done", "folder": str(folder) if folder else None, "rows": every,
        "kept": {name: asdict(k) for name, k in kept.items()},
    })  # fmt: skip
    if not ui.json:
        ui.table(
            ["", "engine", "size", "bits/weight", "with ends", "peak", "read tok/s", "write tok/s",
             *(metric(name).label for name in measures)],
            rows, align="ll" + "r" * (6 + len(measures)),
        )  # fmt: skip
    ui.paths([("kept", k.text) for k in kept.values()])
    if folder is not None:
        ui.paths([("result", str(folder / FILE))])
        if not kept and any(d.line.kind == "run" for d in done):
            ui.paths([("next", f"fleetune measure {folder} --kept-gain")])
