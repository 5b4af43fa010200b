"""The plan against what happens: predicted and measured peak memory of every method and comparison.

Each measurement is a process of its own that loads a model from disk and does one round of a few steps the
way a device does: a message comes in, the method's own `local` works on it (`local_work`), a message goes
out.  Full SGD and Adam, which are no methods, take the same steps through the same loss.  The peak is that of
the whole process, interpreter and libraries with it; "inference with kernels" is inference in a process that
has loaded the compiled kernels, which do not depend on the model, and "mezo, torch's kernels" needs none of them
(`FLEETUNE_KERNELS=torch`).  A step's seconds are the processor's, in the same processes: a round over its steps, with
what it loads at first (Numba takes a second or two).

    python -m benchmarks.plan_memory [MODEL] [OPTIONS]

prints a table; MODEL is smollm2-135m unless stated.
"""

import argparse
import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from benchmarks.harness import child

KERNELS: Final = "inference with kernels"
TORCH: Final = "mezo, torch's kernels"  # FLEETUNE_KERNELS=torch
BACKWARD: Final = "fedkseed, backward"  # a device that back-propagates
PEPTAO: Final = "fedpeptao"
SCALES: Final = "fedpetuning, scales"  # of a base in a GGUF file: with --base mapped alone
# A method's settings for one step.
SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "mezo": {"tau": 1},
        "zosgd": {"tau": 1},
        "fedkseed": {"tau": 1},
        "onebyte": {"directions": 1},
        BACKWARD: {"backprop_steps": 1, "backprop": 1.0, "K": 1024},
        "fwdllm": {"P": 1},
        "fedit": {"steps": 1},
        "fedpetuning": {"steps": 1},
        "signlora": {"steps": 1},
        PEPTAO: {"steps": 1, "lanczos": 2},  # a tenth of its products; the plan counts as many vectors
        SCALES: {"steps": 1, "module": "scales"},
    }
)
PARTS: Final = ("inference", KERNELS, TORCH, *SETTINGS, "full SGD", "full Adam")


def compare(
    model: str, names: Sequence[str], batch: int, length: int, steps: int, dtype: str, base: str, repeats: int
) -> dict[str, dict[str, float]]:
    """Predicted and measured peak bytes, and the processor's seconds a step, of the named rows of the plan.

    Measured are medians of `repeats` processes, taken by turns.
    """
    from fleetune import models
    from fleetune.planning import device_cost, plan

    work = device_cost.Workload(batch, length, steps, dtype, base)
    planned = {row.method: row for row in plan.table(models.load_config(model), work)}
    planned[BACKWARD] = _row(model, work, planned["fedkseed"], {"backprop": 1.0})
    planned[PEPTAO] = _row(model, work, planned[PEPTAO], {"lanczos": SETTINGS[PEPTAO]["lanczos"]})
    planned[SCALES] = _row(model, work, planned["fedpetuning"], {"module": "scales"})
    turns: dict[str, list[dict[str, float]]] = {n: [] for n in names if n != SCALES or base == "mapped"}
    for name in list(turns) * repeats:
        turns[name].append(child("plan_memory", name, model, batch, length, steps, dtype, base))
    rows = {}
    for name, seen in turns.items():
        rows[name] = {key: statistics.median(turn[key] for turn in seen) for key in seen[0]}
        row = planned["inference" if name == KERNELS else "mezo" if name == TORCH else name]
        rows[name]["planned"] = row.peak + _kernels(name)
    return rows


def _row(model: str, work: Any, usual: Any, settings: Mapping[str, Any]) -> Any:
    """Return the row of a method with other settings, which the plan's table does not show."""
    from fleetune import models
    from fleetune.models.shapes import shape_of
    from fleetune.planning import device_cost
    from fleetune.tuning import methods

    shape = shape_of(models.load_config(model))
    method: Any = methods.make(usual.method, settings)
    *_, other = method.footprints(shape)
    parts = device_cost.memory(shape, work, other)
    return dataclasses.replace(usual, peak=sum(parts.values()), parts=parts, seconds=None)


def _kernels(name: str) -> int:
    """Bytes of a row's kernels beside those of its row in the plan."""
    from fleetune.planning.device_cost import KERNELS as known
    from fleetune.seeds import chosen_kernels

    here = known[chosen_kernels()]
    return {KERNELS: here, TORCH: known["torch"] - here}.get(name, 0)


def text(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The comparison as lines: peaks in MB, and what each is of inference's, bare and with the kernels loaded."""
    head = ",peak,private,of inference,with kernels,plan,plan / peak,CPU a step"
    lines = [head.split(",")]
    for name, row in rows.items():
        of = [f"{row['peak'] / rows[base]['peak']:.3f}" if base in rows else "" for base in PARTS[:2]]
        peak, private, plan = (f"{row[kind] / 1e6:,.0f} MB" for kind in ("peak", "private", "planned"))
        ratio = f"{row['planned'] / row['peak']:.3f}"
        lines.append([name, peak, private, *of, plan, ratio, f"{row['cpu']:.2f} s"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def one(
    name: str, model_name: str, batch: int, length: int, steps: int, dtype: str, base: str
) -> dict[str, float]:
    """In the child: one round, the peak of this process and of what no file backs, the processor's seconds a step."""
    import torch

    from fleetune import models
    from fleetune.common.memory import peak_rss

    torch.set_num_threads(1)
    if name == TORCH:
        os.environ["FLEETUNE_KERNELS"] = "torch"
    model = models.load(model_name, dtype=dtype, device="cpu", labels=("no", "yes"), base=base)
    model.ram = 1  # as where memory is short: activations are computed twice
    private = watched()
    if name == KERNELS:
        load_kernels(dtype)
    rows = _rows(model, batch, length)
    work = _round if name in SETTINGS or name == TORCH else _steps
    before = time.process_time()
    work("mezo" if name == TORCH else name, model, rows, batch, steps)
    cpu = (time.process_time() - before) / steps
    return {"peak": peak_rss(), "private": max(private), "cpu": cpu}


def load_kernels(dtype: str) -> None:
    """Load and compile all that a process does to tune any model: one step on a single small layer."""
    import torch

    from benchmarks import mezo_step, shape
    from fleetune.seeds.descent import two_point
    from fleetune.seeds.noise import passes, probe
    from fleetune.seeds.view import View

    layer = torch.nn.Linear(64, 128, bias=False, dtype=shape.DTYPES[dtype]).requires_grad_(False)
    view = View([("weight", layer.weight)], layer, run_key=1, law="hashed", grid=mezo_step.GRID)
    view.place(passes("hashed", mezo_step.K, *mezo_step.moved()))
    with torch.inference_mode():
        x = torch.ones(1, 64, dtype=shape.DTYPES[dtype])
        two_point(view, probe("hashed", mezo_step.K, 5), 1e-3, lambda: float(layer(x).sum()))


def watched() -> list[int]:
    """Return a list to which the bytes that no file backs (RssAnon) are added twenty times a second."""
    seen: list[int] = [0]

    def look() -> None:
        while True:
            with open("/proc/self/status", encoding="ascii") as file:
                seen[0] = max(
                    seen[0], next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
                )
            time.sleep(0.05)

    threading.Thread(target=look, daemon=True).start()
    return seen


def _rows(model: Any, batch: int, length: int) -> list[Any]:
    """Rows of `length` random tokens and a little less, as rows of a batch are; the answer is all but the first.

    For an encoder the answer is one of two labels.
    """
    import numpy as np

    from fleetune.data import Encoded

    rng = np.random.default_rng(0)
    sizes = [length - 3 * (i % 5) if batch > 1 else length for i in range(2 * batch)]
    ids = [rng.integers(0, model.net.config.vocab_size, max(2, size), dtype=np.int32) for size in sizes]
    if model.labels:
        return [Encoded(row, 0, np.zeros_like(row), i % 2) for i, row in enumerate(ids)]
    return [Encoded(row, 1) for row in ids]


def _round(name: str, model: Any, rows: list[Any], batch: int, steps: int) -> None:
    """A device's own round, from bytes to bytes; it has no state of a server's, and lets go of the bytes it has read."""
    from fleetune.data import Batches
    from fleetune.evaluation.losses import pad_id
    from fleetune.tuning import methods
    from fleetune.tuning.exchange.messages import decode
    from fleetune.tuning.rounds.local_work import Memories, work

    (counted, _), *more = SETTINGS[name].items()
    method = methods.make(name.partition(",")[0], {"batch_size": batch, counted: steps} | dict(more))
    received = decode(_message(method, model))
    work(method, model, Batches(rows, pad_id(model), 1), 1, received, Memories(), lambda *step: None)


def _message(method: Any, model: Any) -> bytes:
    """What the server sends a device in round 1."""
    from fleetune.tuning.exchange.messages import Message, encode

    payload, _ = method.kinds(method.init(model, 7))[method.kind_of(0)]
    return encode(Message(1, bytes.fromhex(model.digest)[:8], payload))


def _steps(name: str, model: Any, rows: list[Any], batch: int, steps: int) -> None:
    """Forward passes, or steps of full SGD or Adam, through the methods' loss."""
    import torch

    from fleetune.data import Batches
    from fleetune.evaluation import objectives
    from fleetune.evaluation.losses import pad_id

    batches = Batches(rows, pad_id(model), 1).steps(steps, batch)
    if name in ("inference", KERNELS):
        loss = objectives.get("loss")
        for part in batches:
            loss(model, part)
        return
    model.net.requires_grad_(True)
    optimizer = {"full SGD": torch.optim.SGD, "full Adam": torch.optim.AdamW}[name](
        model.net.parameters(), lr=1e-6
    )
    for part in batches:
        objectives.loss_tensor(model, part).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Compare the rows, and print the table."""
    parser = argparse.ArgumentParser(
        "benchmarks.plan_memory", description="The plan's peak memory against measured."
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help=", ".join(PARTS)
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--base", default="memory", choices=["memory", "mapped"])
    parser.add_argument("--repeats", type=int, default=1, help="processes of each row, whose median counts")
    o = parser.parse_args()
    print(text(compare(o.model, o.only, o.batch, o.length, o.steps, o.dtype, o.base, o.repeats)))


if __name__ == "__main__":
    main()
