"""Bytes of one FedKSeed round, as encoded, against the published 18 kilobytes.

The published figure (arXiv 2312.06353, "communication cost under 18 kilobytes"), with K = 4096 and tau = 200:
down 4 bytes a pool seed, up a seed and a scalar a step (8 bytes), and 4 bytes for the seed of the pool:
4 K + 8 tau + 4 = 17,988.

Ours are the lengths of the messages that the loop sends: a real reply of a real client on a tiny model (its
size does not depend on the model), and an announcement in which every one of the K sums is taken.
"""

from __future__ import annotations

import numpy as np

from benchmarks.fleet_overhead import BASE, tiny
from benchmarks.harness import Result, Row, Setting
from benchmarks.shape import rows
from fleetune.data import Batches, Encoded
from fleetune.seeds.noise import derive
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, encode
from fleetune.tuning.methods._zeroth import pool_ids

TAU, K = 200, 4096
PUBLISHED_UP, PUBLISHED_DOWN = 8 * TAU, 4 * K + 4


def run(setting: Setting) -> Result:
    """Bytes up, bytes down, both, and a step's share of the reply."""
    result, tau = Result(), 20 if setting.quick else TAU
    model, method = tiny(), methods.make("fedkseed", {"tau": tau, "K": K})
    state = method.init(model, derive(7, "init"))
    sums = np.random.default_rng(0).normal(0, 3000, K).astype(np.int64)
    state = state._replace(ledger=state.ledger.append(pool_ids(0, np.arange(K)), sums, 1), round=1)
    down = method.broadcast(state)
    encoded = [Encoded(e.ids % 512, e.n_prompt) for e in rows(True, 8, 32)]
    reply = method.local(model, down, Batches(encoded, 257, 1), 1, {})
    up = len(encode(Message(2, BASE, reply)))
    head = up - sum(a.nbytes for a in reply.arrays.values())
    sent = len(encode(Message(2, BASE, down)))
    result.raw["bytes"] = {"tau": tau, "K": K, "up": up, "up_head": head, "down": sent}
    note = f"{tau} bytes of steps and {head} of head (checksum, round, base, names, loss); 2 bytes a step are 0.25x"
    published = PUBLISHED_UP * tau // TAU
    for name, ours, theirs, unit, target in (
        (f"reply of {tau} steps, a step", up / tau, published / tau, "B/step", 2 / 8),
        (f"reply of {tau} steps", up, published, "B", None),
        (f"announcement, K = {K}", sent, PUBLISHED_DOWN, "B", None),
        ("a client's round, both ways", up + sent, published + PUBLISHED_DOWN, "B", 1.0),
    ):
        row = Row(
            f"Wire: {name}",
            ours,
            theirs,
            unit,
            ours / theirs,
            "cost",
            target,
            note=note if target == 0.25 else "",
        )
        result.rows.append(row)
    return result
