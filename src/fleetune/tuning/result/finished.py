"""Load the model of a finished run (base plus ledger, or base plus adapter), rebuild it, and write it as a directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from fleetune import adapters, models
from fleetune.common import sums
from fleetune.common.display import counted, quoted
from fleetune.common.events import TuneDone
from fleetune.common.ggml import SCALES
from fleetune.data import Example, columns
from fleetune.errors import FleetuneError, Interrupted, LedgerError, ModelError, UsageError
from fleetune.models.cache.cache import BLOCKS
from fleetune.models.families import number_types
from fleetune.models.net import chat_template
from fleetune.models.net.model import Model, Pieces, refuse_copies
from fleetune.report import page, single
from fleetune.runs import rundir
from fleetune.runs.listener import Listener, Silent
from fleetune.seeds import ledger as ledgers
from fleetune.seeds.noise import PASSES
from fleetune.seeds.scale_view import moved_tensors
from fleetune.seeds.weights import kernels
from fleetune.tuning.methods._zeroth import place_at as place_at
from fleetune.tuning.methods._zeroth import view_of
from fleetune.tuning.prepare.prepare import split
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.objects import RESULT as RESULT
from fleetune.tuning.recipe.objects import entry_of
from fleetune.tuning.result import foundations

REPLAYS: Final = 256  # of a ledger that is verified; a run states one digest


def recipe_of(run: Path) -> recipes.Recipe:
    """The recipe that a run folder was made with; UsageError for a run that is gone."""
    if not (run / "run.toml").is_file():
        raise UsageError(
            f"there is no run at {run}: it was removed, or lies elsewhere",
            hint="what was compressed from it is measured on rows that are given: fleetune eval FOLDER rows.jsonl, "
            "or fleetune measure FOLDER/model --data rows.jsonl",
        )
    return foundations.recipe_of(run)


def result_of(run: Path) -> Path:
    """The ledger or adapter directory of a run.

    UsageError when it has no result yet; ModelError (of a ledger LedgerError) when a file of it is not as it was written.
    """
    found = run / RESULT[entry_of(run, recipe_of(run)).kind]
    if not found.exists():
        raise UsageError(f"{run} has no result yet", hint=f"finish it: fleetune tune --resume {quoted(run)}")
    remedy = f"write it again from the last checkpoint: fleetune tune --resume {quoted(run)}"
    listed = (found.name, f"{found.name}/{sums.FILE}")
    for _, words in (*sums.faults(run, listed), *sums.faults(found)):
        raise (ModelError if found.is_dir() else LedgerError)(words, hint=remedy)
    return found


def stated_by(run: Path) -> Mapping[str, Any]:
    """What a run states of its result: its event `done`; {} for a run that has not finished."""
    return next((e for e in rundir.events(run) if e["event"] == "done"), {})


def ledger_file(run: Path) -> Path:
    """The ledger file of a run; UsageError for a run that leaves an adapter."""
    found = result_of(run)
    if found.name != RESULT["ledger"]:
        raise UsageError(f"{run} leaves an adapter, no ledger", hint=f"see {found}")
    return found


def ledger_of(run: Path) -> ledgers.Ledger:
    """The seed ledger of a run; UsageError for a run that leaves an adapter."""
    return ledgers.load(ledger_file(run))


def held_out(run: Path, *, offline: bool = False) -> list[Example]:
    """The rows that a run never trained on; UsageError when its data has other rows now."""
    recipe = recipe_of(run)
    foundations.check_files(recipe, run)
    parts = split(recipe, entry_of(run, recipe), offline=offline)
    foundations.check_rows(run, recipe, parts)
    return [parts.examples[i] for i in parts.held.tolist()]


def trained_on(run: Path, rows: Sequence[Example], *, offline: bool = False) -> int:
    """Return how many of `rows` the run trained on, by their words; 0 where its data cannot be read any more."""
    recipe = recipe_of(run)
    try:
        parts = split(recipe, entry_of(run, recipe), offline=offline)
    except FleetuneError:
        return 0
    held = set(parts.held.tolist())
    own = {(row.messages, row.response) for i, row in enumerate(parts.examples) if i not in held}
    return sum((row.messages, row.response) in own for row in rows)


def base_of(
    ledger: ledgers.Ledger, name: str, *, offline: bool = False, device: str = "cpu", base: str = "auto"
) -> Model:
    """The base model `name`, loaded as the ledger needs it; LedgerError when it is not the ledger's base.

    `base` says where its weights are, as in `models.load`.
    """
    if not ledger.head.tensors:
        raise LedgerError("the ledger names no tensors, so it is no model's")
    full = ledger.head.tensors[0][2]
    dtype = next((name for name, dtype in number_types.WEIGHTS.items() if dtype.full == full), None)
    if dtype is None:
        raise LedgerError(f"the ledger's tensors are {full}, which is not a type of weights")
    labels = recipes.label_words(str(ledger.head.hyper.get("labels", "")))
    if ledger.head.trains == SCALES:
        base = BLOCKS
    model = models.load(name, dtype=dtype, device=device, offline=offline, labels=labels, base=base)
    check_base(model, ledger)
    return model


def check_base(model: Model, ledger: ledgers.Ledger) -> None:
    """LedgerError when a model is not the ledger's base."""
    model.trains = ledger.head.trains
    ledgers.require_base(ledger.head, model.digest, model.tokenizer_digest, moved_tensors(model))


def rebuild(
    model: Model, ledger: ledgers.Ledger, *, threads: int | None = None, listener: Listener | None = None
) -> str:
    """Put `model` at the ledger's point and give the SHA-256 of the rebuilt weights (the base stays as it was).

    The listener is told what work is ahead, and how far it is.
    """
    listener = listener or Silent()
    model.trains = ledger.head.trains
    view = view_of(model, ledger.head.run_key, ledger.head.law, ledger.head.grid)
    view.threads, view.kernels = threads, kernels(view.device)
    passes = ledger.passes()
    work = counted(len(passes.ids), "pass", "passes")
    listener.note(f"{work} over {model.n_params:,} weights to rebuild")
    view.place(passes)
    return models.digest(told(view.pieces(), listener, model.n_params, work))


def told(
    tensors: Iterable[tuple[str, Tensor | Pieces]], listener: Listener, total: int, work: str
) -> Iterator[tuple[str, Tensor | Pieces]]:
    """Yield the tensors, and tell the listener of each weight that went by; Interrupted when it asks to stop."""
    done = 0

    def parts(pieces: Pieces) -> Iterator[Tensor]:
        nonlocal done
        for part in pieces.parts:
            yield part
            done += part.numel()
            listener.progress("weights", done, total, work)
            if listener.stop_requested:
                raise Interrupted("stopped before all weights were rebuilt; nothing was written")

    for name, tensor in tensors:
        if isinstance(tensor, Pieces):
            yield name, tensor._replace(parts=parts(tensor))
        else:
            yield name, tensor
            done += tensor.numel()


def stated_points(ledger: ledgers.Ledger) -> dict[int, ledgers.Ledger]:
    """Return round -> the ledger up to there, for each round after which it states a digest: of a run one, its last.

    LedgerError where these take more replays or passes than any run's ledger.
    """
    rounds = [int(r) for r in ledger.head.checks][: REPLAYS + 1]
    points = {r: ledger.truncate(r) for r in rounds}
    if len(rounds) > REPLAYS or sum(point.count_passes() for point in points.values()) > PASSES:
        raise LedgerError(
            f"to verify the digests after {len(ledger.head.checks):,} rounds takes more work than a run asks for: at most "
            f"{REPLAYS:,} replays and {PASSES:,} passes",
            hint="rebuild the end alone: fleetune ledger replay FILE",
        )
    return points


def verify(
    model: Model, ledger: ledgers.Ledger, *, listener: Listener | None = None
) -> tuple[str, dict[int, bool]]:
    """(digest of the rebuilt weights, round -> whether its stated digest was found again); errors as of `stated_points`."""
    points, digests = stated_points(ledger), dict[int, str]()
    for point in [*points.values(), ledger]:
        if len(point) not in digests:
            digests[len(point)] = rebuild(model, point, listener=listener)
    stated = ledger.head.checks
    return digests[len(ledger)], {r: digests[len(p)] == stated[str(r)] for r, p in points.items()}


def load(
    run: str | Path,
    *,
    offline: bool = False,
    device: str | None = None,
    base: str | None = None,
    model: str | None = None,
) -> Model:
    """The tuned model of a finished run; its stored weights stay the base's, so that it refuses to be copied.

    `device`, `base` (where the base's weights are) and `model` (the base's name now) are the run's own unless given.

    UsageError when the run has no result yet, or cannot have its base there; LedgerError when the base is another now.
    """
    run = Path(run)
    recipe, result = recipe_of(run), result_of(run)
    entry = entry_of(run, recipe)
    if recipe.train == SCALES and base == "memory":
        raise UsageError(
            f"{run} has tuned the {recipe.train} of a GGUF file, which move as they are read from it: base = memory cannot be",
            hint=f"leave out --base; or write the tuned file, and give that: fleetune export {quoted(run)} --to gguf",
        )
    where = "mapped" if recipe.train == SCALES else base or recipe.base
    recipe = dataclasses.replace(
        recipe, device=device or recipe.device, base=where, model=model or recipe.model
    )
    load = _load_ledger if entry.kind == "ledger" else _load_adapter
    try:
        tuned = load(result, recipe, offline)
    except ModelError as error:
        if (run / sums.SIGNATURE).is_file() and not ("/" in recipe.model or Path(recipe.model).exists()):
            own = f"lay its base, or a link to it, here as {quoted(recipe.model)}"
            error.hint = "; or ".join(filter(None, (error.hint, own)))
        raise
    chat_template.begin_with(tuned.tokenizer, columns.sentence(recipe.columns))
    refuse_copies(tuned.net)
    return tuned


def _load_ledger(path: Path, recipe: recipes.Recipe, offline: bool) -> Model:
    ledger = ledgers.load(path)
    model = base_of(ledger, recipe.model, offline=offline, device=recipe.device, base=recipe.base)
    place_at(model, ledger)
    return model


def require_digest(digest: str, stated: str | None, what: Path | str) -> None:
    """LedgerError when a ledger states (`Ledger.final_check`) another digest of its weights than the one it rebuilds."""
    if stated not in (None, digest):
        now, then = sums.apart(digest, str(stated))
        raise LedgerError(
            f"{what} rebuilds other weights than it states: their SHA-256 is {now}, it states {then}",
            hint="the ledger was changed after it was made: get it again from its origin (a run's own: remove the file, "
            "then fleetune tune --resume RUN)",
        )


def _load_adapter(path: Path, recipe: recipes.Recipe, offline: bool) -> Model:
    model = models.load(
        recipe.model,
        dtype=recipe.dtype,
        device=recipe.device,
        base=BLOCKS if recipe.train == SCALES else recipe.base,
        offline=offline,
        labels=recipes.label_words(recipe.labels),
    )
    made_on = rundir.made_on(path.parent)
    for what, now in (("base", model.digest), ("tokenizer", model.tokenizer_digest)):
        if made_on[what] != now:
            then, found = sums.apart(made_on[what], now)
            raise ModelError(
                f"{path} was made on {what} {then}, that of {recipe.model} is now {found}",
                hint="get the base it was made on (fleetune models shows sources)",
            )
    adapters.load(model, path)
    return model


def export_hf(model: Model, out: Path, *, card: str | None = None, stated: str | None = None) -> str:
    """Write a tuned model as a Hugging Face directory; the digest of its weights.

    The tuned weights become the stored ones of `model`.  ModelError when `out` exists; LedgerError, with nothing
    written, when `stated` is another digest.
    """
    if out.exists():
        raise ModelError(f"{out} exists already", hint="choose a new place: nothing is overwritten")
    merge_weights(model)
    digest = models.digest(models.named_tensors(model.net))
    require_digest(digest, stated, "the ledger")
    models.save(model.net, model.tokenizer, out, card=card, replace=False)
    return digest


def merge_weights(model: Model) -> None:
    """Make the tuned weights the stored ones of `model`, with nothing attached to it any more."""
    if model.attachment is not None:
        model.attachment.merge(model)


MEASURES: Final = ("loss", "accuracy", "objective", "rouge_l")  # of a round
COSTS: Final = ("clients", "accepted", "bytes_up", "bytes_down", "bytes_total", "seconds", "rss")


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """A finished run.  `done` is its last event: measures before and after, bytes, seconds, digest."""

    folder: Path
    done: TuneDone

    @property
    def path(self) -> Path:
        """The ledger file, or the adapter's directory."""
        return Path(self.done.result)

    @property
    def digest(self) -> str:
        """SHA-256 of the tuned weights (a ledger's run) or of the adapter's."""
        return self.done.digest

    @property
    def report(self) -> Path:
        """The run's page."""
        return self.folder / "report.html"

    @property
    def history(self) -> dict[str, list[Any]]:
        """The history of the rounds, as columns of equal length that `pandas.DataFrame` takes.

        `round` counts from 0, the base model; a column has None where a round was not evaluated (losses in nats, bytes
        and seconds of the round).  Columns without any value are left out.
        """
        rows: dict[int, dict[str, Any]] = {}
        for event in rundir.events(self.folder):
            if event["event"] in ("round", "eval"):
                rows.setdefault(int(event["round"]), {}).update(event)
        found = {c: [rows[r].get(c) for r in sorted(rows)] for c in (*MEASURES, *COSTS)}
        used = {c: values for c, values in found.items() if any(v is not None for v in values)}
        return {"round": sorted(rows), **used}

    def plot(self) -> page.Drawing:
        """Draw the validation loss by round (SVG, which a notebook shows); UsageError for a run with fewer than two."""
        return single.drawing(self.folder)

    def _repr_html_(self) -> str:
        return page.framed(self.report.read_text("utf-8"))

    def model(self, *, device: str = "cpu", offline: bool = False) -> Model:
        """Load the tuned model; its stored weights stay the base's."""
        return load(self.folder, device=device, offline=offline)

    def ledger(self) -> ledgers.Ledger:
        """Read the seed ledger; UsageError for a run that leaves an adapter."""
        return ledger_of(self.folder)

    def adapter(self) -> dict[str, Tensor]:
        """Read the adapter's tensors, by PEFT's names; UsageError for a run that leaves a ledger."""
        from safetensors.torch import load_file

        found = result_of(self.folder)
        if not found.is_dir():
            raise UsageError(f"{self.folder} leaves a ledger, no adapter", hint="its tuned model: .model()")
        return dict(load_file(found / "adapter_model.safetensors"))


def read(folder: Path) -> TuneResult:
    """Return the result of a finished run; UsageError when it is not finished."""
    known = {name for name in TuneDone.__dataclass_fields__ if name != "event"}
    for event in rundir.events(folder):
        if event["event"] == "done":
            done = TuneDone(**{n: v for n, v in event.items() if n in known})
            result = str(folder / Path(done.result).name)  # as it is found from here
            return TuneResult(folder, dataclasses.replace(done, run=str(folder), result=result))
    raise UsageError(f"{folder} is not finished", hint=f"fleetune tune --resume {quoted(folder)}")


def finished_in(out: Path) -> list[TuneResult]:
    """Return the results of the finished runs under a folder, in order of number."""
    return [read(path) for path in rundir.listing(out) if rundir.status_of(path) == "done"]
