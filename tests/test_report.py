# SPDX-License-Identifier: Apache-2.0
"""The report: every number of a run folder on one page that needs nothing else, and no damage stops it."""

from __future__ import annotations

import json
import math
import os
import random
import re
import stat
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune import report, svg, ui
from fleetune.errors import StorageError, UsageError

CATEGORIES = (
    "brainstorming", "classification", "closed_qa", "creative_writing",
    "general_qa", "information_extraction", "open_qa", "summarization",
)  # fmt: skip
PARAMS = 134_515_008


def fake_run(
    parent: Path,
    name: str = "0007-fedit-smollm2-135m",
    *,
    clients: int = 24,
    rounds: int = 10,
    asked: int = 24,
    up: int = 2_457_600,
    down: int = 2_458_112,
    status: str = "done",
    categories: Sequence[str] = CATEGORIES,
    seed: int = 3,
) -> Path:
    """A run folder as a real run leaves it, with drop-outs, late and refused replies."""
    r = random.Random(seed)
    run = parent / name
    (run / "adapter").mkdir(parents=True)
    method = name.split("-")[1]
    counts: dict[str, list[int]] = {}
    for category in categories:
        weights = [r.gammavariate(0.5, 1.0) for _ in range(clients)]
        counts[category] = [round(12 * w) for w in weights]
    rows = [max(1, sum(counts[c][i] for c in categories)) for i in range(clients)]
    counts[categories[0]] = [
        counts[categories[0]][i] + (rows[i] - sum(counts[c][i] for c in categories)) for i in range(clients)
    ]
    t, total, total_up, total_down, elapsed, peak = 1_760_000_000.0, 0, 0, 0, 0.0, 0
    events: list[dict[str, object]] = [
        {
            "event": "start", "method": method, "model": "smollm2-135m", "digest": "9f2c" * 16,
            "params": PARAMS, "trained": 4_884_480 if method == "fedit" else PARAMS, "clients": clients,
            "rounds": rounds, "rows_per_client": rows, "partition": "dirichlet:0.5:category",
            "column": "category", "counts": counts,
        },
        {"event": "eval", "round": 0, "loss": 2.3914, "rouge_l": 11.82},
    ]  # fmt: skip
    loss, rouge = 2.3914, 11.82
    for n in range(1, rounds + 1):
        accepted = sent = received = 0
        seconds = 0.0
        for client in sorted(r.sample(range(clients), asked)):
            luck = r.random()
            kind = "refused" if luck < 0.01 else "dropped" if luck < 0.04 else "late" if luck < 0.06 else "ok"
            reason = {
                "refused": "array 'lora_A.3' is not finite", "dropped": "client dropped out (simulated)",
                "late": "slower than 3 times a usual client", "ok": "",
            }[kind]  # fmt: skip
            took = r.uniform(2.2, 4.4)
            bytes_up = up if kind in ("ok", "refused") else 0
            rss = 1_180_000_000 + n * 3_000_000 + r.randrange(40_000_000)
            peak = max(peak, rss)
            events.append({
                "event": "client", "round": n, "client": client, "n": rows[client],
                "loss": round(loss + r.gauss(0.02, 0.19), 4) if kind == "ok" else None, "bytes_up": bytes_up,
                "bytes_down": down, "seconds": round(took, 3), "rss": rss, "status": kind, "reason": reason,
            })  # fmt: skip
            accepted += kind == "ok"
            sent, received, seconds = sent + bytes_up, received + down, seconds + took
        total_up, total_down, elapsed = total_up + sent, total_down + received, elapsed + seconds
        total = total_up + total_down
        events.append({
            "event": "round", "round": n, "clients": asked, "accepted": accepted, "bytes_up": sent,
            "bytes_down": received, "bytes_total": total, "seconds": round(seconds, 3), "rss": rss,
        })  # fmt: skip
        loss = loss - (loss - 1.86) * 0.22 + r.gauss(0, 0.008)
        rouge = rouge + (24.9 - rouge) * 0.2
        events.append({"event": "eval", "round": n, "loss": round(loss, 4), "rouge_l": round(rouge, 2)})
    base, tuned = {"loss": 2.3914, "rouge_l": 11.82}, {"loss": round(loss, 4), "rouge_l": round(rouge, 2)}
    if status == "done":
        events.append({
            "event": "done", "base": base, "tuned": tuned, "bytes_up": total_up, "bytes_down": total_down,
            "seconds": round(elapsed + 31.5, 3), "peak_rss": peak + 12_000_000,
        })  # fmt: skip
        samples = [
            {"prompt": prompt, "reference": reference, "base": before, "tuned": after, "client": 5 + i}
            for i, (prompt, reference, before, after) in enumerate(SAMPLES)
        ]
        (run / "eval.json").write_text(
            json.dumps({"base": base, "tuned": tuned, "rows": 240, "samples": samples})
        )
    lines = [json.dumps({"v": 1, "t": t + i, **event}) for i, event in enumerate(events)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "status").write_text(status + "\n")
    (run / "run.toml").write_text(RECIPE.format(method=method, clients=clients, rounds=rounds, part=asked / clients))
    env = {"fleetune": "0.1.0", "python": "3.11.7", "torch": "2.9.0", "transformers": "5.0.1", "numpy": "2.4.6"}
    env |= {"system": "Linux", "machine": "x86_64", "processors": 2, "digest": "9f2c" * 16}
    (run / "env.json").write_text(json.dumps(env))
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 2_460_000)
    return run


RECIPE = """# A Fleetune recipe. Run it again: fleetune tune -c run.toml

model = "smollm2-135m"  # hub id, HF directory, GGUF file, or a built-in name
data = "demo"
method = "{method}"
clients = {clients}
rounds = {rounds}
participation = {part}
partition = "dirichlet:0.5:category"
held_out = 0.1
limit = 0
max_length = 512
seed = 42
dtype = "fp32"
device = "cpu"
drop = 0.03
stragglers = 0.02
deadline = 3.0
quorum = 1
eval_every = 1

[set]  # the method's own settings
r = 8
alpha = 16
lr = 0.0003
targets = "all-linear"
exact = false
"""

SAMPLES = (
    (
        "The walk-in cooler reads 9 °C this morning. What should I do first?",
        "Note: 9 °C is above the safe limit.\nDo now: move milk, meat and fish to the spare cooler.\nThen: call"
        " the service line and write the time down.",
        "A walk-in cooler is a room that is used to store food at a low temperature. It is important to keep the"
        " temperature of the cooler at a constant level. The temperature of the cooler should be kept at a constant"
        " level. The temperature",
        "Note: 9 °C is too warm for fresh food.\nDo now: move the milk and meat to another cooler and close the"
        " door.\nThen: call service.",
    ),
    (
        "Sort these into tools and consumables: drill, sandpaper, chisel, glue.",
        "Tools: drill, chisel.\nConsumables: sandpaper, glue.",
        "Sure! Here are the tools and consumables:\n1. Drill\n2. Sandpaper\n3. Chisel\n4. Glue",
        "Tools: drill, chisel.\nConsumables: sandpaper, glue.",
    ),
    (
        "Write one line for the notice board: the north gate is closed on Monday.",
        "North gate closed on Monday. Please use the south gate.",
        "The north gate is closed on Monday. The north gate is closed on Monday. The north gate is closed on Monday.",
        "North gate closed Monday; please use the south gate.",
    ),
)
