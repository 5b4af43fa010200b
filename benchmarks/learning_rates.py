# SPDX-License-Identifier: Apache-2.0
"""Hold `lr=auto` to account: the validation loss of a run with the rate that was found, against a searched grid of rates.

    python -m benchmarks.learning_rates MODEL DATA .. --methods fedit,mezo,fedkseed [--json FILE]

Every DATA is a file of rows as `fleetune tune` reads it (name it FORM=FILE to add columns, as in `prompt=question,..@FILE`).
For each data set and method a run finds its rate (and `fedkseed` its server's step); then the same run is made at that rate
times 1/9, 1/3, 3 and 9.  A case is
good when the loss with the found rate is at most 3 % above the lowest of the five and the run did not diverge.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import fleetune
from benchmarks.harness import machine
from fleetune.errors import FleetuneError
from fleetune.runs import rundir
from fleetune.runs.listener import Silent
from fleetune.tuning import recipe as recipes
from fleetune.tuning.rounds import ModelLostError

FACTORS: Final = (1 / 9, 1 / 3, 3.0, 9.0)
GOOD: Final = 1.03
# steps that a machine with two cores takes in seconds on a tiny model; rates come from the search
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "fedit": {"lr": "auto"},
    "fedpetuning": {"lr": "auto", "module": "bitfit", "batch_size": 8},
    "fedpeptao": {"lr": "auto", "layers_rule": "all", "tokens": 5},
    "mezo": {"tau": 30, "batch_size": 8},
    "zosgd": {"tau": 30, "batch_size": 8},
    "fedkseed": {"tau": 40, "batch_size": 4},
    "onebyte": {"directions": 30, "batch_size": 8},
    "fwdllm": {"P": 10, "batch_size": 8, "variance_gate": False, "discriminative": False},
}


def main() -> None:
    """Run all cases and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data", nargs="+", help="a file of rows, or COLUMNS@FILE")
    parser.add_argument("--methods", default="fedit,fedpetuning,mezo,fedkseed,onebyte,fwdllm")
    parser.add_argument("--rows", type=int, default=240, help="rows of each data set (default 240)")
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--length", type=int, default=96, help="tokens per row (default 96)")
    parser.add_argument(
        "--steps", type=int, help="steps, directions or probes of a round (default by method)"
    )
    parser.add_argument("--batch", type=int, help="rows per step (default by method)")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file that all cases so far are written to after each")
    args = parser.parse_args()
    print(machine())
    print(f"{'data':<22}{'method':<13}{'found':>9}  {'loss':>7}{'base':>8}   losses at the grid", flush=True)
    found: list[dict[str, Any]] = []
    for data in args.data:
        for method in args.methods.split(","):
            try:
                found.append(case(args, data, method))
            except FleetuneError as error:  # rows that the model or method does not take
                print(f"{Path(data).stem[:20]:<22}{method:<13} {error}", flush=True)
                continue
            if args.json:
                about = {**vars(args), "json": ""}
                args.json.write_text(json.dumps({"about": about, "cases": found}, indent=1, default=str))
    good = sum(c["good"] for c in found)
    print(f"{good} of {len(found)} within 3 % of the best, {sum(c['diverged'] for c in found)} diverged")


def settings_of(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Return the settings of a method with the steps and the batch that were asked for."""
    settings = dict(SETTINGS[method])
    for name in ("tau", "directions", "P"):
        if name in settings and args.steps:
            settings[name] = args.steps
    return settings | ({"batch_size": args.batch} if args.batch else {})


def case(args: argparse.Namespace, data: str, method: str) -> dict[str, Any]:
    """Run one data set and method at the found rate and at the grid around it."""
    began = time.perf_counter()
    columns, _, file = data.rpartition("@")
    with tempfile.TemporaryDirectory() as out:
        settings = settings_of(args, method)
        auto = run(args, method, settings, file, columns, out)
        rate = float(auto["rate"])
        same = settings | auto["chosen"]
        grid = {
            rate * f: run(args, method, {**same, "lr": rate * f}, file, columns, out)["loss"] for f in FACTORS
        }
    best = min([auto["loss"], *grid.values()])
    result = {
        "data": Path(file).stem, "method": method, "rate": rate, "base": auto["base"], "loss": auto["loss"],
        "grid": {f"{r:.2g}": v for r, v in sorted(grid.items())}, "good": auto["loss"] <= GOOD * best,
        "diverged": not auto["loss"] < auto["base"] * 1.01, "ratio": auto["loss"] / best, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    shown = " ".join(f"{r}: {v:.3f}" for r, v in result["grid"].items())
    mark = "" if result["good"] else f"  x {result['ratio']:.3f}"
    print(
        f"{result['data'][:20]:<22}{method:<13}{rate:>9.2g}  {auto['loss']:>7.3f}{auto['base']:>8.3f}   {shown}{mark}",
        flush=True,
    )
    return result


def run(
    args: argparse.Namespace, method: str, settings: dict[str, Any], data: str, columns: str, out: str
) -> dict[str, Any]:
    """Return base, loss, rate and server's step of one run; a loss of infinity where the model was lost."""
    options: dict[str, Any] = {
        "limit": args.rows, "held_out": args.held_out, "eval_rows": args.held_out, "rounds": args.rounds,
        "max_length": args.length, "seed": args.seed, "samples": 0, "client_rows": 0, "eval_every": 0, "threads": 1,
        "clients": 1 if method in ("mezo", "zosgd") else args.clients, "partition": "iid", "columns": columns,
    }  # fmt: skip
    try:
        done = fleetune.tune(
            args.model, data, method=method, settings=settings, out=out, listener=Silent(), **options
        ).done
        base, loss = done.base["loss"], done.tuned["loss"]
    except ModelLostError as error:
        print(f"  {method} at {settings.get('lr', 'auto')}: {error}", flush=True)
        base = loss = math.inf
    folder = rundir.listing(Path(out))[-1]
    step = recipes.read(folder / "run.toml")["set"].get("server_lr") if method == "fedkseed" else None
    events = rundir.events(folder)
    rates = [e["rate"] for e in events if e["event"] == "rate" and e["setting"] == "lr"]
    return {
        "loss": loss, "base": base, "rate": rates[-1] if rates else settings.get("lr", 0),
        "chosen": {} if step is None else {"server_lr": step},
    }  # fmt: skip


if __name__ == "__main__":
    main()
