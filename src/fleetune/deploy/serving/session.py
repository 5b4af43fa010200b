# SPDX-License-Identifier: Apache-2.0
"""Open an engine with a run, a compressed model or a plain model.

What the engine cannot read as it is is exported for the time of the session; an engine for .gguf files takes one that
lies in the subject's folder.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fleetune.common.shell import quoted
from fleetune.deploy import export_subject
from fleetune.deploy.formats import _gguf_vocabulary
from fleetune.deploy.serving import engines
from fleetune.deploy.serving.engines import KEY, Engine, Options, Session
from fleetune.errors import UsageError
from fleetune.models.cache import names as model_names
from fleetune.models.gguf import header
from fleetune.runs import rundir
from fleetune.runs.listener import Listener
from fleetune.subject import Compressed, Run, Subject


@contextmanager
def opened(subject: Subject, options: Options, listener: Listener, *, offline: bool) -> Iterator[Session]:
    """Run an engine with the subject's model while the block runs; UsageError for options that cannot be."""
    _check(subject, options)
    engine = engines.choose(options.engine)
    key, port = _key(engine, options), engines.free_port(options.host, options.port)
    with tempfile.TemporaryDirectory(prefix="fleetune-") as folder:
        model = _model_for(subject, engine, Path(folder), listener, offline=offline).resolve()
        listener.note(f"{engine.name} loads {model.name}")
        settled = replace(options, port=port, key=key)
        with engines.started(engine, model, settled, Path(folder) / "engine.log") as session:
            yield session


def _check(subject: Subject, options: Options) -> None:
    """UsageError for numbers that mean nothing, and for a subject that is a missing or another file."""
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads {options.threads} is below 1", hint="leave it to the engine")
    if options.context < 64:
        raise UsageError(f"--context {options.context} is below 64 tokens", hint="the default is 4096")
    if not isinstance(subject, Run | Compressed):
        model_names.check(subject.name)
        if (path := Path(subject.name).expanduser()).suffix.lower() == ".gguf" and not path.is_dir():
            header.check(path)


def _key(engine: Engine, options: Options) -> str:
    """Return the key that clients must present: the one given, that of the environment, or one made; "" for none."""
    made = secrets.token_urlsafe(24) if engine.keys else ""
    if options.key is None:
        return made
    here = options.host in ("localhost", "::1") or options.host.startswith("127.")
    key = options.key or os.environ.get(KEY, "")
    if not engine.keys and (key or not here):
        raise UsageError(
            f"the engine '{engine.name}' asks nobody for a key, so it serves this machine alone",
            hint=f"serve a .gguf file with llama.cpp: {engines.INSTALL}",
        )
    return key or ("" if here else made)


# The engine's model -----------------------------------------------------------------------------------


def _model_for(subject: Subject, engine: Engine, folder: Path, listener: Listener, *, offline: bool) -> Path:
    """Return the file or directory that the engine reads, exported into `folder` where there is none yet."""
    if isinstance(subject, Compressed):
        subject.model  # noqa: B018  (an unfinished one is refused before a file of it is served)
        home = subject.home
    else:
        home = subject.folder if isinstance(subject, Run) else Path(subject.name).expanduser()
    if engine.reads == "gguf" and (ready := home if home.is_file() else _newest_gguf(home)) is not None:
        header.check(ready)
        listener.note(f"serving {ready}")
        return ready
    if engine.reads == "hf" and not isinstance(subject, Run | Compressed):
        directory = subject.directory(offline=offline)
        if _gguf_vocabulary.load(directory).chat_template is not None:
            return directory  # without one transformers cannot put a conversation into words; an export can
    kind = engine.reads if engine.reads == "hf" else _exact_target(subject)
    name = rundir.slug(home.resolve().name) or "model"
    out = folder / (name if kind == "hf" else f"{name}.gguf")
    keep = f"to keep it: fleetune export {quoted(subject.argument)} --to {kind}"
    listener.note(f"exporting {subject.argument} to {kind} for this session; {keep}")
    return export_subject.export(subject, kind, out, None, listener, offline=offline).path


def _exact_target(subject: Subject) -> str:
    """Return the smallest GGUF target that holds a subject exactly: fp32 for codes that have no blocks there."""
    from fleetune.deploy.checkpoint import open_checkpoint
    from fleetune.deploy.formats import gguf

    return (isinstance(subject, Compressed) and gguf.exact_target(open_checkpoint(subject.model))) or "gguf"


def _newest_gguf(folder: Path) -> Path | None:
    """Return the newest file with a whole model; an exported adapter may lie beside it."""
    from fleetune.deploy.formats.gguf_lora import is_adapter

    files = [p for p in folder.glob("*.gguf") if not is_adapter(p)] if folder.is_dir() else []
    return max(files, key=lambda p: p.stat().st_mtime, default=None)
