# SPDX-License-Identifier: Apache-2.0
"""Tune the file that ships, or tune in fp32 and compress: losses on held-out rows at one size, as a Markdown table.

    python -m benchmarks.tuned_files [--seeds 42 43 44]

The demo's 24 sites, three rounds, for each seed: the scales of SmolLM2-135M's Q4_1 file (98.4 MB) by back-propagation
(`fedpetuning`, docs/scales.md), and the demo's LoRA (`fedit`) in fp32, which is then compressed by `optq` and by `qronos`, to the
same type, and to the same bytes in types of several kinds.  The loss is that of every second held-out row: `compress`
calibrates on the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

import fleetune
from fleetune.data.examples import row_of
from fleetune.tuning import demo

BYTES: Final = "98.4MB"
SCALES: Final[dict[str, Any]] = {
    "partition": "column:client", "rounds": 3, "participation": 0.167, "held_out": 32, "max_length": demo.LENGTH, "samples": 0,
    "method": "fedpetuning", "train": "scales",
}  # fmt: skip
RATES: Final = (1.5e-3, 3e-3)


def main() -> None:
    """Make and measure all files of each seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    found: dict[str, list[float]] = {}
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as scratch:
            for name, loss in _losses(seed, Path(scratch)).items():
                found.setdefault(name, []).append(loss)
                print(f"seed {seed}: {name}: {loss:.4f}", flush=True)
    print("| | median | each seed |\n|---|---|---|")
    for name, losses in found.items():
        print(f"| {name} | {statistics.median(losses):.3f} | {' '.join(f'{loss:.3f}' for loss in losses)} |")


def _losses(seed: int, out: Path) -> dict[str, float]:
    """Return the loss on every second held-out row of each file."""
    quiet: dict[str, Any] = {"out": out, "progress": False}
    recipe = dataclasses.replace(demo.recipes()[0], seed=seed, samples=0)
    options = dataclasses.asdict(recipe)
    model, data, settings = (options.pop(name) for name in ("model", "data", "set"))
    run = fleetune.tune(model, data, settings=settings, **options, **quiet)
    found: dict[str, Any] = {"fedit, fp32": run}
    for method in ("optq", "qronos"):
        how = {"method": method, "length": demo.LENGTH, **quiet}
        small = fleetune.compress(run, settings={"grid": "universal"}, **how)
        found |= {
            f"fedit, {method}, Q4_1": small,
            f"fedit, {method}, {BYTES}": fleetune.compress(run, bytes=BYTES, **how),
        }
    rows = [row_of(example) for example in fleetune.open(small.folder).held_out()]
    for rate in RATES:
        found[f"scales, lr {rate:g}"] = fleetune.tune(
            demo.MODEL, "demo", settings={"batch_size": 2, "lr": rate}, seed=seed, **SCALES, **quiet
        )
    return {
        name: fleetune.evaluate(made, rows, tasks=["loss"], **quiet)["loss"] for name, made in found.items()
    }


if __name__ == "__main__":
    main()
