# SPDX-License-Identifier: Apache-2.0
"""GKD: a small model learns from a large one, on answers that the small one writes itself.

Agarwal, Vieillard, Zhou, Stanczyk, Ramos Garea, Geist, Bachem: "On-Policy Distillation of Language Models: Learning
from Self-Generated Mistakes", ICLR 2024, arXiv 2306.13649 (algorithm 1; section 3.1 for the divergence and the reward).

For each step a batch of prompts and a number u of [0, 1): with u < lmbda the student writes the answers; else, with
`seq_kd`, the teacher; else they are the data's own.  No gradient goes through the writing.  Then AdamW moves all
weights of the student down the mean over the batch's answer tokens of the generalised Jensen-Shannon divergence of
P (teacher) and Q (student), with M = beta P + (1 - beta) Q:

    D = beta KL(P || M) + (1 - beta) KL(Q || M)        beta = 0 is KL(P || Q), beta = 1 is KL(Q || P)

An answer's tokens are those up to and with its first end token.  `teacher=same keep_layers=N` makes a student of N of
the model's own blocks, evenly spaced, the first and the last among them.

With a `reward` r the student learns besides to write what is worth more (equation 5).  Where it has written the batch,
it is moved up

    (1 - alpha) E[r(y)] - alpha E[D]

with the gradient of E[r(y)] by REINFORCE: the mean over the answers of (r - b) grad log p(y | x), where b is the mean
reward of the other answers: `reward_samples` of each prompt, or one each of the batch's other prompts.  Batches that
the student has not written are worth no reward, and their divergence has the weight alpha too.  The reward is the
name of a measure, `exact_match`, `f1` or `rouge_l` (0 to 1), or a function of one's own at `package.module:function`
or `file.py:function`, which is given three texts, prompt, answer and the data's answer, and returns a number.

What to know:
- The formula itself tends to 0 at both ends, like beta KL(P || Q) and (1 - beta) KL(Q || P).  The ends are the whole
  divergences, as in TRL, so the loss and its gradient jump there: by 1 / beta, and by 1 / (1 - beta).  AdamW divides by
  the gradient's size, so this moves little more than where `clip` begins to act.
- `temperature` is that of the writing.  It does not enter the divergence; p(y | x) of the reward is the probability
  with which the answer was written, at this temperature, so that the gradient is that of what is really written.
- r(y) is of a whole answer and log p(y | x) a sum over its tokens, while D is a mean over tokens, as in the paper.  A
  reward far from 0 to 1 shifts the balance that alpha sets.  With alpha = 1 it is measured and does nothing: the
  same bits as without it.  `-v`, and the `step` events of `--json`, tell the mean reward of every step that has one.
- A reward that fails or is not finite ends the training before the step that it is of, and shows the row.  `--resume`
  goes on from what was kept before with the same function: its file may not have changed, what that imports may.
- Teacher and student must have the same vocabulary.  Where one of them has more rows in its output head than the
  other (padding), both distributions are those over the rows they share.
- All weights are trained, in fp32 and without dropout.  Zeros of a pruned model stay zero with `keep_zeros` alone: the
  entries of matrices that are exactly 0 have no gradient then.  Codes of a quantised model do not stay codes: training
  moves every weight off its grid, so distil first and quantise the result.
- Logits are made, compared and given up a chunk of tokens at a time and made again for the gradient, so that
  [batch, tokens, vocabulary] never exists, of either model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fleetune.common.settings import setting
from fleetune.compression.distillation import reward
from fleetune.compression.distillation.divergence import divergences, log_probs
from fleetune.compression.distillation.reward import Reward
from fleetune.compression.distillation.training_state import restore, store
from fleetune.compression.pruning.depth import shallow, shallow_config
from fleetune.data import Batches, Encoded
from fleetune.data.encode import Batch, collate
from fleetune.errors import FleetuneError, Interrupted, RecipeError
from fleetune.evaluation.answers import sample_from_ids, stop_ids, until_end
from fleetune.evaluation.losses import context_length, eval_mode, pad_id, predictors
from fleetune.evaluation.objectives import split
from fleetune.models.model import Model, digest, named_tensors, uniform
from fleetune.planning import compression_cost
from fleetune.planning.shapes import Shape, shape_of
from fleetune.planning.workload import SIZES

PAPER = "Agarwal et al., ICLR 2024, arXiv 2306.13649"
PRUNED = (
    0.2  # share of exact zeros from which on a model is taken for a pruned one; a 4-bit grid gives a tenth
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """Settings with the paper's symbols."""

    teacher: str = setting("", "p_T", "a model, a finished run, or same: the model itself")
    keep_layers: int = setting(0, "N", "the student has so many of the model's blocks (0: all)")
    beta: float = setting(0.5, "β", "0 is KL(P || Q), 1 is KL(Q || P), between: JSD")
    lmbda: float = setting(0.5, "λ", "share of batches that the student answers")
    seq_kd: bool = setting(False, "SeqKD", "the teacher answers the others, not the data")
    temperature: float = setting(0.9, "γ", "of the writing; it does not enter the loss")
    max_new_tokens: int = setting(128, "L", "tokens of a written answer at most")
    reward: str = setting("", "r", "exact_match, f1, rouge_l or file.py:function, of answers")
    alpha: float = setting(1.0, "α", "weight of the divergence; the reward has the rest")
    reward_samples: int = setting(1, "n", "answers that the student writes to a prompt, for a reward")
    keep_zeros: bool = setting(False, "M", "zeros of the student's matrices stay zero")
    steps: int = setting(200, "K", "batches")
    batch_size: int = setting(8, "B", "rows a batch")
    lr: float = setting(1e-4, "η", "AdamW's learning rate at its highest")
    warmup: float = setting(0.1, "w", "share of the steps in which it rises, before it falls")
    clip: float = setting(1.0, "c", "of the gradient's norm (0: not)")
    save_every: int = setting(50, "s", "steps after which all is kept for --resume")

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("no teacher is given: teacher=MODEL, teacher=RUN or teacher=same")
        for name in ("beta", "lmbda", "alpha", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} is not between 0 and 1")
        for name in ("max_new_tokens", "reward_samples", "steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is below 1")
        for name in ("temperature", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if not 0 <= self.clip < math.inf or self.keep_layers < 0:
            raise ValueError(f"clip = {self.clip} and keep_layers = {self.keep_layers} cannot be negative")
        self._check_reward()

    def _check_reward(self) -> None:
        """ValueError, or RecipeError for a function that cannot be had."""
        if not self.reward:
            for name, value in (("alpha", self.alpha), ("reward_samples", self.reward_samples)):
                if value != 1:
                    raise ValueError(
                        f"{name} = {value} without a reward: reward=f1 or reward=file.py:function"
                    )
            return
        if not self.lmbda:
            raise ValueError("a reward with lmbda = 0: the student writes nothing that could be rewarded")
        if not self.alpha and self.lmbda < 1:
            raise ValueError(f"alpha = 0 with lmbda = {self.lmbda}: nothing is learnt of the other batches")
        reward.get(self.reward)

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

    def _longest(self, length: int) -> int:
        """Tokens at most of a row with its answer, where those of the data have `length`."""
        return length + (self.max_new_tokens if self.lmbda or self.seq_kd else 0)

    def memory(self, model: Model, teacher: Model, length: int) -> int:
        """Bytes of the peak of training on rows of `length` tokens at most, as planned."""
        others = {id(other.net): other for other in (teacher, *([model] if self.keep_layers else []))}
        beside = sum(SIZES[other.dtype] * shape_of(other.net.config).params for other in others.values())
        rows = self.batch_size * (self.reward_samples if self.lmbda else 1)
        return sum(
            compression_cost.training(self._shape(model), rows, self._longest(length), beside).values()
        )

    def disk(self, model: Model) -> int:
        """Bytes of the states that are kept and of the result, at their most."""
        return compression_cost.training_disk(self._shape(model), math.ceil(self.steps / self.save_every))

    def _shape(self, model: Model) -> Shape:
        """The student's."""
        config = model.net.config
        return shape_of(shallow_config(config, self.keep_layers) if self.keep_layers else config)

    def student(self, model: Model) -> Model:
        """What is trained, in fp32: the model itself, or some of its blocks."""
        net = shallow(model.net, self.keep_layers) if self.keep_layers else model.net
        return dataclasses.replace(model, net=net.float(), dtype="fp32")

    def distance(self, student: Model, teacher: Model, rows: Sequence[Encoded]) -> float:
        """Mean divergence (nats) over the answer tokens of the rows as they are."""
        found = []
        with eval_mode(student.net), eval_mode(teacher.net):
            for first in range(0, len(rows), self.batch_size):
                batch = collate(rows[first : first + self.batch_size], pad_id(student), student.device)
                made = predictors(student.net, batch)
                found.append(divergences(made, teacher.net, batch, self.beta).double())
        return float(torch.cat(found).mean())

    def train(
        self,
        student: Model,
        teacher: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        on_step: Callable[[int, int, float, float | None], None] = lambda step, steps, loss, reward: None,
    ) -> None:
        """Train `student.net` in place; goes on with what `folder` holds already.

        `on_step(step, steps, loss, reward)` is called after every step, with the mean reward of what the student has
        written in it, if any, and may raise Interrupted to stop, which keeps the step.  FleetuneError when the loss or
        its gradient is not finite any more.
        """
        parameters = dict(named_tensors(student.net))
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.lr, weight_decay=0.0)
        worth = reward.get(self.reward) if self.reward else None
        origin = self._origin(student, teacher, rows, seed, worth)
        done = restore(folder, origin, parameters, optimizer)
        batches = Batches(rows, pad_id(student), seed, student.device).steps(self.steps, self.batch_size)
        with _trainable(student.net):
            for t, batch in enumerate(itertools.islice(batches, done, None), done):
                answered = self.answered(student, teacher, batch, seed, t)
                gains = mean = None
                if worth is not None and self._on_policy(seed, t):
                    gains, mean = self._gains(worth, student, batch, answered, t)
                loss = self._update(student, teacher, answered, gains, optimizer, t)
                if (t + 1) % self.save_every == 0 or t + 1 == self.steps:
                    store(folder, origin, t + 1, parameters, optimizer)
                try:
                    on_step(t + 1, self.steps, loss, mean)
                except Interrupted:
                    store(folder, origin, t + 1, parameters, optimizer)
                    raise

    def writer(self, student: Model, teacher: Model, seed: int, t: int) -> Model | None:
        """Who answers the batch of step t; None for the data."""
        return student if self._on_policy(seed, t) else teacher if self.seq_kd else None

    def _on_policy(self, seed: int, t: int) -> bool:
        """Whether the student answers the batch of step t (algorithm 1's u)."""
        u = float(uniform(f"gkd/{seed}/{t}", (1,), 0.5)[0]) + 0.5
        return u < self.lmbda

    def answered(self, student: Model, teacher: Model, batch: Batch, seed: int, t: int) -> Batch:
        """The batch with the answers of step t, a function of the student, the teacher, `seed` and `t` alone.

        Of the student's own a prompt has `reward_samples`, one after the other.
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

    def _gains(
        self, worth: Reward, student: Model, batch: Batch, answered: Batch, t: int
    ) -> tuple[np.ndarray, float]:
        """What the rewards of the student's answers are above their baseline (float64, one for each), and their mean."""
        prompts, answers = split(answered)
        references = self._repeated(split(batch)[1])
        found = reward.rewards(self.reward, worth, student, prompts, answers, references)
        mean = float(found.mean())
        log.info("step %d: mean reward %.4f of %d answers", t + 1, mean, len(found))
        return reward.advantages(found, self.reward_samples), mean

    def rate(self, t: int) -> float:
        """The learning rate of step t (from 0): up in a line, then down in a line to 0 after the last."""
        rise = math.ceil(self.warmup * self.steps)
        return self.lr * ((t + 1) / rise if t < rise else (self.steps - t) / (self.steps - rise))

    def loss(
        self, student: Model, teacher: Model, batch: Batch, gains: np.ndarray | None
    ) -> tuple[Tensor, Tensor]:
        """What a step makes small, and the mean divergence that is a part of it: two scalars.

        `gains` are those of the batch's rows, where the student has written them for a reward.
        """
        made = predictors(student.net, batch)
        found = divergences(made, teacher.net, batch, self.beta)
        D = found.sum() / max(1, len(found))
        if gains is None or self.alpha == 1:
            return self.alpha * D, D
        log_p = log_probs(made, batch, self.temperature)
        return self.alpha * D - (1 - self.alpha) * reward.reinforce_objective(log_p, batch, gains), D

    def _update(
        self,
        student: Model,
        teacher: Model,
        batch: Batch,
        gains: np.ndarray | None,
        optimizer: torch.optim.Optimizer,
        t: int,
    ) -> float:
        loss, D = self.loss(student, teacher, batch, gains)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.keep_zeros:
            for weight in _matrices(student.net):
                if weight.grad is not None:
                    weight.grad.masked_fill_(weight == 0, 0.0)  # AdamW's moments, and so its step, are 0 too
        norm = nn.utils.clip_grad_norm_(student.net.parameters(), self.clip or math.inf)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise FleetuneError(
                f"the loss is {loss.item()} in step {t + 1}, its gradient's norm {norm.item()}",
                hint="give a lower lr, or look for values that are not finite in the models",
            )
        optimizer.param_groups[0]["lr"] = self.rate(t)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(D.item())

    def _origin(
        self,
        student: Model,
        teacher: Model,
        rows: Sequence[Encoded],
        seed: int,
        worth: Reward | None,
    ) -> str:
        """SHA-256 of all that the result is a function of."""
        sha = hashlib.sha256(json.dumps([dataclasses.asdict(self), seed], sort_keys=True).encode())
        for model in (student, teacher):
            sha.update(digest(named_tensors(model.net)).encode())
        for row in rows:
            sha.update(f"{len(row.ids)} {row.n_prompt} ".encode() + row.ids.tobytes())
        if worth is not None:
            sha.update(reward.source_digest(self.reward, worth).encode())
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


def _matrices(net: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in net.parameters() if weight.ndim == 2]


def zero_share(net: nn.Module) -> float:
    """The share of exact zeros among the entries of the matrices."""
    counts = [(int(weight.count_nonzero()), weight.numel()) for weight in _matrices(net)]
    return 1 - sum(n for n, _ in counts) / sum(size for _, size in counts)
