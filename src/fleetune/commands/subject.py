# SPDX-License-Identifier: Apache-2.0
"""What `fleetune compress` works on: what was asked for, the model, its rows, and how the result is told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetune.errors import UsageError
from fleetune.text import human_bytes, human_time
from fleetune.ui import Ui

if TYPE_CHECKING:
    from fleetune.data import Encoded, Example
    from fleetune.models import Model

RECORD: Final = "compress.json"
PARTS: Final = "parts"


@dataclass(frozen=True)
class Work:
    """What is asked for; as it is written to `compress.json`."""

    model: str  # a model's name, or a run's folder
    run: bool
    method: str
    set: dict[str, str]
    data: str
    text: str
    windows: int
    length: int
    eval_text: str
    seed: int
    dtype: str


@dataclass(frozen=True)
class Subject:
    """The model to compress, the rows to do it with, and what to measure it on."""

    model: Model
    rows: Sequence[Encoded]  # of the data, or of the run's held-out half: to calibrate or train on
    held: Sequence[Encoded]
    texts: Sequence[str]
    source: str


def load(work: Work, *, offline: bool) -> Subject:
    """The model, and the rows that the work asks for.  UsageError for an encoder, and as loading gives."""
    from fleetune import data, models, tuned
    from fleetune.commands import evaluate
    from fleetune.data.encode import encode_all

    texts = data.read_text(work.eval_text) if work.eval_text else []
    if not work.run:
        model = models.load(work.model, dtype=work.dtype, device="cpu", offline=offline)
        _causal(model)
        rows = (
            encode_all(data.read(work.data, offline=offline), model.tokenizer, work.length)[0]
            if work.data
            else []
        )
        return Subject(model, rows, [], texts, work.data or work.text or "text of its own")
    recipe = tuned.recipe_of(Path(work.model))
    held = evaluate.held_out(Path(work.model), offline=offline)
    model = tuned.load(work.model, offline=offline, device="cpu")
    _causal(model)
    tuned.settle(model)

    def encoded(rows: Sequence[Example]) -> list[Encoded]:
        return encode_all(rows, model.tokenizer, recipe.max_length)[0]

    if work.data:
        rows = encode_all(data.read(work.data, offline=offline), model.tokenizer, work.length)[0]
        return Subject(model, rows, encoded(held), texts, work.data)
    if work.text:
        return Subject(model, [], encoded(held), texts, work.text)
    source = "every second held-out row of the run"
    return Subject(model, encoded(held[::2]), encoded(held[1::2]), texts, source)


def _causal(model: Model) -> None:
    if model.labels:
        raise UsageError("an encoder cannot be compressed", hint="decoders can, such as: fleetune models")


def measure(model: Model, subject: Subject) -> dict[str, float]:
    """Loss on the held-out rows and perplexity of the text, where there are any."""
    from fleetune.losses import perplexity, response_loss

    found = {"loss": response_loss(model, subject.held)} if subject.held else {}
    return found | ({"perplexity": perplexity(model, subject.texts)} if subject.texts else {})


def name_of(work: Work, model: Model) -> str:
    """A line on the model."""
    return f"{work.model} @ {model.digest[:8]} · {model.n_params / 1e6:.1f} M parameters"


def weight_bytes(model: Model) -> int:
    """The size of a model's weights in memory."""
    return sum(p.numel() * p.element_size() for p in model.net.parameters())


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def finish(ui: Ui, work: Work, folder: Path, done: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Write the result down and tell it; `sizes` in bytes are those of what `done` has measures of."""
    from fleetune.files import write_atomic

    write_atomic(folder / RECORD, json.dumps({"v": 1, **asdict(work), "result": done}, indent=1) + "\n")
    ui.event({"event": "done", "folder": str(folder), **done})
    columns = list(sizes)
    rows: list[list[object]] = [["size", *(human_bytes(size) for size in sizes.values())]]
    rows += [
        [name, *(f"{done[c][name]:.3f}" if name in done[c] else "" for c in columns)]
        for name in done["before"]
    ]
    if not ui.json:
        ui.table(["", *columns], rows, align="l" + "r" * len(columns))
    ui.paths([
        ("result", f"{folder / 'model'} ({human_bytes(done['bytes'])})"),
        ("time · peak memory", f"{human_time(done['seconds'])} · {human_bytes(done['peak_rss'])}"),
        ("digest", str(done["digest"])), ("next", f"fleetune export {folder} --to gguf"),
    ])  # fmt: skip
