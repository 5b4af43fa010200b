"""`python -m benchmarks [NAMES] [--quick] [--threads N] [--json FILE]`: run benchmarks, print the ratio table."""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import adapter_step, mezo_step, privacy, solvers
from benchmarks.harness import Others, Result, Setting, machine, table

ALL = {
    "mezo_step": mezo_step.run,
    "adapter_step": adapter_step.run,
    "solvers": solvers.run,
    "privacy": privacy.run,
}
ALONE = ("privacy",)  # run only where named: 20 minutes, and files


def main() -> int:
    """0 when everything ran; whether targets were met is what the table says."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = machine()
    print("; ".join(f"{name} {value}" for name, value in facts.items() if value), flush=True)
    results, about = {}, {}
    for name in options.names or [name for name in ALL if name not in ALONE]:
        others, began, load = Others(), time.perf_counter(), os.getloadavg()
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        results[name] = ALL[name](Setting(options.quick))
        if options.quick:  # the targets are for the real size
            results[name].rows = [dataclasses.replace(row, target=None) for row in results[name].rows]
        about[name] = {
            "seconds": time.perf_counter() - began,
            "load_before": load,
            "load_after": os.getloadavg(),
            "used_by_others": others.share(),
        }
        print(f"{about[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    print("\n" + table([row for result in results.values() for row in result.rows]))
    print("\n" + _quiet(about))
    if options.json:
        _write(options.json, facts, results, about, options.quick)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks", description="Ours against the papers' way, as ratios.")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(ALL)} (default: all but privacy: it takes 20 minutes, and files)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small model and few repeats; no number counts"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    options = parser.parse_args()
    if unknown := set(options.names) - set(ALL):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    return options


def _quiet(about: dict[str, Any]) -> str:
    shares = [a["used_by_others"] for a in about.values() if a["used_by_others"] is not None]
    if not shares:
        return "This system does not say whether others used the machine meanwhile."
    word = "a quiet machine" if max(shares) < 0.05 else "trust the CPU column and the minima more"
    return f"Others used up to {max(shares):.0%} of the machine meanwhile: {word}."


def _write(
    path: Path, facts: dict[str, Any], results: dict[str, Result], about: dict[str, Any], quick: bool
) -> None:
    rows = [
        {"benchmark": name, **dataclasses.asdict(row), "met": row.met}
        for name, result in results.items()
        for row in result.rows
    ]
    content = {
        "format": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": quick,
        "machine": facts,
        "runs": about,
        "rows": rows,
        "raw": {name: result.raw for name, result in results.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
