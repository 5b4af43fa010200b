# SPDX-License-Identifier: Apache-2.0
"""GKD: a small model learns from a large one, on answers that the small one writes itself.

Agarwal, Vieillard, Zhou, Stanczyk, Ramos Garea, Geist, Bachem: "On-Policy Distillation of Language Models: Learning
from Self-Generated Mistakes", ICLR 2024, arXiv 2306.13649 (algorithm 1; section 3.1 for the divergence).

For each step a batch of prompts and a number u of [0, 1): with u < lmbda the student writes the answers; else, with
`seq_kd`, the teacher; else they are the data's own.  No gradient goes through the writing.  Then AdamW moves all
weights of the student down the mean over the batch's answer tokens of the generalised Jensen-Shannon divergence of
P (teacher) and Q (student), with M = beta P + (1 - beta) Q:

    D = beta KL(P || M) + (1 - beta) KL(Q || M)        beta = 0 is KL(P || Q), beta = 1 is KL(Q || P)

An answer's tokens are those up to and with its first end token.  `teacher=same keep_layers=N` makes a student of N of
the model's own blocks, evenly spaced, the first and the last among them.

What to know:
- The formula itself tends to 0 at both ends, like beta KL(P || Q) and (1 - beta) KL(Q || P).  The ends are the whole
  divergences, as in TRL, so the loss and its gradient jump there: by 1 / beta, and by 1 / (1 - beta).  AdamW divides by
  the gradient's size, so this moves little more than where `clip` begins to act.
- `temperature` is that of the writing alone.  It does not enter the divergence.
- Teacher and student must have the same vocabulary.  Where one of them has more rows in its output head than the
  other (padding), both distributions are those over the rows they share.
- All weights are trained, in fp32 and without dropout: zeros of a pruned model do not stay zero.
- Logits are made, compared and given up a chunk of tokens at a time and made again for the gradient, so that
  [batch, tokens, vocabulary] never exists, of either model.
- The paper also adds a reward for what the student writes; that is not here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fleetune.answers import sample_from_ids, stop_ids, until_end
from fleetune.compress.depth import shallow
from fleetune.compress.progress import restore, store
from fleetune.data import Batches, Encoded
from fleetune.data.encode import Batch, collate
from fleetune.errors import FleetuneError, Interrupted, RecipeError
from fleetune.losses import CHUNK_BYTES, context, frozen, pad_id, predictors
from fleetune.models import Model, digest, named_tensors, uniform
from fleetune.objectives import split

PAPER = "Agarwal et al., ICLR 2024, arXiv 2306.13649"


@dataclass(frozen=True)
class Trainer:
    """Settings with the paper's symbols."""

    teacher: str = field(
        default="", metadata={"symbol": "p_T", "help": "a model, a finished run, or same: the model itself"}
    )
    keep_layers: int = field(
        default=0, metadata={"symbol": "N", "help": "the student has so many of the model's blocks (0: all)"}
    )
    beta: float = field(
        default=0.5, metadata={"symbol": "β", "help": "0 is KL(P || Q), 1 is KL(Q || P), between: JSD"}
    )
    lmbda: float = field(
        default=0.5, metadata={"symbol": "λ", "help": "share of batches that the student answers"}
    )
    seq_kd: bool = field(
        default=False, metadata={"symbol": "SeqKD", "help": "the teacher answers the others, not the data"}
    )
    temperature: float = field(
        default=0.9, metadata={"symbol": "γ", "help": "of the writing; it does not enter the loss"}
    )
    max_new_tokens: int = field(
        default=128, metadata={"symbol": "L", "help": "tokens of a written answer at most"}
    )
    steps: int = field(default=200, metadata={"symbol": "K", "help": "batches"})
    batch_size: int = field(default=8, metadata={"symbol": "B", "help": "rows a batch"})
    lr: float = field(default=1e-4, metadata={"symbol": "η", "help": "AdamW's learning rate at its highest"})
    warmup: float = field(
        default=0.1, metadata={"symbol": "w", "help": "share of the steps in which it rises, before it falls"}
    )
    clip: float = field(default=1.0, metadata={"symbol": "c", "help": "of the gradient's norm (0: not)"})
    save_every: int = field(
        default=50, metadata={"symbol": "s", "help": "steps after which all is kept for --resume"}
    )

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("no teacher is given: teacher=MODEL, teacher=RUN or teacher=same")
        for name in ("beta", "lmbda", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} is not between 0 and 1")
        for name in ("max_new_tokens", "steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is below 1")
        for name in ("temperature", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if not 0 <= self.clip < math.inf or self.keep_layers < 0:
            raise ValueError(f"clip = {self.clip} and keep_layers = {self.keep_layers} cannot be negative")

    def check(self, model: Model, teacher: Model, length: int) -> None:
        """RecipeError with everything in the way of rows of `length` tokens."""
        problems = []
        blocks = int(model.net.config.get_text_config().num_hidden_layers)
        if self.keep_layers and not 2 <= self.keep_layers < blocks:
            problems.append(f"keep_layers = {self.keep_layers} of {blocks} blocks: 2 to {blocks - 1} can be")
        if teacher is model and not self.keep_layers:
            problems.append("teacher=same without keep_layers: the student has nothing to learn from itself")
        if teacher.labels:
            problems.append(f"the teacher {teacher.name} is an encoder, which writes nothing")
        elif teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            problems.append(
                f"the teacher {teacher.name} has another vocabulary ({len(teacher.tokenizer)} tokens) than "
                f"{model.name} ({len(model.tokenizer)})"
            )
        room = min(context(model), context(teacher))
        longest = length + (self.max_new_tokens if self.lmbda or self.seq_kd else 0)
        if longest > room:
            problems.append(
                f"rows of {length} tokens and answers of {longest - length} go beyond the context of {room}"
            )
        if problems:
            raise RecipeError(problems, hint="settings: fleetune compress --list gkd; --length cuts rows")

    def student(self, model: Model) -> Model:
        """What is trained, in fp32: the model itself, or some of its blocks."""
        net = shallow(model.net, self.keep_layers) if self.keep_layers else model.net
        return dataclasses.replace(model, net=net.float(), dtype="fp32")

    def distance(self, student: Model, teacher: Model, rows: Sequence[Encoded]) -> float:
        """Mean divergence (nats) over the answer tokens of the rows as they are."""
        found = []
        with frozen(student.net), frozen(teacher.net):
            for first in range(0, len(rows), self.batch_size):
                batch = collate(rows[first : first + self.batch_size], pad_id(student), student.device)
                found.append(divergences(student.net, teacher.net, batch, self.beta).double())
        return float(torch.cat(found).mean())

    def train(
        self,
        student: Model,
        teacher: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    ) -> None:
        """Train `student.net` in place; goes on with what `folder` holds already.

        `on_step(step, steps, loss)` is called after every step and may raise Interrupted to stop, which keeps the
        step.  FleetuneError when the loss or its gradient is not finite any more.
        """
        parameters = dict(named_tensors(student.net))
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.lr, weight_decay=0.0)
        origin = self._origin(student, teacher, rows, seed)
        done = restore(folder, origin, parameters, optimizer)
        batches = Batches(rows, pad_id(student), seed, student.device).steps(self.steps, self.batch_size)
        with _trainable(student.net):
            for t, batch in enumerate(itertools.islice(batches, done, None), done):
                answered = self.answered(student, teacher, batch, seed, t)
                loss = self._update(student, teacher, answered, optimizer, t)
                if (t + 1) % self.save_every == 0 or t + 1 == self.steps:
                    store(folder, origin, t + 1, parameters, optimizer)
                try:
                    on_step(t + 1, self.steps, loss)
                except Interrupted:
                    store(folder, origin, t + 1, parameters, optimizer)
                    raise

    def writer(self, student: Model, teacher: Model, seed: int, t: int) -> Model | None:
        """Who answers the batch of step t (algorithm 1's u); None for the data."""
        u = float(uniform(f"gkd/{seed}/{t}", (1,), 0.5)[0]) + 0.5
        return student if u < self.lmbda else teacher if self.seq_kd else None

    def answered(self, student: Model, teacher: Model, batch: Batch, seed: int, t: int) -> Batch:
        """The batch with the answers of step t, a function of the student, the teacher, `seed` and `t` alone."""
        prompts, answers = split(batch)
        writer = self.writer(student, teacher, seed, t)
        if writer is not None:
            draw = int.from_bytes(hashlib.sha256(f"gkd/{seed}/{t}".encode()).digest()[:7])
            answers = sample_from_ids(
                writer, prompts, temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=draw
            )
        stops = stop_ids(student)
        rows = [
            Encoded(np.concatenate([prompt, until_end(answer, stops)]).astype(np.int32), len(prompt))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return collate(rows, pad_id(student), student.device)

    def rate(self, t: int) -> float:
        """The learning rate of step t (from 0): up in a line, then down in a line to 0 after the last."""
        rise = math.ceil(self.warmup * self.steps)
        return self.lr * ((t + 1) / rise if t < rise else (self.steps - t) / (self.steps - rise))

    def _update(
        self, student: Model, teacher: Model, batch: Batch, optimizer: torch.optim.Optimizer, t: int
    ) -> float:
        found = divergences(student.net, teacher.net, batch, self.beta)
        loss = found.sum() / max(1, len(found))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(student.net.parameters(), self.clip or math.inf)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise FleetuneError(
                f"the loss is {loss.item()} in step {t + 1}, its gradient's norm {norm.item()}",
                hint="give a lower lr, or look for values that are not finite in the models",
            )
        optimizer.param_groups[0]["lr"] = self.rate(t)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    def _origin(self, student: Model, teacher: Model, rows: Sequence[Encoded], seed: int) -> str:
        """SHA-256 of all that the result is a function of."""
        sha = hashlib.sha256(json.dumps([dataclasses.asdict(self), seed], sort_keys=True).encode())
        for model in (student, teacher):
            sha.update(digest(named_tensors(model.net)).encode())
        for row in rows:
            sha.update(f"{len(row.ids)} {row.n_prompt} ".encode() + row.ids.tobytes())
        return sha.hexdigest()


@contextmanager
def _trainable(net: nn.Module) -> Iterator[None]:
    """Gradients of all weights while the block runs."""
    net.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        net.zero_grad(set_to_none=True)
        net.requires_grad_(False)


# ---------------------------------------------------------------- the divergence


def divergence(Q: Tensor, P: Tensor, beta: float) -> Tensor:
    """D of each row, in nats, from logits [n, V] of student Q and teacher P: float32 [n] (float64 stays)."""
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
    student: nn.Module, teacher: nn.Module, batch: Batch, beta: float, *, chunk: int = 0
) -> Tensor:
    """D of each of the batch's N scored tokens, `chunk` of them at a time (0: by memory): float32 [N].

    With gradients enabled it can be back-propagated to the student; nothing goes to the teacher.
    """
    with torch.no_grad():
        known, teach = predictors(teacher, batch)
    rows, head = predictors(student, batch)

    def compare(rows: Tensor, known: Tensor) -> Tensor:
        with torch.no_grad():
            P = teach(known)
        Q = head(rows)
        V = min(P.shape[-1], Q.shape[-1])
        return divergence(Q[:, :V], P[:, :V], beta)

    # A chunk's backward pass has some 20 arrays [chunk, V] alive, so each is a quarter of what a lone loss may take.
    size = chunk or max(1, CHUNK_BYTES // (16 * head(rows[:0]).shape[-1]))
    pieces = [(rows[a : a + size], known[a : a + size]) for a in range(0, max(1, len(rows)), size)]
    if not torch.is_grad_enabled():
        return torch.cat([compare(*piece) for piece in pieces])
    return torch.cat([
        cast(Tensor, checkpoint(compare, *piece, use_reentrant=False, preserve_rng_state=False))
        for piece in pieces
    ])  # fmt: skip
