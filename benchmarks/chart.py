"""Held-out loss against bytes and against processor seconds, of every method, on SmolLM2-135M.

    python -m benchmarks.chart FOLDER [--data demo dolly] [--methods NAMES] [--seeds 42 1 2]

The same fleet for all: 24 clients, three rounds of four, at most 256 tokens per row, 32 rows held out.  A client spends about
as much on a round with each method: one pass over its rows with back-propagation, or as many forward passes.  `dolly` is
databricks-dolly-15k.jsonl in the working directory (README.md), 160 rows split by category (Dirichlet, 0.5).  Runs are kept in
FOLDER and not repeated; each ends in a line of the table, and the drawings are made from all that are there.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

import fleetune
from fleetune.common.display import human_bytes
from fleetune.common.events import ClientReply, RoundDone
from fleetune.report import page, svg
from fleetune.runs.listener import Silent

MODEL: Final = "smollm2-135m"
MEASURED: Final = {"held_out": 32, "max_length": 256, "samples": 0, "client_rows": 0}
SHARED: Final = {**MEASURED, "rounds": 3, "participation": 0.167}
PARTS: Final = {"limit": 160, "clients": 24, "partition": "dirichlet:0.5:category"}
DATA: Final[dict[str, dict[str, Any]]] = {
    "demo": {"data": "demo", "partition": "column:client"},
    "dolly": {"data": "databricks-dolly-15k.jsonl", **PARTS},
}
BATCH: Final = {"batch_size": 2}
LORA: Final = {**BATCH, "lr": 2e-3, "r": 8, "alpha": 16, "dropout": 0.0}
FORWARD: Final = {"batch_size": 4, "lr": 1e-4}  # two-point steps
BACKWARD: Final = {"batch_size": 4, "backprop": 1.0, "backprop_steps": 3, "K": 1024}
METHODS: Final[dict[str, dict[str, Any]]] = {
    "fedit": LORA,
    "fedit, sign": {**LORA, "wire": "sign"},
    "signlora": {**BATCH, "lr": 0.05},
    "signlora, share 4": {**BATCH, "lr": 0.05, "share": 4},
    "fedpetuning, bitfit": {**BATCH, "module": "bitfit", "lr": 5e-3},
    "fedpeptao": {**BATCH, "lr": 1e-2},
    "fedkseed, backward": BACKWARD,
    "fedkseed": {**FORWARD, "tau": 4, "K": 1024},
    "onebyte": {**FORWARD, "directions": 4},
    "fwdllm": {"batch_size": 4},
}
SPENT: Final = {"up": "bytes that a client has sent", "seconds": "processor seconds of all clients"}


def main() -> None:
    options = _options()
    for data in options.data:
        for seed in options.seeds:
            for name in options.methods:
                if not (found := _file(options.folder, data, name, seed)).exists():
                    found.parent.mkdir(parents=True, exist_ok=True)
                    found.write_text(json.dumps(_run(options.folder, data, name, seed)), encoding="utf-8")
        courses = {name: _courses(options.folder, data, name) for name in options.methods}
        print(f"{data}\n\n" + _table(courses), flush=True)
        drawn = {name: runs for name, runs in courses.items() if runs}
        for what, label in SPENT.items():
            drawing = _drawing(drawn, what, label, data)
            (options.folder / f"loss-{what}-{data}.svg").write_text(drawing, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chart", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    return parser.parse_args()


class _Clock(Silent):
    """Counts the processor seconds of each round's clients: between an evaluation and the round's end."""

    def __init__(self) -> None:
        self.began = 0.0
        self.rounds: list[float] = []

    def event(self, event: object) -> None:
        now = time.process_time()
        if isinstance(event, RoundDone):
            self.rounds.append(now - self.began)
        if not isinstance(event, ClientReply):
            self.began = now


def _file(folder: Path, data: str, name: str, seed: int) -> Path:
    return folder / f"{data}-{name.replace(', ', '-').replace(' ', '')}-{seed}.json"


def _run(folder: Path, data: str, name: str, seed: int) -> dict[str, Any]:
    """Tune; return for each round the loss, and up to it the bytes that a client sent and got, and all clients' seconds."""
    clock, method = _Clock(), name.partition(",")[0]
    options: dict[str, Any] = {
        **SHARED,
        **DATA[data],
        "method": method,
        "settings": METHODS[name],
        "seed": seed,
    }
    done = fleetune.tune(MODEL, out=folder / "runs", listener=clock, progress=False, **options).history
    spent = {k: np.cumsum([0, *done[f"bytes_{k}"][1:]]) / max(done["clients"][1:]) for k in ("up", "down")}
    seconds = np.cumsum([0.0, *clock.rounds])
    return {"loss": done["loss"], "seconds": seconds.tolist()} | {k: v.tolist() for k, v in spent.items()}


def _courses(folder: Path, data: str, name: str) -> list[dict[str, Any]]:
    """Return what is there of a method, whatever the seed."""
    pattern = _file(Path(), data, name, 0).name.replace("-0.json", "-[0-9]*.json")
    return [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob(pattern))]


def _table(courses: Mapping[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| method | loss after 1, 2, 3 rounds | up per client and round | down | processor seconds |",
        "|---|---|---|---|---|",
    ]
    for name, runs in courses.items():
        for run in runs:
            losses = " ".join(f"{loss:.3f}" for loss in run["loss"][1:])
            each = (human_bytes(run[key][-1] / (len(run["loss"]) - 1)) for key in ("up", "down"))
            lines.append(f"| `{name}` | {losses} | {' | '.join(each)} | {run['seconds'][-1]:.0f} |")
    return "\n".join(lines) + "\n"


def _drawing(courses: Mapping[str, list[dict[str, Any]]], what: str, label: str, data: str) -> str:
    """Draw the median loss of the seeds against the median of what was spent, a line per method."""
    medians = {n: np.median([[r[what], r["loss"]] for r in runs], axis=0) for n, runs in courses.items()}
    lines = {name: list(zip(*median.tolist(), strict=True)) for name, median in medians.items()}
    spent = [x for line in lines.values() for x, _ in line[1:]]
    decades = range(math.floor(math.log10(min(spent))), math.ceil(math.log10(max(spent))) + 1)
    ticks = tuple((10.0**k, human_bytes(10**k) if what == "up" else f"{10**k}") for k in decades)
    across = svg.PlotAxis(ticks[0][0], ticks[-1][0], ticks, label, log=True)
    up = svg.numbers([y for line in lines.values() for _, y in line], "held-out loss")
    title = f"SmolLM2-135M on {data}: loss by {label}"
    plot = svg.Plot(
        f"loss-{what}", title, "A mark for each round; the median of the seeds.", across, up, right=130.0
    )
    for colour, (name, line) in enumerate(lines.items()):
        plot.line(line[1:], colour, [name] * len(line))
        plot.end(line[-1], name, colour)
    plot.reference(next(iter(lines.values()))[0][1], "before")
    return page.drawing(plot.svg())


if __name__ == "__main__":
    main()
