"""Remove whole heads and MLP channels from a model, then train what is left (LLM-Pruner).

Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, arXiv 2305.11627
(sections 3.1 to 3.3).

## Algorithm

1. Estimate on a few short texts how much the loss would rise without each group of weights that only make sense together: a key
   head with its query heads, or an MLP channel (`compression/importance.py` has the formulas).
2. Remove the least important groups.  With `scope=global` heads and channels are ranked apart: a head has far more weights.
3. Recover: train the smaller model with LoRA, or distil the whole model into it (`gkd`).

## Differences from the paper

- The reference code credits query head h to key head h % n_kv; here it is h // n_rep, as in attention itself.  In 13 of
  SmolLM2-135M's 30 blocks (9 query and 3 key heads) the two choose different heads.
- Rows count the tokens of their responses, plain text all of its tokens, in estimation and in recovery.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fleetune.adapters import Lora, attach, detach, merge, trainable, training
from fleetune.common.settings import setting
from fleetune.compression.importance import AGGREGATES, KINDS, Shares, estimate, select_units, width_problems
from fleetune.compression.training import Checkpoints, clipped_step, fingerprint, learning_rate
from fleetune.data import Batches, Encoded
from fleetune.data.encode import Batch
from fleetune.errors import DataError, FleetuneError, RecipeError
from fleetune.evaluation.losses import pad_id
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.families.widths import FAMILIES, KeptUnits, blocks_of, cut, width_of
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import Model, digest, named_tensors
from fleetune.models.shapes import shape_of

PAPER = "Ma et al., NeurIPS 2023, arXiv 2305.11627"
CLIP = 1.0  # of the gradient's norm in the recovery


@dataclass(frozen=True)
class Pruner:
    """The settings, with the paper's symbols."""

    ratio: float = setting(0.2, "ρ", "share of the groups that is removed")
    importance: str = setting("first", "I", "magnitude, first, second or mixed (orders in w)")
    aggregate: str = setting("sum", "Σ", "over the layers of a group: sum, mean, max or prod")
    scope: str = setting("local", "S", "local: the same share of every block; or global")
    first: int = setting(4, "a", "blocks spared at the start")
    last: int = setting(2, "z", "blocks spared at the end")
    round_to: int = setting(32, "m", "channels are left in multiples of this")
    samples: int = setting(10, "N", "texts or rows to estimate the importance on")
    recover: str = setting("lora", "R", "lora or none")
    r: int = setting(8, "r", "rank of the LoRA")
    alpha: float = setting(16.0, "α", "scale of the LoRA: alpha / r")
    dropout: float = setting(0.05, "p", "dropout of the LoRA in training")
    steps: int = setting(200, "K", "training steps of the recovery, of a batch each")
    batch_size: int = setting(8, "B", "rows per batch")
    lr: float = setting(1e-4, "η", "AdamW's highest learning rate")
    warmup: float = setting(0.1, "w", "share of the steps in which the learning rate rises")
    save_every: int = setting(50, "s", "steps between checkpoints, for --resume")

    # ---------------------------------------------------------------- estimate and remove

    def prune(
        self,
        model: Model,
        rows: Sequence[Encoded],
        on_row: Callable[[int, int], None] = lambda row, rows: None,
    ) -> Model:
        """Return the smaller model, whose net is that of `model`, cut in place.

        DataError when no row has a token to score; FleetuneError when the importance is not
        finite.
        """
        scored = [row for row in rows if len(row.ids) > max(1, row.n_prompt)]
        if not scored:
            raise DataError(f"none of {len(rows)} rows has a token to score", hint="give rows with responses")
        few = scored[:: max(1, len(scored) // self.samples)][: self.samples]
        blocks = blocks_of(model.net)
        shares = estimate(model, few, self.importance, range(self.first, len(blocks) - self.last), on_row)
        for i, both in shares.items():
            if not all(bool(torch.isfinite(share).all()) for share in both):
                raise FleetuneError(f"the importance in block {i} is not finite", hint="use --dtype fp32")
        cut(model.net, self.select(blocks, shares))
        return dataclasses.replace(model, digest=digest(named_tensors(model.net)))

    def select(self, blocks: Sequence[Any], shares: Mapping[int, Shares]) -> list[KeptUnits]:
        """Return what stays of each block, given the importance in the blocks that are not spared."""
        across = self.scope == "global"
        return select_units(blocks, shares, self.aggregate, self.ratio, self.round_to, across_blocks=across)

    # ---------------------------------------------------------------- recover

    def train(
        self,
        pruned: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    ) -> Model:
        """Train the pruned model in place and return it."""
        if self.recover == "lora":
            attach(pruned, Lora(self.r, self.alpha, self.dropout), seed=seed)
            try:
                self._train_lora(pruned, rows, seed, folder, on_step)
            except BaseException:
                detach(pruned)
                raise
            merge(pruned)
        return pruned

    def _train_lora(
        self,
        model: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        on_step: Callable[[int, int, float], None],
    ) -> None:
        """Train the LoRA that is attached to a model.

        The loss is the cross-entropy of the responses (of plain text: of all tokens).  AdamW trains the factors in fp32 on
        frozen weights, so memory is the model, the activations of one batch, and little more.  Dropout, the order of rows
        and the initial factors depend on the seed and the step alone, so a training resumed from a checkpoint ends with the
        same bits.  FleetuneError when the loss or its gradient is not finite.
        """
        origin = fingerprint(json.dumps([dataclasses.asdict(self), seed, model.digest], sort_keys=True), rows)
        parameters = trainable(model)
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=0.0)

        def step(t: int, batch: Batch) -> float:
            dropout = int.from_bytes(hashlib.sha256(f"recovery/{seed}/{t}".encode()).digest()[:7])
            rate, hint = (
                learning_rate(t, self.steps, self.lr, self.warmup),
                "give a lower lr, or --dtype fp32",
            )
            with training(model, dropout), by_layer(model.net):
                loss = loss_tensor(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                clipped_step(loss, parameters.values(), optimizer, t=t, rate=rate, clip=CLIP, hint=hint)
            return float(loss.item())

        batches = Batches(rows, pad_id(model), seed, model.device).steps(self.steps, self.batch_size)
        checkpoints = Checkpoints(folder, origin, self.save_every)
        checkpoints.run(
            batches, self.steps, parameters, optimizer, step, lambda t, loss: on_step(t, self.steps, loss)
        )

    # ---------------------------------------------------------------- checks

    def check(self, model: Model) -> None:
        """Raise RecipeError with every reason why the model cannot be pruned."""
        kind = model.net.config.model_type
        if kind not in FAMILIES:
            raise RecipeError(
                [f"models of type '{kind}' are not pruned; {', '.join(FAMILIES)} are"],
                hint="use a method that works on any model: fleetune compress --list",
            )
        blocks = blocks_of(model.net)
        widths = {width_of(block) for block in blocks[self.first : len(blocks) - self.last]}
        if not widths:
            problem = f"first = {self.first} and last = {self.last} spare all {len(blocks)} blocks"
            raise RecipeError([problem], hint="--set first=1 --set last=1, or less")
        problems = width_problems(widths, self.ratio, self.round_to)
        if any(not torch.isfinite(p).all() for p in model.net.parameters()):
            problems.append("the model holds values that are not finite")
        if problems:
            raise RecipeError(problems, hint="settings: fleetune compress --list llm-pruner")

    def disk(self, model: Model) -> int:
        """Return how many bytes the checkpoints and the result take at most: those of the whole model."""
        return WEIGHTS[model.dtype].size * shape_of(model.net.config).params

    def __post_init__(self) -> None:
        problems = []
        choices = {
            "importance": KINDS,
            "aggregate": tuple(AGGREGATES),
            "scope": ("local", "global"),
            "recover": ("lora", "none"),
        }
        for name, value in dataclasses.asdict(self).items():
            if name in choices and value not in choices[name]:
                problems.append(f"{name} = {value!r} is not one of {', '.join(choices[name])}")
            if name in ("round_to", "samples", "r", "steps", "batch_size", "save_every") and value < 1:
                problems.append(f"{name} = {value} is below 1")
            if name in ("first", "last") and value < 0:
                problems.append(f"{name} = {value} is below 0")
            if name in ("alpha", "lr") and not 0 < value < math.inf:
                problems.append(f"{name} = {value} must be positive")
        if not 0 < self.ratio < 1:
            problems.append(f"ratio = {self.ratio} is not between 0 and 1")
        if not (0 <= self.dropout < 1 and 0 <= self.warmup <= 1):
            problems.append(f"dropout = {self.dropout} and warmup = {self.warmup} are not both shares")
        if problems:
            raise ValueError(*problems)
