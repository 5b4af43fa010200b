# SPDX-License-Identifier: Apache-2.0
"""`fleetune serve`: an OpenAI-compatible endpoint and a chat page over an engine that others keep.

The subject may be a .gguf file, a model, a finished run or a compressed one.  What the engine cannot read as it is
is exported for the time of the command; an engine for .gguf files takes one that lies in the subject's folder.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from fleetune.cli.console import Ui
from fleetune.deploy.serving import engines, threads
from fleetune.deploy.serving.engines import Engine, Running
from fleetune.deploy.serving.front import Front, is_loopback
from fleetune.errors import ModelError, UsageError
from fleetune.models.gguf import header

TOKEN: Final = "FLEETUNE_TOKEN"


def run(args: argparse.Namespace, ui: Ui, of_run: Path | None) -> None:
    """Carry out `fleetune serve`; `of_run` is the folder where the subject is a tuned run.

    Ctrl-C and SIGTERM end it, and the engine with it.  FleetuneError when the engine ends by itself.
    """
    token, made = _token(args)
    check(args)
    with stopped_by_signals(0), _front(args, token) as front, opened(args, ui, of_run) as engine:
        front.attach(engine.address, engine.alive)
        try:
            _tell(ui, front, engine, token if made else "")
            while engine.alive():
                time.sleep(0.1)
            time.sleep(0.5)  # those who wait for an answer are told
            raise engine.death()
        except KeyboardInterrupt:
            ui.note("stopped")


@contextmanager
def _front(args: argparse.Namespace, token: str) -> Iterator[Front]:
    """The door, open while the block runs: bound first, so that a port in use is said before a model is loaded."""
    front = Front("127.0.0.1" if args.host == "localhost" else args.host, args.port, token)
    threading.Thread(target=front.serve_forever, args=(0.1,), daemon=True).start()
    try:
        yield front
    finally:
        front.shutdown()
        front.server_close()


def _token(args: argparse.Namespace) -> tuple[str, bool]:
    """The token that is asked for, "" for none, and whether it was made here."""
    token = args.token if args.token is not None else os.environ.get(TOKEN, "")
    if not token.isascii() or any(not 32 < ord(c) < 127 for c in token):
        raise UsageError("a token is of letters, digits and marks, without spaces", hint="leave --token out")
    if args.token == "":
        raise UsageError("the token is empty", hint=f"leave --token out, or set {TOKEN}")
    if token or is_loopback(args.host):
        return token, False
    return secrets.token_urlsafe(24), True


def _tell(ui: Ui, front: Front, engine: Running, made: str) -> None:
    ui.event(
        {
            "event": "serving", "url": front.url, "model": engine.wanted.model.name, "engine": engine.engine.name,
            "threads": engine.wanted.threads, **({"token": made} if made else {}),
        }
    )  # fmt: skip
    rows = [("page", front.url + "/"), ("endpoint", front.url + "/v1")]
    rows += [("token", made)] if made else []
    ui.paths(rows)
    if not front.loopback:
        ui.note(
            "others can reach this, unencrypted: put it behind a proxy with TLS where you do not trust the net"
        )
    ui.note("Ctrl-C ends it")


@contextmanager
def stopped_by_signals(code: int) -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP leave it as an exit with `code`, so that what it opened is closed.

    One that is ignored stays so: under `nohup` it goes on when the terminal is closed.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(code)

    found = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in found if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# The engine and its model -----------------------------------------------------------------------------------


@contextmanager
def opened(args: argparse.Namespace, ui: Ui, of_run: Path | None) -> Iterator[Running]:
    """An engine with the subject's model, on as many threads as are fastest (or as many as asked for)."""
    engine = engines.choose(args.engine)
    with tempfile.TemporaryDirectory(prefix="fleetune-") as folder:
        model = _model(args, ui, of_run, engine, Path(folder))
        count = args.threads or _measured(ui, engine, model, args.context)
        ui.note(f"{engine.name} with {model.name} on {count} thread{'s' if count > 1 else ''}")
        with engines.started(engine, model, count, args.context) as running:
            yield running


def check(args: argparse.Namespace) -> None:
    """UsageError for numbers that mean nothing, and for a subject that is a missing or another file."""
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads} is below 1", hint="leave it out to have it measured")
    if args.context < 64:
        raise UsageError(f"--context {args.context} is below 64 tokens", hint="the default is 4096")
    path = Path(args.subject)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise ModelError(f"there is no file '{path}'", hint="check the path")
        header.check(path)


def _measured(ui: Ui, engine: Engine, model: Path, context: int) -> int:
    """The fastest number of threads for a model in an engine, said with the others that were tried."""
    counts = threads.candidates(threads.cores())
    if len(counts) == 1:
        return 1

    def rate(count: int) -> float:
        with engines.started(engine, model, count, context) as running, running.asked():
            found = threads.speed(running.address)
        ui.note(f"measured: {count} thread{'s' if count > 1 else ''}, {found:.1f} tokens/s")
        return found

    count, rates = threads.fastest(counts, rate)
    ui.event(
        {"event": "threads", "chosen": count, "tokens_per_second": {str(n): r for n, r in rates.items()}}
    )
    return count


def _model(args: argparse.Namespace, ui: Ui, of_run: Path | None, engine: Engine, folder: Path) -> Path:
    """The file or directory that the engine reads, exported into `folder` where there is none yet."""
    path = Path(args.subject)
    if path.is_file() and engine.reads == "gguf":
        return _told(ui, path)
    made = compressed(args, of_run)
    home = made[0] if made is not None else of_run if of_run is not None else path
    if engine.reads == "gguf" and (ready := _newest_gguf(home)) is not None:
        ui.note(f"serving {ready}")
        return _told(ui, ready)
    source = made[1] if made is not None else _plain(args, of_run, folder / _name(home))
    if engine.reads == "hf" and made is None and _has_template(source):
        return source
    return _exported(args, ui, source, engine.reads, folder / "exported" / _name(home))


def _told(ui: Ui, file: Path) -> Path:
    """A file with a whole model in it, of which is said what an engine will do differently."""
    if not header.check(file).values.get("tokenizer.chat_template"):
        ui.note(f"{file} has no chat template, so the engine asks it in a form of its own; export it again")
    return file


def _plain(args: argparse.Namespace, of_run: Path | None, folder: Path) -> Path:
    """The plain directory of a model, or of a finished run, for which it is written to `folder`."""
    from fleetune import models
    from fleetune.runs import rundir
    from fleetune.tuning import finished

    if of_run is None:
        rundir.check_name(args.subject, Path(args.out))
        return models.resolve(args.subject, offline=args.offline)
    finished.export_hf(finished.load(of_run, offline=args.offline, device="cpu"), folder)
    return folder


def _has_template(folder: Path) -> bool:
    """Whether transformers' server can put a conversation into words: an export can where the model cannot."""
    from fleetune.deploy.formats import gguf_vocabulary

    return gguf_vocabulary.load(folder).chat_template is not None


def _exported(args: argparse.Namespace, ui: Ui, source: Path, kind: str, out: Path) -> Path:
    """`source` exported to "hf", or to "gguf": in fp32 where that has no blocks for its codes."""
    from fleetune.deploy import export
    from fleetune.deploy.checkpoint import open_checkpoint
    from fleetune.deploy.formats import gguf

    if kind == "gguf":
        kind = gguf.exact_target(open_checkpoint(source)) or kind
        out = out.with_name(f"{out.name}.gguf")
    if kind == "gguf:f32":
        ui.note(
            "GGUF has no blocks that hold these codes exactly, so the weights are fp32 there: slower, and larger"
        )
    keep = f"to keep it: fleetune export {args.subject} --to {kind}"
    ui.note(f"exporting {args.subject} to {kind} for this session; {keep}")
    out.parent.mkdir(exist_ok=True)
    report = export.export(source, kind, out)
    for note in report.notes:
        ui.note(f"note: {note}")
    return report.path


def compressed(args: argparse.Namespace, of_run: Path | None) -> tuple[Path, Path] | None:
    """The folder of the compressed model that is meant, and the model in it; None for none."""
    from fleetune.cli.commands import compress
    from fleetune.models.artefact import is_master

    path = Path(args.subject)
    if is_master(path):
        return (path.parent if path.name == "model" else path), path
    found = compress.named(args.subject, Path(args.out), of_run)
    return (found, compress.artefact(found)) if found else None


def _newest_gguf(folder: Path) -> Path | None:
    """The newest file with a whole model; an exported adapter may lie beside it."""
    from fleetune.deploy.formats.gguf_lora import is_adapter

    files = [p for p in folder.glob("*.gguf") if not is_adapter(p)] if folder.is_dir() else []
    return max(files, key=lambda p: p.stat().st_mtime, default=None)


def _name(home: Path) -> str:
    from fleetune.runs import rundir

    return rundir.slug(home.resolve().name) or "model"


# Arguments --------------------------------------------------------------------------------------------------


def arguments(sub: argparse.ArgumentParser) -> None:
    """The flags of `fleetune serve`."""
    engine_arguments(sub, [engine.name for engine in engines.ENGINES])
    sub.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    sub.add_argument(
        "--port", type=int, default=8080, help="port to listen on, 0 for any free one (default 8080)"
    )
    sub.add_argument(
        "--token",
        help=f"what a client must present (or the environment's {TOKEN}); off this machine one is made",
    )


def engine_arguments(sub: argparse.ArgumentParser, names: list[str]) -> None:
    """The flags that `serve` and `chat` share."""
    sub.add_argument("subject", metavar="RUN|FOLDER|MODEL", help="also a .gguf file, or latest")
    sub.add_argument(
        "--engine",
        default="auto",
        choices=["auto", *names],
        help="what runs the model (default: the first installed)",
    )
    sub.add_argument("--threads", type=int, help="threads of the engine (default: measured)")
    sub.add_argument(
        "--context", type=int, default=4096, help="tokens of a conversation at most (default 4096; llama.cpp)"
    )
