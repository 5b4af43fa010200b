"""Leaks of a tuned model, measured, and what hiding them costs: without noise and at client-level epsilon 8 and 2.

Membership of a client: LiRA (Carlini et al. 2022, arXiv 2112.03570, Algorithm 1, online).  A shadow run is one round, in which
every client is with probability 1/2.  Seen is the loss on its rows.  Each run in turn is the target, and the others say how that
loss is distributed with the client in and out: normally, with one variance, as they are few.  The AUC of the likelihood ratio is
over all runs and clients; 0.5 is a guess.

Canary: each client has a row that ends in a secret of its own, random tokens.  Exposure (Carlini et al. 2019, arXiv 1802.08232,
section 4) is log2 |R| - log2 rank, by loss, among secrets R that nobody else has.  That of runs without the client is chance.

Reconstruction of a client's only row, one of 16, from one reply (prior-aware attack, Hayes et al. 2023, arXiv 2302.07225): who
knows all else makes the reply of each row, and takes the nearest.  Without noise this is what the server sees, at any epsilon;
with noise, it is a round's sum, seen by somebody who knows all other replies.

Utility: the loss on rows of nobody after equal rounds.  Rates and clips are found on held-out rows, neither the clients' nor
those.  Fleets are simulated by the loop of every run.  The two files (README.md) are looked for in the working directory.
"""

import dataclasses
import logging
import math
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

from benchmarks.harness import Result, Row, Setting
from fleetune import data, models
from fleetune.data import Batches, Encoded, encode_rows
from fleetune.evaluation.losses import all_row_losses, pad_id, token_mean
from fleetune.models import Model
from fleetune.privacy.mechanism import Privacy
from fleetune.runs.rundir import create
from fleetune.seeds.noise import derive
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import PRIVATE, Rule
from fleetune.tuning.methods import Method, Reply
from fleetune.tuning.prepare import private, rates
from fleetune.tuning.prepare.trial import restored
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.rounds.rounds import Hooks, RoundPlan
from fleetune.tuning.rounds.rounds import run as run_rounds
from fleetune.tuning.rounds.simulated_fleet import LocalFleet

MODEL, ROWS = "stories260K-hf", "databricks-dolly-15k.jsonl"
LENGTH, EACH, HELD, TESTED = 64, 3, 64, 128  # tokens of a row, rows of a client, held out, tested on
EPSILONS: Final = (0.0, 8.0, 2.0)  # 0: without noise
METHODS: Final[dict[str, dict[str, Any]]] = {
    "fedkseed": {"backprop": 1.0, "backprop_steps": 1, "backprop_lr": 0.04, "K": 1024, "batch_size": EACH},
    "fedit": {"steps": 1, "r": 2, "dropout": 0.0, "checkpointing": False, "batch_size": EACH},
    "onebyte": {"directions": 2, "K": 256, "batch_size": EACH},
    "signlora": {"steps": 1, "batch_size": EACH},
}
FLEETS, ROUNDS = {1000: 0.03, 100: 0.2}, 3  # clients: share that is asked in a round
AUDIT: Final[dict[str, dict[str, Any]]] = {  # more work, in one round
    "fedkseed": {"backprop_steps": 4},
    "fedit": {"steps": 4},
    "onebyte": {"directions": 8},
    "signlora": {"steps": 4},
}
SHADOWS, AUDITED, GUESSES, DRAWS = 32, 24, 16, 100  # runs, clients of which half are in, rows, draws of noise
SECRETS, SECRET = 255, 4  # that nobody has; tokens of one


@dataclass(frozen=True)
class Kept(Privacy):
    """A mechanism that keeps the vectors that it is given."""

    seen: list[np.ndarray] = field(default_factory=list)

    def units(self, moves: Any) -> dict[str, np.ndarray]:
        self.seen.append(np.concatenate([np.ravel(move) for move in moves.values()]))
        return super().units(moves)


@dataclass(frozen=True)
class Job:
    """A method with its rates found, on a model; its held-out rows."""

    model: Model
    recipe: Any
    held: list[Encoded]

    @property
    def method(self) -> Method:
        return methods.make(self.recipe.method, self.recipe.set)

    def rule(self, epsilon: float, clients: int, q: float, rounds: int) -> Rule:
        """Return how a run of these options combines replies, its noise and clip included."""
        hidden = {"privacy": "client", "epsilon": epsilon} if epsilon else {}
        recipe = dataclasses.replace(self.recipe, rounds=rounds, participation=q, clients=clients, **hidden)
        job = SimpleNamespace(recipe=recipe, method=self.method, model=self.model, rows=(), held=self.held)
        job.recipe = private.settled(job, find=True, note=lambda text: None)
        return private.rule_of(job)

    def tune(self, clients: list[list[Encoded]], rule: Rule, q: float, rounds: int, seed: int) -> None:
        """Run the rounds; the model is then the tuned one, until `restored` ends."""
        method, base = self.method, bytes.fromhex(self.model.digest)[:8]
        fleet = LocalFleet(self.model, method, clients, seed, pad_id(self.model))
        plan = RoundPlan(rounds, q, 1, seed, 0, base, rule=rule)
        first = method.init(self.model, derive(0, "init"))  # who attacks knows it: a ledger states it
        with tempfile.TemporaryDirectory() as folder, create(Path(folder), "bench", "model") as opened:
            hooks = Hooks(lambda: None, lambda state: {}, lambda event: None)
            method.apply(self.model, run_rounds(method, fleet, first, opened, plan, hooks).state)

    def replies(self, clients: list[list[Encoded]], numbers: Iterable[int]) -> tuple[Any, list[Reply]]:
        """Return the first state, and what clients with these numbers reply to it."""
        method, found = self.method, []
        state = method.init(self.model, derive(0, "init"))
        for rows, number in zip(clients, numbers, strict=True):
            key, payload = derive(0, "local", 1, number), method.kinds(state)[method.kind_of(0)][0]
            batches = Batches(rows, pad_id(self.model), key)
            reply = method.local(self.model, dataclasses.replace(payload), batches, key, {})
            found.append(Reply(number, key, reply))
        return state, found

    def losses(self, rows: list[Encoded]) -> tuple[np.ndarray, np.ndarray]:
        return all_row_losses(self.model, rows, 64)


def run(setting: Setting) -> Result:
    """Utility, then leaks; each figure is told at once, too.  Quick: one method on a random model."""
    logging.getLogger("fleetune").setLevel(logging.ERROR)  # rounds in which nobody takes part are no news
    result, quick = Result(), setting.quick
    read = data.read("demo" if quick else ROWS)
    model = models.tiny_llama() if quick else models.load(MODEL, dtype="fp32", device="cpu", offline=True)
    chosen = np.random.default_rng(0).permutation(len(read))[:4000]
    if not quick:
        _large(result, [read[i] for i in chosen])
    rows, _ = encode_rows(model, [read[i] for i in chosen], LENGTH)
    held, tested, rest = rows[:HELD], rows[HELD : HELD + TESTED], rows[HELD + TESTED :]
    jobs = [_job(model, name, held) for name in list(METHODS)[: 1 if quick else None]]
    for clients, q in ({10: 1.0} if quick else FLEETS).items():
        parts = [rest[i * EACH : (i + 1) * EACH] for i in range(clients)]
        for job in jobs:
            _utility(result, job, parts, q, tested)
    for job in jobs:
        longer = dataclasses.replace(job.recipe, set=job.recipe.set | AUDIT[job.recipe.method])
        audited = dataclasses.replace(job, recipe=longer)
        _reconstruction(result, audited, rest[:GUESSES])
        _leaks(result, audited, rest, setting.repeats(SHADOWS))
    return result


def _job(model: Model, name: str, held: list[Encoded]) -> Job:
    options = {"model": MODEL, "data": "demo", "method": name, "set": METHODS[name], "rounds": ROUNDS}
    recipe = recipes.make(options)
    return Job(model, rates.find(recipe, rates.wanted(recipe), model, held, 4)[0], held)


def _tell(result: Result, row: Row, **raw: Any) -> None:
    result.rows.append(row)
    result.raw[row.name] = raw
    print(f"\n{row.name}: {row.ours:.4f}, {row.baseline:.4f}, {row.ratio:.3f}", file=sys.stderr, flush=True)


def _kind(job: Job, epsilon: float) -> str:
    return f"{job.recipe.method}, " + (f"epsilon {epsilon:g}" if epsilon else "no noise")


def _utility(result: Result, job: Job, clients: list[Any], q: float, tested: list[Encoded]) -> None:
    before = plain = token_mean(*job.losses(tested))
    for epsilon in EPSILONS:
        rule = job.rule(epsilon, len(clients), q, ROUNDS)
        with restored(job.model):
            job.tune(clients, rule, q, ROUNDS, 1)
            after = token_mean(*job.losses(tested))
        plain = plain if epsilon else after
        kept = (before - after) / (before - plain) if before != plain else math.nan
        name = f"Gain kept, {len(clients):,} clients: {_kind(job, epsilon)}"
        goal, note = 0.75 if (epsilon, len(clients)) == (8, 1000) else None, f"losses; {before:.3f} before"
        row = Row(name, after, plain, "nats", kept, "gain", goal, note=note)
        _tell(result, row, mechanism=rule.text, settings=job.recipe.set)


def _large(result: Result, read: list[Any]) -> None:
    """Utility on SmolLM2-135M: the same replies of one round with and without noise; how far the server steps is found first."""
    model, count, N = models.load("smollm2-135m", dtype="fp32", device="cpu"), 20, 1000
    rows, _ = encode_rows(model, read[: HELD + EACH * count], LENGTH)
    held, tested, more = rows[: 2 * EACH], rows[2 * EACH : HELD], rows[HELD:]
    settings = METHODS["fedkseed"] | {"lr": 1e-6, "backprop_lr": 3e-4}
    options = {"model": "smollm2-135m", "data": "demo", "method": "fedkseed", "set": settings}
    job = Job(model, recipes.make(options), held)
    rules = {epsilon: job.rule(epsilon, N, count / N, 1) for epsilon in EPSILONS}
    with restored(model):

        def loss(state: Any, replies: list[Reply], rate: float, rule: Rule, rows: list[Encoded]) -> float:
            method = dataclasses.replace(job.method, server_lr=rate)  # type: ignore[call-arg]
            method.apply(model, method.aggregate(state, iter(replies), rule))
            return token_mean(*job.losses(rows))

        state, replies = job.replies([held[:EACH], held[EACH:]], (N, N + 1))
        tried = {r: loss(state, replies, r, Rule(), tested[:16]) for r in (3.0, 10.0, 30.0, 100.0, 300.0)}
        rate = min(tried, key=tried.__getitem__)
        state, replies = job.replies([more[i::count] for i in range(count)], range(count))
        before = plain = loss(state, [], 1.0, Rule(), tested[16:])
        for epsilon, rule in rules.items():
            after = loss(state, replies, rate, rule, tested[16:])
            plain = plain if epsilon else after
            kept, name = (before - after) / (before - plain), f"Gain kept, 135M: {_kind(job, epsilon)}"
            row = Row(name, after, plain, "nats", kept, "gain", note=f"losses; {before:.3f} before")
            _tell(result, row, mechanism=rule.text, tried=tried)


def _leaks(result: Result, job: Job, rows: list[Encoded], shadows: int) -> None:
    """Membership and exposure, of the same shadow runs; clients do not know of each other, so each works once."""
    rng, two = np.random.default_rng(1), EACH - 1
    secrets, own = canaries(job.model, rng, AUDITED + SECRETS), rows[: two * AUDITED]
    clients = [[*own[two * c : two * (c + 1)], secrets[c]] for c in range(AUDITED)]
    member = rng.random((shadows, AUDITED)) < 0.5
    rules = {epsilon: job.rule(epsilon, AUDITED // 2, 1.0, 1) for epsilon in EPSILONS}
    with restored(job.model):
        state, replies = job.replies(clients, range(AUDITED))
        for epsilon, rule in rules.items():
            seen, bits = np.zeros(member.shape), np.zeros(member.shape)
            for r in range(shadows):
                inside = [replies[c] for c in np.flatnonzero(member[r])]
                job.method.apply(job.model, job.method.aggregate(state, iter(inside), rule))
                sums, counts = job.losses([*own, *secrets])
                found = sums / np.maximum(counts, 1)
                seen[r] = found[: len(own)].reshape(AUDITED, two).mean(1)
                bits[r] = exposure(found[len(own) :][:AUDITED], found[len(own) + AUDITED :])
            auc, kind = area(likelihood_ratios(seen, member), member), _kind(job, epsilon)
            _tell(result, Row(f"Membership AUC: {kind}", auc, 0.5, "", auc / 0.5), mechanism=rule.text)
            exposed, chance = inside_and_out(bits, member)
            times = exposed / (chance or math.nan)
            _tell(
                result, Row(f"Canary exposure: {kind}", exposed, chance, "bits", times), mechanism=rule.text
            )


def canaries(model: Model, rng: np.random.Generator, count: int) -> list[Encoded]:
    """Return rows that begin alike and end in secrets, no two alike."""
    prompt, pieces = model.tokenizer.encode("My secret code is"), len(model.tokenizer)
    codes: set[tuple[int, ...]] = set()
    while len(codes) < count:
        codes.add(tuple(rng.integers(pieces // 2, pieces, SECRET).tolist()))  # beyond the bytes
    return [Encoded(np.array([*prompt, *code], np.int32), len(prompt)) for code in codes]


def exposure(canaries: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return log2 |R| - log2 rank of the loss of each canary, R being it and the others."""
    rank = 1 + (others[None] < canaries[:, None]).sum(1)
    return np.asarray(math.log2(len(others) + 1) - np.log2(rank))


def inside_and_out(values: np.ndarray, member: np.ndarray) -> tuple[float, float]:
    """Return the means over clients of their means in and out: a canary is compared with itself, as some are likely anyway."""
    known = member.any(0) & ~member.all(0)
    inside, out = ((values * side).sum(0)[known] / side.sum(0)[known] for side in (member, ~member))
    return float(inside.mean()), float(out.mean())


def likelihood_ratios(seen: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Return log p(seen | in) / p(seen | out) of each run and client, by the other runs; 0 where they say nothing."""
    ratios = np.zeros(seen.shape)
    for r, c in np.ndindex(*seen.shape):
        others = np.arange(len(seen)) != r
        out, inside = (seen[others & (member[:, c] == side), c] for side in (False, True))
        if min(len(out), len(inside)) > 1:
            squares = sum(len(part) * part.var() for part in (out, inside))
            variance = max(squares / (len(seen) - 3), 1e-12)
            far, near = (np.square(seen[r, c] - part.mean()) for part in (out, inside))
            ratios[r, c] = (far - near) / (2 * variance)
    return ratios


def area(scores: np.ndarray, member: np.ndarray) -> float:
    """Return the area under the curve of true against false positives."""
    apart = scores[member][:, None] - scores[~member][None]
    return float(((apart > 0) + 0.5 * (apart == 0)).mean())


def _reconstruction(result: Result, job: Job, guesses: list[Encoded]) -> None:
    kept = Kept(1.0, 1.0, 1.0, 1)
    with restored(job.model):
        state, replies = job.replies([[row] for row in guesses], [0] * len(guesses))
    for reply in replies:
        job.method.aggregate(state, iter([reply]), Rule(PRIVATE, privacy=kept))
    for epsilon in EPSILONS:
        privacy = job.rule(epsilon, AUDITED // 2, 1.0, 1).privacy
        clip, noise = (privacy.clip, privacy.noise) if privacy else (math.inf, 0.0)
        rate, name = guessed(np.array(kept.seen), clip, noise), f"Row found: {_kind(job, epsilon)}"
        _tell(result, Row(name, rate, 1 / len(guesses), "", rate * len(guesses)))


def guessed(vectors: np.ndarray, clip: float, noise: float) -> float:
    """Return how often the right vector is the nearest to it clipped, with noise."""
    rng, norms = np.random.default_rng(2), np.linalg.norm(vectors, axis=1, keepdims=True)
    cut = vectors * np.minimum(1.0, clip / np.maximum(norms, 1e-300))
    right = []
    for _ in range(DRAWS):
        seen = cut + (noise * clip * rng.standard_normal(cut.shape) if noise else 0.0)
        nearest = (seen @ cut.T - np.square(cut).sum(1) / 2).argmax(1)
        right.append(nearest == np.arange(len(cut)))
    return float(np.mean(right))
