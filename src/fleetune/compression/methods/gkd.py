"""Distil a large model into a small one on answers that the small one writes itself (GKD).

Agarwal, Vieillard, Zhou, Stanczyk, Ramos Garea, Geist, Bachem: "On-Policy Distillation of Language Models: Learning from
Self-Generated Mistakes", ICLR 2024, arXiv 2306.13649 (algorithm 1; section 3.1 for the divergence).

## Algorithm

1. With probability lmbda the student writes the answers to a batch of prompts, up to the first end token.  Otherwise the teacher
   writes them (`seq_kd`), or they are those of the data.  No gradient goes through the writing.
2. AdamW moves all weights of the student down the mean, over the tokens of the answers, of the generalised Jensen-Shannon
   divergence of teacher P and student Q, with M = beta P + (1 - beta) Q:

       D = beta KL(P || M) + (1 - beta) KL(Q || M)        beta = 0 is KL(P || Q), beta = 1 is KL(Q || P)

## Differences from the paper

- D as written tends to 0 at both ends, like beta KL(P || Q) and (1 - beta) KL(Q || P).  At the ends the whole divergence is used,
  as in TRL: the loss and its gradient jump there.  AdamW divides by the gradient's size, so this only changes where `clip` acts.
- Where the output heads differ in size (padding), both distributions are over the rows that they share.  The vocabularies must be
  the same.
- All weights are trained, in fp32 and without dropout, so zeros of a pruned model and codes of a quantised one do not stay.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fleetune.common.settings import setting
from fleetune.compression.training import Checkpoints, all_trainable, clipped_step, fingerprint, learning_rate
from fleetune.data import Batches, Encoded
from fleetune.data.encode import Batch, collate
from fleetune.errors import RecipeError
from fleetune.evaluation.answers import sample_from_ids, stop_ids, until_end
from fleetune.evaluation.head_loss import CHUNK_BYTES
from fleetune.evaluation.losses import context_length, eval_mode, pad_id, predictors
from fleetune.evaluation.objectives import split
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.families.widths import KEY, has_block_widths
from fleetune.models.net.layers import by_layer, layers_of
from fleetune.models.net.model import Model, digest, named_tensors, uniform
from fleetune.models.shapes import Shape, shape_of
from fleetune.planning import compression_cost

PAPER = "Agarwal et al., ICLR 2024, arXiv 2306.13649"
Predictors = tuple[Tensor, Callable[[Tensor], Tensor]]  # the result of `losses.predictors`


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
        on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    ) -> None:
        """Run algorithm 1 on `student.net`, in place.  FleetuneError when the loss or its gradient is not finite."""
        parameters = dict(named_tensors(student.net))
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.lr, weight_decay=0.0)
        models = "".join(digest(named_tensors(model.net)) for model in (student, teacher))
        origin = fingerprint(json.dumps([dataclasses.asdict(self), seed], sort_keys=True) + models, rows)

        def step(t: int, batch: Batch) -> float:
            return self._update(
                student, teacher, self.answered(student, teacher, batch, seed, t), optimizer, t
            )

        def report(done: int, loss: float) -> None:
            on_step(done, self.steps, loss)

        batches = Batches(rows, pad_id(student), seed, student.device).steps(self.steps, self.batch_size)
        with all_trainable(student.net):
            checkpoints = Checkpoints(folder, origin, self.save_every)
            checkpoints.run(batches, self.steps, parameters, optimizer, step, report)

    def writer(self, student: Model, teacher: Model, seed: int, t: int) -> Model | None:
        """Return the model that answers the batch of step t; None for the data."""
        u = float(uniform(f"gkd/{seed}/{t}", (1,), 0.5)[0]) + 0.5
        return student if u < self.lmbda else teacher if self.seq_kd else None

    def answered(self, student: Model, teacher: Model, batch: Batch, seed: int, t: int) -> Batch:
        """Return the batch with the answers of step t, which depend on the models, `seed` and `t` alone."""
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

    def _update(
        self, student: Model, teacher: Model, batch: Batch, optimizer: torch.optim.Optimizer, t: int
    ) -> float:
        """Take step t, and return the mean divergence before it."""
        with by_layer(student.net):
            found = divergences(predictors(student.net, batch), teacher.net, batch, self.beta)
            loss = found.sum() / max(1, len(found))
            loss.backward()  # type: ignore[no-untyped-call]
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
        return float(loss.item())

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
        shape, longest = student_shape(model, self.keep_layers), self._longest(length)
        return sum(compression_cost.training(shape, self.batch_size, longest, beside).values())

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
        if problems:
            raise RecipeError(problems, hint="settings: fleetune compress --list gkd; --length cuts rows")

    def __post_init__(self) -> None:
        problems = [] if self.teacher else ["no teacher is given: teacher=MODEL, teacher=RUN or teacher=same"]
        for name, value in dataclasses.asdict(self).items():
            if name in ("beta", "lmbda", "warmup") and not 0 <= value <= 1:
                problems.append(f"{name} = {value} is not between 0 and 1")
            if name in ("max_new_tokens", "steps", "batch_size", "save_every") and value < 1:
                problems.append(f"{name} = {value} is below 1")
            if name in ("temperature", "lr") and not 0 < value < math.inf:
                problems.append(f"{name} = {value} must be positive")
        if not 0 <= self.clip < math.inf or self.keep_layers < 0:
            problems.append(f"clip = {self.clip} and keep_layers = {self.keep_layers} cannot be negative")
        if problems:
            raise ValueError(*problems)


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


# ---------------------------------------------------------------- a student of some blocks


def evenly_spaced(whole: int, keep: int) -> list[int]:
    """Return `keep` of `whole` block numbers, evenly spaced, with the first and the last (2 <= keep <= whole)."""
    gaps = keep - 1
    return [(2 * k * (whole - 1) + gaps) // (2 * gaps) for k in range(keep)]


def shallow(net: PreTrainedModel, keep: int) -> PreTrainedModel:
    """Copy `net` with `keep` of its decoder blocks, evenly spaced; `net` is left unchanged.

    Students of DistilBERT start so (Sanh et al. 2019, arXiv 1910.01108, section 3).
    Lists in the configuration with an entry a block (such as `layer_types`) are cut alike.  ModelError for a family
    whose blocks are not known.
    """
    kept = evenly_spaced(len(layers_of(net)), keep)
    path = layers_of(net)[0].name.rpartition(".")[0]
    parent, _, stack = path.rpartition(".")
    owner, whole = net.get_submodule(parent), cast(nn.ModuleList, net.get_submodule(path))
    setattr(owner, stack, nn.ModuleList(whole[i] for i in kept))
    try:
        cut = copy.deepcopy(net)
    finally:
        setattr(owner, stack, whole)
    for number, block in enumerate(cast(nn.ModuleList, cut.get_submodule(path))):
        for module in block.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = number
    _cut_config(cut.config.get_text_config(), len(whole), kept)
    return cut


def shallow_config(config: Any, keep: int) -> Any:
    """Return the configuration that `shallow` gives its copy."""
    cut, whole = copy.deepcopy(config), int(config.get_text_config().num_hidden_layers)
    _cut_config(cut.get_text_config(), whole, evenly_spaced(whole, keep))
    return cut


def _cut_config(config: Any, whole: int, kept: list[int]) -> None:
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == whole:
            setattr(config, name, [value[i] for i in kept])
    if has_block_widths(config):
        table = getattr(config, KEY)
        setattr(config, KEY, {name: [found[i] for i in kept] for name, found in table.items()})
    config.num_hidden_layers = len(kept)


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

    # The backward pass of a chunk has some 20 arrays [chunk, V] alive, so a chunk is a quarter of a plain loss's.
    rows, size = student[0], chunk or max(1, CHUNK_BYTES // (16 * head(student[0][:0]).shape[-1]))
    pieces = [(rows[a : a + size], hidden[a : a + size]) for a in range(0, max(1, len(rows)), size)]
    if torch.is_grad_enabled():  # each is computed again for the gradient, not stored
        again = functools.partial(checkpoint, compare, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([cast(Tensor, again(*piece)) for piece in pieces])
    return torch.cat([compare(*piece) for piece in pieces])
