# SPDX-License-Identifier: Apache-2.0
"""What each aggregation rule makes of clients that lie as hard as they can unrefused: `python -m benchmarks.liars .. --rules`.

Ten clients, of which the first `--liars` do their work, look at all replies of the round, and then send a lie that goes 99 % as
far as the server takes (`replies.allowed` times the median).  A row of the table is a method and a lie (`LIES`), a column a
rule: the validation loss after the rounds, the mean over seeds.  Rows `none` have no liar: what a rule costs.  Every seed draws
other rows; with `--unlike` a client has rows of one kind (`category`) or two, with `--unlike dirichlet:0.1:category` or
`--unlike column:client` also more rows than another (of 100 rows, or of all).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import liars
from benchmarks.harness import machine
from fleetune import data, models
from fleetune.common.events import ClientReply
from fleetune.data import encode_rows
from fleetune.data.partition import partition
from fleetune.evaluation.losses import pad_id, response_loss
from fleetune.models import Model
from fleetune.runs.rundir import create
from fleetune.seeds.noise import derive
from fleetune.tuning import checkpoint, methods, robust
from fleetune.tuning.fleets import Answer
from fleetune.tuning.fleets.local import LocalFleet
from fleetune.tuning.messages import Message, decode, encode
from fleetune.tuning.methods import Reply
from fleetune.tuning.replies import Replies, agreed, allowed
from fleetune.tuning.rounds import Hooks, RoundPlan
from fleetune.tuning.rounds import run as run_rounds

CLIENTS: Final = 10
EACH: Final = 6  # rows of a client
HELD: Final = 32  # rows of the validation loss
LENGTH: Final = 64  # tokens of a row
KINDS: Final = "kinds"  # of rows, of which a client has one or two
DEALT: Final = 100  # rows that a partition deals
SHORT: Final = 0.99  # of the way to the bound
RULES: Final = ("mean", "mean:4", *robust.REDUCE)
LORA: Final = {"r": 4, "steps": 2, "lr": 3e-3}
CASES: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {  # method, settings
    "fedit": ("fedit", LORA),
    "fedit epochs=1": ("fedit", {"r": 4, "lr": 3e-3, "batch_size": 4}),
    "fedit scaffold=true": ("fedit", LORA | {"scaffold": True}),
    "fedit server=adam": ("fedit", LORA | {"server": "adam", "server_lr": 1e-2}),
    "fedpetuning": ("fedpetuning", {"size": 4, "steps": 2, "lr": 3e-3}),
    "fedpeptao": ("fedpeptao", {"tokens": 4, "steps": 3, "layers_rule": "half", "lr": 4e-2}),
    "mezo": ("mezo", {"lr": 1e-4, "batch_size": 1, "tau": 8}),
    "fedkseed": ("fedkseed", {"lr": 1e-4, "batch_size": 1, "K": 8, "tau": 10}),
    "onebyte": ("onebyte", {"lr": 4e-3, "directions": 10, "batch_size": 1}),
    "onebyte wire=sign": ("onebyte", {"lr": 2e-2, "directions": 10, "batch_size": 1, "wire": "sign"}),
    "fwdllm": ("fwdllm", {"P": 8, "lr": 0.03, "variance_gate": False}),
}  # fmt: skip


# The lies ---------------------------------------------------------------------------------------------


def random(move: np.ndarray, start: np.ndarray, round: int) -> np.ndarray:
    """Return a random move of the honest one's sizes."""
    return start + np.abs(move) * np.random.default_rng([round, move.size]).normal(size=move.shape)


def constant(move: np.ndarray, start: np.ndarray, round: int) -> np.ndarray:
    """Return the same direction in every round and from every liar: all numbers up."""
    return start + np.where(move != 0, np.sqrt(np.square(move).mean()), 0.0)


LIES: Final[Mapping[str, liars.Lie | None]] = {
    "none": None,
    "turned": liars.flipped,
    "random": random,
    "constant": constant,
}


def times(lie: liars.Lie, factor: float) -> liars.Lie:
    """Return the lie that goes `factor` times as far."""
    return lambda move, start, round: start + factor * (lie(move, np.zeros(move.shape), round))


def furthest(replies: Replies, answers: Sequence[Answer], lie: liars.Lie, count: int) -> list[Answer]:
    """Return the answers, of which the first `count` are the lie, as far as it may go."""
    signs = getattr(replies.method, "wire", "") == "sign"

    def distance(answer: Answer, payload: Any) -> float:
        sent = replies.kinds[answer.client % len(replies.kinds)][0]
        reply = Reply(answer.client, answer.key, payload)
        return methods.distance_of(replies.method, replies.round.state, sent, reply)

    told = [decode(a.data or b"") for a in answers]
    moving = [distance(a, m.payload) for a, m in zip(answers[count:], told[count:], strict=True)]
    ordered = sorted([d for d in moving if d > 0] + count * [np.inf])
    found = list(answers)
    for i, answer in enumerate(answers[:count]):
        sent, spec = replies.kinds[answer.client % len(replies.kinds)]
        most = SHORT * allowed(agreed(spec) or 0) * ordered[(len(ordered) - 1) // 2]
        honest, number, factor = told[i].payload, replies.round.number, 1.0
        while True:  # a second time, and a third where codes are rounded up
            payload = liars.lied(times(lie, factor), sent, honest, number, signs=signs, fewer=False)
            gone = distance(answer, payload)
            if signs or (factor != 1.0 and gone <= most):
                break
            factor *= most / gone if factor == 1.0 else 0.97
        found[i] = answer._replace(data=encode(Message(told[i].round, told[i].base, payload)))
    return found


@contextlib.contextmanager
def lying(lie: liars.Lie | None, count: int) -> Iterator[None]:
    """Let the first `count` clients of every round send `lie`."""
    gather = Replies.gather

    def false(self: Replies, answers: Iterator[Answer]) -> None:
        every = sorted(answers, key=lambda a: a.client)
        gather(self, iter(every if lie is None else furthest(self, every, lie, count)))

    Replies.gather = false  # type: ignore[method-assign]
    try:
        yield
    finally:
        Replies.gather = gather  # type: ignore[method-assign]


@contextlib.contextmanager
def remembered(cache: dict[str, bytes]) -> Iterator[None]:
    """Do a client's work of the first round once: it is the same under every rule and lie."""
    work = LocalFleet._work

    def once(self: LocalFleet, client: int, key: int, message: bytes) -> bytes:
        if decode(message).round > 1 or getattr(
            self.method, "scaffold", False
        ):  # which remembers on the device
            return work(self, client, key, message)
        about = f"{client} {key} {hashlib.sha256(message).hexdigest()}"
        if about not in cache:
            cache[about] = work(self, client, key, message)
        return cache[about]

    LocalFleet._work = once  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalFleet._work = work  # type: ignore[method-assign]


# The runs ---------------------------------------------------------------------------------------------


def prepared(model: Model, file: str, seed: int, *, unlike: str) -> liars.Rows:
    """Return the rows of each client and the held-out ones, drawn by the seed."""
    examples = data.read(file, offline=True)
    order = np.random.default_rng(seed).permutation(len(examples))
    if ":" in unlike:
        return dealt(model, [examples[i] for i in order], seed, unlike)
    order = order[: CLIENTS * EACH + HELD]
    held, own = order[:HELD].tolist(), order[HELD:].tolist()
    if unlike == KINDS:
        own.sort(key=lambda i: examples[i].meta.get("category", ""))
    rows, _ = encode_rows(model, [examples[i] for i in held + own], LENGTH)
    rest = rows[HELD:]
    parts = [rest[c * EACH : (c + 1) * EACH] if unlike == KINDS else rest[c::CLIENTS] for c in range(CLIENTS)]
    return [*parts, rows[:HELD]]


def dealt(model: Model, examples: Sequence[data.Example], seed: int, spec: str) -> liars.Rows:
    """Return the rows of each client, as a recipe's `partition` deals them, and the held-out ones before them."""
    own = examples[HELD : None if spec.startswith("column") else HELD + DEALT]
    parts = partition(own, spec, None if spec.startswith("column") else CLIENTS, seed)
    rows = [encode_rows(model, [own[i] for i in part.tolist()], LENGTH)[0] for part in parts]
    return [*rows, encode_rows(model, examples[:HELD], LENGTH)[0]]


def played(
    model: Model,
    rows: liars.Rows,
    case: str,
    rule: str,
    lie: liars.Lie | None,
    seed: int,
    count: int,
    cache: dict[str, bytes],
    rounds: int,
) -> dict[str, Any] | None:
    """Run one case; return the losses before and after and the refused clients, None where the rule does not fit."""
    name, settings = CASES[case]
    method, parsed = methods.make(name, settings), robust.parse(rule)
    if methods.cannot_combine(method, parsed, CLIENTS):
        return None
    events: list[Any] = []

    def loss_of(state: Any) -> float:
        method.apply(model, state)
        return response_loss(model, rows[-1])

    with (
        tempfile.TemporaryDirectory() as folder,
        create(Path(folder), name, "model") as opened,
        lying(lie, count),
        remembered(cache),
    ):
        state = method.init(model, derive(seed, "init"))
        before = loss_of(state)
        fleet = LocalFleet(model, method, rows[:-1], seed, pad_id(model))
        plan = RoundPlan(rounds, 1.0, 1, seed, 0, bytes.fromhex(model.digest)[:8], rule=parsed)
        hooks = Hooks(lambda: None, lambda state: {}, events.append)
        state, *_ = run_rounds(method, fleet, state, opened, plan, hooks)
        after = loss_of(state)
        digest = hashlib.sha256(checkpoint.encode(rounds, state, checkpoint.Totals())).hexdigest()
    liars.detached(model)
    replies = {(e.round, e.client): e for e in events if isinstance(e, ClientReply)}.values()
    refused = [e.client for e in replies if e.status != "ok"]
    return {"before": before, "after": after, "refused": refused, "state": digest}


def measure(
    name: str,
    file: str,
    *,
    rules: Sequence[str],
    lies: Sequence[str],
    only: Sequence[str],
    seeds: int,
    count: int,
    unlike: str,
    rounds: int,
    to: Path | None,
) -> None:
    """Print the table as it grows; write every number to `to`."""
    began, every = time.monotonic(), []
    model = models.load(name, device="cpu", offline=True)
    work = {seed: dict[str, bytes]() for seed in range(1, seeds + 1)}
    drawn = {seed: prepared(model, file, seed, unlike=unlike) for seed in range(1, seeds + 1)}
    print("| method | untuned | liar | " + " | ".join(rules) + " |", flush=True)
    print("|---" * (3 + len(rules)) + "|", flush=True)
    for case in only:
        for cache in work.values():
            cache.clear()
        for told in lies:
            cells, before = [], 0.0
            for rule in rules:
                found = [
                    played(model, rows, case, rule, LIES[told], seed, count, work[seed], rounds)
                    for seed, rows in drawn.items()
                ]
                good = [f for f in found if f is not None]
                if not good:
                    cells.append("")
                    continue
                before = statistics.fmean(f["before"] for f in good)
                refused = sum(len(f["refused"]) for f in good)
                cells.append(
                    f"{statistics.fmean(f['after'] for f in good):.3f}" + (f" ({refused})" if refused else "")
                )
                every.append(
                    {"case": case, "lie": told, "rule": rule, "liars": count, "unlike": unlike, "seeds": good}
                )
            print(f"| `{case}` | {before:.3f} | {told} | " + " | ".join(cells) + " |", flush=True)
        if to:
            to.write_text(json.dumps({"machine": machine(), "runs": every}, indent=1) + "\n")
    print(f"\n(n): refused replies, of all rounds and seeds; {time.monotonic() - began:.0f} s")
