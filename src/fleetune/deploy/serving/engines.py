# SPDX-License-Identifier: Apache-2.0
"""Start an inference engine that others maintain: a child process with OpenAI's HTTP interface.

    llama-server   llama.cpp's own server, where its binary is on the PATH
    xllamacpp      the same server out of a wheel (extra `fleetune[serve]`), started by `main` below
    transformers   `transformers serve` over a Hugging Face directory (same extra)

The first two read a .gguf file and have a chat page.  An engine's key travels in the environment, so that it is in no list
of processes; its output goes to a log file.  It leads a session of its own: Ctrl-C in a terminal reaches Fleetune alone,
which then ends it.
"""

from __future__ import annotations

import http.client
import importlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from fleetune.common.shell import pip_install
from fleetune.errors import FleetuneError, UsageError

INSTALL: Final = pip_install("serve")
LOOPBACK: Final = "127.0.0.1"
EVERYWHERE: Final = {"": LOOPBACK, "0.0.0.0": LOOPBACK, "::": "::1"}  # where it is asked from this machine
KEY: Final = "LLAMA_API_KEY"  # llama-server's own name for it
START_SECONDS: Final = 600.0  # a large model from a slow card takes minutes
STOP_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Options:
    """Options of an engine: which, on how many threads, and where it listens."""

    engine: str = "auto"  # the first installed
    threads: int | None = None  # None: as many as the engine chooses
    context: int = 4096  # tokens of a conversation at most (llama.cpp)
    host: str = LOOPBACK
    port: int = 0  # any free one
    key: str | None = (
        ""  # that a client must present; "": none on this machine, one made off it; None: always one made
    )


@dataclass(frozen=True)
class Engine:
    """An engine: what it reads, whether it is installed, and the command that starts it."""

    name: str
    reads: str  # "gguf" or "hf"
    available: Callable[[], bool]
    command: Callable[[Path, Options], list[str]]
    page: bool = True  # whether it has a chat page
    keys: bool = True  # whether it can ask for a key


def _llama_server(model: Path, asked: Options) -> list[str]:
    threads = ["--threads", str(asked.threads)] if asked.threads else []
    return [
        shutil.which("llama-server") or "llama-server",
        "--model",
        str(model),
        "--alias",
        model.name,
        "--host",
        asked.host,
        "--port",
        str(asked.port),
        "--ctx-size",
        str(asked.context),
        *threads,
    ]


def _python(*words: str) -> list[str]:
    """Return the command that runs a module; -P: none that lies in the current folder takes its place."""
    return [sys.executable, "-P", "-m", *words]


def _xllamacpp(model: Path, asked: Options) -> list[str]:
    numbers = (str(number) for number in (asked.port, asked.context, asked.threads or 0))
    return _python("fleetune.deploy.serving.engines", str(model), asked.host, *numbers)


def _transformers(model: Path, asked: Options) -> list[str]:
    place = ["--host", asked.host, "--port", str(asked.port)]
    return _python("transformers.cli.transformers", "serve", model.name, *place)


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


ENGINES: Final = (
    Engine("llama-server", "gguf", lambda: shutil.which("llama-server") is not None, _llama_server),
    Engine("xllamacpp", "gguf", lambda: _installed("xllamacpp"), _xllamacpp),
    Engine(
        "transformers",
        "hf",
        lambda: _installed("fastapi", "uvicorn", "openai", "accelerate"),
        _transformers,
        page=False,
        keys=False,
    ),
)


def choose(name: str) -> Engine:
    """Return the engine of a name, or for `auto` the first that is installed.  UsageError when there is none."""
    named = [engine for engine in ENGINES if name in ("auto", engine.name)]
    if not named:
        raise UsageError(
            f"no engine named '{name}'", hint=f"there are: auto, {', '.join(e.name for e in ENGINES)}"
        )
    for engine in named:
        if engine.available():
            return engine
    what = "no engine" if name == "auto" else f"no '{name}'"
    raise UsageError(f"{what} is installed", hint=f"{INSTALL}; or put llama.cpp's llama-server on the PATH")


@dataclass(frozen=True)
class Session:
    """A model in a running engine."""

    engine: Engine
    model: Path  # a .gguf file, or a directory
    options: Options
    process: subprocess.Popen[bytes]
    log: Path  # of the engine's output

    @property
    def url(self) -> str:
        """The address that others ask: of the chat page where the engine has one, and of OpenAI's interface under /v1."""
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
                raise self.failed(f"{self.engine.name} has not loaded {self.model} in {seconds:.0f} s")
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
            otherwise if code is None else f"the engine {self.engine.name} has ended ({how})",
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
def started(engine: Engine, model: Path, options: Options, log: Path) -> Iterator[Session]:
    """Run an engine for the block; FleetuneError when it does not become healthy."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment |= {KEY: options.key} if options.key else {}
    environment |= {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                engine.command(model, options),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=model.parent,
                start_new_session=True,
            )
        except OSError as error:
            raise FleetuneError(
                f"{engine.name} cannot be started: {error.strerror}", hint="choose another with --engine"
            ) from error
    session = Session(engine, model, options, process, log)
    try:
        session.load()
        yield session
    finally:
        session.stop()


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
