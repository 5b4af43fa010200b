"""Timing, ratio rows and the facts of the machine.

What is compared is timed in turn, over and over (a, b, c, a, b, c, ...), so that whatever else the machine
does falls on all alike.  Wall time is what a user waits; CPU time is of this process and all its threads, and
is the steadier number where others use the machine too.  The ratio is between medians; the ratio between
minima stands beside it, since noise only ever adds.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fleetune.common.memory import total_memory

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Setting:
    """What a benchmark is told: the small or the real model, and how often to repeat."""

    quick: bool = False

    def repeats(self, count: int) -> int:
        """`count`, or at most 2 for a quick look."""
        return min(count, 2) if self.quick else count


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat: wall time and CPU time (user + system, all threads)."""

    wall: list[float]
    cpu: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def least(self) -> float:
        return min(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)

    def beyond(self, other: Timing) -> Timing:
        """Repeat by repeat, how much longer than `other`."""
        pairs = ((self.wall, other.wall), (self.cpu, other.cpu))
        wall, cpu = ([a - b for a, b in zip(left, right, strict=True)] for left, right in pairs)
        return Timing(wall, cpu)


def clock(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall and CPU time that `work` takes, once."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(
    work: Mapping[str, Callable[[], object]],
    repeats: int,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Time every piece of work, in turn, `repeats` times after one time for warming up.

    `before[name]` is called untimed ahead of `work[name]`.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, function in work.items():
            if before is not None and name in before:
                before[name]()
            taken = clock(function)
            if repeat:
                times[name].append(taken)
    return {name: Timing([w for w, _ in pairs], [c for _, c in pairs]) for name, pairs in times.items()}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    `sense` says what `ratio` is: "cost" ours / baseline (at most the target), "gain" baseline / ours (at
    least the target), "plain" no target.
    """

    name: str
    ours: float
    baseline: float
    unit: str
    ratio: float
    sense: str = "plain"
    target: float | None = None
    ratio_least: float | None = None
    ratio_cpu: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the ratio of medians keeps the target; None without one."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.sense == "cost" else self.ratio >= self.target


def compare(
    name: str, ours: Timing, baseline: Timing, sense: str, target: float | None = None, note: str = ""
) -> Row:
    """The row of two timings."""

    def ratio(a: float, b: float) -> float:
        above, below = (a, b) if sense == "cost" else (b, a)
        return above / below if below else float("inf")

    return Row(
        name,
        ours.median,
        baseline.median,
        "s",
        ratio(ours.median, baseline.median),
        sense,
        target,
        ratio(ours.least, baseline.least),
        ratio(ours.cpu_median, baseline.cpu_median),
        note,
    )


@dataclass
class Result:
    """What a benchmark gives: rows for the table, and every single number for the JSON file."""

    rows: list[Row] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def keep(self, group: str, times: Mapping[str, Timing]) -> None:
        """Put the timings of a group among the raw numbers."""
        self.raw[group] = {name: asdict(t) for name, t in times.items()}


def child(module: str, *arguments: object) -> Any:
    """What `one(*arguments)` of a module of this package returns in a process of its own."""
    code = f"import json; from benchmarks.{module} import one; print(json.dumps(one(*{arguments!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module}.one{arguments!r} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


HEAD = ("what", "ours", "baseline", "ratio", "of minima", "of CPU", "target", "met")


def table(rows: Sequence[Row]) -> str:
    """The ratio table as text; notes are numbered below it."""
    lines, notes = [HEAD], list(dict.fromkeys(r.note for r in rows if r.note))
    for r in rows:
        mark = f" [{notes.index(r.note) + 1}]" if r.note else ""
        sign = {"cost": "<=", "gain": ">=", "plain": ""}[r.sense]
        met = {True: "yes", False: "NO", None: ""}[r.met]
        target = f"{sign} {r.target:,g}x" if r.target is not None else ""
        ratios = (_times(x) if x is not None else "" for x in (r.ratio, r.ratio_least, r.ratio_cpu))
        lines.append(
            (r.name + mark, _amount(r.ours, r.unit), _amount(r.baseline, r.unit), *ratios, target, met)
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([*text, *(f"[{i}] {note}" for i, note in enumerate(notes, 1))])


def _times(x: float) -> str:
    return f"{x:,.0f}x" if x >= 100 else f"{x:.1f}x" if x >= 10 else f"{x:.3f}x" if x < 1.2 else f"{x:.2f}x"


def _amount(x: float, unit: str) -> str:
    if unit == "MB":
        return f"{x / 1e6:,.1f} MB"
    if unit != "s":
        return f"{x:,.2f} {unit}".rstrip()
    return f"{x * 1e3:,.1f} ms" if abs(x) < 1 else f"{x:,.2f} s" if x < 120 else f"{x / 60:,.1f} min"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": total_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        **{name: version(name) for name in ("torch", "numba", "numpy", "transformers", "fleetune")},
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


class Others:
    """How much of the machine others used meanwhile: 0 quiet, 1 all of it; None where the system does not say."""

    def __init__(self) -> None:
        self.start = self._now()

    def share(self) -> float | None:
        """The share of all cores since the start that was neither idle nor ours (nor our children's)."""
        now = self._now()
        if now is None or self.start is None:
            return None
        total, busy, own = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, busy - own) / total if total else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            first = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        tick = os.sysconf("SC_CLK_TCK")
        values = [int(v) / tick for v in first]
        own = os.times()
        return sum(values), sum(values) - values[3] - values[4], sum(own[:4])
