"""Describe a tuning run: its header, its first event, its environment, its page of samples."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from fleetune import adapters
from fleetune.common import __version__
from fleetune.common.display import change as change_text
from fleetune.common.display import counted, human_time, show
from fleetune.common.events import TuneStart
from fleetune.common.ggml import SCALES
from fleetune.common.paired import Difference
from fleetune.common.settings import Value
from fleetune.data.encode import digest
from fleetune.evaluation.losses import response_loss
from fleetune.runs import rundir
from fleetune.seeds.scale_view import moved_tensors, scales_share
from fleetune.tuning import methods
from fleetune.tuning.prepare import private
from fleetune.tuning.prepare.data_check import about_template
from fleetune.tuning.recipe import objects
from fleetune.tuning.recipe.defaults import given
from fleetune.tuning.result import foundations
from fleetune.tuning.rounds import watch
from fleetune.tuning.rounds.checkpoint import released

if TYPE_CHECKING:
    from fleetune.tuning.prepare.prepare import TuneJob
    from fleetune.tuning.recipe.recipe import Recipe
    from fleetune.tuning.rounds.rounds import Outcome


def model_facts(job: TuneJob) -> dict[str, Any]:
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
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def data_facts(job: TuneJob, run: Path) -> dict[str, Any]:
    """Return what env.json says of the data: digests."""
    stated, parts = foundations.of_job(job), job.split
    return {
        "data_sha256": job.files,
        "rows_sha256": stated.rows,
        "held_out_sha256": stated.held_out,
        "split_sha256": split_digest(parts.clients, parts.held),
        **foundations.note_start(run),
    }


def split_digest(clients: Sequence[np.ndarray], held: np.ndarray) -> str:
    """Return the SHA-256 of which rows, by number, are held out and which each client has."""
    sha = hashlib.sha256()
    for part in (held, *clients):
        sha.update(b"part" + np.asarray(part, "<i8").tobytes())
    return sha.hexdigest()


def start_event(job: TuneJob, rows: Sequence[int], params: int) -> TuneStart:
    """Return the first event: who takes part with what; `rows` of every client, `params` the base model's weights.

    With privacy it tells of no client's rows.
    """
    recipe, parts, hidden = job.recipe, job.split, job.recipe.privacy != private.NONE
    if job.entry.kind == "ledger":
        tensors = [math.prod(shape) for _, shape, _ in moved_tensors(job.model)]
    else:
        tensors = [p.numel() for p in adapters.trainable(job.model).values()]
    shown = parts.column if parts.column and not recipe.partition.startswith("column") else "category"
    values = [[parts.examples[i].meta.get(shown, "") for i in part.tolist()] for part in parts.clients]
    names = sorted({v for part in values for v in part})
    few = 1 < len(names) <= 40 and not hidden
    return TuneStart(
        method=recipe.method,
        model=recipe.model,
        digest=job.model.digest,
        params=params,
        trained=sum(tensors),
        clients=len(rows),
        rounds=recipe.rounds,
        partition=recipe.partition,
        rows_per_client=[] if hidden else list(rows),
        held_out=len(job.held),
        column=shown if few else parts.column,
        counts={name: [part.count(name) for part in values] for name in names} if few else None,
        names=client_names(job),
        changed=given(recipe),
        held_out_digest=digest([job.held]),
    )


def client_names(job: TuneJob) -> list[str] | None:
    """Return the clients' names, where they are the values of a column; None where they have only numbers."""
    parts = job.split
    if not parts.column or not job.recipe.partition.startswith("column") or not len(parts.clients):
        return None
    return [str(parts.examples[int(part[0])].meta[parts.column]) for part in parts.clients]


def letters(method: methods.Method, name: str) -> str:
    """Write a method's settings as `K 1,024 · tau 200 · lr 3e-07`; without those of no effect, and words at their default."""
    parts = []
    for s in methods.settings(name):
        value = getattr(method, s.name)
        as_usual = isinstance(value, str) and value == s.default
        if value in (False, "") or as_usual or (value == 0 and s.default == 0) or not s.has_effect(method):
            continue
        kind = "g" if isinstance(value, float) else "," if type(value) is int else ""
        parts.append(f"{s.name} {value:{kind}}")
    return " · ".join(parts)


def header(job: TuneJob, run: rundir.RunDir, fleet: str) -> list[tuple[str, str]]:
    """Return what is about to run, for the console; `fleet` says where."""
    recipe, m = job.recipe, job.model
    share = scales_share(m)
    part = f" · trains its {recipe.train}" if recipe.train == SCALES and not share else ""
    size = f"{m.n_params / 1e6:,.1f} M parameters"
    rule = "" if recipe.aggregation == "mean" else f" · {recipe.aggregation}"
    return [
        ("model", f"{recipe.model} @ {m.digest[:8]} · {size} · {m.dtype}{_faster(job)}{part}"),
        *(("trains", words) for words in share),
        ("method", f"{job.entry.name} · {letters(job.method, job.entry.name)}"),
        ("data", f"{Path(recipe.data).name} · {_rows_words(job)} held out"),
        *(("rows", text) for text in about_template(m.tokenizer, job.split.examples)),
        *(("rows", remark) for remark in job.about_rows()),
        ("fleet", f"{fleet} · {counted(recipe.rounds, 'round')}{rule}"),
        *([("privacy", _promise(job, run.path))] if recipe.privacy != private.NONE else []),
        *([("time", job.estimate.text)] if job.estimate else []),
        ("run", f"{run.path} · seed {recipe.seed}"),
    ]


def _faster(job: TuneJob) -> str:
    """Say where the processor has instructions for bf16, in which it trains an adapter in less time.

    It is not the default: a device of a fleet may lack them, and the simulation would end with another digest than the fleet.
    """
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # none in older releases
    here = job.rows and job.model.device == "cpu" and any(has.get(name) for name in BF16)
    pays = job.entry.kind == "adapter" and job.model.n_params >= LARGE
    free = job.model.dtype == "fp32" and job.recipe.privacy == private.NONE
    return " · faster on this processor: --dtype bf16" if here and pays and free else ""


def _promise(job: TuneJob, run: Path) -> str:
    """Return what a private run is about to promise, by the rounds and releases that it has behind it."""
    if private.account(job) is None:  # a secure sum without noise
        return private.rule_of(job).text
    done = max((round for round, _ in rundir.checkpoints(run)), default=0)
    return private.planned(job, done, released(run))


def _rows_words(job: TuneJob) -> str:
    """Return how the rows are split over a simulated fleet, and how much is held out.

    A text is cut into windows, which are counted one by one; the rows of a real fleet are not here.
    """
    windows = bool(job.examples) and not any(e.messages or e.texts for e in job.examples)
    word = "window" if windows else "row"
    held = counted(len(job.held), word) if windows else f"{len(job.held):,}"
    if not job.rows:
        return held
    sizes = np.array([len(r) for r in job.rows])
    mean = f"{sizes.mean():,.0f} ± {sizes.std():,.0f} {word}s each"
    return f"{job.recipe.partition} · {mean if len(sizes) > 1 else counted(int(sizes[0]), word)} · {held}"


def samples_page(evaluation: Mapping[str, Any]) -> str:
    """Write samples.md: each fixed prompt with the base's answer, the tuned one and the data's."""
    parts = ["# The same prompts before and after tuning\n"]
    for sample in evaluation["samples"]:
        for key in ("prompt", "base", "tuned", "reference"):
            quoted = "\n".join("> " + line for line in _lines(sample.get(key, "")))
            parts.append(f"**{key.capitalize()}**\n\n{quoted}\n")
        parts.append("---\n")
    return "\n".join(parts)


def _lines(text: str) -> list[str]:
    """Return the lines as Markdown sees them: a carriage return alone ends one, too."""
    return re.split(r"\r\n?|\n", text)


BF16: Final = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # by torch's names
LARGE: Final = 50_000_000  # parameters; in smaller models products of matrices are a smaller part of a step
NEW_HEAD: Final = "the classification head is new and starts at random: the base row is of the encoder with that untrained head"
PROBE: Final = 8  # held-out rows that tell whether the start is the base
NOISE: Final = 1e-7  # of a loss, relative: kernels differ by less
PAST: Final = 0.01  # of the lowest validation loss: a result above it by more is past its best
SAME: Final = 1e-3  # nats; kernels differ by less, a random module makes more


def probe(job: TuneJob) -> float:
    """Return the loss (nats) of the model as it stands, on a few held-out rows."""
    few = job.held[:PROBE]
    return response_loss(job.model, few)


def of_start(base: Mapping[str, float], start: Mapping[str, float]) -> str:
    """Say that the rounds set out from another loss than the base's."""
    return (
        f"the untrained module changes the model: its loss is {show('loss', start['loss'])} with it and "
        f"{show('loss', base['loss'])} without. Training starts at the former; the base row is the latter"
    )


def unmoved(first: Any, last: Any, digest: str, base: str) -> bool:
    """Whether a method's last state is its first one: the same tensors, or a ledger that leaves the base's weights.

    `digest` is the result's; `base` that of the base model.
    """
    if not hasattr(last, "tensors"):
        return digest == base
    return all(np.array_equal(tensor, first.tensors.get(name)) for name, tensor in last.tensors.items())


def of_unmoved(job: TuneJob, run: rundir.RunDir, *, stays: bool) -> str:
    """Say that nothing moved (`stays`) or that nothing shows, with the cause where the events tell it, and what to do."""
    events = list(rundir.events(run.path))
    replies = [e for e in events if e["event"] == "client"]
    good = [e for e in replies if e.get("status") == "ok"]
    counting = sum(e.get("accepted", 0) >= job.recipe.quorum for e in events if e["event"] == "round")
    if not good:
        why, remedy = f"none of {counted(len(replies), 'client')} gave a good reply", "see log.txt"
    elif not counting:
        why, remedy = f"no round had {_good(job.recipe.quorum)}", "lower --quorum"
    else:
        change = "no change of any weight" if stays else "a change too small to show"
        why = f"{_good(len(good))} added up to {change}"
        remedy = "raise the learning rate (--set lr=..), or the local steps and --rounds"
        reports = [report for e in events if (report := e.get("report"))]
        if reports and (held := job.method.stays(reports[-1]))[0]:
            why, remedy = held
        elif job.objective != "loss":
            remedy += "; an objective that gives equal values at two near points moves nothing: raise batch_size or eps"
    return f"{'nothing moved' if stays else 'the validation loss did not move'}: {why}; {remedy}"


def _good(replies: int) -> str:
    return counted(replies, "good reply", "good replies")


def of_change(
    job: TuneJob,
    before: Mapping[str, float],
    after: Mapping[str, float],
    change: Difference | None,
    outcome: Outcome,
) -> str:
    """Say that the validation loss rose, or that its change is within noise; "" where it fell by more."""
    if change is None or not math.isfinite(after["loss"]):
        return ""
    rows = counted(change.rows, "held-out row")
    if change.error is None:
        return f"{rows} cannot tell a change from noise: hold more out (--held-out, --eval-rows)"
    if change.noise:
        advice = "tune longer or with a higher learning rate, or hold more rows out"
        if _past_best(job, outcome, after):
            advice = watch.advice(job.method, 3, job.recipe.noise)
        noise = f"two standard errors are {2 * change.error:.3f} on {rows}"
        return f"the change of the validation loss is within noise: {noise}; {advice}"
    if after["loss"] <= before["loss"] or job.objective != "loss":
        return ""
    shown = change_text("loss", before["loss"], after["loss"], change.error)
    return f"the validation loss rose ({shown} on {rows}): {watch.advice(job.method, 3, job.recipe.noise)}"


def _past_best(job: TuneJob, outcome: Outcome, after: Mapping[str, float]) -> bool:
    best = outcome.course
    known = best.best is not None and job.objective == "loss" and math.isfinite(after["loss"])
    return known and (best.best or 0) < outcome.round and after["loss"] - best.score > PAST * abs(best.score)


def of_course(job: TuneJob, outcome: Outcome, after: Mapping[str, float]) -> list[str]:
    """Say which round's model the result is, and that the run was stopped before its last round."""
    recipe, found = job.recipe, []
    early = ", stopped early" if outcome.last < recipe.rounds else ""
    if _past_best(job, outcome, after) and not early:
        found.append(
            f"round {outcome.course.best} was the best ({show('loss', outcome.course.score)}), and the loss rose since: "
            "--keep best keeps its model, --patience ends a run there"
        )
    if recipe.keep == "best":
        best = f"round {outcome.round}" if outcome.round else "the start, since no round was better"
        found.append(f"the result is the best of {counted(outcome.last, 'round')}{early}: {best}")
    elif early and not (recipe.patience and outcome.course.stale >= recipe.patience):
        found.append(f"stopped after round {outcome.last} of {recipe.rounds}: the privacy budget is spent")
    elif early:
        found.append(
            f"stopped early after round {outcome.last} of {recipe.rounds}: "
            f"{counted(outcome.course.stale, 'evaluated round')} in a row no better than round {outcome.course.best}"
        )
    return found


NO_CAUSE: Final = (rundir.STARTED_IN, "processors")  # of env.json: what changes no bit of a result


def progress_words(run: Path, rounds: int, account: private.Account | None = None) -> str:
    """Say after which of `rounds` rounds a run goes on, and about how long those take that its `account` leaves."""
    done = {int(e["round"]): float(e["seconds"]) for e in rundir.events(run) if e["event"] == "round"}
    last = max(done, default=0)
    said = f"goes on after round {last} of {rounds}"
    left = rounds - last if account is None else account.rounds_within(rounds - last, released(run))
    if last < rounds and not left:
        return f"the privacy budget is spent after round {last} of {rounds}: no other round is run"
    if not done or not left:
        return said
    each = statistics.median(done.values())
    return f"{said}: about {human_time(each * left)} left, {counted(left, 'round')} of {human_time(each)}"


def machine_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what of versions and machine differs from the sitting before; "" where nothing does, or it is not known."""
    both = [name for name in before if name in now and name not in NO_CAUSE]
    if not (differ := [f"{n} {before[n]} -> {now[n]}" for n in both if before[n] != now[n]]):
        return ""
    return (
        f"since the last sitting there changed: {', '.join(differ)}; the result may differ in its last bits"
    )


NAMED: tuple[str, ...] = ("model", "data", "eval_data")  # may be paths: their last part is told


def facts_of(job: TuneJob) -> dict[str, Value]:
    """Return option -> value: those of the recipe, the method's as `set.NAME`, and what they were resolved to."""
    return recipe_facts(job.recipe) | {
        "base_digest": job.model.digest,
        "parameters": job.model.n_params,
        "held_out_rows": len(job.held),
        "training_rows": sum(len(rows) for rows in job.rows),
        "fleetune": __version__,
    }


def recipe_facts(recipe: Recipe) -> dict[str, Value]:
    """Return the options of a recipe, those of its method with their defaults."""
    plain = dataclasses.asdict(recipe)
    plain.pop("set")
    found: dict[str, Value] = {n: public(str(v)) if n in NAMED else v for n, v in plain.items()}
    return found | {f"set.{name}": value for name, value in settings_of(recipe).items()}


def settings_of(recipe: Recipe) -> dict[str, Value]:
    """Return the settings of a recipe's method, each with the value that it has in the run; files by their last part."""
    values = objects.method_settings(recipe)
    return {name: public(v) if isinstance(v, str) and "/" in v else v for name, v in values.items()}


def public(name: str) -> str:
    """Return a model's or a file's name without the folders of this machine; a hub id, OWNER/NAME, stays whole."""
    path = Path(name).expanduser()
    local = path.is_absolute() or path.exists() or name.count("/") != 1
    return path.name if local else name
