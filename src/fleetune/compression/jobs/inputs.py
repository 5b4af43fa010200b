# SPDX-License-Identifier: Apache-2.0
"""Load the inputs of a compression: the model, rows to calibrate or train on, and rows and text to measure on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.common.display import counted, human_bytes
from fleetune.common.shell import quoted
from fleetune.compression.jobs import progress
from fleetune.errors import DataError, UsageError
from fleetune.runs.compression_folder import CLIENTS, FLEET, LOGITS, CompressRequest
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from fleetune.data import Encoded, Example
    from fleetune.evaluation.losses import OnRows, Reference
    from fleetune.models.net.model import Model
    from fleetune.tuning.recipe.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """The model to compress, the rows to calibrate or train on, and the rows and texts to measure on."""

    model: Model
    rows: Sequence[Encoded]  # to calibrate or train on: of the data, or every second held-out row of the run
    held_out: Sequence[Encoded]  # of the run: rows for the loss before and after
    texts: Sequence[str]  # for the perplexity before and after
    source: str  # where the rows or the text are from, for the header
    clients: Mapping[int, Sequence[Encoded]] = field(default_factory=dict)  # client -> its training rows
    own_text: Sequence[Encoded] = ()  # windows that the model wrote, for the perplexity on text of its own

    @property
    def measured(self) -> bool:
        """Whether there are rows or texts to measure on."""
        return bool(self.held_out or self.texts or self.own_text)

    def compared_rows(self, model: Model) -> Sequence[Encoded]:
        """Return what a model is compared with its reference on: the text, else the held-out rows, else its own text."""
        from fleetune.evaluation.losses import text_rows

        return (text_rows(model, self.texts) if self.texts else self.held_out) or self.own_text

    def logits_size(self, model: Model) -> int:
        """Return the bytes that the logits of a reference model take on the disk."""
        from fleetune.evaluation import kl_divergence
        from fleetune.evaluation.losses import scored_tokens

        vocabulary = model.net.get_input_embeddings().weight.shape[0]
        return kl_divergence.file_size(scored_tokens(self.compared_rows(model)), vocabulary)

    @contextmanager
    def reference(self, model: Model, folder: Path, listener: Listener) -> Iterator[Reference | None]:
        """Keep the logits of the model that others are compared with in `folder` while the block runs; None without text."""
        from fleetune.evaluation.losses import keep_logits, scored_tokens

        rows = self.compared_rows(model)
        if not scored_tokens(rows):
            yield None
            return
        file = folder / LOGITS
        try:
            on_rows = progress.row_reporter(listener, folder, "rows of the reference")
            found = keep_logits(model, rows, file, on_rows=on_rows)
            listener.note(
                f"{counted(found.tokens, 'token')} to compare by: {human_bytes(file.stat().st_size)} of logits, on the disk "
                "until the end"
            )
            yield found
        finally:
            file.unlink(missing_ok=True)

    def measure(
        self, model: Model, listener: Listener, folder: Path, reference: Reference | None = None
    ) -> dict[str, float]:
        """Measure a model: loss on the held-out rows, perplexity of its own text and of the text, where there are any.

        With a `reference` also how far its next-token distributions are from that model's.  Interrupted on Ctrl-C; `folder`
        is the job's, for the command that resumes it.
        """
        from fleetune.evaluation.losses import perplexity, response_loss, row_perplexity

        def told(what: str) -> OnRows:
            return progress.row_reporter(listener, folder, what)

        found = {"loss": response_loss(model, self.held_out, on_rows=told("rows"))} if self.held_out else {}
        if self.own_text:
            found["own_perplexity"] = row_perplexity(
                model, self.own_text, on_rows=told("rows of its own text")
            )
        if self.texts:
            found["perplexity"] = perplexity(model, self.texts, on_rows=told("rows of the text"))
        if reference:
            found |= reference.compare(model, told("rows compared")).values()
        return found


def load(request: CompressRequest, *, offline: bool) -> Inputs:
    """Load the model, and the rows that the request asks for.

    Raises UsageError for an encoder model, and whatever loading the model (`models.load`), the run or the rows raises.
    """
    from fleetune import data, models
    from fleetune.data.encode import encode_all

    texts = data.read_text(request.eval_text) if request.eval_text else []
    if request.run:
        return _of_run(request, texts, offline=offline)
    model = models.load(
        request.model,
        dtype=request.dtype,
        device="cpu",
        offline=offline,
        base="mapped" if request.low_memory else "memory",
    )
    _require_decoder(model)
    examples = data.read(request.data, offline=offline) if request.data else []
    rows = encode_all(examples, model.tokenizer, request.length)[0] if examples else []
    return Inputs(model, rows, [], texts, request.data or request.text or "text of its own")


def check_kinds(request: CompressRequest) -> None:
    """Raise UsageError for rows that are given as text, and for text that is given as rows; the hint has the flag that fits.

    Of rows the first is looked at; what cannot be read is told where it is read.
    """
    from fleetune.data import readers

    if request.text:
        readers.require_text(request.text, hint=f"--data {quoted(request.text)}")
    rows = Path(request.data).expanduser()
    other = request.data and rows.is_file() and rows.suffix.lower() not in readers.READERS
    if other and _is_text(rows):
        raise UsageError(
            f"{request.data} is plain text, and --data is rows in {', '.join(readers.READERS)}",
            hint=f"--text {quoted(request.data)}",
        )


def _is_text(file: Path) -> bool:
    from fleetune import data

    try:
        return bool(data.read_text(file))
    except DataError:
        return False


def _of_run(request: CompressRequest, texts: Sequence[str], *, offline: bool) -> Inputs:
    from fleetune import data
    from fleetune.data.encode import encode_all
    from fleetune.tuning.result import finished

    run = Path(request.model)
    recipe = finished.recipe_of(run)
    held_out = finished.held_out(run, offline=offline)
    model = finished.load(run, offline=offline, device="cpu")
    _require_decoder(model)
    finished.merge_weights(model)

    def encoded(rows: Sequence[Example], length: int = recipe.max_length) -> list[Encoded]:
        return encode_all(rows, model.tokenizer, length)[0]

    if request.data:
        rows = encoded(data.read(request.data, offline=offline), request.length)
        return Inputs(model, rows, encoded(held_out), texts, request.data)
    if request.text:
        return Inputs(model, [], encoded(held_out), texts, request.text)
    if request.calibrate == CLIENTS:
        own = {c: encoded(rows) for c, rows in _of_clients(request, recipe, offline=offline).items()}
        return Inputs(model, [], encoded(held_out), texts, "training rows of the run's clients", own)
    if request.calibrate == FLEET:
        return Inputs(model, [], encoded(held_out), texts, "training rows of the devices that join")
    source = "every second held-out row of the run"
    return Inputs(model, encoded(held_out[::2]), encoded(held_out[1::2]), texts, source)


def _of_clients(request: CompressRequest, recipe: Recipe, *, offline: bool) -> dict[int, list[Example]]:
    """Return client -> training rows, of all clients of the run, or of `request.clients` of them drawn by the seed."""
    from fleetune.tuning.prepare import prepare
    from fleetune.tuning.recipe import objects
    from fleetune.tuning.rounds import rounds

    parts = prepare.split(recipe, objects.entry_of(Path(request.model), recipe), offline=offline)
    count = len(parts.clients)
    if request.clients > count:
        raise UsageError(
            f"--clients {request.clients} are more than the run's {count}", hint="leave it out for all"
        )
    chosen = rounds.sample(range(count), (request.clients or count) / count, request.seed, 0)
    return {c: [parts.examples[i] for i in parts.clients[c].tolist()] for c in chosen}


def _require_decoder(model: Model) -> None:
    if model.labels:
        raise UsageError("an encoder cannot be compressed", hint="decoders can, such as: fleetune models")
