# SPDX-License-Identifier: Apache-2.0
"""Distil a large model into a small one on answers that the small one writes itself (GKD).

Agarwal, Vieillard, Zhou, Stanczyk, Ramos Garea, Geist, Bachem: "On-Policy Distillation of Language Models: Learning
from Self-Generated Mistakes", ICLR 2024, arXiv 2306.13649 (algorithm 1; section 3.1 for the divergence and the reward).

## Algorithm

Each step takes a batch of prompts and draws a number u from [0, 1):

1. With u < lmbda the student writes the answers.  Otherwise the teacher writes them (`seq_kd`), or they are those of the
   data.  No gradient goes through the writing.
2. AdamW moves all weights of the student down the mean, over the tokens of the answers, of the generalised
   Jensen-Shannon divergence of teacher P and student Q, with M = beta P + (1 - beta) Q:

       D = beta KL(P || M) + (1 - beta) KL(Q || M)        beta = 0 is KL(P || Q), beta = 1 is KL(Q || P)

An answer ends with its first end token; tokens after it do not count.

With a `reward` r the student also learns to write better answers (equation 5).  Where it has written the batch, a step
goes up

    (1 - alpha) E[r(y)] - alpha E[D]

The gradient of E[r(y)] is that of REINFORCE: the mean over the answers of (r - b) grad log p(y | x).  The baseline b is
the mean reward of the other answers: of the `reward_samples` to the same prompt or, with one answer a prompt, of the
other prompts of the batch.  In batches that the student has not written there is no reward, and the divergence still
has the weight alpha.

## Differences from the paper

- The formula of D tends to 0 at both ends, like beta KL(P || Q) and (1 - beta) KL(Q || P).  At the ends the whole
  divergence is used, as in TRL, so the loss and its gradient jump there, by 1 / beta and by 1 / (1 - beta).  AdamW divides
  by the size of the gradient, so in practice this only changes where `clip` takes effect.
- r(y) belongs to a whole answer and log p(y | x) is a sum over its tokens, while D is a mean over tokens, as in the paper.
  A reward far outside 0 to 1 shifts the balance that alpha sets.
- Where teacher and student have output heads of different sizes (padding), both distributions are over the rows that they
  share.  Their vocabularies must be the same.

## Options

- `teacher=same keep_layers=N` makes a student of N of the model's own blocks, evenly spaced, with the first and the last.
- `temperature` is that of the writing.  It does not enter the divergence.  For the reward, p(y | x) is the probability at
  this temperature, so the gradient is that of what is really written.
- `reward` is `exact_match`, `f1` or `rouge_l` (0 to 1), or a function of your own, `package.module:function` or
  `file.py:function`.  It is given three texts (prompt, answer, the data's answer) and returns a number.  With `alpha=1` the
  reward is measured and changes nothing, bit for bit.  `-v`, and the `step` events of `--json`, show the mean reward of
  every step that has one.  A reward that fails or is not finite stops the training before its step and shows the row.
  `--resume` needs the same function: its file must be unchanged.
- `keep_zeros=true` keeps the zeros of a pruned model: entries of matrices that are exactly 0 get no gradient.  Codes of
  a quantised model do not stay codes, because training moves every weight off its grid: distil first, then quantise.
- All weights are trained, in fp32 and without dropout.  Logits are computed and compared a chunk of tokens at a time, and
  computed again for the gradient, so [batch, tokens, vocabulary] is never in memory, for either model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fleetune.common.settings import setting
from fleetune.compression import distillation
from fleetune.compression.distillation import Reward, divergences, log_probs
from fleetune.compression.pruning.depth import shallow, shallow_config
from fleetune.compression.training import Checkpoints, all_trainable, clipped_step, fingerprint, learning_rate
from fleetune.data import Batches, Encoded
from fleetune.data.encode import Batch, collate
from fleetune.errors import RecipeError
from fleetune.evaluation.answers import sample_from_ids, stop_ids, until_end
from fleetune.evaluation.losses import context_length, eval_mode, pad_id, predictors
from fleetune.evaluation.objectives import split
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import Model, digest, named_tensors, uniform
from fleetune.models.shapes import Shape, shape_of
from fleetune.planning import compression_cost

PAPER = "Agarwal et al., ICLR 2024, arXiv 2306.13649"
PRUNED = 0.2  # a model with this share of exact zeros counts as pruned; a 4-bit grid makes a tenth

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """The settings, with the paper's symbols."""

    teacher: str = setting("", "p_T", "a model, a finished run, or same: the model itself")
    keep_layers: int = setting(0, "N", "blocks of the model that the student has, evenly spaced (0: all)")
    beta: float = setting(0.5, "β", "0 is KL(P || Q), 1 is KL(Q || P), between: JSD")
    lmbda: float = setting(0.5, "λ", "share of the batches that the student answers")
    seq_kd: bool = setting(False, "SeqKD", "the teacher answers the other batches, not the data")
    temperature: float = setting(0.9, "γ", "sampling temperature of written answers; not part of the loss")
    max_new_tokens: int = setting(128, "L", "tokens of a written answer at most")
    reward: str = setting("", "r", "exact_match, f1, rouge_l or file.py:function: scores answers")
    alpha: float = setting(1.0, "α", "weight of the divergence; the reward has 1 - alpha")
    reward_samples: int = setting(1, "n", "answers that the student writes to a prompt, for a reward")
    keep_zeros: bool = setting(False, "M", "zeros of the student's matrices stay zero")
    steps: int = setting(200, "K", "training steps, of a batch each")
    batch_size: int = setting(8, "B", "rows per batch")
    lr: float = setting(1e-4, "η", "AdamW's highest learning rate")
    warmup: float = setting(0.1, "w", "share of the steps in which the learning rate rises")
    clip: float = setting(1.0, "c", "largest norm of the gradient (0: no limit)")
    save_every: int = setting(50, "s", "steps between checkpoints, for --resume")

    # ---------------------------------------------------------------- algorithm 1

    def train(
        self,
        student: Model,
        teacher: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        on_step: Callable[[int, int, float, float | None], None] = lambda step, steps, loss, reward: None,
    ) -> None:
        """Train `student.net` in place; resume from the checkpoint in `folder`.

        `on_step(step, steps, loss, reward)` is called after every step, with the mean reward of the answers that the
        student wrote in it, if there is one.  It may raise Interrupted, which saves the step.  FleetuneError when the
        loss or its gradient is not finite.
        """
        parameters = dict(named_tensors(student.net))
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.lr, weight_decay=0.0)
        score = distillation.reward_of(self.reward) if self.reward else None
        origin = self._origin(student, teacher, rows, seed, score)

        def step(t: int, batch: Batch) -> tuple[float, float | None]:
            answered = self.answered(student, teacher, batch, seed, t)
            advantages = mean = None
            if score is not None and self._on_policy(seed, t):
                advantages, mean = self._advantages(score, student, batch, answered, t)
            return self._update(student, teacher, answered, advantages, optimizer, t), mean

        def report(done: int, result: tuple[float, float | None]) -> None:
            on_step(done, self.steps, *result)

        batches = Batches(rows, pad_id(student), seed, student.device).steps(self.steps, self.batch_size)
        with all_trainable(student.net):
            checkpoints = Checkpoints(folder, origin, self.save_every)
            checkpoints.run(batches, self.steps, parameters, optimizer, step, report)

    def _on_policy(self, seed: int, t: int) -> bool:
        """Tell whether the student answers the batch of step t (u < lmbda in algorithm 1)."""
        u = float(uniform(f"gkd/{seed}/{t}", (1,), 0.5)[0]) + 0.5
        return u < self.lmbda

    def writer(self, student: Model, teacher: Model, seed: int, t: int) -> Model | None:
        """Return the model that answers the batch of step t; None for the data."""
        return student if self._on_policy(seed, t) else teacher if self.seq_kd else None

    def answered(self, student: Model, teacher: Model, batch: Batch, seed: int, t: int) -> Batch:
        """Return the batch with the answers of step t, which depend on the models, `seed` and `t` alone.

        When the student writes, every prompt has `reward_samples` answers, one after the other.
        """
        prompts, answers = split(batch)
        writer = self.writer(student, teacher, seed, t)
        if writer is not None:
            if writer is student:
                prompts = self._repeated(prompts)
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

    def _repeated(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [array for array in arrays for _ in range(self.reward_samples)]

    def _advantages(
        self, score: Reward, student: Model, batch: Batch, answered: Batch, t: int
    ) -> tuple[np.ndarray, float]:
        """Return r - b of every answer that the student wrote, float64, and their mean reward."""
        prompts, answers = split(answered)
        references = self._repeated(split(batch)[1])
        found = distillation.rewards(self.reward, score, student, prompts, answers, references)
        mean = float(found.mean())
        log.info("step %d: mean reward %.4f of %d answers", t + 1, mean, len(found))
        return distillation.advantages(found, self.reward_samples), mean

    def loss(
        self, student: Model, teacher: Model, batch: Batch, advantages: np.ndarray | None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a step, and the mean divergence that is a part of it: two scalars.

        `advantages` belong to the rows of the batch, where the student wrote them for a reward.
        """
        made = predictors(student.net, batch)
        found = divergences(made, teacher.net, batch, self.beta)
        D = found.sum() / max(1, len(found))
        if advantages is None or self.alpha == 1:
            return self.alpha * D, D
        log_p = log_probs(made, batch, self.temperature)
        return self.alpha * D - (1 - self.alpha) * distillation.reinforce_objective(
            log_p, batch, advantages
        ), D

    def _update(
        self,
        student: Model,
        teacher: Model,
        batch: Batch,
        advantages: np.ndarray | None,
        optimizer: torch.optim.Optimizer,
        t: int,
    ) -> float:
        """Take step t, and return the mean divergence before it."""
        with by_layer(student.net):
            loss, D = self.loss(student, teacher, batch, advantages)
            loss.backward()  # type: ignore[no-untyped-call]
        for weight in (
            matrices(student.net) if self.keep_zeros else ()
        ):  # AdamW's moments, and so its step, are 0 as well
            if weight.grad is not None:
                weight.grad.masked_fill_(weight == 0, 0.0)
        clipped_step(
            loss,
            student.net.parameters(),
            optimizer,
            t=t,
            rate=learning_rate(t, self.steps, self.lr, self.warmup),
            clip=self.clip or math.inf,
            hint="give a lower lr, or look for values that are not finite in the models",
        )
        optimizer.zero_grad(set_to_none=True)
        return float(D.item())

    def _origin(
        self, student: Model, teacher: Model, rows: Sequence[Encoded], seed: int, score: Reward | None
    ) -> str:
        models = "".join(digest(named_tensors(model.net)) for model in (student, teacher))
        own = json.dumps([dataclasses.asdict(self), seed], sort_keys=True)
        return fingerprint(
            own + models, rows, distillation.source_digest(self.reward, score) if score else ""
        )

    # ---------------------------------------------------------------- before and after

    def student(self, model: Model) -> Model:
        """Return what is trained, in fp32: the model itself, or some of its blocks."""
        net = shallow(model.net, self.keep_layers) if self.keep_layers else model.net
        return dataclasses.replace(model, net=net.float(), dtype="fp32")

    def distance(self, student: Model, teacher: Model, rows: Sequence[Encoded]) -> float:
        """Return the mean divergence, in nats, over the answer tokens of the rows as they are."""
        found = []
        with eval_mode(student.net), eval_mode(teacher.net):
            for first in range(0, len(rows), self.batch_size):
                batch = collate(rows[first : first + self.batch_size], pad_id(student), student.device)
                made = predictors(student.net, batch)
                found.append(divergences(made, teacher.net, batch, self.beta).double())
        return float(torch.cat(found).mean())

    def memory(self, model: Model, teacher: Model, length: int) -> int:
        """Estimate the peak memory, in bytes, of training on rows of at most `length` tokens."""
        others = {id(other.net): other for other in (teacher, *([model] if self.keep_layers else []))}
        beside = sum(
            WEIGHTS[other.dtype].size * shape_of(other.net.config).params for other in others.values()
        )
        rows = self.batch_size * (self.reward_samples if self.lmbda else 1)
        shape = student_shape(model, self.keep_layers)
        return sum(compression_cost.training(shape, rows, self._longest(length), beside).values())

    def disk(self, model: Model) -> int:
        """Return how many bytes the checkpoints and the result take at most."""
        shape = student_shape(model, self.keep_layers)
        return compression_cost.training_disk(shape, math.ceil(self.steps / self.save_every))

    def _longest(self, length: int) -> int:
        """Return how many tokens a row with its answer has at most, where rows of the data have `length`."""
        return length + (self.max_new_tokens if self.lmbda or self.seq_kd else 0)

    def check(self, model: Model, teacher: Model, length: int) -> None:
        """Raise RecipeError with every reason why the models cannot be trained on rows of `length` tokens."""
        problems = mismatches(model, teacher, self.keep_layers)
        room = min(context_length(model), context_length(teacher))
        longest = self._longest(length)
        if longest > room:
            problems.append(
                f"rows of {length} tokens and answers of {longest - length} go beyond the context of {room}"
            )
        zeros = zero_share(model.net)
        if self.keep_zeros and not zeros:
            problems.append(f"keep_zeros: no matrix of {model.name} has a zero to keep")
        if problems:
            raise RecipeError(problems, hint="settings: fleetune compress --list gkd; --length cuts rows")
        if zeros >= PRUNED and not self.keep_zeros:
            log.warning(
                "%.0f %% of the weights are 0 and will not stay so; keep_zeros=true does that", 100 * zeros
            )

    def __post_init__(self) -> None:
        problems = [] if self.teacher else ["no teacher is given: teacher=MODEL, teacher=RUN or teacher=same"]
        for name, value in dataclasses.asdict(self).items():
            if name in ("beta", "lmbda", "alpha", "warmup") and not 0 <= value <= 1:
                problems.append(f"{name} = {value} is not between 0 and 1")
            if (
                name in ("max_new_tokens", "reward_samples", "steps", "batch_size", "save_every")
                and value < 1
            ):
                problems.append(f"{name} = {value} is below 1")
            if name in ("temperature", "lr") and not 0 < value < math.inf:
                problems.append(f"{name} = {value} must be positive")
        if not 0 <= self.clip < math.inf or self.keep_layers < 0:
            problems.append(f"clip = {self.clip} and keep_layers = {self.keep_layers} cannot be negative")
        problems += self._reward_problems()
        if problems:
            raise ValueError(*problems)
        if self.reward:
            distillation.reward_of(self.reward)

    def _reward_problems(self) -> list[str]:
        if not self.reward:
            return [
                f"{name} = {value} without a reward: reward=f1 or reward=file.py:function"
                for name, value in (("alpha", self.alpha), ("reward_samples", self.reward_samples))
                if value != 1
            ]
        if not self.lmbda:
            return ["a reward with lmbda = 0: the student writes nothing that could be rewarded"]
        if not self.alpha and self.lmbda < 1:
            return [f"alpha = 0 with lmbda = {self.lmbda}: nothing is learnt from the other batches"]
        return []


def student_shape(model: Model, keep_layers: int) -> Shape:
    """Return the shape of that student."""
    config = model.net.config
    return shape_of(shallow_config(config, keep_layers) if keep_layers else config)


def mismatches(model: Model, teacher: Model, keep_layers: int) -> list[str]:
    """List why a student with `keep_layers` blocks of `model` (0: all) cannot learn from `teacher`."""
    problems = []
    blocks = int(model.net.config.get_text_config().num_hidden_layers)
    if keep_layers and not 2 <= keep_layers < blocks:
        problems.append(f"keep_layers = {keep_layers} of {blocks} blocks: 2 to {blocks - 1} can be")
    if teacher is model and not keep_layers:
        problems.append("teacher=same without keep_layers: the student has nothing to learn from itself")
    if teacher.labels:
        problems.append(f"the teacher {teacher.name} is an encoder, which writes nothing")
    elif teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        problems.append(
            f"the teacher {teacher.name} has another vocabulary ({len(teacher.tokenizer)} tokens) than "
            f"{model.name} ({len(model.tokenizer)})"
        )
    return problems


def matrices(net: nn.Module) -> list[nn.Parameter]:
    """Return the two-dimensional weights."""
    return [weight for weight in net.parameters() if weight.ndim == 2]


def zero_share(net: nn.Module) -> float:
    """Return the share of exact zeros among the entries of the matrices."""
    counts = [(int(weight.count_nonzero()), weight.numel()) for weight in matrices(net)]
    return 1 - sum(n for n, _ in counts) / sum(size for _, size in counts)
