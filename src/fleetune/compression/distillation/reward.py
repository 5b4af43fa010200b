# SPDX-License-Identifier: Apache-2.0
"""Score answers with a reward, and train a model to write better ones (REINFORCE).

| name | reward |
|---|---|
| exact_match | 1 where the answer is the reference, after SQuAD's normalising, else 0 |
| f1 | SQuAD's F1 of the two bags of words, 0 to 1 |
| rouge_l | Rouge-L F1, 0 to 1 |
| `package.module:function`, `file.py:function` | what `function(prompt, answer, reference)` returns |

The three arguments are texts without special tokens: the prompt as the chat template writes it, the answer up to its
end, and the data's own answer.  A function of your own must be deterministic if a resumed training is to end with the
same bits.  It is loaded once: later changes of the file do not reach a running training.  It is code that runs here, so
take its path only from the user of this machine, never from a peer.

The gradient is that of REINFORCE (Williams 1992): of the mean over rows of (r - b) log p(answer | prompt), with the
advantage r - b a constant.  The baseline b is the mean reward of the *other* answers to the same prompt or, with one
answer a prompt, of the other rows.  It does not depend on the answer it is subtracted from, so the expected gradient is
exactly that of the mean expected reward.  A mean that includes the answer's own reward would shrink it by 1 - 1 / n.
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
from fleetune.errors import FAULTS, FleetuneError, RecipeError, fault
from fleetune.evaluation.answers import decode_answer, exact_match, rouge_l, token_f1
from fleetune.evaluation.objectives import finite_number, import_function
from fleetune.models.net.model import Model

Reward = Callable[[str, str, str], float]

SHOWN = 80  # characters of a prompt and of an answer in an error


def get(name: str) -> Reward:
    """Return the reward of that name (see the module's table), or the function at that import path.

    RecipeError when there is none, or when the path cannot be imported or is not callable.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    return import_function(name, "reward", BUILT_IN, "reward(prompt, answer, reference)")


def source_digest(name: str, reward: Reward) -> str:
    """Return the SHA-256 of the file that defines a reward function.

    "" for a built-in reward, and where there is no such file (compiled code).
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
    {"exact_match": _scaled(exact_match), "f1": _scaled(token_f1), "rouge_l": _scaled(rouge_l)}
)


def rewards(
    name: str,
    reward: Reward,
    model: Model,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
) -> np.ndarray:
    """Return the reward of each answer, float64 [n]; prompts, answers and references are token ids.

    RecipeError, which shows the row, where the function fails or returns something that is not a finite number.
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
        except FAULTS as error:
            raise RecipeError(
                [f"{row} failed: {fault(error)}"],
                hint="it is called as reward(prompt, answer, reference), three texts",
            ) from error
        found.append(finite_number(value, row))
    return np.array(found, np.float64)


def advantages(rewards: np.ndarray, samples: int) -> np.ndarray:
    """Subtract from each reward the mean of the others in its group: float64 [n].

    A group is the `samples` answers to one prompt, which follow one another, or all n answers with one a prompt.  A
    reward alone in its group is returned as it is.
    """
    groups = rewards.reshape(-1, samples) if samples > 1 else rewards.reshape(1, -1)
    others = groups.shape[1] - 1
    if not others:
        return rewards
    apart = groups[:, :, None] - groups[:, None, :]  # equal rewards give exact zeros
    found: np.ndarray = apart.sum(2).reshape(-1) / others
    return found


def reinforce_objective(log_p: Tensor, batch: Batch, advantages: np.ndarray) -> Tensor:
    """Return the mean over the rows of advantage times log p of the answer, from log p of the N tokens: a scalar.

    Its gradient is the REINFORCE estimate of the gradient of the mean expected reward.
    """
    row = (batch.labels[:, 1:] != MASKED).nonzero()[:, 0]
    return (torch.from_numpy(advantages).to(log_p)[row] * log_p).sum() / len(batch.labels)
