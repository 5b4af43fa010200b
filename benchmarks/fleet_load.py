# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.fleet_load [--devices 1000] [--rounds 5] [--json F]`: a real fleet's server under load, beside Flower's.

Every line is a run of its own, in processes of their own, on loopback, without TLS: rounds a minute (of the median round),
the seconds from an order to its answer at the server, the server's largest memory and its CPU time for a client and a round.
The devices share the machine's cores with the server.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Others, child, machine

SCALARS = ((16, "float32", "16 scalars"), (256, "float32", "256 scalars"))
ADAPTER = (196_608, "float16", "LoRA r=8, 393 kB")  # q and v of 12 layers of width 512
FEW = 3  # rounds of what is slow
HEAD = ("what", "devices", "rounds/min", "round", "p50", "p99", "server RSS", "CPU/client")


def main() -> int:
    """Run all, print the table."""
    options = _options()
    others, began, load = Others(), time.monotonic(), os.getloadavg()
    found: dict[str, dict[str, Any]] = {}
    for numbers, dtype, name in (*SCALARS, ADAPTER):
        rounds = min(options.rounds, FEW) if numbers == ADAPTER[0] else options.rounds
        _run(found, f"fleetune, {name}", "fleet_server", options.devices, rounds, numbers, dtype)
    few = min(options.devices, options.light)
    if few:
        for numbers, dtype, name in (SCALARS[0], ADAPTER):
            bits = 16 if dtype == "float16" else 32
            _run(
                found,
                f"Flower SuperLink + FedAvg, light nodes, {name}",
                "flower_stock",
                "light",
                few,
                FEW,
                numbers,
                bits,
            )
    if options.supernodes:
        _run(
            found,
            "Flower SuperLink + FedAvg, SuperNodes, 16 scalars",
            "flower_stock",
            "supernodes",
            options.supernodes,
            FEW,
            16,
            32,
        )
    for method in ("fedit", "fedkseed"):
        _run(
            found,
            f"fleet serve + join, an empty round ({method})",
            "fleet_join",
            method,
            max(5, options.rounds),
        )
    print(f"\n{table(found)}\n\n{_memory(found)}")
    about = {"seconds": time.monotonic() - began, "load_before": load, "used_by_others": others.share()}
    print(
        f"{about['seconds']:.0f} s; others used {about['used_by_others'] or 0:.0%} of the machine meanwhile"
    )
    if options.json:
        content = {"format": 1, "machine": machine(), "about": about, "runs": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.fleet_load", description=__doc__)
    parser.add_argument("--devices", type=int, default=1000, help="simulated devices (default: 1000)")
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"rounds of scalars (default: 5); {FEW} of all else"
    )
    parser.add_argument(
        "--light", type=int, default=100, help="light nodes of Flower's own server (default: 100; 0: none)"
    )
    parser.add_argument(
        "--supernodes", type=int, default=10, help="Flower's own nodes (default: 10; 0: none)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    return parser.parse_args()


def _run(found: dict[str, dict[str, Any]], name: str, module: str, *arguments: object) -> None:
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        found[name] = child(module, *arguments)
        print(table({name: found[name]}), file=sys.stderr, flush=True)
    except RuntimeError as error:  # the others still count
        print(error, file=sys.stderr)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the runs as a table."""
    lines = [HEAD]
    for name, run in found.items():
        second = statistics.median(run["seconds"])
        lines.append((
            name, f"{run['devices']:,}", f"{60 / second:,.1f}", f"{second:.2f} s",
            *(f"{run[p]:.2f} s" if p in run else "" for p in ("p50", "p99")),
            f"{run['server_rss'] / 1e6:.0f} MB" if "server_rss" in run else "",
            f"{1e3 * run['cpu_per_client']:.1f} ms" if "cpu_per_client" in run else "",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in text)


def _memory(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, run in found.items():
        if "model_rss" in run:
            beside = run["device_rss"] - run["model_rss"]
            lines.append(
                f"a device: {run['device_rss'] / 1e6:.0f} MB, {beside / 1e6:.0f} MB of it beside torch and the model"
            )
        elif "device_rss" in run:
            lines.append(f"{name}: {run['device_rss'] / 1e6:.0f} MB for a node")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
