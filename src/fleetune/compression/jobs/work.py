# SPDX-License-Identifier: Apache-2.0
"""What `fleetune compress` works on: what was asked for, the model, its rows, and how the result is told."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from fleetune.cli.console import Ui
from fleetune.common.display import human_bytes, human_time
from fleetune.errors import Interrupted, StorageError, UsageError

if TYPE_CHECKING:
    from fleetune.cli.interrupt import InterruptHandler
    from fleetune.data import Encoded, Example
    from fleetune.models.model import Model
    from fleetune.tuning.recipe import Recipe

RECORD: Final = "compress.json"
PARTS: Final = "parts"
CLIENTS: Final = "clients"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What is asked for; as it is written to `compress.json`."""

    model: str  # a model's name, or a run's folder
    run: bool
    method: str
    set: dict[str, str] = field(default_factory=dict)
    data: str = ""
    text: str = ""
    windows: int = 128
    length: int = 512
    eval_text: str = ""
    seed: int = 42
    dtype: str = "fp32"
    low_memory: bool = False  # the model stays in its files
    calibrate: str = "server"  # who calibrates: server, or clients (those of the run)
    clients: int = 0  # how many of them, 0 for all
    true_sequential: bool = False  # a layer also meets what its own block gives once compressed


@dataclass(frozen=True)
class Subject:
    """The model to compress, the rows to do it with, and what to measure it on."""

    model: Model
    rows: Sequence[Encoded]  # of the data, or of the run's held-out half: to calibrate or train on
    held: Sequence[Encoded]
    texts: Sequence[str]
    source: str
    clients: Mapping[int, Sequence[Encoded]] = field(default_factory=dict)  # of the run: their training rows

    @property
    def measured(self) -> bool:
        """Whether there is anything to measure on."""
        return bool(self.held or self.texts)


def load(work: Work, *, offline: bool) -> Subject:
    """The model, and the rows that the work asks for.  UsageError for an encoder, and as loading gives."""
    from fleetune import data, models
    from fleetune.cli.commands import eval
    from fleetune.data.encode import encode_all
    from fleetune.tuning import finished as tuned

    texts = data.read_text(work.eval_text) if work.eval_text else []
    if not work.run:
        model = models.load(
            work.model, dtype=work.dtype, device="cpu", offline=offline, paged=work.low_memory
        )
        _causal(model)
        rows = (
            encode_all(data.read(work.data, offline=offline), model.tokenizer, work.length)[0]
            if work.data
            else []
        )
        return Subject(model, rows, [], texts, work.data or work.text or "text of its own")
    recipe = tuned.recipe_of(Path(work.model))
    held = eval.held_out(Path(work.model), offline=offline)
    model = tuned.load(work.model, offline=offline, device="cpu")
    _causal(model)
    tuned.merge_weights(model)

    def encoded(rows: Sequence[Example]) -> list[Encoded]:
        return encode_all(rows, model.tokenizer, recipe.max_length)[0]

    if work.data:
        rows = encode_all(data.read(work.data, offline=offline), model.tokenizer, work.length)[0]
        return Subject(model, rows, encoded(held), texts, work.data)
    if work.text:
        return Subject(model, [], encoded(held), texts, work.text)
    if work.calibrate == CLIENTS:
        own = {client: encoded(rows) for client, rows in _of_clients(work, recipe, offline=offline).items()}
        return Subject(model, [], encoded(held), texts, "training rows of the run's clients", own)
    source = "every second held-out row of the run"
    return Subject(model, encoded(held[::2]), encoded(held[1::2]), texts, source)


def _of_clients(work: Work, recipe: Recipe, *, offline: bool) -> dict[int, list[Example]]:
    """The training rows of the clients that take part: all of the run's, or so many, drawn by the seed."""
    from fleetune.tuning import methods, prepare, rounds

    parts = prepare.split(recipe, methods.entry(recipe.method), offline=offline)
    count = len(parts.clients)
    if work.clients > count:
        raise UsageError(
            f"--clients {work.clients} are more than the run's {count}", hint="leave it out for all"
        )
    chosen = rounds.sample(count, (work.clients or count) / count, work.seed, 0)
    return {c: [parts.examples[i] for i in parts.clients[c].tolist()] for c in chosen}


def _causal(model: Model) -> None:
    if model.labels:
        raise UsageError("an encoder cannot be compressed", hint="decoders can, such as: fleetune models")


def measure(model: Model, subject: Subject) -> dict[str, float]:
    """Loss on the held-out rows and perplexity of the text, where there are any."""
    from fleetune.evaluation.losses import perplexity, response_loss

    found = {"loss": response_loss(model, subject.held)} if subject.held else {}
    return found | ({"perplexity": perplexity(model, subject.texts)} if subject.texts else {})


class OnStep(Protocol):
    """What a training calls after every step."""

    def __call__(self, step: int, steps: int, loss: float, reward: float | None = None, /) -> None:
        """Interrupted ends the training; the step is kept."""


@contextmanager
def told(ui: Ui, brake: InterruptHandler, folder: Path, what: str) -> Iterator[OnStep]:
    """Every step is told to programs, ten means of `what` to people; Interrupted comes once the brake is pulled."""
    recent: list[float] = []
    with ui.count("steps", 0) as bar:

        def on_step(step: int, steps: int, loss: float, reward: float | None = None, /) -> None:
            bar.update(step, steps, f"{what} {loss:.4f}")
            worth = {} if reward is None else {"reward": reward}
            ui.event({"event": "step", "step": step, "steps": steps, "loss": loss, **worth})
            recent.append(loss)
            if step == steps or step % max(1, steps // 10) == 0:
                ui.note(f"step {step}/{steps}  {what} {statistics.fmean(recent):.4f}")
                recent.clear()
            if brake.requested:
                raise Interrupted(
                    f"stopped after step {step}; it is kept", hint=f"fleetune compress --resume {folder}"
                )

        yield on_step


def warn_of_memory(ui: Ui, planned: int, ways: Sequence[str]) -> None:
    """A note when less memory is free than is planned; `ways` are those that take less."""
    from fleetune.planning import compression_cost
    from fleetune.tuning.rounds import rss

    free, more = compression_cost.available(), planned - rss()
    if free is not None and more > free:
        instead = f"; {' or '.join(ways)} it takes less" if ways else ""
        ui.note(f"this takes {human_bytes(more)} more, {human_bytes(free)} of memory are free{instead}")


def check_disk(folder: Path, need: int, what: str) -> None:
    """StorageError when less is free where `folder` is than `what` takes beyond what is in it already."""
    more = need - folder_bytes(folder)
    if more > (left := shutil.disk_usage(folder).free):
        raise StorageError(
            f"{what} take {human_bytes(more)}, {folder} has {human_bytes(left)} free",
            hint=f"free some space, then: fleetune compress --resume {folder}",
        )


def name_of(work: Work, model: Model) -> str:
    """A line on the model."""
    return f"{work.model} @ {model.digest[:8]} · {model.n_params / 1e6:.1f} M parameters"


def weight_bytes(model: Model) -> int:
    """The size of a model's weights in the type that they are loaded in."""
    from fleetune.planning.workload import SIZES

    return model.n_params * SIZES[model.dtype]


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def stored_bytes(folder: Path) -> int:
    """The size of the weights in a model's folder, without its tokenizer and configuration."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def drop(parts: Path) -> None:
    """Remove parts that are not needed any more.  They lose their name first: no half of them is gone on with."""
    gone = parts.with_name(f".{parts.name}.tmp")
    shutil.rmtree(gone, ignore_errors=True)  # what a kill left
    try:
        parts.rename(gone)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s is not needed any more, but cannot be removed: %s", parts, error)
    shutil.rmtree(gone, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove models that a kill left half-written."""
    for half in folder.glob(".model.*.tmp"):
        shutil.rmtree(half, ignore_errors=True)


def made(folder: Path) -> bool:
    """Whether a folder holds what its work makes: a master artefact or a plain model."""
    from fleetune.models.artefact import is_master

    return is_master(folder / "model") or any((folder / "model").glob("model*.safetensors"))


def recorded(folder: Path) -> dict[str, Any]:
    """What a folder's record says.  StorageError when it is damaged."""
    file = folder / RECORD
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{file} is damaged ({error!r})", hint="compress again: fleetune compress MODEL"
        ) from error
    return found


def finished(ui: Ui, folder: Path) -> bool:
    """Whether the work in a folder is done; then that is told again, and what a kill left goes."""
    done = recorded(folder).get("result")
    tidy(folder)
    if done is None or not made(folder):
        return False
    drop(folder / PARTS)
    ui.event({"event": "done", "folder": str(folder), **done})
    ui.note(f"{folder} is finished: there is nothing to go on with")
    return True


def finish(ui: Ui, work: Work, folder: Path, done: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Write the result down, let go of the parts and tell it; `sizes` in bytes are those of the weights that `done` measures.

    In this order: a kill before it is written leaves all that `--resume` goes on with, one after it a finished folder.
    """
    from fleetune.common.files import write_atomic

    write_atomic(folder / RECORD, json.dumps({"v": 1, **asdict(work), "result": done}, indent=1) + "\n")
    drop(folder / PARTS)
    ui.event({"event": "done", "folder": str(folder), **done})
    columns = list(sizes)
    rows: list[list[object]] = [["weights", *(human_bytes(size) for size in sizes.values())]]
    rows += [
        [name, *(f"{done[c][name]:.3f}" if name in done[c] else "" for c in columns)]
        for name in done["before"]
    ]
    if not ui.json:
        ui.table(["", *columns], rows, align="l" + "r" * len(columns))
    ui.paths([
        ("result", f"{folder / 'model'} ({human_bytes(done['bytes'])})"),
        ("time · peak memory", f"{human_time(done['seconds'])} · {human_bytes(done['peak_rss'])}"),
        ("digest", str(done["digest"])), ("next", f"fleetune export {folder} --to {_target(folder / 'model')}"),
    ])  # fmt: skip


def _target(model: Path) -> str:
    """What a result can be exported to without loss: a GGUF file, where it has a place in one."""
    from fleetune.deploy.checkpoint import open_checkpoint
    from fleetune.deploy.formats import gguf

    return "gguf" if gguf.exact_target(open_checkpoint(model), sample=True) == "gguf" else "hf"
