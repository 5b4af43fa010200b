# SPDX-License-Identifier: Apache-2.0
"""Start inference engines, each a child process with an OpenAI-compatible server on a loopback port.

    llama-server   llama.cpp's own server, where its binary is on the PATH
    xllamacpp      the same server out of a wheel (extra `fleetune[serve]`), started by `engine_process.py`
    transformers   transformers' own server over a plain Hugging Face directory (same extra), started likewise

The first two read a .gguf file.  An engine is a name, what it reads, whether it is installed, and the command that
starts it.

The port is a random free one; llama.cpp's servers also ask for a key made for this one process.  It is passed in the
environment, so that other users and web pages cannot bypass the front's checks.  The child leads a process group of its
own: Ctrl-C in a terminal reaches Fleetune first, which then ends the group.  Where Fleetune itself is killed, a watching
process ends the group, since llama-server would not notice.  The last of the child's output stays in memory.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from fleetune.common.extras import pip_install
from fleetune.deploy.serving.openai_client import Address
from fleetune.errors import FleetuneError, UsageError

INSTALL: Final = pip_install("serve")
LOOPBACK: Final = "127.0.0.1"
KEY: Final = "LLAMA_API_KEY"  # llama-server's own name for it
START_SECONDS: Final = 600.0  # a large model from a slow card takes minutes
STOP_SECONDS: Final = 5.0
TAIL_BYTES: Final = 2000  # of the output
READ_SECONDS: Final = 1.0  # to read the rest of the output after the end
# its standard input ends when Fleetune does, however that came
WATCH: Final = "import os, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), 9)"


@dataclass(frozen=True)
class LaunchOptions:
    """Arguments of an engine's process: the model's file or directory, and options."""

    model: Path
    port: int
    threads: int
    context: int  # tokens of a conversation


@dataclass(frozen=True)
class Engine:
    """An engine: what it reads, whether it is installed, and the command that starts it."""

    name: str
    reads: str  # "gguf" or "hf"
    available: Callable[[], bool]
    command: Callable[[LaunchOptions], list[str]]


def _llama_server(options: LaunchOptions) -> list[str]:
    model, threads = options.model, str(options.threads)
    return [
        shutil.which("llama-server") or "llama-server", "--model", str(model), "--alias", model.name, "--host", LOOPBACK,
        "--port", str(options.port), "--ctx-size", str(options.context), "--parallel", "1",
        "--threads", threads, "--threads-batch", threads,
    ]  # fmt: skip


def _child(kind: str) -> Callable[[LaunchOptions], list[str]]:
    def command(options: LaunchOptions) -> list[str]:
        numbers = [str(n) for n in (options.port, options.threads, options.context)]
        # -P: a module that lies in the folder we were started in is not run
        return [
            sys.executable,
            "-P",
            "-m",
            "fleetune.deploy.serving.engine_process",
            kind,
            str(options.model),
            *numbers,
        ]

    return command


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


ENGINES: Final = (
    Engine("llama-server", "gguf", lambda: shutil.which("llama-server") is not None, _llama_server),
    Engine("xllamacpp", "gguf", lambda: _installed("xllamacpp"), _child("xllamacpp")),
    Engine(
        "transformers",
        "hf",
        lambda: _installed("fastapi", "uvicorn", "openai", "pydantic", "accelerate"),
        _child("transformers"),
    ),
)


def choose(name: str) -> Engine:
    """Return the engine of a name, or for `auto` the first that is installed.  UsageError when there is none."""
    found = [engine for engine in ENGINES if name in ("auto", engine.name)]
    if not found:
        raise UsageError(
            f"no engine named '{name}'", hint="choose one of auto, " + ", ".join(e.name for e in ENGINES)
        )
    for engine in found:
        if engine.available():
            return engine
    what = "no engine" if name == "auto" else f"the engine '{name}'"
    hint = "put llama.cpp's llama-server on the PATH" if name == "llama-server" else INSTALL
    raise UsageError(f"{what} is{' not' if name != 'auto' else ''} installed", hint=hint)


class _OutputTail:
    """The last output of a process, read in a thread so that the process never waits."""

    def __init__(self, said: IO[bytes] | None) -> None:
        self.last = b""
        self._thread = threading.Thread(target=self._read, args=(said,), daemon=True)
        self._thread.start()

    def _read(self, said: IO[bytes] | None) -> None:
        if said is not None:
            with said:
                while piece := said.read(1 << 16):
                    self.last = (self.last + piece)[-TAIL_BYTES:]

    def end(self) -> None:
        """Read the rest after the process ended; a child of it may still hold the pipe open."""
        self._thread.join(READ_SECONDS)


class Running:
    """A started engine."""

    def __init__(self, engine: Engine, options: LaunchOptions) -> None:
        """Start the process; it may die at once, which `wait` reports."""
        self.engine, self.options = engine, options
        self.address = Address(LOOPBACK, options.port, secrets.token_urlsafe(24))
        environment = os.environ | {
            KEY: self.address.key,
            "OMP_NUM_THREADS": str(options.threads),
            "HF_HUB_OFFLINE": "1",
        }
        try:
            self.process = subprocess.Popen(
                engine.command(options), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise FleetuneError(
                f"{engine.name} cannot be started: {error.strerror}", hint="choose another with --engine"
            ) from error
        self._output = _OutputTail(self.process.stdout)
        self._watch = _watch(self.process)

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self.process.poll() is None

    def healthy(self) -> bool:
        """Return whether the engine answers and has its model loaded."""
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(self.address.host, self.address.port, timeout=5)
            try:
                connection.request("GET", "/health", headers=self.address.headers())
                return connection.getresponse().status == 200
            finally:
                connection.close()
        return False

    def wait(self, seconds: float = START_SECONDS) -> None:
        """Return when the engine is healthy.  FleetuneError when it dies instead, or takes too long."""
        end = time.monotonic() + seconds
        while not self.healthy():
            if not self.alive():
                raise self.exit_error()
            if time.monotonic() > end:
                raise FleetuneError(
                    f"{self.engine.name} has not loaded {self.options.model} within {seconds:.0f} s",
                    hint=self._last_words(),
                )
            time.sleep(0.05)

    def exit_error(self) -> FleetuneError:
        """Return the error of an engine that has ended by itself."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        code = self.process.returncode
        how = f"exit code {code}" if code is None or code >= 0 else f"killed by signal {-code}"
        return FleetuneError(
            f"the engine {self.engine.name} has ended ({how})",
            hint=self._last_words(),
        )

    @contextmanager
    def request(self) -> Iterator[None]:
        """Run a request to the engine; where its connection breaks, a FleetuneError says why."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            with suppress(subprocess.TimeoutExpired):  # a connection breaks before its process is gone
                self.process.wait(1)
            if not self.alive():
                raise self.exit_error() from error
            raise FleetuneError(
                f"the answer of {self.engine.name} broke off: {error!r}",
                hint=self._last_words(),
            ) from error

    def _last_words(self) -> str:
        return "its last words: " + (self.tail().replace("\n", "\n  ") or "none")  # as a message has lines

    def tail(self) -> str:
        """Return the last lines of the engine's output."""
        if not self.alive():
            self._output.end()
        return "\n".join(self._output.last.decode(errors="replace").strip().splitlines()[-5:])

    def stop(self) -> None:
        """End the process and all that it started, and wait for it."""
        _signal(self.process, signal.SIGTERM)
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        finally:  # also when a second Ctrl-C cuts the waiting short
            _signal(self.process, getattr(signal, "SIGKILL", signal.SIGTERM))
            self.process.wait()
            self._output.end()
            if self._watch is not None:
                self._watch.kill()
                self._watch.communicate()


def _watch(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes] | None:
    """Start a small process that ends the group of `process` when this one is gone; None where there are no groups."""
    if sys.platform == "win32":
        return None
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WATCH, str(process.pid)], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the process and its group, or to what is left of them."""
    with suppress(OSError):
        if sys.platform == "win32":
            process.terminate()
        else:
            os.killpg(process.pid, number)


@contextmanager
def started(engine: Engine, model: Path, threads: int, context: int) -> Iterator[Running]:
    """Run an engine for the block; FleetuneError when it does not become healthy."""
    running = Running(engine, LaunchOptions(model, _free_port(), threads, context))
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
