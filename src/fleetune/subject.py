"""Find what a name means: a run, a compressed model, or a plain model.  The first rule that fits wins:

`latest`                                      the newest run or compression, by number
a folder with `master.safetensors`            `Compressed`: an artefact of codes
a path, name or number of a compression       `Compressed`
a path, name or number of a run               `Run`
a built-in name, a directory, a .gguf file, a hub id        `Plain`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from fleetune import models
from fleetune.common import sums
from fleetune.common.display import quoted
from fleetune.errors import UsageError
from fleetune.models.cache import cache, names
from fleetune.runs import compression_folder, rundir

if TYPE_CHECKING:
    from fleetune.common.paired import RowLosses
    from fleetune.data import Example
    from fleetune.evaluation.losses import OnRows
    from fleetune.models.net.model import Model
    from fleetune.seeds.ledger import Ledger
    from fleetune.tuning.recipe.recipe import Recipe


def _framed(found: Run | Compressed | Plain) -> str:
    from fleetune.report import page, runlog

    rows = [("model", found.argument)]
    if isinstance(found, Run):
        rows = [row for row in runlog.facts(found.folder, {}) if row[0] != "settings"]
    elif isinstance(found, Compressed) and (request := found.request):
        rows += [("made from", request.model), ("method", request.method)]
    return page.framed_table(found.name, rows, [], [])


ROW: Final = 512  # tokens of a row at most, unless a run says otherwise


@dataclass(frozen=True)
class Run:
    """A tuning run, finished or not."""

    folder: Path
    base: str = ""  # where its base model lies now, if its recipe names another place

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    _repr_html_ = _framed

    @property
    def argument(self) -> str:
        """The run as a command takes it."""
        return str(self.folder)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that made it."""
        from fleetune.tuning.result import finished

        recipe = finished.recipe_of(self.folder)
        return replace(recipe, model=self.base) if self.base else recipe

    @property
    def max_length(self) -> int:
        """Tokens of a row at most, as in its recipe: its losses are of rows cut so."""
        return self.recipe.max_length

    @property
    def columns(self) -> str:
        """Which columns its rows were read from; "" for those of a form."""
        return self.recipe.columns

    @property
    def result(self) -> Path:
        """The path of its ledger or adapter directory; UsageError when it has no result yet."""
        from fleetune.tuning.result import finished

        return finished.result_of(self.folder)

    def load(self, *, device: str = "cpu", offline: bool = False, base: str | None = None) -> Model:
        """Load the base model with the change that was tuned; the base's stored weights stay as they are.

        `base` says where these are, as in `models.load`; by default as while it was tuned.
        """
        from fleetune.tuning.result import finished

        return finished.load(self.folder, device=device, offline=offline, base=base, model=self.base or None)

    def held_out(self, *, offline: bool = False) -> list[Example]:
        """Read the rows that the run never trained on; UsageError when its data has other rows now."""
        from fleetune.tuning.result import finished

        return finished.held_out(self.folder, offline=offline)

    def ledger(self) -> Ledger:
        """Read its seed ledger; UsageError for a run that leaves an adapter."""
        from fleetune.tuning.result import finished

        return finished.ledger_of(self.folder)


@dataclass(frozen=True)
class Compressed:
    """A compressed model: the folder of a compression, or an artefact of codes without one (`folder` is then None)."""

    folder: Path | None
    artefact: Path | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return (self.folder or self.model).name

    _repr_html_ = _framed

    @property
    def argument(self) -> str:
        """The compressed model as a command takes it."""
        return str(self.folder or self.model)

    @property
    def home(self) -> Path:
        """Where exported files are written: the folder of the compression, or of the artefact."""
        if self.folder is not None:
            return self.folder
        return self.model.parent if self.model.name == "model" else self.model

    @property
    def model(self) -> Path:
        """The artefact of codes, or the plain directory.

        UsageError when the compression is not finished, ModelError when a file is not what was written.
        """
        if self.artefact is not None:
            sums.check(self.artefact, remedy=f"copy {self.artefact} again from where it was made")
            return self.artefact
        assert self.folder is not None
        return check_compressed(self.folder)

    @property
    def request(self) -> compression_folder.CompressRequest | None:
        """The request; None for an artefact without a compression's folder."""
        return compression_folder.request_of(self.folder) if self.folder is not None else None

    @property
    def max_length(self) -> int:
        """Tokens of a row at most: those of the run that it comes from, so that losses compare; else `ROW`."""
        return self.run.max_length if self.run is not None else ROW

    @property
    def columns(self) -> str:
        """Which columns the rows of the run that it comes from were read from; "" for those of a form."""
        return self.run.columns if self.run is not None else ""

    @cached_property
    def run(self) -> Run | None:
        """The run that it comes from, where that is still there."""
        request = self.request
        if request is None or not request.run or not (Path(request.model) / "run.toml").is_file():
            return None
        return Run(Path(request.model))

    @property
    def holds_codes(self) -> bool:
        """Whether the result is an artefact of codes, not a plain directory."""
        return names.is_master(self.model)

    def load(
        self, *, dtype: str = "fp32", device: str = "cpu", offline: bool = False, base: str | None = None
    ) -> Model:
        """Load it with its weights dequantised to `dtype`; `base` is as in `models.load`.

        UsageError for a mapped base where it holds codes.
        """
        if not self.holds_codes:
            return models.load(
                str(self.model), dtype=dtype, device=device, offline=offline, base=base or "auto"
            )
        if base == "mapped":
            hint = "leave out --base; or, unless it has experts, export it with --to gguf and give that file"
            raise UsageError(f"{self.name} holds codes, which are read into memory", hint=hint)
        return models.load_artefact(self.model, dtype=dtype, device=device)

    def held_out(self, *, offline: bool = False) -> list[Example]:
        """Return the run's held-out rows, without those used to compress it; [] when the model does not come from a run.

        UsageError when the run is gone, or its data has other rows now.
        """
        from fleetune.tuning.result import finished

        request = self.request
        if request is None or not request.run:
            return []
        if not (Path(request.model) / "run.toml").is_file():
            raise UsageError(
                f"{self.folder} was made from the run {request.model}, which is gone with its held-out rows",
                hint=f"give rows: fleetune eval {quoted(self.folder)} rows.jsonl",
            )
        rows = finished.held_out(Path(request.model), offline=offline)
        return rows[1::2] if request.uses_held_out else rows


@dataclass(frozen=True)
class Plain:
    """A plain model: a built-in name, a Hugging Face directory, a .gguf file or a hub id."""

    name: str
    max_length: ClassVar[int] = ROW
    columns: ClassVar[str] = ""

    _repr_html_ = _framed

    @property
    def argument(self) -> str:
        """The model as a command takes it."""
        return self.name

    def load(
        self,
        *,
        dtype: str = "fp32",
        device: str = "cpu",
        offline: bool = False,
        base: str | None = None,
        labels: Sequence[str] = (),
    ) -> Model:
        """Load the model; `base` says where its weights are, as in `models.load`; `labels` are an encoder's label words."""
        where = base or "auto"
        return models.load(self.name, dtype=dtype, device=device, offline=offline, labels=labels, base=where)

    def directory(self, *, offline: bool = False) -> Path:
        """Return its Hugging Face directory, fetched or converted first if necessary; all its files are as it states."""
        path = models.resolve(self.name, offline=offline)
        sums.check(path, remedy=cache.remedy(path))
        return path


Subject = Run | Compressed | Plain


def open(name: object, out: str | Path = "runs") -> Subject:
    """Return what `name` means: a text, a path, a result of `tune`, `compress` or `export`, or a subject itself.

    UsageError for `latest` or a number where there is no such run, for a text that no name can be, and for an adapter.
    """
    if isinstance(name, Run | Compressed | Plain):
        return name
    text, runs = text_of(name), Path(out)
    path = Path(text)
    try:
        path.exists()
    except (OSError, ValueError) as error:  # too long, or a character that no path has
        raise UsageError(f"{text[:80]!r}.. is not the name of a model: {error}") from error
    if text != "latest" and names.is_master(path):
        return Compressed(None, path)
    run, smaller = _run(text, runs), compression_folder.find(text, runs)
    if smaller and not (run and rundir.number(smaller) <= rundir.number(run.resolve())):
        return Compressed(smaller)  # both have a `latest`
    if run:
        return Run(run)
    rundir.check_name(text, runs)
    names.check_no_adapter(text)
    return Plain(text)


def open_weights(name: object, out: str | Path = "runs") -> Run | Plain:
    """Return what `name` means where plain weights are needed: to compress them, or to teach a student.

    A finished compression whose result is a plain Hugging Face directory is returned as `Plain`.  `latest` skips
    compressions that hold codes.  UsageError for an artefact of codes; its hint is the command that exports it.
    """
    if isinstance(name, Run | Plain):
        return name
    text, runs = name.argument if isinstance(name, Compressed) else text_of(name), Path(out)
    if text == "latest":
        run = _run(text, runs)
        done = [p for p in compression_folder.listing(runs) if compression_folder.is_complete(p)]
        plain = [p for p in done if not names.is_master(p / "model")]
        newest = max(plain, key=rundir.number, default=None)
        if newest and not (run and rundir.number(newest) < rundir.number(run.resolve())):
            return Plain(str(newest / "model"))
        if run:
            return Run(run)
    subject = open(text, runs)
    if not isinstance(subject, Compressed):
        return subject
    if not subject.holds_codes:
        return Plain(str(subject.model))
    from fleetune.models.artefact import Master

    head = Master(subject.model).head
    raise UsageError(
        f"{text} was compressed with {head.method}: it holds {'codes' if head.grids else 'zeros among weights'} "
        "in a file of Fleetune's own, not a plain model",
        hint=f"fleetune export {quoted(text)} --to hf   and give the folder that it writes",
    )


def text_of(name: object) -> str:
    """The name or path in what a caller handed over: a result has a folder, an export's has a path."""
    if isinstance(name, str | Path):
        return str(name)
    for attribute in ("folder", "path"):
        if isinstance(found := getattr(name, attribute, None), Path):
            return str(found)
    raise UsageError(
        f"a {type(name).__name__} is not the name of a model", hint="give a name, a path or a result"
    )


def check_compressed(folder: Path) -> Path:
    """Return the model of a finished compression, as it was written.

    UsageError when it is not finished, ModelError for a file that is not what its list states.
    """
    model, record = compression_folder.model_in(folder), compression_folder.record(folder)
    command = f"fleetune compress {quoted(record['model'])} --method {record.get('method')}"
    sums.check(model, remedy=f"compress again: {command}")
    return model


def _run(name: str, out: Path) -> Path | None:
    """Return the folder of the run that `name` means; None when it means no run."""
    like_one = name == "latest" or name.isdigit() or (Path(name) / "run.toml").is_file()
    if like_one or (out / name / "run.toml").is_file():
        with suppress(UsageError):
            return rundir.find(name, out)
    return None


# ---------------------------------------------------------------- loading


def load_with_rows(
    subject: Subject,
    given: list[Example],
    *,
    labels: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "auto",
    base: str | None = None,
    needs_rows: bool = True,
    offline: bool = False,
) -> tuple[Model, list[Example]]:
    """Load a subject, and return it with the rows to measure it on: those `given`, else its own held-out rows.

    UsageError, before the model is loaded, when `needs_rows` and there are none, or when `dtype` differs from a run's.
    """
    _check_dtype(subject, dtype, device)
    rows = given or ([] if isinstance(subject, Plain) else subject.held_out(offline=offline))
    if not rows and needs_rows and not isinstance(subject, Run):
        what = "a compressed model" if isinstance(subject, Compressed) else "no run here but a model"
        raise UsageError(
            f"{subject.argument} is {what}: it is measured on DATA",
            hint=f"fleetune eval {quoted(subject.argument)} data.jsonl; the runs: fleetune runs list",
        )
    words = list(labels) or sorted({e.response.strip() for e in rows})
    model = load_alone(subject, labels=words, dtype=dtype, device=device, base=base, offline=offline)
    return model, rows


def base_losses(
    subject: Subject, model: Model, examples: Sequence[Example], told: Callable[[str], OnRows]
) -> RowLosses | None:
    """Return the losses of rows under the base of a run, whose tuned `model` becomes that base; None for anything else."""
    from fleetune.evaluation import measures

    if not isinstance(subject, Run) or model.attachment is None:
        return None
    model.attachment.detach(model)
    return measures.evaluate(model, examples, ["loss"], max_length=subject.max_length, told=told).rows


def load_alone(
    subject: Subject,
    *,
    labels: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "auto",
    base: str | None = None,
    offline: bool = False,
) -> Model:
    """Load a subject without any rows; UsageError, before that, when `dtype` differs from a run's."""
    _check_dtype(subject, dtype, device)
    where: dict[str, Any] = {"device": device, "offline": offline, "base": base}
    if isinstance(subject, Run):
        return subject.load(**where)
    more: dict[str, Any] = {"labels": labels} if isinstance(subject, Plain) else {}
    return subject.load(dtype=dtype or "fp32", **where, **more)


def check_same_tokens(subject: Subject, reference: Subject, *, offline: bool = False) -> None:
    """UsageError when two models have different tokens, before either is loaded; one may have more of them."""
    own, other = (_vocabulary(of, offline=offline).items() for of in (subject, reference))
    if not (own <= other or other <= own):
        raise UsageError(
            f"{subject.argument} and {reference.argument} have different tokens, so what they predict cannot be compared",
            hint="--reference MODEL: the model that it was made from, or another with the same tokenizer",
        )


def _vocabulary(subject: Subject, *, offline: bool) -> dict[str, int]:
    """Return the tokens of a subject, with their numbers."""
    if isinstance(subject, Compressed):
        from transformers import AutoTokenizer

        return dict(AutoTokenizer.from_pretrained(subject.model, local_files_only=True).get_vocab())
    name = subject.recipe.model if isinstance(subject, Run) else subject.name
    return dict(models.load_tokenizer(name, offline=offline).get_vocab())


def _check_dtype(subject: Subject, dtype: str | None, device: str) -> None:
    """UsageError for another dtype than a run's, ModelError for a device that cannot compute in it."""
    own = subject.recipe.dtype if isinstance(subject, Run) else dtype or "fp32"
    if dtype not in (None, own):
        raise UsageError(f"a run has a dtype of its own, here {own}", hint="leave out --dtype")
    models.check_device(device, own)
