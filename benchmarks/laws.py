# SPDX-License-Identifier: Apache-2.0
"""Compare the laws of directions at equal steps: held-out loss after a walk, as paired differences over seeds.

    python -m benchmarks.laws MODEL ROWS.jsonl                            mezo, 100 steps, 8 seeds
    python -m benchmarks.laws MODEL ROWS.jsonl --method fedkseed --clients 4 --rounds 2 --set K=1024

MODEL is a name or a folder.  For `mezo`, and `zosgd`, which take the same steps, the first row is the loop of MeZO's
published code (`benchmarks/papers.py`: in place, `torch.normal`); it sees the same batches with the same learning rate and eps.
Rows are shuffled by a fixed key; the last ones are held out.  A difference is law minus baseline for the same seed; +- is one
standard error of the mean difference.  Negative is better.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import papers
from fleetune import data, models
from fleetune.data import Batches, Encoded, keyed_order
from fleetune.evaluation import objectives
from fleetune.evaluation.losses import eval_mode, pad_id
from fleetune.models import Model, named_tensors
from fleetune.seeds.noise import LAWS, derive
from fleetune.tuning import methods
from fleetune.tuning.methods import Reply

PUBLISHED = "published loop"
Walk = Callable[[int], None]  # from the base, with this seed


class Trial:
    """A model, its rows for training and the batches that measure it."""

    def __init__(self, model: Model, rows: Sequence[Encoded], held_out: int, batch_size: int) -> None:
        order = keyed_order(1, 0, len(rows))
        self.model = model
        self.rows = [rows[i] for i in order[:-held_out]]
        measured = Batches([rows[i] for i in order[-held_out:]], pad_id(model), 0)
        self.held_out = list(measured.epochs(1, batch_size))
        self.objective = objectives.get("loss")

    def loss(self) -> float:
        """Return the mean held-out loss over batches."""
        return statistics.fmean(self.objective(self.model, batch) for batch in self.held_out)

    def batches(self, seed: int, round: int, client: int, clients: int) -> Batches:
        """Return a client's rows (every `clients`-th) in the order of this seed and round."""
        own = self.rows[client::clients]
        return Batches(own, pad_id(self.model), derive(seed, "batches", round), client=client)


def method_walk(trial: Trial, method: Any, rounds: int, clients: int) -> Walk:
    """Return the walk of a method's own functions, without fleet and files."""

    def walk(seed: int) -> None:
        state = method.init(trial.model, derive(seed, "run"))
        for round in range(rounds):
            replies = []
            for client in range(clients):
                key, batches = derive(seed, round, client), trial.batches(seed, round, client, clients)
                sent = method.local(trial.model, method.broadcast(state), batches, key, {})
                replies.append(Reply(client, key, sent))
            state = method.aggregate(state, iter(replies))
        method.apply(trial.model, state)

    return walk


def published_walk(trial: Trial, method: Any, rounds: int) -> Walk:
    """Return the walk of MeZO's published loop, on the batches that the method would see."""

    def walk(seed: int) -> None:
        named = papers.trained(trial.model.net)
        for round in range(rounds):
            batches = trial.batches(seed, round, 0, 1).steps(method.tau, method.batch_size)
            for step, batch in enumerate(batches):
                key = derive(seed, "z", round, step) % 2**32
                loss = lambda batch=batch: trial.objective(trial.model, batch)  # noqa: E731
                papers.step(named, loss, key, method.eps, method.lr, in_place=True)

    return walk


def measured(trial: Trial, walk: Walk, seed: int) -> float:
    """Return the loss after a walk, and put the model back."""
    stored = {name: tensor.clone() for name, tensor in named_tensors(trial.model.net)}
    walk(seed)
    found = trial.loss()
    if trial.model.attachment is not None:
        trial.model.attachment.remove()
        trial.model.attachment = None
    with torch.no_grad():
        for name, tensor in named_tensors(trial.model.net):
            tensor.copy_(stored[name])
    return found


def line(name: str, found: Sequence[float], baseline: Sequence[float]) -> str:
    """A row of the table: mean loss, mean difference to the baseline and its error, seeds in which it is lower."""
    apart = [a - b for a, b in zip(found, baseline, strict=True)]
    error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
    lower = sum(d < 0 for d in apart)
    return f"| {name} | {statistics.fmean(found):.4f} | {statistics.fmean(apart):+.4f} +- {error:.4f} | {lower} of {len(apart)} |"


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.laws")
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--method", default="mezo")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--laws", default=",".join(LAWS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Print the losses of every seed, then the table."""
    asked = options()
    torch.set_num_threads(asked.threads)
    model = models.load(asked.model, offline=True)
    examples = data.read(str(asked.rows))
    rows = data.encode_all(examples, model.tokenizer, asked.max_length)[0]
    settings = dict(pair.split("=", 1) for pair in asked.set)
    method: Any = methods.make(asked.method, settings)
    trial = Trial(model, rows, asked.held_out, 8)
    walks = {
        law: method_walk(trial, replace(method, law=law), asked.rounds, asked.clients)
        for law in asked.laws.split(",")
    }
    if asked.method in ("mezo", "zosgd"):
        walks = {PUBLISHED: published_walk(trial, method, asked.rounds)} | walks
    found: dict[str, list[float]] = {name: [] for name in walks}
    with torch.inference_mode(), eval_mode(model.net):
        print(f"before: {trial.loss():.4f}")
    with eval_mode(model.net):
        for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
            for name, walk in walks.items():
                found[name].append(measured(trial, walk, seed))
            print(seed, {name: round(losses[-1], 4) for name, losses in found.items()}, flush=True)
    baseline = next(iter(found))
    print(f"| law | loss after | minus {baseline} | lower in |\n|---|---|---|---|")
    for name, losses in found.items():
        print(line(name, losses, found[baseline]))


if __name__ == "__main__":
    main()
