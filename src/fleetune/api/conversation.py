# SPDX-License-Identifier: Apache-2.0
"""Ask a model: one prompt, or a conversation.  In torch; for an engine that is faster, `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fleetune import subject as subjects
from fleetune.errors import UsageError

if TYPE_CHECKING:
    from fleetune.deploy.serving.conversation import Conversation
    from fleetune.models.model import Model


def generate(
    model: object,
    prompt: str,
    *,
    system: str = "",
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 42,
    out: str | Path = "runs",
    offline: bool = False,
) -> str:
    """Return a model's answer to a prompt, through its chat template.

    `model` is a loaded model (`fleetune.open(..).load()`, `run.model()`), which is the fast way for many prompts, or a name
    or result, which is loaded for this answer.  Temperature 0 gives the likeliest answer, the same each time; above it the
    answer is drawn with `seed`.  It has at most `max_tokens` tokens.  RecipeError for an encoder; UsageError for an empty
    prompt or a number that means nothing; FleetuneError for a prompt that leaves no room for an answer.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty", hint='fleetune.generate(model, "What is ..")')
    talk = chat(
        model, system=system, max_tokens=max_tokens, temperature=temperature, seed=seed, out=out, offline=offline
    )  # fmt: skip
    return talk.say(prompt)


def chat(
    model: object,
    *,
    system: str = "",
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 42,
    out: str | Path = "runs",
    offline: bool = False,
) -> Conversation:
    """Begin a conversation with a model: `.say(text)` returns the answer, `.turns` has all that was said.

    The arguments are those of `generate`.
    """
    from fleetune.deploy.serving.conversation import Conversation, Sampling
    from fleetune.evaluation.answers import require_text_model

    sampling = Sampling(temperature, max_tokens, seed)
    sampling.check()
    loaded = _loaded(model, Path(out), offline=offline)
    require_text_model(loaded, "chat")
    return Conversation(loaded, sampling, system)


def _loaded(model: object, out: Path, *, offline: bool) -> Model:
    """Return a model as it is, or what a name means, loaded."""
    from fleetune.models.model import Model

    return model if isinstance(model, Model) else subjects.open(model, out).load(offline=offline)
