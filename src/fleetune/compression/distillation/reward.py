# SPDX-License-Identifier: Apache-2.0
"""What an answer is worth, and how a model learns to write answers that are worth more.

| name | reward |
|---|---|
| exact_match | 1 where the answer is the reference, after SQuAD's normalising, else 0 |
| f1 | SQuAD's F1 of the two bags of words, 0 to 1 |
| rouge_l | Rouge-L F1, 0 to 1 |
| `package.module:function`, `file.py:function` | what `function(prompt, answer, reference)` returns |

All three are texts without special tokens: the prompt as the chat template writes it, the answer up to its end, the
data's own answer.  A function of one's own must be deterministic for a training to go on bit for bit, and a training
has the same one from its first step to its last, whatever becomes of the file; it is code that runs here: take its path
from the user of this machine, never from a peer.

The gradient is REINFORCE's (Williams 1992): that of mean over rows of (r - b) log p(answer | prompt), where r - b is a
number.  The baseline b is the mean reward of the *other* answers to the same prompt or, where each prompt has one, of
the other rows.  It does not depend on the answer that it is set against, so that the expectation of the gradient is
exactly that of the mean expected reward; the mean with the own reward in it would shrink it by 1 - 1 / n.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from fleetune.data.encode import MASKED, Batch
from fleetune.errors import FleetuneError, RecipeError
from fleetune.evaluation import scores
from fleetune.evaluation.answers import decode_answer
from fleetune.evaluation.objectives import finite_number, import_function
from fleetune.models.model import Model

Reward = Callable[[str, str, str], float]

SHOWN = 80  # characters of a prompt and of an answer in an error


def get(name: str) -> Reward:
    """The reward of that name (see the module's table), or the function at that import path.

    RecipeError when there is none, or the path cannot be imported or is not callable.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    return import_function(name, "reward", BUILT_IN, "reward(prompt, answer, reference)")


def source_digest(name: str, reward: Reward) -> str:
    """SHA-256 of the file that the function of that name is written in.

    "" for a measure of ours, and where there is no such file (compiled code): the name is all that is known then.
    """
    if name in BUILT_IN:
        return ""
    written = reward if inspect.isroutine(reward) or inspect.isclass(reward) else type(reward)
    try:
        file = inspect.getsourcefile(inspect.unwrap(written))
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except (TypeError, OSError):
        return ""


def _scaled(score: Callable[[Sequence[str], Sequence[str]], float]) -> Reward:
    return lambda prompt, answer, reference: score([answer], [reference]) / 100.0


BUILT_IN: Mapping[str, Reward] = MappingProxyType(
    {
        "exact_match": _scaled(scores.exact_match),
        "f1": _scaled(scores.token_f1),
        "rouge_l": _scaled(scores.rouge_l),
    }
)


def rewards(
    name: str,
    reward: Reward,
    model: Model,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
) -> np.ndarray:
    """What the reward of that name gives each answer (token ids, all three): float64 [n].

    RecipeError that shows the row where the function fails or what it returns is not a finite number.
    """
    found = []
    for ids, answer, reference in zip(prompts, answers, references, strict=True):
        prompt = str(model.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()
        texts = (prompt, *(decode_answer(model, part.tolist()) for part in (answer, reference)))
        row = f"reward {name!r}, on the answer {texts[1][:SHOWN]!r} to {prompt[-SHOWN:]!r},"
        try:
            with torch.no_grad():
                value = reward(*texts)
        except FleetuneError:
            raise
        except Exception as error:
            raise RecipeError(
                [f"{row} failed: {type(error).__name__}: {error}"],
                hint="it is called as reward(prompt, answer, reference), three texts",
            ) from error
        found.append(finite_number(value, row))
    return np.array(found, np.float64)


def advantages(rewards: np.ndarray, samples: int) -> np.ndarray:
    """Each reward less the mean of the others of its group: float64 [n].

    A group is the `samples` answers to one prompt, which follow one another, or all n where there is one each.  A
    reward that has no others is left as it is.
    """
    groups = rewards.reshape(-1, samples) if samples > 1 else rewards.reshape(1, -1)
    others = groups.shape[1] - 1
    if not others:
        return rewards
    apart = groups[:, :, None] - groups[:, None, :]  # equal rewards give exact zeros
    found: np.ndarray = apart.sum(2).reshape(-1) / others
    return found


def reinforce_objective(log_p: Tensor, batch: Batch, gains: np.ndarray) -> Tensor:
    """Mean over the batch's rows of gain times log p of the answer, from log p of its N tokens: a scalar.

    Its gradient is REINFORCE's estimate of that of the mean expected reward.
    """
    row = (batch.labels[:, 1:] != MASKED).nonzero()[:, 0]
    return (torch.from_numpy(gains).to(log_p)[row] * log_p).sum() / len(batch.labels)
