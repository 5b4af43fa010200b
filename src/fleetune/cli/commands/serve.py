"""`fleetune serve`: an OpenAI-compatible endpoint and a chat page, of an engine that others maintain."""

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import fleetune
from fleetune.cli import flags
from fleetune.cli.console import Ui, console_listener
from fleetune.errors import Interrupted

HELP = "an OpenAI-compatible endpoint and a chat page over a model"
ORDER = 100
EXAMPLES = """\
fleetune serve latest
fleetune serve model.gguf --port 9000 --threads 4
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    engine_arguments(sub)
    sub.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    sub.add_argument(
        "--port", type=int, default=8080, help="port to listen on, 0 for any free one (default 8080)"
    )
    sub.add_argument(
        "--api-key",
        default="",
        metavar="KEY",
        help="what a client must present (or the environment's LLAMA_API_KEY); off this machine one is made",
    )


def engine_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the subject and the engine's flags: `chat` has them too."""
    sub.add_argument("subject", metavar="RUN|FOLDER|MODEL", help="also a .gguf file, or latest")
    sub.add_argument(
        "--engine", default="auto", help="llama-server or xllamacpp (default: the first installed)"
    )
    sub.add_argument("--threads", type=int, help="threads of the engine (default: its own choice)")
    sub.add_argument("--context", type=int, default=4096, help="most tokens of a conversation (default 4096)")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Serve until Ctrl-C, SIGTERM or SIGHUP, which end the engine too.  FleetuneError when it ends by itself."""
    ui.note(f"loading {args.subject}")
    with (
        ended_by_signals(),
        console_listener(ui, resumes=False, begins="") as listener,
        fleetune.serve(
            args.subject,
            key=args.api_key,
            listener=listener,
            **flags.options(args, "engine threads context host port"),
        ) as session,
    ):
        rows = [("page", session.url + "/"), ("endpoint", session.url + "/v1"), ("log", str(session.log))]
        ui.paths(rows + ([("key", session.options.key)] if session.options.key else []))
        ui.note("Ctrl-C ends it")
        try:
            session.wait()
        except KeyboardInterrupt:
            ui.note("stopped")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP leave it as an error, so that what it opened is closed.

    One that is ignored stays so: under `nohup` the command survives a closed terminal.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped")

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: signal.signal(n, leave) for n in known if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
