# SPDX-License-Identifier: Apache-2.0
"""`fleetune chat`: a conversation in the terminal, or one answer to one prompt.

The engine is that of `fleetune serve`, asked directly.  Where none is installed (or with `--engine torch`) the
model is loaded here and answers as `eval` has it answer: slower, and an answer comes whole.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing, suppress
from typing import Final

from fleetune import subject
from fleetune.cli import engine_flags
from fleetune.cli.console import Ui
from fleetune.cli.listener import console_listener
from fleetune.common.events import Answered
from fleetune.deploy.serving import engines, session
from fleetune.deploy.serving.conversation import TORCH, Answer, Sampling, answering
from fleetune.deploy.serving.openai_client import MAX_TOKENS, TEMPERATURE, Refused
from fleetune.deploy.serving.torch_chat import Turn
from fleetune.errors import UsageError

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
    engine_flags.add(sub, [*(engine.name for engine in engines.ENGINES), TORCH])
    sub.add_argument(
        "--prompt", metavar="TEXT", help="answer this and end (a pipe's whole text counts as one)"
    )
    sub.add_argument("--system", metavar="TEXT", help="system prompt of the conversation")
    sub.add_argument(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        help=f"0: the likeliest answer, the same each time (default {TEMPERATURE:g}, as on the page of serve)",
    )
    sub.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        help=f"tokens of an answer at most (default {MAX_TOKENS})",
    )
    sub.add_argument("--seed", type=int, default=42, help="of what is drawn above temperature 0 (default 42)")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Talk; with `--prompt`, or what a pipe holds, answer once and end."""
    found = subject.open(args.subject, args.out)
    session.check(found, _options(args))
    _sampling(args).check()
    prompt = args.prompt if args.prompt is not None or sys.stdin.isatty() else sys.stdin.read()
    prompt = prompt if prompt is None else prompt.strip()
    if prompt == "":
        raise UsageError("the prompt is empty", hint='fleetune chat MODEL --prompt "What is .."')
    first = [] if prompt is None else [*_system(args), {"role": "user", "content": prompt}]
    with (
        engine_flags.exit_on_signals(143),
        console_listener(ui) as listener,
        answering(found, _options(args), _sampling(args), listener, first, offline=args.offline) as answer,
    ):
        if prompt is not None:
            _once(args, ui, answer, prompt)
        else:
            _talk(args, ui, answer)


def _options(args: argparse.Namespace) -> session.EngineOptions:
    return session.EngineOptions(args.engine, args.threads, args.context)


def _sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.max_tokens, args.seed)


def _once(args: argparse.Namespace, ui: Ui, answer: Answer, prompt: str) -> None:
    began, text = time.monotonic(), ""
    for piece in answer([*_system(args), {"role": "user", "content": prompt}]):
        text += piece
        if not ui.json:
            ui.text(piece)
    if not ui.json:
        ui.text("\n")
    _tell(ui, prompt, text, began)


def _talk(args: argparse.Namespace, ui: Ui, answer: Answer) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its line editing)
    ui.note(KEYS)
    turns = _system(args)
    while True:
        try:
            said = _typed(ui).strip()
        except (EOFError, KeyboardInterrupt):
            ui.text("\n")
            return
        if said in ("/exit", "/quit"):
            return
        if said == "/new":
            turns = _system(args)
        elif said.startswith("/"):
            ui.note(KEYS)
        elif said:
            turns = _exchange(ui, answer, [*turns, {"role": "user", "content": said}])


def _typed(ui: Ui) -> str:
    """The line that is typed next; stdout is for events alone where they are wanted."""
    if ui.json:
        ui.text("> ")
    return input("" if ui.json else "> ")


def _exchange(ui: Ui, answer: Answer, turns: list[Turn]) -> list[Turn]:
    """Answer the last turn; the conversation with the answer, or as it was before where there is none."""
    began, text = time.monotonic(), ""
    try:
        with closing(answer(turns)) as written:
            for piece in written:
                text += piece
                ui.text(piece)
    except KeyboardInterrupt:
        ui.text(" (stopped)")
    except Refused as error:
        ui.note(f"the engine refuses: {error.message}; /new begins a shorter conversation")
    ui.text("\n")
    if not text:
        return turns[:-1]
    _tell(ui, turns[-1]["content"], text, began)
    return [*turns, {"role": "assistant", "content": text}]


def _tell(ui: Ui, prompt: str, text: str, began: float) -> None:
    ui.event(Answered(prompt=prompt, text=text, seconds=time.monotonic() - began))


def _system(args: argparse.Namespace) -> list[Turn]:
    return [{"role": "system", "content": args.system}] if args.system else []
