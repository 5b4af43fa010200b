"""Load what a compression works on: the model, rows or windows to calibrate or train on, rows and text to measure on.

A run's held-out rows are few and all of one kind.  A model calibrated on them alone becomes worse at everything else, which its
loss on these rows does not show.  So a run is calibrated on its rows and on the text that comes with Fleetune
(`data/calibration`), and every model is measured on other windows of that text, too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fleetune import data, models
from fleetune.common.display import counted, human_bytes
from fleetune.compression.jobs.progress import row_reporter
from fleetune.compression.layerwise import driver
from fleetune.data import Encoded, Example
from fleetune.data.encode import encode_all
from fleetune.errors import DataError, UsageError
from fleetune.evaluation import kl_divergence, losses
from fleetune.models.net.model import Model
from fleetune.runs.compression_folder import CLIENTS, FLEET, LOGITS, CompressRequest
from fleetune.runs.listener import Listener
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import objects
from fleetune.tuning.recipe.recipe import Recipe
from fleetune.tuning.result import finished
from fleetune.tuning.rounds import rounds

OWN: Final = "text that comes with Fleetune"
# how many of 16 windows of it are of each file
SHARES: Final = {"prose": 4, "knowledge": 4, "chats": 3, "code": 3, "german": 1, "spanish": 1}
MEASURED: Final = 4  # windows of it that are measured on
LONGEST: Final = 512  # tokens of these
LEAST: Final = 8  # windows of it beside the rows of a run
MOST: Final = 32  # windows of it: more cost time, and hardly help


@dataclass(frozen=True)
class Inputs:
    """The model to compress, the rows to calibrate or train on, and the rows and texts to measure on."""

    model: Model
    rows: Sequence[Encoded]  # to calibrate or train on: of the data, or every second held-out row of the run
    held_out: Sequence[Encoded]  # of the run: rows for the loss before and after
    texts: Sequence[Encoded]  # windows of a text, for the perplexity before and after
    source: str  # where the rows or the text are from, for the header
    clients: Mapping[int, Sequence[Encoded]] = field(default_factory=dict)  # client -> its training rows
    other: Sequence[Encoded] = ()  # windows of the text that comes with Fleetune, to measure on

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.rows)

    @property
    def compared(self) -> Sequence[Encoded]:
        """What a model is compared with its reference on: the text, else the held-out rows, else other text."""
        return self.texts or self.held_out or self.other

    def logits_size(self, model: Model) -> int:
        """Return the bytes that the logits of a reference model take on the disk."""
        vocabulary = model.net.get_input_embeddings().weight.shape[0]
        return kl_divergence.file_size(losses.scored_tokens(self.compared), vocabulary)

    @contextmanager
    def reference(self, model: Model, folder: Path, listener: Listener) -> Iterator[losses.Reference | None]:
        """Keep the logits of the model that others are compared with in `folder` while the block runs; None without text."""
        rows, file = self.compared, folder / LOGITS
        if not losses.scored_tokens(rows):
            yield None
            return
        try:
            on_rows = row_reporter(listener, folder, "rows of the reference")
            kept = losses.keep_logits(model, rows, file, on_rows=on_rows)
            listener.note(
                f"compared on {counted(kept.tokens, 'token')}: {human_bytes(file.stat().st_size)} of logits, on the disk "
                "until the end"
            )
            yield kept
        finally:
            file.unlink(missing_ok=True)

    def measure(
        self,
        model: Model,
        listener: Listener,
        folder: Path,
        reference: losses.Reference | None = None,
        known: float | None = None,
    ) -> dict[str, float]:
        """Measure a model: loss on the held-out rows, perplexity of the text and of other text, where there are any.

        With a `reference` also how far its next-token distributions are from that model's; `known` is the loss on the rows that
        are compared, where the model is the reference.  Interrupted on Ctrl-C; `folder` is the job's, for the command that
        resumes it.
        """
        compared, measures = dict[str, float](), dict[str, float]()
        if reference:
            found, known = reference.compare(model, row_reporter(listener, folder, "rows compared"))
            compared = found.values()
        for name, rows, what, size in (
            ("loss", self.held_out, "rows", 8),
            ("perplexity", self.texts, "rows of the text", 1),
            ("other_perplexity", self.other, "rows of other text", 1),
        ):
            if rows:
                loss = known if rows is self.compared else None
                if loss is None:
                    on_rows = row_reporter(listener, folder, what)
                    loss = losses.response_loss(model, rows, batch_size=size, on_rows=on_rows)
                measures[name] = loss if name == "loss" else losses.perplexity_of(loss)
        return measures | compared


def load(request: CompressRequest, *, offline: bool) -> Inputs:
    """Load the model, and the rows that the request asks for.

    Raises UsageError for an encoder model, and whatever loading the model (`models.load`), the run or the rows raises.
    """
    recipe = finished.recipe_of(Path(request.model)) if request.run else None
    held_out: Sequence[Example] = []
    if recipe is not None:
        held_out = finished.held_out(Path(request.model), offline=offline)
        model = finished.load(Path(request.model), offline=offline, device="cpu")
    else:
        base = "mapped" if request.low_memory else "memory"
        model = models.load(request.model, dtype=request.dtype, device="cpu", offline=offline, base=base)
    if model.labels:
        raise UsageError("an encoder cannot be compressed", hint="decoders can, such as: fleetune models")
    if recipe is not None:
        finished.merge_weights(model)

    texts = losses.text_rows(model, data.read_text(request.eval_text)) if request.eval_text else []

    def encoded(rows: Sequence[Example], length: int) -> list[Encoded]:
        return encode_all(rows, model.tokenizer, length)[0] if rows else []

    measured = encoded(held_out, recipe.max_length) if recipe else []
    if request.data:
        rows = encoded(data.read(request.data, offline=offline), request.length)
        return Inputs(model, rows, measured, texts, request.data)
    if request.text or recipe is None:
        return Inputs(model, [], measured, texts, request.text or OWN)
    if request.calibrate == CLIENTS:
        own = _of_clients(request, recipe, offline=offline)
        clients = {client: encoded(rows, recipe.max_length) for client, rows in own.items()}
        return Inputs(model, [], measured, texts, "training rows of the run's clients", clients)
    if request.calibrate == FLEET:
        return Inputs(model, [], measured, texts, "training rows of the devices that join")
    rows, measured = (encoded(held_out[first::2], recipe.max_length) for first in (0, 1))
    return Inputs(model, rows, measured, texts, "every second held-out row of the run")


def _of_clients(request: CompressRequest, recipe: Recipe, *, offline: bool) -> dict[int, list[Example]]:
    """Return client -> training rows, of all clients of the run, or of `request.clients` of them drawn by the seed."""
    parts = prepare.split(recipe, objects.entry_of(Path(request.model), recipe), offline=offline)
    count = len(parts.clients)
    if request.clients > count:
        raise UsageError(
            f"--clients {request.clients} are more than the run's {count}", hint="leave it out for all"
        )
    chosen = rounds.sample(range(count), (request.clients or count) / count, request.seed, 0)
    return {c: [parts.examples[i] for i in parts.clients[c].tolist()] for c in chosen}


# Windows --------------------------------------------------------------------------------------------


def windows(request: CompressRequest, inputs: Inputs) -> Tensor:
    """Return int64 [N, length]: windows of the request's rows or text; without both, of the text that comes with Fleetune."""
    check_length(request, inputs)
    if inputs.rows:
        return _cut(inputs.rows, request.length, request.windows)
    if request.text:
        return driver.windows(
            _ids(inputs.model, data.read_text(request.text)), request.length, request.windows
        )
    return of_package(inputs.model, request.length, min(request.windows, MOST))[0]


def of_run(request: CompressRequest, inputs: Inputs, listener: Listener) -> tuple[Tensor, Inputs]:
    """Return int64 [N, length], windows of a run's rows and of the text that comes with Fleetune, and the inputs that say so.

    There are as many of that text as of rows, and `LEAST`; all are where the rows do not fill one, and that is noted.
    """
    check_length(request, inputs)
    tokens = sum(len(row.ids) for row in inputs.rows)
    filled = tokens >= request.length
    rows = [_cut(inputs.rows, request.length, (request.windows + 1) // 2)] if filled else []
    if not filled:
        listener.note(
            f"{inputs.source} has {counted(tokens, 'token')}, fewer than a window of {request.length}: the model is calibrated "
            f"on {OWN} alone; a smaller --length uses the rows, --data FILE or --text FILE gives more"
        )
    left, wanted = min(MOST, request.windows - sum(map(len, rows))), max(LEAST, sum(map(len, rows)))
    beside = of_package(inputs.model, request.length, min(left, wanted) if filled else left)[0]
    of_rows = [f"{inputs.source}: {counted(len(each), 'window')}, and {len(beside)} of " for each in rows]
    return torch.cat([*rows, beside]), replace(inputs, source="".join([*of_rows, OWN]))


def documents(kind: str) -> list[str]:
    """Return the documents of a file of the text that comes with Fleetune; lines `%%` part them."""
    file = Path(data.__file__).parent / "calibration" / f"{kind}.txt"
    return file.read_text(encoding="utf-8").split("\n%%\n")


def with_other(request: CompressRequest, inputs: Inputs) -> Inputs:
    """Return the inputs with windows of other text to measure on."""
    length = min(request.length, losses.context_length(inputs.model))
    return replace(inputs, other=of_package(inputs.model, length, 0)[1])


def of_package(model: Model, length: int, count: int) -> tuple[Tensor, list[Encoded]]:
    """Return windows of the text that comes with Fleetune, int64 [`count` or fewer, length], and others to measure on.

    Kinds of text follow one another by their shares, so that any first part of the windows is a mix as well; one that fills no
    window is left out.  DataError where all are.
    """
    whole, ordered, measured = sum(SHARES.values()), list[tuple[float, Tensor]](), list[Encoded]()
    for kind, share in SHARES.items():
        ids = _ids(model, documents(kind))
        if sum(map(len, ids)) < length:
            continue
        found = driver.windows(ids, length, 1 << 20)
        if length > 1 and len(found) > 1 and len(measured) < MEASURED:
            measured.append(Encoded(ids=found[-1, :LONGEST].numpy(), n_prompt=1))
            found = found[:-1]
        wanted = min(len(found), math.ceil(count * share / whole))
        places = [k * len(found) // wanted for k in range(wanted)]
        ordered += [((k + 0.5) / share, found[place]) for k, place in enumerate(places)]
    if count and not ordered:
        raise DataError(f"{OWN} fills no window of {length} tokens", hint="give a smaller --length")
    ordered.sort(key=lambda each: each[0])
    taken = [window[None] for _, window in ordered[:count]]
    return torch.cat([torch.zeros((0, length), dtype=torch.int64), *taken]), measured


def _cut(rows: Sequence[Encoded], length: int, count: int) -> Tensor:
    return driver.windows([np.asarray(row.ids) for row in rows], length, count)


def _ids(model: Model, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.asarray(model.tokenizer(text, verbose=False)["input_ids"]) for text in texts]


def of_clients(request: CompressRequest, inputs: Inputs, listener: Listener) -> dict[int, Tensor]:
    """Return client -> its windows: an equal part of the request's, at least one; a client that fills none is left out."""
    check_length(request, inputs)
    each, shares = each_of(request.windows, len(inputs.clients)), dict[int, Tensor]()
    for client, rows in inputs.clients.items():
        try:
            shares[client] = _cut(rows, request.length, each)
        except DataError as error:
            listener.note(f"client {client} is left out: {error.message}")
    if not shares:
        raise DataError(
            f"no client has text for a window of {request.length} tokens", hint="give a smaller --length"
        )
    return shares


def each_of(windows: int, clients: int) -> int:
    """Return how many of a request's windows each of so many clients takes, at most."""
    return max(1, windows // clients)


def check_length(request: CompressRequest, inputs: Inputs) -> None:
    """Raise UsageError for windows that are longer than the model's context."""
    if request.length > (longest := losses.context_length(inputs.model)):
        raise UsageError(
            f"windows of {request.length} tokens are longer than the model's {longest}",
            hint=f"--length {min(longest, 512)}",
        )
