# SPDX-License-Identifier: Apache-2.0
"""Describe a tuning run: its header, its first event, its environment, its page of samples."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fleetune import adapters
from fleetune.common.display import counted
from fleetune.common.events import RateFound, TuneStart
from fleetune.common.files import read_json
from fleetune.common.ggml import SCALES
from fleetune.data.encode import digest
from fleetune.errors import StorageError
from fleetune.models.net.model import Model
from fleetune.runs import env_file
from fleetune.runs.rundir import RunDir
from fleetune.seeds.scale_view import moved_tensors, scales_share
from fleetune.tuning import methods
from fleetune.tuning.methods import Method
from fleetune.tuning.recipe.settled import given
from fleetune.tuning.result import foundations, places

if TYPE_CHECKING:
    from fleetune.tuning.prepare.prepare import TuneJob
    from fleetune.tuning.prepare.rates import Found
    from fleetune.tuning.recipe.recipe import Recipe

TRAINED: dict[str, Callable[[Model], int]] = {
    "ledger": lambda model: sum(math.prod(shape) for _, shape, _ in moved_tensors(model)),
    "adapter": lambda model: sum(p.numel() for p in adapters.trainable(model).values()),
}


def of_model(job: TuneJob) -> dict[str, Any]:
    """Return what env.json says of the model."""
    m = job.model
    return {
        "base_digest": m.digest,
        "tokenizer_digest": m.tokenizer_digest,
        "dtype": m.dtype,
        "device": m.device,
        **_computed_by(m.device),
    }


def _computed_by(device: str) -> dict[str, Any]:
    """Return what of the machine decides the bits of a product of matrices."""
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def of_data(job: TuneJob, run: Path) -> dict[str, Any]:
    """Return what env.json says of the data and the recipe: digests, and the options that were not the defaults.

    What it says of the defaults already stays: a run may be resumed by a version with others.
    """
    stated, parts = foundations.of_job(job), job.split
    try:
        told = read_json(run / env_file.ENVIRONMENT, "").get("given")
    except StorageError:
        told = None
    return {
        "data_sha256": job.files,
        "rows_sha256": stated.rows,
        "held_out_sha256": stated.held_out,
        "split_sha256": split_digest(parts.clients, parts.held),
        "given": told if isinstance(told, list) else given(job.recipe),
        **places.note(run),
    }


def split_digest(clients: Sequence[np.ndarray], held: np.ndarray) -> str:
    """Return the SHA-256 of which rows, by number, are held out and which each client has."""
    sha = hashlib.sha256()
    for part in (held, *clients):
        sha.update(b"part" + np.asarray(part, "<i8").tobytes())
    return sha.hexdigest()


def start(job: TuneJob, rows: Sequence[int], params: int) -> TuneStart:
    """Return the first event: who takes part with what; `rows` of every client, `params` the base model's weights."""
    recipe, parts = job.recipe, job.split
    shown = parts.column if parts.column and not recipe.partition.startswith("column") else "category"
    values = [[parts.examples[i].meta.get(shown, "") for i in part.tolist()] for part in parts.clients]
    names = sorted({v for part in values for v in part})
    few = 1 < len(names) <= 40
    return TuneStart(
        method=recipe.method,
        model=recipe.model,
        digest=job.model.digest,
        params=params,
        trained=TRAINED[job.entry.kind](job.model),
        clients=len(rows),
        rounds=recipe.rounds,
        partition=recipe.partition,
        rows_per_client=list(rows),
        held_out=len(job.held),
        column=shown if few else parts.column,
        counts={name: [part.count(name) for part in values] for name in names} if few else None,
        names=client_names(job),
        changed=given(recipe),
        held_out_digest=digest([job.held]),
    )


def rate(found: Found) -> RateFound:
    """Return the event of a learning rate that was found."""
    return RateFound(
        setting=found.setting,
        rate=found.rate,
        way=found.way,
        why=found.why,
        seconds=found.seconds,
        rates=[t.rate for t in found.tried] or None,
        losses=[t.loss for t in found.tried] or None,
        slopes=found.slopes or None,
        curvatures=found.curvatures or None,
    )


def client_names(job: TuneJob) -> list[str] | None:
    """Return the clients' names, where they are the values of a column; None where they have only numbers."""
    parts = job.split
    if not parts.column or not job.recipe.partition.startswith("column") or not len(parts.clients):
        return None
    return [str(parts.examples[int(part[0])].meta[parts.column]) for part in parts.clients]


def letters(method: Method, name: str) -> str:
    """Write a method's settings as `K 1,024 · tau 200 · lr 3e-07`; those without effect are left out."""
    parts = []
    for s in methods.settings(name):
        value = getattr(method, s.name)
        if value in (False, "") or (value == 0 and s.default == 0) or not s.has_effect(method):
            continue
        text = (
            f"{value:g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
        )
        parts.append(f"{s.name} {text}")
    return " · ".join(parts)


def header(job: TuneJob, run: RunDir, fleet: str) -> list[tuple[str, str]]:
    """Return what is about to run, for the console; `fleet` says where."""
    recipe, m = job.recipe, job.model
    share = scales_share(m)
    part = f" · trains its {recipe.train}" if recipe.train == SCALES and not share else ""
    return [
        (
            "model",
            f"{recipe.model} @ {m.digest[:8]} · {m.n_params / 1e6:,.1f} M parameters · {m.dtype}{part}",
        ),
        *(("trains", words) for words in share),
        ("method", f"{job.entry.name} · {letters(job.method, job.entry.name)}"),
        ("data", f"{Path(recipe.data).name} · {_split(job)}{_held(job)} held out"),
        *(("rows", remark) for remark in job.about_rows()),
        ("fleet", f"{fleet} · {counted(recipe.rounds, 'round')}{_rule(recipe)}"),
        *([("time", job.estimate.text)] if job.estimate else []),
        ("run", f"{run.path} · seed {recipe.seed}"),
    ]


def _rule(recipe: Recipe) -> str:
    """Return how replies are combined; nothing of the usual mean."""
    return "" if recipe.aggregation == "mean" else f" · {recipe.aggregation}"


def _unit(job: TuneJob) -> str:
    """Return what the rows of a job are: a text is cut into windows, which are counted one by one."""
    return "window" if job.examples and not any(e.messages or e.texts for e in job.examples) else "row"


def _held(job: TuneJob) -> str:
    """Return how much is held out; windows are named as such."""
    return counted(len(job.held), "window") if _unit(job) == "window" else f"{len(job.held):,}"


def _split(job: TuneJob) -> str:
    """Return how the rows are split over a simulated fleet; nothing of a real one, whose rows are not here."""
    sizes = np.array([len(r) for r in job.rows])
    if not len(sizes):
        return ""
    word = _unit(job)
    mean = f"{sizes.mean():,.0f} ± {sizes.std():,.0f} {word}s each"
    spread = mean if len(sizes) > 1 else counted(int(sizes[0]), word)
    return f"{job.recipe.partition} · {spread} · "


def samples_page(evaluation: Mapping[str, Any]) -> str:
    """Write samples.md: each fixed prompt with the base's answer, the tuned one and the data's."""
    parts = ["# The same prompts before and after tuning\n"]
    for sample in evaluation["samples"]:
        for title, key in (
            ("Prompt", "prompt"),
            ("Base", "base"),
            ("Tuned", "tuned"),
            ("Reference", "reference"),
        ):
            parts.append(
                f"**{title}**\n\n" + "\n".join("> " + line for line in _lines(sample.get(key, ""))) + "\n"
            )
        parts.append("---\n")
    return "\n".join(parts)


def _lines(text: str) -> list[str]:
    """Return the lines as Markdown sees them: a carriage return alone ends one, too."""
    return re.split(r"\r\n?|\n", text)
