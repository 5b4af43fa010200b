"""A simulated fleet: what rounds cost beyond the clients' own compute, and memory against their number.

The real loop over the real local fleet with its codec, checks at the door, metrics and checkpoints on disk;
the clients' own compute is the sum of the seconds spent inside `Method.local`.  Evaluation is left out.  Few
local steps a round are unfavourable to us: the papers take 200.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import shape
from benchmarks.harness import Result, Row, Setting, child
from fleetune import models
from fleetune.common.events import as_dict
from fleetune.common.memory import peak_rss, release_memory
from fleetune.data import Batches, Encoded
from fleetune.models import Model
from fleetune.runs.rundir import create
from fleetune.seeds.noise import derive
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Payload
from fleetune.tuning.methods import Method
from fleetune.tuning.rounds.rounds import Hooks, RoundPlan
from fleetune.tuning.rounds.rounds import run as run_rounds
from fleetune.tuning.rounds.simulated_fleet import LocalFleet

BASE = bytes(8)
NOTE = "whole rounds with codec, door, metrics and checkpoints, against the time inside Method.local; ratio - 1 is the overhead"


class Clocked:
    """A method that adds up the time spent in `local`; all else is the method's own."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.seconds = self.cpu = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """As the method's, on the clock."""
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            return self.method.local(model, payload, batches, key, memory)
        finally:
            self.seconds += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu


def run(setting: Setting) -> Result:
    """Overhead on a large and a tiny model, and the memory of 8 and 200 clients."""
    result = Result()
    big = shape.model(setting.quick)
    cases = (
        ("fedkseed, 135M, 10 clients x 4 steps", big, "fedkseed", {"tau": 4}, 10, 4, 1),
        ("fedit, 135M, 4 clients x 2 steps of 8 rows", big, "fedit", {"steps": 2, "lr": 3e-4}, 4, 16, 1),
        ("fedkseed, tiny model, 200 clients x 5 steps", tiny(), "fedkseed", {"tau": 5}, 200, 4, 2),
    )
    for name, model, method, values, clients, rows, rounds in cases:
        if setting.quick:
            name, clients = name.replace("135M", "4M").replace("200 clients", "20 clients"), min(clients, 20)
        spent = _overhead(model, method, values, clients, rows, setting.repeats(rounds))
        result.raw[name] = spent
        ratio, cpu = spent["wall"] / spent["local"], spent["cpu"] / spent["local_cpu"]
        row = Row(f"Fleet: {name}", spent["wall"], spent["local"], "s", ratio, "cost", 1.05, None, cpu, NOTE)
        result.rows.append(row)
    return _memory(result, setting)


def tiny() -> Model:
    """A llama of about 0.2 M parameters, whose steps take milliseconds: the overhead at its most visible."""
    return models.tiny_llama(vocab=512, hidden=64, layers=5, heads=8, kv_heads=4)


def _data(vocab: int, clients: int, rows: int, length: int) -> list[list[Encoded]]:
    every = [Encoded(e.ids % vocab, e.n_prompt) for e in shape.rows(False, clients * rows, length)]
    return [every[c * rows : (c + 1) * rows] for c in range(clients)]


@contextlib.contextmanager
def _fleet(model: Model, method: Method, clients: int, rows: int, length: int = 64) -> Iterator[Any]:
    # Gives a function that plays so many rounds.
    vocab = model.net.config.vocab_size
    fleet = LocalFleet(model, method, _data(vocab, clients, rows, length), 7, 257)
    state = method.init(model, derive(7, "init"))

    def play(rounds: int) -> None:
        with tempfile.TemporaryDirectory() as folder, create(Path(folder), "bench", "model") as opened:
            hooks = Hooks(lambda: None, lambda state: {}, lambda event: opened.record(as_dict(event)))
            run_rounds(method, fleet, state, opened, RoundPlan(rounds, 1.0, 1, 7, 0, BASE), hooks)

    try:
        yield play
    finally:
        if model.attachment is not None:
            model.attachment.detach(model)


def _overhead(
    model: Model, name: str, values: dict[str, Any], clients: int, rows: int, rounds: int
) -> dict[str, float]:
    clocked = Clocked(methods.make(name, values))
    with _fleet(model, clocked, clients, rows) as play:
        play(1)  # compiles, and touches all memory
        clocked.seconds = clocked.cpu = 0.0
        cpu, wall = time.process_time(), time.perf_counter()
        play(rounds)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "local": clocked.seconds, "cpu": cpu, "local_cpu": clocked.cpu, "rounds": rounds}


# --- Memory ---------------------------------------------------------------------------------------------


def _memory(result: Result, setting: Setting) -> Result:
    few, many = (child("fleet_overhead", n, setting.quick) for n in (8, 20 if setting.quick else 200))
    result.raw["memory"] = {"few": few, "many": many}
    name = f"Fleet memory: {many['clients']} clients against 8"
    note = f"peak RSS of a FedKSeed round, each fleet in its own process; its rows are {many['data'] / 1e6:.1f} MB of it"
    ratio = many["peak"] / few["peak"]
    result.rows.append(Row(name, many["peak"], few["peak"], "MB", ratio, "cost", 1.02, note=note))
    return result


def one(clients: int, quick: bool) -> dict[str, int]:
    """In the child: one round of so many clients, one step each."""
    torch.set_num_threads(1)
    model = shape.model(quick)
    method = methods.make("fedkseed", {"tau": 1})
    release_memory()
    with _fleet(model, method, clients, 8, 16) as play:
        play(1)
        peak = peak_rss()
    return {"clients": clients, "peak": peak, "data": clients * 8 * 16 * 4}
