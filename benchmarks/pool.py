# SPDX-License-Identifier: Apache-2.0
"""Measure FedKSeed's defaults: the pool of devices that back-propagate, and the server's step for those that do not.

    python -m benchmarks.pool pool MODEL DATA [--seeds 3,4,5]
    python -m benchmarks.pool mean MODEL DATA

`pool` varies K (the directions) and epoch_rounds (how often they are renewed) where all, or half, of the clients back-propagate.
`mean` varies server_lr, the multiple of the clients' mean that the server steps by, over the number of clients asked in a round.
Rates are found (`lr=auto`) anew for each case.  Prints the validation loss after the run, mean and range over the
seeds, and what one client was sent in all rounds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import fleetune
from benchmarks.harness import machine
from fleetune.errors import FleetuneError
from fleetune.runs import rundir
from fleetune.runs.listener import Silent

POOLS: Final = ((1024, 0), (1024, 1), (4096, 0), (4096, 1), (16384, 0), (16384, 1))
ASKED: Final = (2, 4, 8, 16)


def main() -> None:
    """Run the cases and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("pool", "mean"))
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--seeds", default="3,4,5")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--length", type=int, default=96, help="tokens per row (default 96)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a client that back-propagates")
    parser.add_argument("--lr", default="auto", help="of clients that take two-point steps, for `pool`")
    parser.add_argument("--shares", default="1,0.5", help="shares of clients that back-propagate")
    parser.add_argument(
        "--pools", default=",".join(f"{K}:{every}" for K, every in POOLS), help="K:epoch_rounds,.."
    )
    args = parser.parse_args()
    print(machine(), flush=True)
    (pools if args.what == "pool" else means)(args)


def pools(args: argparse.Namespace) -> None:
    """Vary K and its renewal, for each share of clients that back-propagate."""
    chosen = [tuple(int(x) for x in pool.split(":")) for pool in args.pools.split(",")]
    for share in args.shares.split(","):
        for K, every in chosen:
            settings = {
                "K": K, "epoch_rounds": every, "backprop": float(share), "backprop_lr": "auto", "backprop_steps": args.steps,
                "batch_size": 4, "tau": 20, "lr": args.lr,
            }  # fmt: skip
            line(f"backprop={share} K={K} epoch_rounds={every}", args, settings, clients=4)


def means(args: argparse.Namespace) -> None:
    """Vary the server's step over the number of clients."""
    for clients in ASKED:
        for server_lr in sorted({1.0, round(math.sqrt(clients), 2), float(clients)}):
            settings = {"tau": 20, "batch_size": 4, "server_lr": server_lr}
            line(f"clients={clients} server_lr={server_lr:g}", args, settings, clients=clients)


def line(name: str, args: argparse.Namespace, settings: dict[str, Any], clients: int) -> None:
    """Run one case for all seeds and print it."""
    began = time.perf_counter()
    losses, rates, base, sent = [], [], math.nan, 0.0
    for seed in map(int, args.seeds.split(",")):
        with tempfile.TemporaryDirectory() as out:
            try:
                done = fleetune.tune(
                    args.model, args.data, method="fedkseed", settings=settings, out=out, listener=Silent(), clients=clients,
                    partition="iid", limit=args.rows, held_out=48, eval_rows=48, rounds=args.rounds, max_length=args.length,
                    seed=seed, samples=0, client_rows=0, eval_every=0, threads=1,
                ).done  # fmt: skip
            except FleetuneError as error:
                print(f"  {name}, seed {seed}: {error}", flush=True)
                losses.append(math.inf)
                continue
            base, loss = done.base["loss"], done.tuned["loss"]
            losses.append(loss)
            events = rundir.events(Path(done.run))
            rates.append("/".join(f"{e['rate']:.2g}" for e in events if e["event"] == "rate"))
            sent = done.bytes_down / clients
    print(
        f"{name:<42} {base:.3f} -> {statistics.mean(losses):.3f}  ({min(losses):.3f} to {max(losses):.3f})  "
        f"rates {' '.join(rates)}  {sent / 1000:,.0f} kB down  {time.perf_counter() - began:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
