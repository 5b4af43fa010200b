# SPDX-License-Identifier: Apache-2.0
"""Open an engine with a model, and the OpenAI-compatible front before it.

What the engine cannot read as it is is exported for the time of the session; an engine for .gguf files takes one that
lies in the subject's folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fleetune.common.display import counted, human_bytes
from fleetune.common.events import Serving, ThreadsChosen
from fleetune.common.shell import quoted
from fleetune.deploy.serving import engines, threads
from fleetune.deploy.serving.engine_site import EngineSite
from fleetune.deploy.serving.engines import Engine, Running
from fleetune.deploy.serving.front import Front, listening, token_for
from fleetune.errors import UsageError
from fleetune.models import names as model_names
from fleetune.models.gguf import header
from fleetune.runs import folder_names
from fleetune.runs.listener import Listener
from fleetune.subject import Compressed, Plain, Run, Subject


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine."""

    engine: str = "auto"  # the first installed
    threads: int | None = None  # None: several counts are tried, the fastest is used
    context: int = 4096  # tokens of a conversation at most (llama.cpp)


@dataclass(frozen=True)
class FrontOptions:
    """Options of the front: the address it listens on, and the token it asks for."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any free one
    token: str | None = (
        None  # what a client must present; None: the environment's, or one made off this machine
    )


@dataclass(frozen=True)
class Session:
    """A model that is being served."""

    front: Front
    engine: Running
    started: Serving
    base: Running | None = None  # the engine with the base model beside it

    def ended(self) -> Running | None:
        """Return an engine that has ended by itself; None while all live."""
        return next((e for e in (self.engine, self.base) if e is not None and not e.alive()), None)

    @property
    def url(self) -> str:
        """The address of the front."""
        return self.front.url


@contextmanager
def served(
    subject: Subject,
    engine: EngineOptions,
    front: FrontOptions,
    listener: Listener,
    *,
    offline: bool,
    beside_base: bool = False,
) -> Iterator[Session]:
    """Serve a model while the block runs; with `beside_base`, the base that it was made of as well, in a second engine.

    The port is bound first, so that one in use is said before a model is loaded.  UsageError for options that cannot be.
    """
    token, made = token_for(front.host, front.token)
    check(subject, engine)
    base = base_of(subject) if beside_base else None
    site = EngineSite()
    with ExitStack() as stack:
        door = stack.enter_context(listening(front.host, front.port, token, site))
        running = stack.enter_context(opened(subject, engine, listener, offline=offline))
        second = _beside(base, engine, running, site, listener, stack, offline=offline) if base else None
        site.attach(running.address, lambda: running.alive() and (second is None or second.alive()))
        started = Serving(
            url=door.url, model=running.options.model.name, engine=running.engine.name,
            threads=running.options.threads, token=token if made else None,
            base=second.options.model.name if second else None,
        )  # fmt: skip
        listener.event(started)
        yield Session(door, running, started, second)


def base_of(subject: Subject) -> Plain:
    """Return the plain model that a run or a compressed model was made of; UsageError for what was made of none."""
    if isinstance(subject, Run):
        return Plain(subject.recipe.model)
    request = subject.request if isinstance(subject, Compressed) else None
    if request is None:
        raise UsageError(
            f"{subject.argument} was not made of another model, so there is no base to serve beside it",
            hint="give a run or a compressed model: fleetune serve latest --beside-base",
        )
    return base_of(Run(Path(request.model))) if request.run else Plain(request.model)


def _beside(
    base: Plain,
    engine: EngineOptions,
    running: Running,
    site: EngineSite,
    listener: Listener,
    stack: ExitStack,
    *,
    offline: bool,
) -> Running:
    """Open a second engine with the base, on as many threads as the first, and let the site pass requests to it."""
    same = replace(engine, engine=running.engine.name, threads=running.options.threads)
    second = stack.enter_context(opened(base, same, listener, offline=offline))
    names = running.options.model.name, second.options.model.name
    if names[0] == names[1]:
        raise UsageError(
            f"both models go by the name {names[0]}, so a request could not say which", hint="rename one"
        )
    site.beside(second.address, names)
    size = human_bytes(_size(second.options.model))
    listener.note(
        f"the base runs beside it in an engine of its own: about {size} more memory, and that of its conversation"
    )
    return second


def _size(model: Path) -> int:
    """Return the bytes of a model's file, or of all files of its folder."""
    files = [model] if model.is_file() else [p for p in model.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


@contextmanager
def opened(
    subject: Subject, options: EngineOptions, listener: Listener, *, offline: bool
) -> Iterator[Running]:
    """Run an engine with the subject's model, on as many threads as are fastest (or as many as asked for)."""
    engine = engines.choose(options.engine)
    with tempfile.TemporaryDirectory(prefix="fleetune-") as folder:
        model = _model_for(subject, engine, Path(folder), listener, offline=offline)
        count = options.threads or _fastest(engine, model, options.context, listener)
        listener.note(f"{engine.name} with {model.name} on {counted(count, 'thread')}")
        with engines.started(engine, model, count, options.context) as running:
            yield running


def check(subject: Subject, options: EngineOptions) -> None:
    """UsageError for numbers that mean nothing, and for a subject that is a missing or another file."""
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads {options.threads} is below 1", hint="leave it out to have it measured")
    if options.context < 64:
        raise UsageError(f"--context {options.context} is below 64 tokens", hint="the default is 4096")
    if isinstance(subject, Run | Compressed):
        return
    model_names.check(subject.name)
    path = Path(subject.name).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        header.check(path)


# The engine's model -----------------------------------------------------------------------------------


def _fastest(engine: Engine, model: Path, context: int, listener: Listener) -> int:
    """The fastest number of threads for a model in an engine, said with the others that were tried."""
    counts = threads.candidates(threads.cores())
    if len(counts) == 1:
        return 1
    listener.note(
        f"trying up to {counted(counts[-1], 'thread')}, since more can be slower; --threads N skips this"
    )

    def rate(count: int) -> float:
        with engines.started(engine, model, count, context) as running, running.request():
            found = threads.speed(running.address)
        listener.note(f"measured: {counted(count, 'thread')}, {found:.1f} tokens/s")
        return found

    count, rates = threads.fastest(counts, rate)
    listener.event(ThreadsChosen(chosen=count, tokens_per_second={str(n): r for n, r in rates.items()}))
    return count


def _model_for(subject: Subject, engine: Engine, folder: Path, listener: Listener, *, offline: bool) -> Path:
    """The file or directory that the engine reads, exported into `folder` where there is none yet."""
    home = _home(subject)
    if home.is_file() and engine.reads == "gguf":
        return _with_template(home, listener)
    if isinstance(subject, Compressed):
        subject.model  # noqa: B018  (an unfinished one is refused before a file of it is served)
    if engine.reads == "gguf" and (ready := _newest_gguf(home)) is not None:
        listener.note(f"serving {ready}")
        return _with_template(ready, listener)
    source = _plain(subject, folder / _name(home), offline=offline)
    if engine.reads == "hf" and not isinstance(subject, Compressed) and _has_template(source):
        return source
    return _exported(subject, source, engine.reads, folder / "exported" / _name(home), listener)


def _home(subject: Subject) -> Path:
    """The subject's folder or file."""
    if isinstance(subject, Run):
        return subject.folder
    return subject.home if isinstance(subject, Compressed) else Path(subject.name).expanduser()


def _with_template(file: Path, listener: Listener) -> Path:
    """A file with a whole model in it, of which is said what an engine will do differently."""
    if not header.check(file).values.get("tokenizer.chat_template"):
        listener.note(
            f"{file} has no chat template, so the engine asks it in a form of its own; export it again"
        )
    return file


def _plain(subject: Subject, folder: Path, *, offline: bool) -> Path:
    """The folder of the subject's weights; a run's are written to `folder`."""
    from fleetune.tuning import finished

    if isinstance(subject, Compressed):
        return subject.model
    if not isinstance(subject, Run):
        return subject.directory(offline=offline)
    finished.export_hf(subject.load(offline=offline), folder)
    return folder


def _has_template(folder: Path) -> bool:
    """Whether transformers' server can put a conversation into words: an export can where the model cannot."""
    from fleetune.deploy.formats import _gguf_vocabulary

    return _gguf_vocabulary.load(folder).chat_template is not None


def _exported(subject: Subject, source: Path, kind: str, out: Path, listener: Listener) -> Path:
    """`source` exported to "hf", or to "gguf": in fp32 where that has no blocks for its codes."""
    from fleetune.deploy import export
    from fleetune.deploy.checkpoint import open_checkpoint
    from fleetune.deploy.formats import gguf

    if kind == "gguf":
        kind = gguf.exact_target(open_checkpoint(source)) or kind
        out = out.with_name(f"{out.name}.gguf")
    if kind == "gguf:f32":
        listener.note(
            "GGUF has no blocks that hold these codes exactly, so the weights are fp32 there: slower, and larger"
        )
    name = subject.argument
    keep = f"to keep it: fleetune export {quoted(name)} --to {kind}"
    listener.note(f"exporting {name} to {kind} for this session; {keep}")
    out.parent.mkdir(exist_ok=True)
    report = export.export(source, kind, out)
    for note in report.notes:
        listener.note(f"note: {note}")
    return report.path


def _newest_gguf(folder: Path) -> Path | None:
    """The newest file with a whole model; an exported adapter may lie beside it."""
    from fleetune.deploy.formats.gguf_lora import is_adapter

    files = [p for p in folder.glob("*.gguf") if not is_adapter(p)] if folder.is_dir() else []
    return max(files, key=lambda p: p.stat().st_mtime, default=None)


def _name(home: Path) -> str:
    return folder_names.slug(home.resolve().name) or "model"
