# SPDX-License-Identifier: Apache-2.0
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
from fleetune import methods
from fleetune.data import Batches, Encoded
from fleetune.messages import Message, encode
from fleetune.methods._zeroth import pool_ids
from fleetune.seeds.noise import derive

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
    note = (
        f"the reply's {up} bytes are {tau} of steps and {head} of head (checksum, round, base, names, loss)"
    )
    result.rows += [
        Row(
            f"Wire: FedKSeed reply, tau = {tau}, a step",
            up / tau,
            8,
            "B/step",
            up / tau / 2,
            "cost",
            1.0,
            note=f"ratio to the target of 2 bytes a step, head included; {note}",
        ),
        Row(f"Wire: up, tau = {tau}", up, 8 * tau, "B", up / (8 * tau), "cost"),
        Row(f"Wire: down, K = {K}", sent, PUBLISHED_DOWN, "B", sent / PUBLISHED_DOWN, "cost"),
        Row(
            "Wire: a client's round, both ways",
            up + sent,
            8 * tau + PUBLISHED_DOWN,
            "B",
            (up + sent) / (8 * tau + PUBLISHED_DOWN),
            "cost",
            1.0,
        ),
    ]
    return result
