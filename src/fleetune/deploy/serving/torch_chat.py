# SPDX-License-Identifier: Apache-2.0
"""Answer a conversation in torch, where no engine is installed: slower, and an answer comes whole."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from fleetune.common.display import counted
from fleetune.deploy.serving import threads
from fleetune.deploy.serving.openai_client import Refused
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    import numpy as np

    from fleetune.models.model import Model

WHOLE: Final = 1 << 20  # tokens: a conversation is not cut

Turn = dict[str, str]  # role, content


def generate(model: Model, turns: list[Turn], *, temperature: float, max_tokens: int, seed: int) -> str:
    """Return the model's answer to a conversation; the likeliest at temperature 0, else drawn with `seed`.

    Refused, as by an engine, when the conversation leaves no room for one.
    """
    from fleetune.evaluation import answers
    from fleetune.evaluation.losses import context_length

    ids = encode(model, turns)
    room = min(max_tokens, context_length(model) - len(ids))
    if temperature == 0:
        return answers.generate_from_ids(model, [ids], max_new_tokens=room)[0]
    drawn = answers.sample_from_ids(model, [ids], temperature=temperature, max_new_tokens=room, seed=seed)
    return answers.decode_answer(model, drawn[0].tolist())


def encode(model: Model, turns: list[Turn]) -> np.ndarray:
    """Return a conversation's tokens, int32 [T].  Refused when they leave no room for an answer."""
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


def use_threads(model: Model, count: int | None, listener: Listener) -> int:
    """Let torch use `count` threads, or as many as are fastest, measured as an engine's are; their number."""
    chosen = count or _fastest(model, listener)
    _set_threads(chosen)
    return chosen


def _fastest(model: Model, listener: Listener) -> int:
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
        drawn = answers.sample_from_ids(
            model, [ids], temperature=1.0, max_new_tokens=16, seed=0, seconds=threads.SECONDS
        )
        found = len(drawn[0]) / (time.monotonic() - began)
        listener.note(f"measured: {counted(count, 'thread')}, {found:.1f} tokens/s")
        return found

    return threads.fastest(counts, rate)[0]


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)
