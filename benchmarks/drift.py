# SPDX-License-Identifier: Apache-2.0
"""How far a trainer's weights are from a replay of its own log, as a multiple of the move itself.

    python -m benchmarks.drift

200 steps of MeZO on a tiny random llama, in each dtype: the published loop (`papers.py`: perturb, restore and update the
stored weights), and ours, through a view with the law `hashed`.  The published log is replayed in the dtype of the weights, and
the move is the same log added up in fp64.  Our ledger is replayed as it is for a result (`tuning/finished.py`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks import papers
from fleetune.data.encode import Batch, collate, encode_all
from fleetune.data.examples import Example
from fleetune.evaluation.objectives import get
from fleetune.models import DTYPES, Model, digest, named_tensors, tiny_llama
from fleetune.seeds import ledger as ledgers
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.ledger import LedgerHead
from fleetune.seeds.spsa import Position, descend
from fleetune.seeds.view import View
from fleetune.tuning import finished

STEPS: Final = 200
LR, EPS = 1e-6, 1e-3
KEY, GRID, K, LAW = 0xFEEDFACE12345678, float(np.float32(3e-6)), 32, "hashed"


def sized(dtype: str) -> Model:
    """A tiny llama with its weights in `dtype`."""
    model = tiny_llama(seed=1)
    model.net.to(DTYPES[dtype])
    return model


def rows(model: Model) -> list[Batch]:
    """Eight batches of one row."""
    examples = [Example((("user", f"what is {i}?"),), "a number" if i % 2 else "yes", {}) for i in range(8)]
    return [collate([row], 257) for row in encode_all(examples, model.tokenizer, 64)[0]]


def rms(tensors: Iterable[Tensor]) -> float:
    """Root mean square over all numbers."""
    return float(torch.cat([t.double().reshape(-1) for t in tensors]).square().mean().sqrt())


def papers_way(dtype: str, *, in_place: bool = False) -> float:
    """Train as the published code does and replay its log; their distance over the move."""
    model = sized(dtype)
    named = papers.trained(model.net)
    start = [(name, p.detach().clone()) for name, p in named]
    batches, objective = rows(model), get("loss")
    log = [
        (seed, papers.step(named, lambda b=batches[seed % 8]: objective(model, b), seed, EPS, LR, in_place=in_place))
        for seed in range(STEPS)
    ]  # fmt: skip
    replayed = [(name, w.clone()) for name, w in start]
    for seed, g in log:
        papers.update(replayed, seed, g, LR, in_place=in_place)
    exact = [w.double() for _, w in start]
    for seed, g in log:
        torch.manual_seed(seed)
        for w, (_, own) in zip(exact, start, strict=True):
            w.add_(papers.direction(own).double(), alpha=-LR * g)
    apart = rms(a.detach().double() - b.double() for (_, a), (_, b) in zip(named, replayed, strict=True))
    return apart / rms(e - w.double() for e, (_, w) in zip(exact, start, strict=True))


def our_way(dtype: str) -> float:
    """Take as many steps through a view, and rebuild from the ledger's bytes; the distance over the move."""
    model = sized(dtype)
    base = digest(named_tensors(model.net))
    view = View(named_tensors(model.net), model.net, run_key=KEY, law=LAW, grid=GRID)
    position = Position(LAW, K, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    ids = [step // K << 32 | step % K for step in range(STEPS)]
    batches = rows(model)
    taken = descend(
        model, view, position, ids, [batches[i % 8] for i in range(STEPS)], get("loss"),
        eps=EPS, clip=0.0, to_units=lambda step, g: round(-LR * g / GRID),
    )  # fmt: skip
    position.place(view)
    here = {name: w.clone() for name, w in view.tensors()}
    tensors = tuple(
        (n, tuple(w.shape), str(w.dtype).removeprefix("torch.")) for n, w in named_tensors(model.net)
    )
    ledger = Ledger(LedgerHead(base, "", tensors, KEY, LAW, K, GRID))
    other = sized(dtype)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ledger.safetensors"
        ledger.append(np.array(ids, np.uint64), taken.coefficients, 1).save(file)
        finished.rebuild(other, ledgers.load(file))
    there = dict(other.attachment.tensors())
    apart = rms(here[n].double() - there[n].double() for n in here)
    return apart / rms(here[n].double() - w.double() for n, w in named_tensors(model.net))


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    dtypes = ("bf16", "fp16", "fp32")
    print(f"| | {' | '.join(dtypes)} |\n|---|---|---|---|")
    for name, way in {
        "the papers' way (perturb, restore, update; out of place, as published)": papers_way,
        "the same in place": lambda dtype: papers_way(dtype, in_place=True),
        "ours": our_way,
    }.items():
        print(f"| {name} | {' | '.join(f'{way(dtype):.3g}' for dtype in dtypes)} |", flush=True)


if __name__ == "__main__":
    main()
