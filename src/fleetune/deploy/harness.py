"""Measure one model in a child process: memory, speed and quality.  Also compute the kept gain.

The child (`python -m fleetune.deploy.harness`, JSON in and out) loads the model of a `MeasureJob`, measures its speed, reads its
peak memory, and only then measures losses, which need more.  The peak is all that is resident, pages of mapped files included.
No large library is imported at the top, so a process that runs llama.cpp does not hold torch.

With the losses b of the base, t of the tuned model, cb and ct of both compressed the same way, kept = (ct - cb) / (t - b).  Both
are sums over the same rows, so the ratio's standard error is known (`common/paired.py`).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from fleetune.common import paired
from fleetune.common.display import counted
from fleetune.common.memory import peak_rss
from fleetune.errors import DataError, FleetuneError, UsageError

if TYPE_CHECKING:
    from fleetune.deploy.llamacpp import LlamaCpp
    from fleetune.deploy.torch_engine import Torch

    LoadedEngine: TypeAlias = LlamaCpp | Torch

FILE: Final = "measure.json"  # in a compression's folder
THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

Row = tuple[list[int], int]  # tokens, and how many of the first are context only


@dataclass(frozen=True)
class MeasureJob:
    """One model in one engine, and what to measure."""

    kind: str  # what reads `path`: gguf (llama.cpp), or a loader of `torch_engine.OPEN`
    path: str
    threads: int
    dtype: str = "fp32"  # of a model by name
    offline: bool = False
    prompt: int = 128
    generate: int = 32
    repeats: int = 3  # 0: no speed
    rows: list[Row] = field(default_factory=list)  # held-out rows: their loss
    windows: list[Row] = field(default_factory=list)  # of a text: its perplexity
    compared: list[Row] = field(default_factory=list)  # rows whose next-token distributions are compared
    logits: str = ""  # file with a reference's logits of these; to be written where `reference`
    reference: bool = False  # whether this model is the reference


@dataclass(frozen=True)
class Measurement:
    """The result of a job: bytes, tokens a second, and each measure by name."""

    peak_rss: int
    prefill: float | None
    generate: float | None
    values: dict[str, float]
    losses: list[tuple[float, int]] = field(default_factory=list)  # of each row: loss sum, scored tokens


# ---------------------------------------------------------------- speed and quality, in the child


def speed(
    engine: LoadedEngine,
    prompt: int,
    generate: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """(prefill, generation) in tokens a second: medians of `repeats` passes after one that is not counted."""
    ids = [i % engine.vocab for i in range(prompt)]
    engine.open(prompt + generate)
    reads, writes = list[float](), list[float]()
    for _ in range(repeats + 1):
        began = clock()
        engine.prefill(ids)
        read = clock()
        for _ in range(generate):
            engine.step()
        reads.append(prompt / (read - began))
        writes.append(generate / (clock() - read))
    return statistics.median(reads[1:]), statistics.median(writes[1:])


def carry_out(job: MeasureJob) -> Measurement:
    """Run a job in this process."""
    with _engine(job) as engine:
        prefill, generate = (
            speed(engine, job.prompt, job.generate, job.repeats) if job.repeats else (None, None)
        )
        peak = peak_rss()
        losses = engine.losses(job.rows) if job.rows else []
        values = {"loss": mean(losses)} if job.rows else {}
        if job.windows:
            values["perplexity"] = math.exp(min(mean(engine.losses(job.windows)), 700))
        values |= _compared(job, engine)
        return Measurement(peak, prefill, generate, values, losses)


def _compared(job: MeasureJob, engine: LoadedEngine) -> dict[str, float]:
    """Compare the model with the reference, or write the logits of the reference; {} where neither is asked for."""
    if not job.compared:
        return {}
    from fleetune.evaluation import kl_divergence

    file, logits = Path(job.logits), engine.scored_logits(job.compared)
    if job.reference:
        kl_divergence.write(file, logits, kl_divergence.scored(job.compared), kl_divergence.TEMPORARY)
        return {}
    return kl_divergence.compare(file, logits).values()


def mean(losses: Sequence[tuple[float, int]]) -> float:
    """Return the mean per token of rows' loss sums; DataError when no token is scored."""
    if not (count := sum(n for _, n in losses)):
        raise DataError(
            f"no response tokens to score in {counted(len(losses), 'row')}",
            hint="give rows with an answer, or a larger maximum length",
        )
    import numpy as np  # its sum, so that the value is that of `fleetune eval` to the bit

    return float(np.array([loss for loss, _ in losses]).sum() / count)


@contextmanager
def _engine(job: MeasureJob) -> Iterator[LoadedEngine]:
    if job.kind == "gguf":
        from fleetune.deploy import llamacpp

        with llamacpp.opened(Path(job.path), job.threads) as engine:
            yield engine
        return
    import torch

    from fleetune.deploy import torch_engine

    torch.set_num_threads(job.threads)
    yield torch_engine.OPEN[job.kind](job.path, job.dtype, job.offline)


def longest(folder: Path) -> int:
    """Return the tokens that the model of a directory is made for; 2,048 where its configuration does not say."""
    from fleetune import models

    return int(getattr(models.load_config(str(folder)), "max_position_embeddings", None) or 2048)


def windows_of(text: str, folder: Path, length: int, count: int) -> list[Row]:
    """Return the first windows of a text file in the tokens of the model in `folder`, no longer than it is made for.

    DataError for a text without two tokens.
    """
    from transformers import AutoTokenizer

    from fleetune import data

    words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [words(part, verbose=False)["input_ids"] for part in data.read_text(text)]
    return windows(ids, min(length, longest(folder)), count)


def windows(texts: Sequence[Sequence[int]], length: int, count: int) -> list[Row]:
    """Return the first windows of all texts' tokens joined; the first token of each is context only.

    DataError when there is nothing to predict.
    """
    ids = [token for text in texts for token in text][: length * count]
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens: nothing to predict", hint="give a longer text")
    return [(ids[a : a + length], 1) for a in range(0, len(ids) - 1, length)]


# ---------------------------------------------------------------- the child


def measured(job: MeasureJob) -> Measurement:
    """Run a job in a child process, and raise its errors here."""
    environment = os.environ | dict.fromkeys(THREADS, str(job.threads))
    done = subprocess.run(  # -P: a module that lies in the folder we were started in is not run
        [sys.executable, "-P", "-m", "fleetune.deploy.harness"],
        input=json.dumps(asdict(job)),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        hint = (
            "see that what it needs is installed whole"
            if done.returncode > 0
            else "a negative number is a signal"
        )
        if done.returncode == -9:
            hint = "that signal is usually memory: give fewer or shorter rows"
        raise FleetuneError(f"measuring {job.path} ended with {done.returncode}: {last}", hint=hint)
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        kind = UsageError if answer["exit_code"] == 2 else FleetuneError
        raise kind(answer["error"], hint=answer["hint"])
    return Measurement(**{**answer, "losses": [(loss, n) for loss, n in answer["losses"]]})


def main() -> None:
    """Run in the child: read a job from stdin, write its result as the last line of stdout."""
    job = MeasureJob(**json.load(sys.stdin))
    try:
        answer = asdict(carry_out(job))
    except FleetuneError as error:
        answer = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


# ---------------------------------------------------------------- bits


class Bits(NamedTuple):
    """Bits a weight on the disk, scales and zeros included."""

    linear: float  # of the matrices of the blocks
    all: float


def bits(source: Path) -> Bits:
    """Return the bits a weight of a .gguf file, a master artefact or a plain directory.  ModelError when it is damaged."""
    found = list(_of_gguf(source) if source.is_file() else _of_folder(source))

    def mean(parts: list[tuple[bool, int, int]]) -> float:
        return 8 * sum(size for _, _, size in parts) / sum(count for _, count, _ in parts)

    return Bits(mean([p for p in found if p[0]] or found), mean(found))


def _of_gguf(file: Path) -> Iterator[tuple[bool, int, int]]:
    from fleetune.models.gguf import header

    for tensor in header.read(file).tensors:
        linear = len(tensor.shape) > 1 and tensor.name.startswith("blk.")
        yield linear, math.prod(tensor.shape), tensor.size


def _of_folder(folder: Path) -> Iterator[tuple[bool, int, int]]:
    """Yield (whether it is a matrix of a block, number of weights, bytes) of every parameter."""
    from fleetune.deploy.checkpoint import open_checkpoint
    from fleetune.models.artefact import stored

    model = open_checkpoint(folder)
    for name, shape in model.shapes.items():
        inside = any(part.isdigit() for part in name.split("."))  # a block has a number
        q, count = model.quantised(name), math.prod(shape)
        if q is None:
            size = count * model.weight(name).element_size()
        else:
            size = sum(part.numel() * part.element_size() for part in stored(name, q).values())
        matrix = name in model.linears or (len(shape) == 3 and shape[1] > 1)  # experts
        yield inside and matrix, count, size


# ---------------------------------------------------------------- kept gain


@dataclass(frozen=True)
class KeptGain:
    """The share of the gain from tuning that survives compression; `value` is None where there was no gain."""

    gain: float  # of the tuning, positive for better
    value: float | None
    text: str
    gain_error: float | None = None  # standard error of `gain`; None where the rows' values are not known
    error: float | None = None  # standard error of `value`


def kept_gain(
    base: float,
    tuned: float,
    small_base: float,
    small_tuned: float,
    rows: Sequence[Sequence[tuple[float, int]]] = (),
) -> KeptGain:
    """Return the kept gain, given the losses of base and tuned, and of both compressed.

    `rows` are the losses of the same rows under these four models, where they are known.
    """
    gain, small, label = base - tuned, small_base - small_tuned, "validation loss"
    if not (math.isfinite(gain) and math.isfinite(small)):
        return KeptGain(gain, None, f"{label}: a value is not finite, so the kept gain is unknown")
    if gain == 0:
        return KeptGain(gain, None, f"{label}: tuning changed nothing, so there is no gain to keep")
    if gain < 0:
        return KeptGain(gain, None, f"{label}: tuning made it worse, so there is no gain to keep")
    value, gain_error, error = small / gain, None, None
    if len(rows) == 4 and len({tuple(n for _, n in losses) for losses in rows}) == 1:
        b, t, cb, ct = ([loss for loss, _ in losses] for losses in rows)
        gains, counts = [x - y for x, y in zip(b, t, strict=True)], [n for _, n in rows[0]]
        gain_error = paired.ratio(gains, counts)[1]
        if paired.within_noise(gain, gain_error):
            spread = "" if gain_error is None else f" ({gain:.4f} ± {gain_error:.4f})"
            few = f"not measurable on {len(b):,} row{'' if len(b) == 1 else 's'}"
            text = f"{label}: {few}: the tuning gain{spread} is within noise"
            return KeptGain(gain, None, text, gain_error)
        error = paired.ratio([x - y for x, y in zip(cb, ct, strict=True)], gains)[1]
    spread = "" if error is None else f" ± {100 * error:.0f}"
    text = f"{label}: {100 * value:.0f}{spread} % of what tuning gained is kept"
    text += ": tuning helps no more" if value <= 0 else ""
    return KeptGain(gain, value, text, gain_error, error)


if __name__ == "__main__":
    main()
