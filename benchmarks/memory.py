"""Peak resident memory of a step, each mode in a process of its own.

The baseline is plain inference on the same batch: two forwards of the same objective.  The papers' step needs
one tensor beside; ours a piece of scratch.  Plain inference is measured twice: as such, and in a process that
has loaded the compiled kernels (Numba and its compiler), which is what a process that tunes has loaded
whatever the size of the model.
"""

import statistics

import torch

from benchmarks import mezo_step, papers, shape
from benchmarks.harness import Result, Row, Setting, child
from fleetune.common.memory import peak_rss, release_memory, rss
from fleetune.data import Batch
from fleetune.evaluation import objectives
from fleetune.models import Model, named_tensors
from fleetune.seeds.descent import Position, two_point
from fleetune.seeds.noise import passes, probe
from fleetune.seeds.view import View

MODES = ("inference", "inference with kernels", "ours", "papers", "papers in place", "SGD", "AdamW")
LOADED = "both processes have the compiled kernels loaded, whose size does not depend on the model"


def run(setting: Setting) -> Result:
    """Every mode in fp32; inference and ours in bf16 too."""
    result = Result()
    cases = {"fp32": MODES, "bf16": MODES[:4]}
    if setting.quick:
        cases = {"fp32": ("inference", "inference with kernels", "ours")}
    for dtype, modes in cases.items():
        peaks = {mode: _peak(setting, mode, dtype) for mode in modes}
        result.raw[dtype] = peaks
        result.rows += _rows(dtype, {mode: p["peak"] for mode, p in peaks.items()}, strict=not setting.quick)
    return result


def _peak(setting: Setting, mode: str, dtype: str) -> dict[str, float]:
    repeats = 3 if mode in MODES[:3] and not setting.quick else 1
    runs = [child("memory", mode, dtype, setting.quick) for _ in range(repeats)]
    return {key: statistics.median(r[key] for r in runs) for key in runs[0]}


def _rows(dtype: str, peak: dict[str, float], strict: bool) -> list[Row]:
    def row(name: str, mode: str, base: str, target: float | None, note: str = "") -> Row:
        ratio = peak[mode] / peak[base]
        return Row(
            f"Peak memory, {dtype}: {name}", peak[mode], peak[base], "MB", ratio, "cost", target, note=note
        )

    rows = [
        row("our MeZO step / inference", "ours", MODES[1], 1.02 if strict else None, LOADED),
        row("our MeZO step / bare inference", "ours", MODES[0], None),
    ]
    rows += [row(f"our MeZO step / {other}", "ours", other, None) for other in MODES[3:] if other in peak]
    return rows


def one(mode: str, dtype: str, quick: bool) -> dict[str, int]:
    """In the child: load, forget the peak so far, do one mode."""
    torch.set_num_threads(1)  # so that no thread's own buffers blur the comparison
    model = shape.model(quick, dtype)
    batch = shape.batch(quick, 16, 64)
    if mode in MODES[1:3]:
        load_kernels(dtype)
    release_memory()
    loaded = rss()
    WORK[mode](model, batch)
    return {"loaded": loaded, "peak": peak_rss()}


def load_kernels(dtype: str) -> None:
    # All that a process loads and compiles to tune any model: one step on a single small layer.
    layer = torch.nn.Linear(64, 128, bias=False, dtype=shape.DTYPES[dtype]).requires_grad_(False)
    view = View([("weight", layer.weight)], layer, run_key=1, law="hashed", grid=mezo_step.GRID)
    view.place(passes("hashed", mezo_step.K, *mezo_step.moved()))
    with torch.inference_mode():
        x = torch.ones(1, 64, dtype=shape.DTYPES[dtype])
        two_point(view, probe("hashed", mezo_step.K, 5), 1e-3, lambda: float(layer(x).sum()))


def _inference(model: Model, batch: Batch) -> None:
    loss = objectives.get("loss")
    loss(model, batch)
    loss(model, batch)


def _ours(model: Model, batch: Batch) -> None:
    position = Position("hashed", mezo_step.K, *mezo_step.moved())
    mezo_step.step(model, mezo_step.look(model), position, batch)


def _papers(model: Model, batch: Batch, in_place: bool = False) -> None:
    loss = objectives.get("loss")
    named = list(model.net.named_parameters())
    papers.step(named, lambda: loss(model, batch), 7, 1e-3, 1e-6, in_place=in_place)


def _gradient(model: Model, batch: Batch, kind: type[torch.optim.Optimizer]) -> None:
    model.net.requires_grad_(True)
    optimizer = kind([t for _, t in named_tensors(model.net)], lr=1e-6)  # type: ignore[call-arg]
    for _ in range(2):
        objectives.loss_tensor(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


WORK = {
    "inference": _inference,
    "inference with kernels": _inference,
    "ours": _ours,
    "papers": _papers,
    "papers in place": lambda model, batch: _papers(model, batch, True),
    "SGD": lambda model, batch: _gradient(model, batch, torch.optim.SGD),
    "AdamW": lambda model, batch: _gradient(model, batch, torch.optim.AdamW),
}
