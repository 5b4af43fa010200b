# SPDX-License-Identifier: Apache-2.0
"""How far honest replies of unlike clients go: the largest distance over a round's median, with no bound on it.

    python -m benchmarks.unlike_clients MODEL ROWS.jsonl NATURAL.jsonl [--only NAME ..]

ROWS have a column `category`: twelve clients get them by Dirichlet(0.1) over it.  NATURAL rows have a column `client`:
`roles.jsonl`, which `python -m benchmarks.inputs` makes.
Two rounds each; a line of the table is a method, with the bound that `tuning/replies.py` sets for replies of that form.
Where devices of two kinds answer (`backprop=0.5`), each kind has its own median, and the larger figure stands here.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Final
from unittest.mock import patch

import fleetune
from fleetune import data
from fleetune.errors import DataError, FleetuneError
from fleetune.tuning import replies
from fleetune.tuning.replies import Kept

ROWS: Final = 100  # that are dealt to the twelve
ADAPTER: Final = {"lr": 3e-3, "batch_size": 4}
ZEROTH: Final = {"lr": 1e-4, "batch_size": 1}
CASES: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "fedit": ("fedit", {"r": 4, **ADAPTER}),
    "fedit epochs=3": ("fedit", {"r": 4, "lr": 3e-3, "batch_size": 2, "epochs": 3}),
    "fedit scaffold=true": ("fedit", {"r": 4, "scaffold": True, **ADAPTER}),
    "fedit average=product ranks=2,4,8": (
        "fedit",
        {"r": 8, "average": "product", "ranks": "2,4,8", **ADAPTER},
    ),
    "fedpetuning module=prefix": (
        "fedpetuning",
        {"module": "prefix", "size": 8, "batch_size": 4, "lr": 5e-4},
    ),
    "fedpetuning module=full": ("fedpetuning", {"module": "full", "batch_size": 4, "lr": 5e-5}),
    "fedpeptao": ("fedpeptao", {"tokens": 4, "layers_rule": "half", "batch_size": 4, "lr": 4e-2}),
    "fedkseed tau=20": ("fedkseed", {"K": 256, "tau": 20, **ZEROTH}),
    "fedkseed tau=20 pro=true": ("fedkseed", {"K": 256, "tau": 20, "pro": True, **ZEROTH}),
    "fedkseed tau=20 backprop=0.5": (
        "fedkseed",
        {"K": 256, "tau": 20, "backprop": 0.5, "backprop_lr": 3e-3, **ZEROTH},
    ),
    "fedkseed tau=4": ("fedkseed", {"K": 256, "tau": 4, **ZEROTH}),
    "mezo tau=20": ("mezo", {"tau": 20, **ZEROTH}),
    "onebyte directions=20": ("onebyte", {"lr": 3e-2, "directions": 20, "batch_size": 2}),
    "fwdllm P=1": ("fwdllm", {"P": 1, "lr": 0.3, "variance_gate": False}),
}


def furthest(model: str, rows: str, name: str, partition: str, clients: int) -> tuple[float, set[float]]:
    """Return the largest distance over the median of its kind and round, and the bounds of the kinds."""
    method, settings = CASES[name]
    ratios, bounds = [0.0], set[float]()

    def watched(kept: Sequence[Kept]) -> list[tuple[Kept, str]]:
        for kind in {k.kind for k in kept}:
            same = [k for k in kept if k.kind == kind]
            ratios.append(max(k.distance for k in same) / replies.median([k.distance for k in same]))
            bounds.update(round(replies.bound(k, same), 1) for k in same)
        return []

    with patch.object(replies, "too_far", watched), tempfile.TemporaryDirectory() as out:
        fleetune.tune(
            model, rows, method=method, settings=settings, out=out, offline=True, rounds=2, clients=clients,
            partition=partition, held_out=8, max_length=64, eval_every=0, samples=0, threads=1, device="cpu",
            limit=ROWS if clients else 0,
        )  # fmt: skip
    return max(ratios), bounds


def check(file: str, column: str) -> None:
    """DataError when rows cannot be read, or one lacks the column that says whose it is."""
    lacking = [i for i, row in enumerate(data.read(file, offline=True), 1) if column not in row.meta]
    if lacking:
        raise DataError(
            f"{file}: {len(lacking):,} rows, the first of them row {lacking[0]}, have no column {column!r}",
            hint="python -m benchmarks.inputs makes demo_train.jsonl and roles.jsonl",
        )


def main() -> int:
    """Print the table as it grows; 2 where the files cannot be used."""
    parser = argparse.ArgumentParser("benchmarks.unlike_clients", description="Honest clients that differ.")
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("natural")
    parser.add_argument("--only", nargs="*", default=list(CASES), metavar="NAME")
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    try:
        check(asked.rows, "category")
        check(asked.natural, "client")
    except FleetuneError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    print("| method | Dirichlet | natural | bound |\n|---|---|---|---|", flush=True)
    for name in asked.only:
        drawn, bounds = furthest(asked.model, asked.rows, name, "dirichlet:0.1:category", 12)
        natural, more = furthest(asked.model, asked.natural, name, "column:client", 0)
        bound = ", ".join(f"{b:g}" for b in sorted(bounds | more))
        print(f"| `{name}` | {drawn:.3g} | {natural:.3g} | {bound} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
