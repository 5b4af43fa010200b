"""What the contract suite runs every method on: a tiny random llama and thirty rows of one small language."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetune import models
from fleetune.common.events import as_dict
from fleetune.data import Encoded, Example
from fleetune.data.encode import encode_all
from fleetune.evaluation.losses import pad_id, response_loss
from fleetune.models import Model
from fleetune.runs.rundir import RunDir, create
from fleetune.seeds.noise import derive
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, Payload, ReplySpec, decode, encode
from fleetune.tuning.methods import Method, Reply
from fleetune.tuning.rounds.local_work import Memories
from fleetune.tuning.rounds.rounds import Hooks, RoundPlan, run
from fleetune.tuning.rounds.simulated_fleet import Faults, LocalFleet

# Settings under which a method learns the small language in seconds.  A method that is not named here runs
# with its own defaults.
QUICK: dict[str, dict[str, Any]] = {
    "fedit": {"r": 4, "alpha": 8, "lr": 1e-2, "batch_size": 5, "epochs": 1, "dropout": 0.1},
    "fedpeptao": {"tokens": 2, "lr": 0.1, "epochs": 4, "batch_size": 5, "lanczos": 3, "warmup": 3},
    "fedpetuning": {"size": 4, "lr": 1e-2, "batch_size": 5, "epochs": 2},
    "fedkseed": {"K": 128, "tau": 40, "lr": 2e-3, "eps": 1e-3, "batch_size": 5},
    "onebyte": {"K": 256, "directions": 40, "lr": 0.08, "eps": 1e-3, "batch_size": 5},
    "zosgd": {"K": 128, "tau": 40, "lr": 2e-3, "eps": 1e-3, "batch_size": 5},
    "fwdllm": {"r": 2, "alpha": 4, "P": 8, "lr": 0.2, "decay": 0, "batch_size": 10, "threshold": 1e3},
    "mezo": {"K": 128, "tau": 40, "lr": 2e-3, "eps": 1e-3, "batch_size": 5},
}
# Options that change what travels or how a direction is made keep the contract too.
VARIANTS = [
    "fedit:average=product,ranks=2;4",
    "fedit:start=pissa,dropout=0",
    "fedit:start=eva",
    "fedit:wire=sign",
    "fedit:variant=ffa",
    "fedit:variant=sb,start=gradient,wire=sign",
    "fedkseed:law=gaussian",
    "fedkseed:pro=true",
    "fedkseed:backprop=0.5,backprop_lr=0.05",
    "fwdllm:patience=1,discriminative=false",
    "fwdllm:module=adapter",
    "mezo:K=32,decay=200",
    "onebyte:wire=sign",
    "zosgd:law=gaussian",
    "fedpetuning:module=prefix",
    "fedpetuning:module=full,size=0",
    "fedpetuning:module=bitfit,size=0,scaffold=true",
    "fedpeptao:layers_rule=all,server_lr=0",
]
# Methods that remember on the server or on the devices: a run that goes on must go on with all of it.
STATEFUL = [
    "fedit:scaffold=true,server=adam",
    "fedit:variant=sb,start=gradient",
    "fedpetuning:scaffold=true,mu=0.1,server=avgm",
    "fedpeptao:epochs=1,layers_rule=all",
    "signlora:r=2,pool=3,planes=1",
]
NAMES = sorted(methods.entries()) + VARIANTS
COLOURS = ("red", "green", "blue")


def method(name: str) -> Method:
    """The method of a case such as `fedkseed` or `fedkseed:law=gaussian,K=16`."""
    name, _, changes = name.partition(":")
    given = dict(pair.replace(";", ",").split("=") for pair in changes.split(",") if pair)
    return methods.make(name, QUICK.get(name, {}) | given)


def short(name: str) -> Method:
    """The method of a case with few local steps, for what holds after any number of them."""
    return _sized(method(name), 3)


def _sized(chosen: Method, steps: int) -> Method:
    return chosen.sized(steps, getattr(chosen, "batch_size", 2))


def rows(model: Model) -> list[Encoded]:
    said = [(c, n) for n in range(10) for c in COLOURS]
    examples = [Example((("user", f"say {c} {n}"),), f"{c} {c} {n}", {"colour": c}) for c, n in said]
    return encode_all(examples, model.tokenizer, 64)[0]


def fleet(
    model: Model, method: Method, clients: int = 3, faults: Faults | None = None, memories: Path | None = None
) -> LocalFleet:
    all_rows = rows(model)
    parts = [all_rows[c::clients] for c in range(clients)]
    return LocalFleet(model, method, parts, 7, pad_id(model), faults or Faults(), memories=Memories(memories))


def base_of(model: Model) -> bytes:
    return bytes.fromhex(model.digest)[:8]


def key() -> int:
    return derive(7, "init")


def kind_of(method: Method, state: Any, client: int = 0) -> tuple[Payload, ReplySpec]:
    kinds = method.kinds(state)
    return kinds[method.kind_of(client)]


def reply(fleet: LocalFleet, method: Method, state: Any, client: int = 0, round: int = 1) -> Reply:
    payload, _ = kind_of(method, state, client)
    message = encode(Message(round, base_of(fleet.model), payload))
    (answer,) = fleet.ask(round, [client], message)
    assert answer.data is not None, answer.reason
    return Reply(client, answer.key, decode(answer.data).payload)


def logits(model: Model) -> torch.Tensor:
    """What the model says on a fixed input: equal weights give equal bits."""
    with torch.inference_mode():
        return model.net(input_ids=torch.arange(40).reshape(2, 20)).logits.clone()


def loss(model: Model) -> float:
    return response_loss(model, rows(model))


def train(
    name: str, folder: Path, rounds: int, *, steps: int = 0, run_dir: RunDir | None = None
) -> tuple[Model, Any, RunDir]:
    """A run of some rounds in a new process's state of things: new model, new fleet; resumes `run_dir`.

    `steps` are the local steps of a round, 0 for those of the case.
    """
    model, chosen = models.tiny_llama(), method(name)
    if steps:
        chosen = _sized(chosen, steps)
    state = chosen.init(model, key())
    opened = run_dir or create(folder, name.partition(":")[0], "tiny")

    def measure(state: Any) -> dict[str, float]:
        chosen.apply(model, state)
        return {"loss": loss(model)}

    plan = RoundPlan(rounds, 1.0, 1, 7, 0, base_of(model))  # evaluated at the end
    with opened:
        devices = fleet(model, chosen, memories=opened.path / "memories")
        hooks = Hooks(lambda: None, measure, lambda event: opened.record(as_dict(event)))
        state = run(chosen, devices, state, opened, plan, hooks).state
    chosen.apply(model, state)
    return model, state, opened


def equal_states(left: Any, right: Any) -> bool:
    return all(_equal(a, b) for a, b in zip(left, right, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b) and a.dtype == b.dtype
    if isinstance(a, Iterable) and not isinstance(a, str | bytes):
        return list(a) == list(b)
    fingerprint = getattr(a, "fingerprint", None)
    return bool(fingerprint() == b.fingerprint()) if fingerprint else bool(a == b)
