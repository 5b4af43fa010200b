# SPDX-License-Identifier: Apache-2.0
"""One liar in a fleet: what a client that lies in its replies does to the model, by method and by lie.

    python -m benchmarks.liars MODEL ROWS.jsonl [--json FILE] [--only NAME ..]
    python -m benchmarks.liars MODEL ROWS.jsonl --rules [RULE ..] [--lies LIE ..] [--seeds N] [--liars N] [--unlike [SPEC]]
    python -m benchmarks.liars MODEL ROWS.jsonl --claims [RULE ..]

The second form measures what aggregation rules withstand (`liars_rules.py`).  The third has six clients of eight rows, of
which the first turn their change and say how many rows they have (`CLAIMS`): as in a real fleet, nobody checks that.

Eight clients, of which client 0 does its work and then sends something else.  Every lie is well formed and within the
agreed ranges, so it is a real reply to the server: see `LIES`.  A line of the table is a method: the validation loss
before, after some rounds without a liar, and after the same rounds with it under each of the lies.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.harness import machine
from fleetune import adapters, data, models
from fleetune.common.events import ClientReply, RoundEvaluated
from fleetune.data import Encoded, encode_rows
from fleetune.errors import FleetuneError
from fleetune.evaluation.losses import pad_id, response_loss
from fleetune.models import Model
from fleetune.runs.rundir import create
from fleetune.seeds.noise import derive
from fleetune.seeds.view import View
from fleetune.tuning import checkpoint, methods, robust
from fleetune.tuning.fleets.local import LocalFleet
from fleetune.tuning.messages import LogCode, Message, Payload, decode, encode
from fleetune.tuning.rounds import Hooks, RoundPlan
from fleetune.tuning.rounds import run as run_rounds

SEED: Final = 7
EACH: Final = 6  # rows of a client
HELD: Final = 16  # rows of the validation loss
LENGTH: Final = 64  # tokens of a row
CLIENTS: Final = 8
ZEROTH: Final = {"lr": 2e-4, "batch_size": 1, "tau": 8}
PROMPTS: Final = {"tokens": 4, "steps": 4, "layers_rule": "half", "lr": 4e-2}
EPOCHS: Final = "fedit epochs=1"  # of the third form: its steps, and so its way, follow the rows
CASES: Final[Mapping[str, tuple[str, int, dict[str, Any]]]] = {  # method, rounds, settings
    "fedit": ("fedit", 2, {"r": 4, "steps": 2, "lr": 3e-3}),
    EPOCHS: ("fedit", 3, {"r": 4, "lr": 3e-3, "batch_size": 4}),
    "fedit scaffold=true": ("fedit", 2, {"r": 4, "steps": 2, "lr": 3e-3, "scaffold": True}),
    "fedit average=product": ("fedit", 2, {"r": 4, "steps": 2, "lr": 3e-3, "average": "product"}),
    "fedit server=adam": ("fedit", 2, {"r": 4, "steps": 2, "lr": 3e-3, "server": "adam"}),
    "fedpetuning": ("fedpetuning", 2, {"size": 4, "steps": 2, "lr": 3e-3}),
    "fedpeptao": ("fedpeptao", 3, PROMPTS),
    "fedkseed wire=byte": ("fedkseed", 2, ZEROTH | {"K": 64}),
    "fedkseed wire=sums": ("fedkseed", 2, ZEROTH | {"K": 64, "wire": "sums"}),
    "fedkseed backprop=0.5": ("fedkseed", 2, ZEROTH | {"K": 64, "backprop": 0.5, "backprop_lr": 3e-3}),
    "mezo": ("mezo", 2, ZEROTH),
    "zosgd": ("zosgd", 2, ZEROTH),
    "onebyte": ("onebyte", 2, {"lr": 2e-3, "directions": 8, "batch_size": 1}),
    "onebyte wire=sign": ("onebyte", 2, {"lr": 2e-3, "directions": 8, "batch_size": 1, "wire": "sign"}),
    "fwdllm": ("fwdllm", 3, {"P": 8, "lr": 0.03, "variance_gate": False}),
}  # fmt: skip


CLAIMS: Final = (  # liars, how many times as far they go, rows that they claim (0: what they have)
    (0, 0.0, 0), (1, 3.0, 0), (1, 3.0, 2**31 - 1), (1, 1.0, 2**31 - 1), (2, 3.5, 0), (2, 3.5, 2**31 - 1),
)  # fmt: skip
CLAIMED: Final = ("mean", "mean:1", "norm-clip", "median", "trimmed-mean")
OF: Final = 6  # clients of the third form,
OWN: Final = 8  # and their rows

FEWER: Final = ("fedkseed wire=byte", "fedkseed backprop=0.5")  # cases in which a reply may hold fewer codes


# The lies ---------------------------------------------------------------------------------------------

Lie = Callable[
    [np.ndarray, np.ndarray, int], np.ndarray
]  # (honest move, where it began, round) -> what is sent


def largest(move: np.ndarray, start: np.ndarray, round: int) -> np.ndarray:
    """Return the largest number that the agreement allows, everywhere."""
    top = 1e9 if move.dtype.kind == "f" else 2.0**40
    return np.full(move.shape, top)


def reversed_100(move: np.ndarray, start: np.ndarray, round: int) -> np.ndarray:
    """Return 100 times the honest move, the other way."""
    return start - 100.0 * move


def flipped(move: np.ndarray, start: np.ndarray, round: int) -> np.ndarray:
    """Return the honest move, the other way."""
    return start - 1.0 * move


def at_the_bound(factor: float) -> Lie:
    """Return the lie that goes `factor` times as far as the honest move, the other way."""
    return lambda move, start, round: start - factor * move


def noise(factor: float) -> Lie:
    """Return the lie that goes `factor` times as far as the honest move, in a random direction."""

    def sent(move: np.ndarray, start: np.ndarray, round: int) -> np.ndarray:
        drawn = np.random.default_rng([round, move.size]).normal(size=move.shape)
        return start + drawn * (factor * np.linalg.norm(move) / (np.linalg.norm(drawn) or 1.0))

    return sent


def one_number(factor: float) -> Lie:
    """Return the lie that puts `factor` times the length of the honest move, the other way, into one number.

    The rest is zero, and is left out where a reply may be shorter (`lied`).
    """

    def sent(move: np.ndarray, start: np.ndarray, round: int) -> np.ndarray:
        told = np.zeros(move.size)
        for j in np.flatnonzero(move)[:1]:  # along a direction that was drawn
            told[j] = -np.sign(move.flat[j]) * factor * np.linalg.norm(move)
        return start + told.reshape(move.shape)

    return sent


LIES: Final[Mapping[str, Lie]] = {
    "largest": largest,
    "x -100": reversed_100,
    "x -1": flipped,
    "noise x 3": noise(3.0),
    "x -3": at_the_bound(3.0),
    "one x -30": one_number(30.0),
}


def lied(lie: Lie, sent: Payload, honest: Payload, round: int, *, signs: bool, fewer: bool) -> Payload:
    """Return the payload with every array told by `lie`; scalars stay.

    `signs`: a byte is 8 signs, not a code.  `fewer`: codes after the only one that is not zero are not sent.
    """
    arrays = {}
    for name, array in honest.arrays.items():
        if array.dtype == np.uint8:
            c = 1.0 - 2.0 * np.unpackbits(array) if signs else LogCode.decode(array)
            told = lie(c, np.zeros(c.shape), round)
            told = np.trim_zeros(told, "b") if fewer and np.count_nonzero(told) == 1 else told
            arrays[name] = np.packbits(told < 0) if signs else LogCode.encode(told, np.full(told.shape, 0.5))
            continue
        start = np.asarray(sent.arrays[name], np.float64) if name in sent.arrays else np.zeros(array.shape)
        told = lie(array - start if array.dtype.kind == "f" else array.astype(np.int64), start, round)
        if array.dtype.kind == "f":
            top = min(1e9, float(np.finfo(array.dtype).max))
        else:
            top = float(np.iinfo(array.dtype).max)
        arrays[name] = np.clip(told, -top, top).astype(array.dtype)
    return Payload(arrays, honest.scalars)


@contextlib.contextmanager
def liar(
    lie: Lie | None, *, signs: bool = False, fewer: bool = False, count: int = 1, claim: int = 0
) -> Iterator[None]:
    """Let the first `count` clients of every local fleet send `lie` instead of their replies; None for an honest fleet.

    They also claim to have `claim` rows, unless that is 0.
    """
    work, rows = LocalFleet._work, LocalFleet.rows

    def declared(self: LocalFleet) -> list[int]:
        return [claim if c < count and claim else len(own) for c, own in enumerate(self.clients)]

    def lying(self: LocalFleet, client: int, key: int, message: bytes) -> bytes:
        data = work(self, client, key, message)
        if lie is None or client >= count:
            return data
        sent, told = decode(message), decode(data)
        false = lied(lie, sent.payload, told.payload, told.round, signs=signs, fewer=fewer)
        if claim:
            false = Payload(false.arrays, {**false.scalars, "n": claim})
        return encode(Message(told.round, told.base, false))

    LocalFleet._work, LocalFleet.rows = lying, property(declared)  # type: ignore
    try:
        yield
    finally:
        LocalFleet._work, LocalFleet.rows = work, rows  # type: ignore


# The runs ---------------------------------------------------------------------------------------------

Rows = list[list[Encoded]]  # of each client, then those held out


def prepared(name: str, file: str, clients: int = CLIENTS, each: int = EACH) -> tuple[Model, Rows]:
    """Return the model, and the rows of each client and the held-out ones."""
    model = models.load(name, device="cpu", offline=True)
    rows, _ = encode_rows(model, data.read(file, limit=clients * each + HELD, offline=True), LENGTH)
    rest = rows[HELD:]
    return model, [*(rest[c::clients] for c in range(clients)), rows[:HELD]]


def played(
    model: Model, rows: Rows, name: str, lie: Lie | None, rule: str = "mean", liars: int = 1, claim: int = 0
) -> dict[str, Any]:
    """Run one case; return the losses before and after, what became of the replies, and why it ended if it did."""
    method_name, count, settings = CASES[name]
    method = methods.make(method_name, settings)
    events: list[Any] = []

    def measure(state: Any) -> dict[str, float]:
        method.apply(model, state)
        return {"loss": response_loss(model, rows[-1])}

    found: dict[str, Any] = {"ended": "", "state": ""}
    with (
        tempfile.TemporaryDirectory() as folder,
        create(Path(folder), method_name, "model") as opened,
        liar(lie, signs=settings.get("wire") == "sign", fewer=name in FEWER, count=liars, claim=claim),
    ):
        state = method.init(model, derive(SEED, "init"))
        fleet = LocalFleet(model, method, rows[:-1], SEED, pad_id(model))
        found["before"] = measure(state)["loss"]
        plan = RoundPlan(count, 1.0, 1, SEED, 0, bytes.fromhex(model.digest)[:8], rule=robust.parse(rule))
        try:
            state, *_ = run_rounds(
                method, fleet, state, opened, plan, Hooks(lambda: None, measure, events.append)
            )
            found["state"] = hashlib.sha256(checkpoint.encode(count, state, checkpoint.Totals())).hexdigest()
        except FleetuneError as error:
            found["ended"] = str(error)
    detached(model)
    replies = {(e.round, e.client): e for e in events if isinstance(e, ClientReply)}.values()
    refused = [e.client for e in replies if e.status != "ok"]
    evals = [e.loss for e in events if isinstance(e, RoundEvaluated)]
    return found | {
        "after": evals[-1] if evals else None,
        "refused_liar": sum(c < liars for c in refused),
        "refused_honest": sum(c >= liars for c in refused),
        "reasons": sorted({e.reason for e in replies if e.reason}),
    }


def detached(model: Model) -> None:
    """Take off what a method has put on the model."""
    if isinstance(model.attachment, View):
        model.attachment.remove()
        model.attachment = None
    elif model.attachment is not None:
        adapters.detach(model)


def claims(name: str, file: str, rules: Sequence[str]) -> None:
    """Print the table of the third form as it grows."""
    model, rows = prepared(name, file, OF, OWN)
    print("| method | liars | lie | rows claimed | " + " | ".join(rules) + " |", flush=True)
    print("|---" * (4 + len(rules)) + "|", flush=True)
    for case in (EPOCHS, "fedit"):
        for count, factor, claim in CLAIMS:
            lie = at_the_bound(factor) if count else None
            cells = [shown(played(model, rows, case, lie, rule, count, claim)) for rule in rules]
            told = (
                [f"{count} of {OF}", f"x -{factor:g}", f"{claim:,}" if claim else "their own"]
                if count
                else ["none", "", ""]
            )
            print(f"| `{case}` | " + " | ".join([*told, *cells]) + " |", flush=True)


def shown(found: Mapping[str, Any]) -> str:
    """Return a cell of the table."""
    text = "NaN" if found["after"] is None else f"{found['after']:.3f}"
    text += f" ({found['refused_liar']}" if found["refused_liar"] or found["refused_honest"] else ""
    text += f"+{found['refused_honest']} honest" if found["refused_honest"] else ""
    text += ")" if "(" in text else ""
    return text + (" stopped" if found["ended"] else "")


def main() -> None:
    """Print the table as it grows; write every number to `--json`."""
    parser = argparse.ArgumentParser("benchmarks.liars", description="One liar among eight clients.")
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help=f"of: {', '.join(CASES)}")
    parser.add_argument(
        "--rules", nargs="*", metavar="RULE", help="compare aggregation rules (all unless named)"
    )
    parser.add_argument(
        "--lies", nargs="*", metavar="LIE", help="with --rules: none, turned, random, constant"
    )
    parser.add_argument("--seeds", type=int, default=3, help="with --rules: runs of each cell")
    parser.add_argument("--rounds", type=int, default=2, help="with --rules: rounds of a run")
    parser.add_argument("--liars", type=int, default=1, help="with --rules: liars among ten clients")
    parser.add_argument(
        "--unlike", nargs="?", const="kinds", default="", metavar="SPEC",
        help="with --rules: clients with rows of one kind or two; or a partition, as dirichlet:0.1:category",
    )  # fmt: skip
    parser.add_argument(
        "--claims",
        nargs="*",
        metavar="RULE",
        help="compare rules where liars claim rows that they do not have",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    if options.claims is not None:
        return claims(options.model, options.rows, options.claims or CLAIMED)
    if options.rules is not None:
        from benchmarks import liars_rules

        return liars_rules.measure(
            options.model, options.rows, rules=options.rules or liars_rules.RULES, lies=options.lies or list(liars_rules.LIES),
            only=options.only or list(liars_rules.CASES), seeds=options.seeds, count=options.liars,
            unlike=options.unlike, rounds=options.rounds, to=options.json,
        )  # fmt: skip
    began, every = time.monotonic(), {}
    model, rows = prepared(options.model, options.rows)
    print("| method | before | honest | " + " | ".join(LIES) + " |", flush=True)
    print("|---" * (3 + len(LIES)) + "|", flush=True)
    for name in options.only or [name for name in CASES if name != EPOCHS]:
        found = {lie: played(model, rows, name, told) for lie, told in [("honest", None), *LIES.items()]}
        every[name] = found
        cells = [f"{found['honest']['before']:.3f}", *(shown(f) for f in found.values())]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"machine": machine(), "cases": every}, indent=1) + "\n")
    print(f"\n(n): refused replies of the liar, all rounds together; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
