# SPDX-License-Identifier: Apache-2.0
"""Tune the file that ships, or tune in fp32 and compress: losses on held-out rows at one size, as a Markdown table.

    python -m benchmarks.tuned_files [--seeds 42 43 44] [--off-grid]

The demo's 24 sites, three rounds, for each seed: the scales of SmolLM2-135M's Q4_1 file (98.4 MB) by back-propagation
(`fedpetuning`, docs/scales.md), and the demo's LoRA (`fedit`) in fp32, which is then compressed by `optq` and by `qronos`, to the
same type, and to the same bytes in types of several kinds.  The loss is that of every second held-out row: `compress`
calibrates on the others.

The built-in model is that file in fp32, so its weights lie on the file's grid and the scales begin where nothing is lost.  With
`--off-grid` the model's dimensions are permuted first (`benchmarks.compression`), which leaves the function as it was: then a
file has to be made of the model before its scales can be tuned, by `qronos` on text that the model writes.  LoRA is also
trained on that file, as QLoRA does, and stays beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

import fleetune
from benchmarks.compression import permute
from fleetune import models
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
    parser.add_argument("--off-grid", action="store_true")
    asked, found = parser.parse_args(), dict[str, list[float]]()
    for seed in asked.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            for name, loss in _losses(seed, Path(scratch), off_grid=asked.off_grid).items():
                found.setdefault(name, []).append(loss)
                print(f"seed {seed}: {name}: {loss:.4f}", flush=True)
    print("| | median | each seed |\n|---|---|---|")
    for name, losses in found.items():
        print(f"| {name} | {statistics.median(losses):.3f} | {' '.join(f'{loss:.3f}' for loss in losses)} |")


def _losses(seed: int, out: Path, *, off_grid: bool) -> dict[str, float]:
    """Return the loss on every second held-out row of each file."""
    quiet: dict[str, Any] = {"out": out / "runs", "progress": False}
    options = dataclasses.asdict(dataclasses.replace(demo.recipes()[0], seed=seed, samples=0))
    given, data, settings = (options.pop(name) for name in ("model", "data", "set"))
    model: Any = _permuted(out / "permuted") if off_grid else given

    def lora(base: Any) -> Any:
        return fleetune.tune(base, data, settings=settings, **options, **quiet)

    run = lora(model)
    found: dict[str, Any] = {"fedit, fp32": run}
    for method in ("optq", "qronos"):
        how = {"method": method, "length": demo.LENGTH, **quiet}
        small = fleetune.compress(run, settings={"grid": "universal"}, **how)
        found |= {
            f"fedit, {method}, Q4_1": small,
            f"fedit, {method}, {BYTES}": fleetune.compress(run, bytes=BYTES, **how),
        }
    rows = [row_of(example) for example in fleetune.open(small.folder).held_out()]
    file: Any = demo.MODEL
    if off_grid:
        made = fleetune.compress(model, settings={"grid": "universal"}, length=demo.LENGTH, **quiet)
        found["the file, not tuned"] = made
        file = fleetune.export(made, to="gguf", path=out / "model.gguf").path
        found["fedit on the file, beside it"] = lora(file)
    for rate in RATES:
        found[f"scales, lr {rate:g}"] = fleetune.tune(
            file, "demo", settings={"batch_size": 2, "lr": rate}, seed=seed, **SCALES, **quiet
        )
    return {
        name: fleetune.evaluate(made, rows, tasks=["loss"], **quiet)["loss"] for name, made in found.items()
    }


def _permuted(folder: Path) -> str:
    """Write the demo's model with its dimensions permuted."""
    model = models.load(demo.MODEL, device="cpu")
    permute(model)
    models.save(model.net, model.tokenizer, folder)
    return str(folder)


if __name__ == "__main__":
    main()
