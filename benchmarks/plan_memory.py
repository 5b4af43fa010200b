# SPDX-License-Identifier: Apache-2.0
"""The plan against what happens: predicted and measured peak memory of every method and comparison.

Each measurement is a process of its own that loads a model from disk and does one round of a few steps the
way a device does: a message comes in, the method's own `local` works on it (`fleets.local`), a message goes
out.  Full SGD and Adam, which are no methods, take the same steps through the same loss.  The peak is that of
the whole process, interpreter and libraries with it.

    python -m benchmarks.plan_memory [MODEL] [--batch B] [--length T] [--steps S] [--dtype D]

prints one JSON object; MODEL is smollm2-135m unless stated.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from benchmarks.harness import child

PARTS = ("inference", "mezo", "fedkseed", "fedit", "full SGD", "full Adam")
SETTINGS = {"mezo": "tau", "fedkseed": "tau", "fedit": "steps"}


def compare(
    model: str, names: tuple[str, ...], batch: int, length: int, steps: int, dtype: str
) -> dict[str, Any]:
    """Predicted and measured peak bytes and seconds a step of the named rows of the plan, and their ratios."""
    from fleetune import models, plan

    work = plan.Work(batch, length, steps, dtype)
    planned = {row.method: row for row in plan.table(models.load_config(model), work)}
    rows = {}
    for name in names:
        seen = child("plan_memory", model, "--one", name, "--batch", batch, "--length", length,
                     "--steps", steps, "--dtype", dtype)  # fmt: skip
        peak, seconds = planned[name].peak, planned[name].seconds
        rows[name] = {
            "predicted": peak, "measured": seen["peak"], "ratio": round(peak / seen["peak"], 3),
            "parts": planned[name].parts, "predicted_step_seconds": seconds and round(seconds / steps, 3),
            "measured_step_seconds": round(seen["seconds"] / steps, 3),
        }  # fmt: skip
    return {"model": model, "batch": batch, "length": length, "steps": steps, "dtype": dtype, "rows": rows}


def one(name: str, model_name: str, batch: int, length: int, steps: int, dtype: str) -> dict[str, float]:
    """In the child: one round, and the peak of this process."""
    import torch

    from fleetune import models

    torch.set_num_threads(1)
    model = models.load(model_name, dtype=dtype, device="cpu")
    rows = _rows(model.net.config.vocab_size, batch, length)
    seconds = (_round if name in SETTINGS else _steps)(name, model, rows, batch, steps)
    from fleetune.rounds import peak_rss

    return {"peak": peak_rss(), "seconds": seconds}


def _rows(vocab: int, batch: int, length: int) -> list[Any]:
    """Rows of `length` random tokens and a little less, as rows of a batch are; the answer is all but the first."""
    import numpy as np

    from fleetune.data import Encoded

    rng = np.random.default_rng(0)
    sizes = [length - 3 * (i % 5) if batch > 1 else length for i in range(2 * batch)]
    return [Encoded(rng.integers(0, vocab, max(2, size), dtype=np.int32), 1) for size in sizes]


def _round(name: str, model: Any, rows: list[Any], batch: int, steps: int) -> float:
    """A method's own round, from bytes to bytes."""
    from fleetune import methods
    from fleetune.fleets.local import LocalFleet
    from fleetune.messages import Message, encode

    method = methods.make(name, {"batch_size": batch, SETTINGS[name]: steps})
    state = method.init(model, 7)
    fleet = LocalFleet(model, method, [rows], 0, 0)
    message = encode(Message(1, bytes.fromhex(model.digest)[:8], method.broadcast(state)))
    (answer,) = fleet.ask(1, [0], message)
    if answer.data is None:
        raise RuntimeError(answer.reason)
    return answer.seconds


def _steps(name: str, model: Any, rows: list[Any], batch: int, steps: int) -> float:
    """Forward passes, or steps of full SGD or Adam, through the methods' loss."""
    import time

    import torch

    from fleetune import objectives
    from fleetune.data import Batches

    began, batches = time.monotonic(), Batches(rows, 0, 1).steps(steps, batch)
    if name == "inference":
        loss = objectives.get("loss")
        for part in batches:
            loss(model, part)
        return time.monotonic() - began
    model.net.requires_grad_(True)
    optimizer = {"full SGD": torch.optim.SGD, "full Adam": torch.optim.AdamW}[name](
        model.net.parameters(), lr=1e-6
    )
    for part in batches:
        objectives.loss_tensor(model, part).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.monotonic() - began


def main() -> None:
    """Compare all rows; or, as a child, measure one."""
    parser = argparse.ArgumentParser(
        "benchmarks.plan_memory", description="The plan's peak memory against measured."
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="fp32")
    o = parser.parse_args()
    work = (o.batch, o.length, o.steps, o.dtype)
    found = one(o.one, o.model, *work) if o.one else compare(o.model, tuple(o.only), *work)
    print(json.dumps(found, indent=None if o.one else 1))


if __name__ == "__main__":
    sys.exit(main())
