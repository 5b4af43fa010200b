# SPDX-License-Identifier: Apache-2.0
"""Compute what GKD trains on: the divergence of a student from a teacher, and rewards of what the student writes.

The divergence of next-token distributions is that of arXiv 2306.13649, section 3.1.  Logits are computed for a chunk of tokens at
a time, and again for the gradient.

| reward | value |
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

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fleetune.data.encode import MASKED, Batch
from fleetune.errors import FAULTS, FleetuneError, RecipeError, fault
from fleetune.evaluation.answers import decode_answer, exact_match, rouge_l, token_f1
from fleetune.evaluation.head_loss import CHUNK_BYTES
from fleetune.evaluation.losses import predictors
from fleetune.evaluation.objectives import finite_number, import_function
from fleetune.models.net.model import Model

Predictors = tuple[Tensor, Callable[[Tensor], Tensor]]  # the result of `losses.predictors`


def divergence(Q: Tensor, P: Tensor, beta: float) -> Tensor:
    """Return D of each row, in nats, from logits [n, V] of student Q and teacher P: float32 [n] (float64 stays)."""
    q, p = (logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1) for logits in (Q, P))
    if beta == 0:
        return _kl(p, q)
    if beta == 1:
        return _kl(q, p)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def divergences(
    student: Predictors, teacher: nn.Module, batch: Batch, beta: float, *, chunk: int = 0
) -> Tensor:
    """Return D of each of the batch's N scored tokens, float32 [N], `chunk` tokens at a time (0: by memory).

    With gradients enabled the result can be back-propagated to the student; the teacher gets no gradient.
    """
    head = student[1]
    with torch.no_grad():
        hidden, teacher_head = predictors(teacher, batch)

    def compare(rows: Tensor, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            P = teacher_head(hidden)
        Q = head(rows)
        V = min(P.shape[-1], Q.shape[-1])
        return divergence(Q[:, :V], P[:, :V], beta)

    return _chunked(compare, student, hidden, chunk)


def log_probs(student: Predictors, batch: Batch, temperature: float, *, chunk: int = 0) -> Tensor:
    """Return the log-probability of each of the N scored tokens at `temperature`: float32 [N].

    Like `divergences`, it can be back-propagated.
    """
    head, labels = student[1], batch.labels[:, 1:]

    def take(rows: Tensor, tokens: Tensor) -> Tensor:
        Q = head(rows)
        Q = Q.to(torch.promote_types(Q.dtype, torch.float32)) / temperature
        return -F.cross_entropy(Q, tokens, reduction="none")

    return _chunked(take, student, labels[labels != MASKED], chunk)


def _chunked(
    function: Callable[[Tensor, Tensor], Tensor], student: Predictors, other: Tensor, chunk: int
) -> Tensor:
    """Return `function(rows, other)` [N], a chunk at a time; each is computed again for the gradient, not stored."""
    rows, head = student
    # The backward pass of a chunk has some 20 arrays [chunk, V] alive, so a chunk is a quarter of a plain loss's.
    size = chunk or max(1, CHUNK_BYTES // (16 * head(rows[:0]).shape[-1]))
    pieces = [(rows[a : a + size], other[a : a + size]) for a in range(0, max(1, len(rows)), size)]
    if torch.is_grad_enabled():
        again = functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([cast(Tensor, again(*piece)) for piece in pieces])
    return torch.cat([function(*piece) for piece in pieces])


Reward = Callable[[str, str, str], float]

SHOWN = 80  # characters of a prompt and of an answer in an error


def reward_of(name: str) -> Reward:
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
