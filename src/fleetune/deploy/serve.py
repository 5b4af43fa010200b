"""Serve a model with llama.cpp's server, a child process that others maintain, and talk to it by OpenAI's HTTP interface.

The key travels in the environment, so that it is in no list of processes.  The engine leads a session of its own: Ctrl-C in a
terminal reaches Fleetune alone, which then ends it.
"""

from __future__ import annotations

import http.client
import importlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NoReturn

from fleetune.common.display import pip_install, quoted
from fleetune.errors import FleetuneError, ModelError, UsageError
from fleetune.models.cache import names as model_names
from fleetune.models.gguf import header
from fleetune.runs import rundir
from fleetune.runs.listener import Listener
from fleetune.subject import Compressed, Run, Subject

INSTALL: Final = pip_install("serve")
ENGINES: Final = ("llama-server", "xllamacpp")
LOOPBACK: Final = "127.0.0.1"
EVERYWHERE: Final = {"": LOOPBACK, "0.0.0.0": LOOPBACK, "::": "::1"}  # where it is asked from this machine
KEY: Final = "LLAMA_API_KEY"  # llama-server's own name for it
START_SECONDS: Final = 600.0  # a large model from a slow card takes minutes
STOP_SECONDS: Final = 5.0
SILENCE: Final = 600.0  # seconds without a word from an engine until it counts as hung
# OpenMP's threads spin 300,000 times where they wait for each other; on busy cores that takes the time of those waited for
SPINS: Final = {"GOMP_SPINCOUNT": "1000"}


@dataclass(frozen=True)
class Options:
    """Options of an engine: which, on how many threads, and where it listens."""

    engine: str = "auto"  # the first installed
    threads: int | None = None  # None: as many as the engine chooses
    context: int = 4096  # tokens of a conversation at most
    host: str = LOOPBACK
    port: int = 0  # any free one
    key: str | None = ""  # of clients; "": none on this machine, one made off it; None: always one made


# ---------------------------------------------------------------- the model that is served


@contextmanager
def opened(subject: Subject, options: Options, listener: Listener, *, offline: bool) -> Iterator[Session]:
    """Run an engine with the subject's model while the block runs; UsageError for options that cannot be."""
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads {options.threads} is below 1", hint="leave it to the engine")
    if options.context < 64:
        raise UsageError(f"--context {options.context} is below 64 tokens", hint="the default is 4096")
    if not isinstance(subject, Run | Compressed):
        model_names.check(subject.name)
        if (path := Path(subject.name).expanduser()).suffix.lower() == ".gguf" and not path.is_dir():
            header.check(path)
    engine = choose(options.engine)
    settled = replace(options, engine=engine, key=_key(options), port=free_port(options.host, options.port))
    with tempfile.TemporaryDirectory(prefix="fleetune-") as folder:
        model = _model_for(subject, Path(folder), listener, offline=offline).resolve()
        listener.note(f"{engine} loads {model.name}")
        with started(model, settled, Path(folder) / "engine.log") as session:
            yield session


def choose(name: str) -> str:
    """Return the engine of a name, or for `auto` the first that is installed.  UsageError when there is none."""
    if name not in ("auto", *ENGINES):
        raise UsageError(f"no engine named '{name}'", hint=f"there are: auto, {', '.join(ENGINES)}")
    for engine in ENGINES:
        if name in ("auto", engine) and (shutil.which(engine) or importlib.util.find_spec(engine)):
            return engine
    what = "no engine" if name == "auto" else f"no '{name}'"
    raise UsageError(f"{what} is installed", hint=f"{INSTALL}; or put llama.cpp's llama-server on the PATH")


def _key(options: Options) -> str:
    """Return the key that clients must present: the one given, that of the environment, or one made; "" for none."""
    if options.key is not None:
        here = options.host in ("localhost", "::1") or options.host.startswith("127.")
        if (key := options.key or os.environ.get(KEY, "")) or here:
            return key
    return secrets.token_urlsafe(24)


def _model_for(subject: Subject, folder: Path, listener: Listener, *, offline: bool) -> Path:
    """Return the file that the engine reads, exported into `folder` where there is none yet."""
    if isinstance(subject, Compressed):
        subject.model  # noqa: B018  (an unfinished one is refused before a file of it is served)
        home = subject.home
    else:
        home = subject.folder if isinstance(subject, Run) else Path(subject.name).expanduser()
    if (ready := home if home.is_file() else _newest_gguf(home)) is not None:
        header.check(ready)
        listener.note(f"serving {ready}")
        return ready
    from fleetune.deploy import export  # the child process of `main` imports this module, and holds no torch
    from fleetune.deploy.checkpoint import open_checkpoint
    from fleetune.deploy.formats import gguf

    exact = gguf.exact_target(open_checkpoint(subject.model)) if isinstance(subject, Compressed) else None
    kind = exact or "gguf"  # gguf:f32 for codes that have no blocks
    out = folder / f"{rundir.slug(home.resolve().name) or 'model'}.gguf"
    keep = f"to keep it: fleetune export {quoted(subject.argument)} --to {kind}"
    listener.note(f"exporting {subject.argument} to {kind} for this session; {keep}")
    return export.export(subject, kind, out, None, listener, offline=offline).path


def _newest_gguf(folder: Path) -> Path | None:
    """Return the newest file with a whole model; an exported adapter may lie beside it."""
    files = [p for p in folder.glob("*.gguf") if not is_adapter(p)] if folder.is_dir() else []
    return max(files, key=lambda p: p.stat().st_mtime, default=None)


def is_adapter(path: Path) -> bool:
    """Return whether a .gguf file holds an adapter; False for one that cannot be read."""
    try:
        return bool(header.read(path).values.get("general.type") == "adapter")
    except ModelError:
        return False


# ---------------------------------------------------------------- the engine


@dataclass(frozen=True)
class Session:
    """A model in a running engine."""

    model: Path  # a .gguf file
    options: Options
    process: subprocess.Popen[bytes]
    log: Path  # of the engine's output

    @property
    def url(self) -> str:
        """The address that others ask: of the chat page, and of OpenAI's interface under /v1."""
        host = self.options.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.options.port}"

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {"Authorization": f"Bearer {self.options.key}"} if self.options.key else {}

    def connection(self, seconds: float) -> http.client.HTTPConnection:
        """Return a connection from this machine that waits so long for an answer."""
        host = EVERYWHERE.get(self.options.host, self.options.host)
        return http.client.HTTPConnection(host, self.options.port, timeout=seconds)

    def healthy(self) -> bool:
        """Return whether the engine answers and has its model loaded."""
        connection = self.connection(5)
        try:
            connection.request("GET", "/health", headers=self.headers)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait(self) -> NoReturn:
        """Wait until the engine ends by itself, which is a FleetuneError."""
        self.process.wait()
        raise self.failed("")

    def load(self, seconds: float = START_SECONDS) -> None:
        """Return when the engine is healthy.  FleetuneError when it ends instead, or takes too long."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and not self.healthy():
            if time.monotonic() > end:
                raise self.failed(f"{self.options.engine} has not loaded {self.model} in {seconds:.0f} s")
            time.sleep(0.05)
        if self.process.poll() is not None:
            raise self.failed("")

    def failed(self, otherwise: str) -> FleetuneError:
        """Return the error of an engine that has ended by itself, or `otherwise`; its last words are the hint."""
        with suppress(subprocess.TimeoutExpired):  # a connection breaks before its process is gone
            self.process.wait(1)
        code = self.process.returncode
        how = f"exit code {code}" if code is None or code >= 0 else f"signal {-code}"
        words = self.log.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()[-5:]
        return FleetuneError(
            otherwise if code is None else f"the engine {self.options.engine} has ended ({how})",
            hint="its last words: " + ("\n  ".join(words) or "none"),
        )

    def stop(self) -> None:
        """End the process, and wait for it."""
        try:
            self.process.terminate()
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also when a second Ctrl-C cuts the waiting short
            self.process.kill()
            self.process.wait()


@contextmanager
def started(model: Path, options: Options, log: Path) -> Iterator[Session]:
    """Run the engine that `options` name for the block; FleetuneError when it does not become healthy."""
    environment = SPINS | os.environ | {"HF_HUB_OFFLINE": "1"}
    environment |= {KEY: options.key} if options.key else {}
    environment |= {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                _command(model, options),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=model.parent,
                start_new_session=True,
            )
        except OSError as error:
            raise FleetuneError(
                f"{options.engine} cannot be started: {error.strerror}", hint="choose another with --engine"
            ) from error
    session = Session(model, options, process, log)
    try:
        session.load()
        yield session
    finally:
        session.stop()


def _command(model: Path, options: Options) -> list[str]:
    """Return the command of an engine; -P: no module that lies in the current folder takes the place of ours."""
    port, context, threads = str(options.port), str(options.context), options.threads
    if options.engine == "xllamacpp":
        numbers = [port, context, str(threads or 0)]
        return [sys.executable, "-P", "-m", "fleetune.deploy.serve", str(model), options.host, *numbers]
    words = ["--model", str(model), "--alias", model.name, "--host", options.host, "--port", port]
    words += ["--ctx-size", context] + (["--threads", str(threads)] if threads else [])
    return [shutil.which("llama-server") or "llama-server", *words]


def free_port(host: str, port: int) -> int:
    """Return `port`, or for 0 any free one.  UsageError when it cannot be listened on: an engine would say so later."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if sys.platform != "win32":  # as servers do: a port whose last connections have just ended is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
                hint="choose another: --port N, or 0 for any free one",
            ) from error
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- a conversation

Turn = dict[str, str]  # role, content


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: the likeliest at temperature 0, else with `seed`; of `max_tokens` tokens at most."""

    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 42

    def check(self) -> None:
        """UsageError for numbers that mean nothing."""
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens} is below 1", hint="the default is 512")
        if not 0 <= self.temperature <= 2:
            raise UsageError(
                f"--temperature {self.temperature} is not in 0..2", hint="0 is the likeliest answer"
            )


class Refused(FleetuneError):
    """The engine answered with an error; it goes on with other requests."""


class Conversation:
    """A conversation with a running engine, which remembers what was said before.

    `turns` are the turns so far, each with a `role` (system, user, assistant) and a `content`.
    """

    def __init__(self, session: Session, sampling: Sampling, system: str = "") -> None:
        self._session, self._sampling = session, sampling
        self._begun: list[Turn] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Turn] = list(self._begun)

    def say(self, text: str) -> str:
        """Return the answer to `text`.  Refused, with the conversation as it was, when it has grown too long."""
        return "".join(self.pieces(text))

    def pieces(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to `text` as it is written; closing the generator ends it, and what came is remembered."""
        asked, answer = [*self.turns, {"role": "user", "content": text}], ""
        written = _streamed(self._session, asked, self._sampling)
        try:
            for piece in written:
                answer += piece
                yield piece
        finally:
            written.close()
            if answer:
                self.turns = [*asked, {"role": "assistant", "content": answer}]

    def restart(self) -> None:
        """Forget what was said, but for the system prompt."""
        self.turns = list(self._begun)


def _streamed(session: Session, turns: list[Turn], sampling: Sampling) -> Generator[str, None, None]:
    """Yield the text of an answer as it comes (server-sent events).

    Refused when the engine says no; FleetuneError when the connection breaks, also in the middle.
    """
    body = {
        "model": session.model.name,
        "messages": turns,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "stream": True,
    }
    connection = session.connection(SILENCE)
    try:
        headers = session.headers | {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise Refused(_reason(response.read(), response.status))
        finished = False
        for line in response:
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                text, ends = _event(line[5:])
                finished = finished or ends
                if text:
                    yield text
        if not finished:
            raise http.client.IncompleteRead(b"")
    except (OSError, http.client.HTTPException) as error:
        raise session.failed(f"the answer of {session.options.engine} broke off: {error!r}") from error
    finally:
        connection.close()


def _event(data: bytes) -> tuple[str, bool]:
    """Return the text of one event, "" for none, and whether it is the last; Refused when it is an error."""
    event = json.loads(data)
    if "error" in event:
        raise Refused(_reason(data, 500))
    if not event.get("choices"):  # a count of tokens
        return "", False
    choice = event["choices"][0]
    return str((choice.get("delta") or {}).get("content") or ""), choice.get("finish_reason") is not None


def _reason(raw: bytes, status: int) -> str:
    """Return why an engine refused: the message of an error in OpenAI's form, else the start of the body."""
    try:
        error = json.loads(raw)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}: " + raw[:200].decode(errors="replace").strip()


# ---------------------------------------------------------------- the child process of xllamacpp


def main(argv: Sequence[str]) -> None:
    """Serve a .gguf file with xllamacpp's copy of llama.cpp's server, until killed."""
    model, host = Path(argv[0]), argv[1]
    port, context, threads = map(int, argv[2:])
    package = importlib.import_module("xllamacpp")
    params = package.CommonParams()
    params.model.path, params.model_alias = str(model), {model.name}
    params.hostnames, params.port, params.n_ctx = [host], port, context
    params.api_keys = [os.environ[KEY]] if os.environ.get(KEY) else []
    if threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cors_origins, params.verbosity = "", 2  # no page of another address may ask; warnings and errors
    server = package.Server(params)  # returns when the model is loaded; ends when it is let go
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main(sys.argv[1:])
