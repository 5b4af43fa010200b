# SPDX-License-Identifier: Apache-2.0
"""Answer conversations: by an engine that is opened for it, or in torch by a model that is loaded here."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fleetune.common.display import counted
from fleetune.deploy.serving import engines, session, torch_chat
from fleetune.deploy.serving.openai_client import MAX_TOKENS, TEMPERATURE, pieces
from fleetune.deploy.serving.torch_chat import Turn
from fleetune.errors import UsageError
from fleetune.runs.listener import Listener
from fleetune.subject import Subject

if TYPE_CHECKING:
    from fleetune.deploy.serving.engines import Running
    from fleetune.models.model import Model

TORCH: Final = "torch"

Answer = Callable[[list[Turn]], Generator[str, None, None]]  # the pieces of the answer to a conversation


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: the likeliest at temperature 0, else with `seed`; of `max_tokens` tokens at most."""

    temperature: float = TEMPERATURE
    max_tokens: int = MAX_TOKENS
    seed: int = 42

    def check(self) -> None:
        """UsageError for numbers that mean nothing."""
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens} is below 1", hint="the default is 512")
        if not 0 <= self.temperature <= 2:
            raise UsageError(
                f"--temperature {self.temperature} is not in 0..2", hint="0 is the likeliest answer"
            )


@contextmanager
def answering(
    subject: Subject,
    options: session.EngineOptions,
    sampling: Sampling,
    listener: Listener,
    first: list[Turn],
    *,
    offline: bool,
) -> Iterator[Answer]:
    """Yield a function that answers a conversation while the block runs; `first` are the turns it begins with.

    Torch answers where it is asked for, or where no engine is installed.
    """
    if options.engine == TORCH or (
        options.engine == "auto" and not any(e.available() for e in engines.ENGINES)
    ):
        if options.engine == "auto":
            listener.note(
                f"no engine is installed, so torch answers, which is slower; for one: {engines.INSTALL}"
            )
        yield _torch(subject, options, sampling, listener, first, offline=offline)
        return
    with session.opened(subject, options, listener, offline=offline) as running:
        yield _engine(running, sampling)


def _engine(running: Running, sampling: Sampling) -> Answer:
    def answer(turns: list[Turn]) -> Generator[str, None, None]:
        body = {
            "messages": turns, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
            "seed": sampling.seed,
        }  # fmt: skip
        with running.request(), closing(pieces(running.address, "/v1/chat/completions", body)) as written:
            yield from written

    return answer


def _torch(
    subject: Subject,
    options: session.EngineOptions,
    sampling: Sampling,
    listener: Listener,
    first: list[Turn],
    *,
    offline: bool,
) -> Answer:
    from fleetune.evaluation import answers

    model = subject.load(offline=offline)
    answers.require_text_model(model, "chat")
    if first:
        torch_chat.encode(model, first)  # a long one is refused before threads are measured
    count = torch_chat.use_threads(model, options.threads, listener)
    listener.note(f"torch with {subject.name} on {counted(count, 'thread')}")

    def answer(turns: list[Turn]) -> Generator[str, None, None]:
        yield answer_of(model, turns, sampling)

    return answer


def answer_of(model: Model, turns: list[Turn], sampling: Sampling) -> str:
    """Return a loaded model's answer to a conversation.  Refused when the turns leave no room for one."""
    return torch_chat.generate(
        model, turns, temperature=sampling.temperature, max_tokens=sampling.max_tokens, seed=sampling.seed
    )


class Conversation:
    """A conversation with a loaded model: `say` asks, and remembers what was said before.

    `turns` are the turns so far, each with a `role` (system, user, assistant) and a `content`.
    """

    def __init__(self, model: Model, sampling: Sampling, system: str = "") -> None:
        self._model, self._sampling = model, sampling
        self._begun: list[Turn] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Turn] = list(self._begun)

    def say(self, text: str) -> str:
        """Return the answer to `text`.  Refused, with the conversation as it was, when it has grown too long."""
        asked = [*self.turns, {"role": "user", "content": text}]
        answer = answer_of(self._model, asked, self._sampling)
        self.turns = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def restart(self) -> None:
        """Forget what was said, but for the system prompt."""
        self.turns = list(self._begun)
