"""A MeZO step: what its passes over the weights cost, alone and as part of a whole step.

Passes alone: the papers' four, against ours, the two sweeps that a view makes for the two forwards (all
weights, piece by piece into scratch, at a point with moves and a probe).  The yardstick is the least that any
two passes can cost: two in-place multiplications of the weights.

Whole steps: on the same batch, two plain forwards, our step, and the papers'.  What a view adds is our step
less the two forwards, repeat by repeat.
"""

import functools

import numpy as np
import torch

from benchmarks import papers, shape
from benchmarks.harness import Result, Setting, compare, measure
from fleetune.data import Batch
from fleetune.evaluation import objectives
from fleetune.models import Model, named_tensors
from fleetune.seeds import weights as views
from fleetune.seeds.descent import Position, descend
from fleetune.seeds.noise import passes, probe
from fleetune.seeds.view import View

K, EPS, LR = 1024, 1e-3, 1e-6
GRID = LR / 256
WEIGHED = "weights are multiplied by 1 in place, twice: each read and written once a pass"
ADDED = "our step less two plain forwards on the same batch, against two in-place multiplications"


def run(setting: Setting) -> Result:
    """Passes alone and whole steps, in fp32 and bf16."""
    result = Result()
    for dtype in shape.DTYPES:
        model = shape.model(setting.quick, dtype)
        _passes(result, setting, model)
        for size, repeats in ((1, 5), (16, 3)):
            _step(result, setting, model, size, repeats)
    return result


def moved() -> tuple[np.ndarray, np.ndarray]:
    """Every direction of the pool, and how far it has moved."""
    return np.arange(K, dtype=np.uint64), np.random.default_rng(0).integers(1, 1000, K)


def look(model: Model) -> View:
    """A view of the model at its base."""
    return View(named_tensors(model.net), model.net, run_key=1, law="hashed", grid=GRID)


def step(model: Model, view: View, position: Position, batch: Batch) -> None:
    """One step as MeZO and FedKSeed take it, from `position`, which moves along."""
    descend(
        model,
        view,
        position,
        [9],
        [batch],
        objectives.get("loss"),
        eps=EPS,
        clip=0.0,
        to_units=lambda step, g: max(-1000, min(1000, round(-g * 256))),
    )


def multiply(model: Model) -> None:
    """The yardstick, one pass."""
    with torch.no_grad():
        for _, tensor in named_tensors(model.net):
            tensor.mul_(1.0)


def sweep(view: View) -> None:
    """What a view computes for one forward: every weight once, in the pieces that the layers ask for."""
    for slot in view.slots:
        size = slot.tensor.numel()
        for first in range(0, size, views.CHUNK):
            view.piece(slot, first, min(first + views.CHUNK, size))


def _passes(result: Result, setting: Setting, model: Model) -> None:
    view, named = look(model), list(model.net.named_parameters())
    view.place(passes("hashed", K, *moved()))

    def ours() -> None:
        for sign in (+1, -1):
            view.probe(probe("hashed", K, 5), sign * EPS)
            sweep(view)

    def theirs(in_place: bool) -> None:
        papers.step(named, lambda: 0.0, 7, EPS, LR, in_place=in_place)

    times = measure(
        {
            "multiply": lambda: (multiply(model), multiply(model)),
            "ours": ours,
            "papers": functools.partial(theirs, False),
            "papers in place": functools.partial(theirs, True),
        },
        setting.repeats(7),
    )
    view.remove()
    result.keep(f"passes {model.dtype}", times)
    of = f"MeZO passes, {model.dtype}"
    ours_ = times["ours"]
    result.rows += [
        compare(f"{of}: against two multiplications", ours_, times["multiply"], "cost", 1.5, WEIGHED),
        compare(f"{of}: against the papers' four", ours_, times["papers"], "gain", 1.0),
        compare(f"{of}: against those four in place", ours_, times["papers in place"], "gain", 1.0),
    ]


def _step(result: Result, setting: Setting, model: Model, size: int, repeats: int) -> None:
    batch, named = shape.batch(setting.quick, size, 64), list(model.net.named_parameters())
    position, views_ = Position("hashed", K, *moved()), list[View]()
    loss = functools.partial(objectives.get("loss"), model, batch)
    times = measure(
        {
            "multiply": lambda: (multiply(model), multiply(model)),
            "forwards": lambda: (loss(), loss()),
            "ours": lambda: step(model, views_[-1], position, batch),
            "papers": lambda: papers.step(named, loss, 7, EPS, LR),
            "papers in place": lambda: papers.step(named, loss, 7, EPS, LR, in_place=True),
        },
        setting.repeats(repeats),
        before={"ours": lambda: views_.append(look(model)), "papers": lambda: views_.pop().remove()},
    )
    result.keep(f"step {size}x64 {model.dtype}", times)
    of = f"MeZO step {size}x64, {model.dtype}"
    added = times["ours"].beyond(times["forwards"])
    result.rows += [
        compare(f"{of}: what a view adds", added, times["multiply"], "cost", 1.5, ADDED),
        compare(f"{of}: against two plain forwards", times["ours"], times["forwards"], "cost"),
        compare(f"{of}: against the papers'", times["ours"], times["papers"], "gain", 1.0),
        compare(f"{of}: against theirs in place", times["ours"], times["papers in place"], "gain", 1.0),
    ]
