# SPDX-License-Identifier: Apache-2.0
"""`fleetune chat`: a conversation in the terminal, or one answer to one prompt.

The engine is that of `fleetune serve`, asked directly.  Where none is installed (or with `--engine torch`) the
model is loaded here and answers as `eval` has it answer: slower, and an answer comes whole.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleetune.cli.commands import serve
from fleetune.cli.console import Ui
from fleetune.deploy.serving import engines, threads
from fleetune.deploy.serving.engines import Running
from fleetune.deploy.serving.openai_client import Refused, pieces
from fleetune.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from fleetune.models.model import Model

TORCH: Final = "torch"
WHOLE: Final = 1 << 20  # tokens: a conversation is not cut
HELP: Final = "/new forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"

Turn = dict[str, str]  # role, content
Answer = Callable[[list[Turn]], Generator[str, None, None]]


def run(args: argparse.Namespace, ui: Ui, of_run: Path | None) -> None:
    """Carry out `fleetune chat`; `of_run` is the folder where the subject is a tuned run.

    With `--prompt`, or what a pipe holds, it answers once and ends.
    """
    serve.check(args)
    _check(args)
    prompt = args.prompt if args.prompt is not None or sys.stdin.isatty() else sys.stdin.read()
    prompt = prompt if prompt is None else prompt.strip()
    if prompt == "":
        raise UsageError("the prompt is empty", hint='fleetune chat MODEL --prompt "What is .."')
    first = [] if prompt is None else [*_system(args), {"role": "user", "content": prompt}]
    with serve.stopped_by_signals(143), _answers(args, ui, of_run, first) as answer:
        if prompt is not None:
            _once(args, ui, answer, prompt)
        else:
            _talk(args, ui, answer)


def _check(args: argparse.Namespace) -> None:
    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens} is below 1", hint="the default is 512")
    if not 0 <= args.temperature <= 2:
        raise UsageError(f"--temperature {args.temperature} is not in 0..2", hint="0 is the likeliest answer")


@contextmanager
def _answers(args: argparse.Namespace, ui: Ui, of_run: Path | None, first: list[Turn]) -> Iterator[Answer]:
    """What answers a conversation while the block runs; `first` is what is known of it."""
    if args.engine == TORCH or (args.engine == "auto" and not any(e.available() for e in engines.ENGINES)):
        if args.engine == "auto":
            ui.note(f"no engine is installed, so torch answers, which is slower; for one: {engines.INSTALL}")
        yield _torch(args, ui, of_run, first)
        return
    with serve.opened(args, ui, of_run) as running:
        yield _engine(args, running)


def _engine(args: argparse.Namespace, running: Running) -> Answer:
    def answer(turns: list[Turn]) -> Generator[str, None, None]:
        body = {
            "messages": turns, "max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed,
        }  # fmt: skip
        with running.asked(), closing(pieces(running.address, "/v1/chat/completions", body)) as written:
            yield from written

    return answer


# torch ------------------------------------------------------------------------------------------------------


def _torch(args: argparse.Namespace, ui: Ui, of_run: Path | None, first: list[Turn]) -> Answer:
    from fleetune.evaluation import answers

    model = _load(args, of_run)
    answers.require_text_model(model, "chat")
    if first:
        _ids(model, first)  # a long one is refused before threads are measured
    count = args.threads or _torch_threads(ui, model)
    _set_threads(count)
    ui.note(f"torch with {Path(args.subject).name} on {count} thread{'s' if count > 1 else ''}")

    def answer(turns: list[Turn]) -> Generator[str, None, None]:
        yield generate(model, turns, temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed)

    return answer


def _load(args: argparse.Namespace, of_run: Path | None) -> Model:
    from fleetune import models
    from fleetune.deploy import export
    from fleetune.runs import rundir
    from fleetune.tuning import finished

    found = serve.compressed(args, of_run)
    if found is not None:
        return export.load(found[1])
    if of_run is not None:
        return finished.load(of_run, offline=args.offline, device="cpu")
    rundir.check_name(args.subject, Path(args.out))
    return models.load(args.subject, device="cpu", offline=args.offline)


def generate(model: Model, turns: list[Turn], *, temperature: float, max_tokens: int, seed: int) -> str:
    """The model's answer to a conversation; the likeliest at temperature 0, else drawn with `seed`.

    Refused, as by an engine, when the conversation leaves no room for one.
    """
    from fleetune.evaluation import answers
    from fleetune.evaluation.losses import context_length

    ids = _ids(model, turns)
    room = min(max_tokens, context_length(model) - len(ids))
    if temperature == 0:
        return answers.generate_from_ids(model, [ids], max_new_tokens=room)[0]
    drawn = answers.sample_from_ids(model, [ids], temperature=temperature, max_new_tokens=room, seed=seed)
    return answers.decode_answer(model, drawn[0].tolist())


def _ids(model: Model, turns: list[Turn]) -> np.ndarray:
    """A conversation's tokens, int32 [T].  Refused when they leave no room for an answer."""
    from fleetune.data import Example
    from fleetune.data.encode import prompt_ids
    from fleetune.evaluation.losses import context_length

    example = Example(tuple((turn["role"], turn["content"]) for turn in turns), "", {})
    ids, longest = prompt_ids(example, model.tokenizer, WHOLE), context_length(model)
    if len(ids) >= longest:
        raise Refused(
            f"the conversation has {len(ids):,} tokens, the model is made for {longest:,}",
            hint="ask something shorter",
        )
    return ids


def _torch_threads(ui: Ui, model: Model) -> int:
    """The fastest number of threads for torch, measured as an engine's is."""
    import numpy as np

    from fleetune.evaluation import answers

    counts = threads.candidates(threads.cores())
    if len(counts) == 1:
        return 1

    ids = np.array(model.tokenizer(threads.TEXT)["input_ids"], np.int32)

    def rate(count: int) -> float:
        _set_threads(count)
        answers.sample_from_ids(model, [ids], temperature=1.0, max_new_tokens=1, seed=0)
        began = time.monotonic()
        drawn = answers.sample_from_ids(model, [ids], temperature=1.0, max_new_tokens=16, seed=0)
        found = len(drawn[0]) / (time.monotonic() - began)
        ui.note(f"measured: {count} thread{'s' if count > 1 else ''}, {found:.1f} tokens/s")
        return found

    return threads.fastest(counts, rate)[0]


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


# The conversation -------------------------------------------------------------------------------------------


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
    ui.note(HELP)
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
            ui.note(HELP)
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
    ui.event({"event": "answer", "prompt": prompt, "text": text, "seconds": time.monotonic() - began})


def _system(args: argparse.Namespace) -> list[Turn]:
    return [{"role": "system", "content": args.system}] if args.system else []


def arguments(sub: argparse.ArgumentParser) -> None:
    """The flags of `fleetune chat`."""
    serve.engine_arguments(sub, [*(engine.name for engine in engines.ENGINES), TORCH])
    sub.add_argument(
        "--prompt", metavar="TEXT", help="answer this and end (a pipe's whole text counts as one)"
    )
    sub.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    sub.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0: the likeliest answer, the same each time (default 0)",
    )
    sub.add_argument("--max-tokens", type=int, default=512, help="tokens of an answer at most (default 512)")
    sub.add_argument("--seed", type=int, default=42, help="of what is drawn above temperature 0 (default 42)")
