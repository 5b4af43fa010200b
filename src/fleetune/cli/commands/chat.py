"""`fleetune chat`: a conversation in the terminal, or one answer to one prompt, with an engine of its own."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Final

import fleetune
from fleetune.cli import flags
from fleetune.cli.commands.serve import ended_by_signals, engine_arguments
from fleetune.cli.console import Ui, console_listener
from fleetune.common.events import Answered
from fleetune.deploy.serve import Refused
from fleetune.errors import UsageError

if TYPE_CHECKING:
    from fleetune.deploy.serve import Conversation

HELP = "talk to a model in the terminal, or ask it one thing"
ORDER = 110
EXAMPLES = """\
fleetune chat latest
fleetune chat latest --prompt "Why is the sky blue?"
echo "Why is the sky blue?" | fleetune chat latest
"""
KEYS: Final = "/new forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    engine_arguments(sub)
    sub.add_argument(
        "--prompt", metavar="TEXT", help="answer this and end (a pipe's whole text counts as one)"
    )
    sub.add_argument("--system", metavar="TEXT", default="", help="system prompt of the conversation")
    sub.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0: the likeliest answer, the same each time (default 0)",
    )
    sub.add_argument("--max-tokens", type=int, default=512, help="most tokens per answer (default 512)")
    sub.add_argument("--seed", type=int, default=42, help="of what is drawn above temperature 0 (default 42)")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Talk; with `--prompt`, or what a pipe holds, answer once and end."""
    ui.note(f"loading {args.subject}")
    model = fleetune.open(args.subject, out=args.out)  # before a pipe is read
    prompt = args.prompt if args.prompt is not None or sys.stdin.isatty() else sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty", hint='fleetune chat MODEL --prompt "What is .."')
    with (
        ended_by_signals(),
        console_listener(ui, resumes=False, begins="") as listener,
        fleetune.chat(
            model,
            listener=listener,
            **flags.options(args, "system max_tokens temperature seed engine threads context"),
        ) as talk,
    ):
        if prompt is not None:
            _answer(ui, talk, prompt.strip())
        else:
            _talk(ui, talk)


def _talk(ui: Ui, talk: Conversation) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its line editing)
    ui.note(KEYS)
    while True:
        try:
            said = input("" if ui.json else "> ").strip()
        except (EOFError, KeyboardInterrupt):
            ui.text("\n")
            return
        if said in ("/exit", "/quit"):
            return
        if said == "/new":
            talk.restart()
        elif said.startswith("/"):
            ui.note(KEYS)
        elif said:
            try:
                _answer(ui, talk, said)
            except KeyboardInterrupt:
                ui.text(" (stopped)\n")
            except Refused as error:
                ui.note(f"the engine refuses: {error.message}; /new begins a shorter conversation")


def _answer(ui: Ui, talk: Conversation, prompt: str) -> None:
    began, text = time.monotonic(), ""
    with closing(talk.pieces(prompt)) as written:
        for piece in written:
            text += piece
            ui.text(piece)
    ui.text("\n")
    ui.event(Answered(prompt=prompt, text=text, seconds=time.monotonic() - began))
