# SPDX-License-Identifier: Apache-2.0
"""All methods on the same data, fleet and budget of computation, as a Markdown table.

    python -m benchmarks.comparison tiny MODEL TRAIN EVAL      a model of well under a million parameters
    python -m benchmarks.comparison smollm2                    smollm2-135m on the built-in data

The budget is counted in passes of one row: a forward is 1, a forward with its backward 3, a two-point
estimate 2.  Every client may spend the same in a round (a fleet of one spends what the eight would), and so
every method spends the same in all.  (FedPepTAO's first round also takes Hessian products to choose the layers, which
are not counted here but are in the device seconds.)  Learning rates were searched by powers of about three with
`--only NAME --rounds 1 --seed 1 --set lr=...`; the table is of another seed.

Device seconds are the processor's (user and system) of a run of one thread, less those of a run of a single
step (start and evaluation), for one device: other work on the machine does not count.  Memory is the process's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FLEET = 8
CHOICE = {
    "layers_rule": "plateau",
    "lanczos": 8,
    "curvature_rows": 0,
}  # FedPepTAO's choice: 8 Hessian products


class Scale(NamedTuple):
    """A model's work: `passes` a client may spend in a round, in batches of `batch` rows."""

    rounds: int
    passes: int
    batch: int
    flags: tuple[str, ...]
    rates: Mapping[str, Mapping[str, object]]  # by row of the table


TINY = Scale(
    3, 640, 8, ("--clients", str(FLEET), "--max-length", "128", "--rouge-rows", "40"),
    {
        "fedit": {"lr": 1e-2, "r": 8}, "fedpetuning, bitfit": {"lr": 1e-1}, "fedpetuning, prefix": {"lr": 1e-1},
        "fedpeptao": {"lr": 1e-1, **CHOICE}, "mezo": {"lr": 1e-4}, "zosgd": {"lr": 1e-4}, "fedkseed": {"lr": 3e-4},
        "onebyte": {"lr": 3e-3}, "fwdllm": {"lr": 3e-2},
    },
)  # fmt: skip
SMOLLM2 = Scale(
    3, 60, 4, ("--partition", "column:client", "--participation", str(FLEET / 24), "--max-length", "256",
               "--held-out", "32", "--rouge-rows", "12", "--answer-tokens", "48"),
    {
        "fedit": {"lr": 3e-3, "r": 8}, "fedpetuning, bitfit": {"lr": 1e-2}, "fedpetuning, prefix": {"lr": 1e-2},
        "fedpeptao": {"lr": 1e-2, **CHOICE}, "mezo": {"lr": 1e-4}, "zosgd": {"lr": 1e-4}, "fedkseed": {"lr": 3e-4},
        "onebyte": {"lr": 1.5e-3}, "fwdllm": {"lr": 1e-2},
    },
)  # fmt: skip
ROWS = tuple(TINY.rates)
HEAD = ("method", "loss", "Rouge-L", "up a client", "down a client", "peak memory", "device seconds")


def recipe(row: str, scale: Scale, rounds: int, more: Mapping[str, object]) -> list[str]:
    """Flags of `fleetune tune` for a row of the table."""
    name, _, module = row.partition(", ")
    gradient, two_point = scale.passes // (3 * scale.batch), scale.passes // (2 * scale.batch)
    flags, setting = list(scale.flags), {"batch_size": scale.batch, **scale.rates[row], **more}
    if module:
        setting["module"] = module
    if name in ("fedit", "fedpetuning", "fedpeptao"):
        setting["steps"] = gradient
    elif name == "fedkseed":
        setting |= {"tau": two_point, "eps": 1e-3}
    elif name in ("mezo", "zosgd"):
        setting["tau"] = FLEET * two_point
        flags += ["--clients", "1", "--partition", "iid", "--participation", "1"]
    elif name == "onebyte":  # four directions a step, a step a round
        setting["directions"] = 4
        rounds *= two_point // 4
    else:  # fwdllm: a direction a round
        rounds *= two_point
    flags += [
        "--method",
        name,
        "--rounds",
        str(rounds),
        "--eval-every",
        "0",
        "--samples",
        "0",
        "--threads",
        "1",
    ]
    return flags + [flag for key, value in setting.items() for flag in ("--set", f"{key}={value}")]


def tune(model: Sequence[str], flags: Sequence[str]) -> tuple[dict[str, Any], float]:
    """The "done" event of a run in a process of its own, and the processor seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fleetune", "tune", *model, *flags, "--out", folder, "--json"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        assert process.stdout is not None
        assert process.stderr is not None
        events = [json.loads(line) for line in process.stdout]
        errors = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"fleetune tune {' '.join(flags)} failed:\n{errors}")
    return events[-1], used.ru_utime + used.ru_stime


def line(row: str, done: Mapping[str, Any], seconds: float) -> str:
    """A row of the table."""
    tuned = done["tuned"]
    fleet = 1 if row in ("mezo", "zosgd") else FLEET
    cells = (
        f"`{row.replace(', ', '`, ')}{'' if ',' in row else '`'}",
        f"{tuned['loss']:.3f}",
        f"{tuned['rouge_l']:.1f}",
        _bytes(done["bytes_up"] / fleet),
        _bytes(done["bytes_down"] / fleet),
        _bytes(done["peak_rss"]),
        f"{seconds / fleet:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _bytes(count: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser("benchmarks.comparison", description="All methods at one budget.")
    parser.add_argument("scale", choices=("tiny", "smollm2"))
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("data", nargs="?", default="demo")
    parser.add_argument("held_out", nargs="?", type=Path)
    parser.add_argument("--only", metavar="ROWS", help=f"of {'; '.join(ROWS)}, with semicolons between")
    parser.add_argument("--rounds", type=int, help="another number of rounds")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting")
    options = parser.parse_args()
    scale = TINY if options.scale == "tiny" else SMOLLM2
    model = [options.model, options.data, "--seed", str(options.seed)]
    if options.held_out:
        model += ["--eval-data", str(options.held_out)]
    more = dict(pair.split("=", 1) for pair in options.set)
    rows = [row.strip() for row in options.only.split(";")] if options.only else ROWS
    done, idle = tune(model, [*recipe("mezo", scale, 1, {}), "--set", "tau=1"])
    print(f"Before: loss {done['base']['loss']:.3f}, Rouge-L {done['base']['rouge_l']:.1f}\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for row in rows:
        done, seconds = tune(model, recipe(row, scale, options.rounds or scale.rounds, more))
        print(line(row, done, seconds - idle), flush=True)


if __name__ == "__main__":
    main()
