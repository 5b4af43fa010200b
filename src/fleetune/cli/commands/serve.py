# SPDX-License-Identifier: Apache-2.0
"""`fleetune serve`: an OpenAI-compatible endpoint and a chat page over an engine that others maintain."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from fleetune.cli import engine_flags
from fleetune.cli.console import Ui

if TYPE_CHECKING:
    from fleetune.deploy.serving.session import Session

HELP = "an OpenAI-compatible endpoint and a chat page over a model"
ORDER = 100
EXAMPLES = """\
fleetune serve latest
fleetune serve model.gguf --port 9000 --threads 4
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from fleetune.deploy.serving import engines, front

    engine_flags.add(sub, [engine.name for engine in engines.ENGINES])
    sub.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    sub.add_argument(
        "--port", type=int, default=8080, help="port to listen on, 0 for any free one (default 8080)"
    )
    sub.add_argument(
        "--token",
        help=f"what a client must present (or the environment's {front.TOKEN}); off this machine one is made",
    )
    sub.add_argument(
        "--beside-base",
        action="store_true",
        help="serve the base model too, in a second engine with memory of its own; the page shows both answers side by side",
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Serve until Ctrl-C or SIGTERM, which end the engine too.  FleetuneError when the engine ends by itself."""
    from fleetune import api
    from fleetune.cli.listener import console_listener

    with engine_flags.exit_on_signals(0), console_listener(ui) as listener, api.serve(
        args.subject, engine=args.engine, threads=args.threads, context=args.context, host=args.host,
        port=args.port, token=args.token, beside_base=args.beside_base, out=args.out, offline=args.offline, listener=listener,
    ) as session:  # fmt: skip
        try:
            _show(ui, session)
            while (ended := session.ended()) is None:
                time.sleep(0.1)
            time.sleep(0.5)  # those who wait for an answer are told
            raise ended.exit_error()
        except KeyboardInterrupt:
            ui.note("stopped")


def _show(ui: Ui, session: Session) -> None:
    rows = [("page", session.url + "/"), ("endpoint", session.url + "/v1")]
    rows += [("token", session.started.token)] if session.started.token else []
    ui.paths(rows)
    if not session.front.loopback:
        ui.note(
            "others can reach this, unencrypted: put it behind a proxy with TLS where you do not trust the net"
        )
    ui.note("Ctrl-C ends it")
