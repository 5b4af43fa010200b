"""Small cases of every method, honest replies of a usual size, and a round that adds them up."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fleetune.models import tiny_llama
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import MEAN, Mean, Rule
from fleetune.tuning.exchange.messages import LogCode, Message, Payload, encode
from fleetune.tuning.rounds import checkpoint
from fleetune.tuning.rounds.fleets import Answer
from fleetune.tuning.rounds.replies import Replies, Round

BASE = bytes(8)
ROWS = [1, 2, 3, 4, 90]
CLIENTS = len(ROWS)
LORA = {"r": 2, "steps": 2}
CASES: dict[str, dict[str, Any]] = {
    "fedit": LORA,
    "fedit sign": LORA | {"wire": "sign", "server": "adam"},
    "fedit scaffold": LORA | {"scaffold": True},
    "fedpeptao": {"tokens": 1, "steps": 2, "layers_rule": "half"},
    "fedpeptao all": {"tokens": 1, "steps": 2, "layers_rule": "all"},
    "fedkseed": {"K": 8, "tau": 20},
    "fedkseed bp": {"K": 8, "tau": 20, "backprop": 1.0},
    "mezo": {"K": 32, "tau": 20},
    "onebyte": {"K": 32, "directions": 8},
    "onebyte sign": {"K": 32, "directions": 8, "wire": "sign"},
    "fwdllm": {"r": 2, "alpha": 4, "P": 8, "patience": 1, "decay": 0, "discriminative": False},
}


@functools.cache
def begun(case: str) -> tuple[Any, Any]:
    method = methods.make(case.split()[0], CASES[case])
    return method, method.init(tiny_llama(), 7)


def usual(method: Any, state: Any, client: int) -> Payload:
    """A reply of a usual size: a change of about 1e-3, a few hundred units."""
    kinds = method.kinds(state)
    sent, spec = kinds[client % len(kinds)]
    rng, arrays = np.random.default_rng(client), {}
    for name, (kind, shape) in spec.arrays.items():
        step = rng.normal(size=[abs(n) for n in shape])
        if np.dtype(kind).kind == "f":
            start = sent.arrays.get(name)
            here = 0.0 if start is None or start.shape != step.shape else start  # signs are changes
            arrays[name] = (here + 1e-3 * step).astype(kind)
        elif kind == "uint8":
            arrays[name] = LogCode.encode(300 * step, np.full(step.shape, 0.5))
        else:
            arrays[name] = (300 * step).astype(kind)
    scalars: dict[str, Any] = {"n": ROWS[client], "loss": 1.0, "kept": 0.5}
    return Payload(arrays, {name: scalars[name] for name in spec.scalars})


def gathered(
    method: Any,
    state: Any,
    payloads: Sequence[Payload],
    folder: Path,
    order: Sequence[int] = (),
    rule: Rule = MEAN,
) -> Replies:
    """The replies of a round of these, which come in an order; not closed."""
    kinds = len(method.kind_names)
    asked = Round(1, BASE, [max(ROWS)] * len(payloads), state, lambda client: client % kinds)
    taken = Replies(method, asked, SimpleNamespace(path=folder), lambda event: None, rule)  # type: ignore[arg-type]
    taken.gather(
        Answer(c, c, encode(Message(1, BASE, payloads[c])), "ok", "", 0.0, 0)
        for c in order or range(len(payloads))
    )
    return taken


def mean_of(weighted: Iterable[tuple[float, Mapping[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    mean = Mean()
    for n, tensors in weighted:
        mean.add(n, tensors)
    return {name: m.astype(np.float32) for name, m in mean.tensors().items()}


def bits(state: Any) -> bytes:
    return checkpoint.encode(1, state, checkpoint.Totals())
