# SPDX-License-Identifier: Apache-2.0
"""LLM-Pruner: take whole heads and MLP channels (or blocks, or width) out of a model, then train it back.

Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, arXiv 2305.11627.
Weights that only make sense together are a group: a key head with its query heads, or an MLP channel.  A few short
texts say how much the loss would suffer without each (`importance.py` has the groups and the formulas); the least
important go; LoRA (`recovery.py`) or distillation from the whole model (`gkd.py`) brings back what was lost.  What is
left is a smaller dense model: it is faster and takes less memory in any runtime, without special kernels.

What to know:
- `ratio` is of the heads and of the channels in the blocks between the `first` and `last` spared ones.  Numbers are
  rounded to the nearest: of channels to a multiple of `round_to`, of heads to whole ones.
- `scope=local` takes the same share of every block; `global` takes the least important ones wherever they are, of heads
  and of channels apart (a head's sum is over far more weights than a channel's).
- `mode=depth` takes the least important blocks out instead: `ratio` of those that are not spared.
- `mode=hidden` takes channels of the residual stream, the same in all blocks (`hidden.py`), so it has no scope and
  spares none.  The result is plain; a llama's width stays a multiple of its heads too, as transformers asks.
- With `first` and `last` 0 and `scope=local` all blocks are alike and the result is a plain Hugging Face directory.
  Else it is one that fleetune loads (and transformers refuses), which goes into a GGUF file of architecture `deci`.
- The reference implementation credits query head h to key head h % n_kv.  Here it is h // n_rep, which is what
  attention does; with 9 query and 3 key heads the two choose other heads in 13 of SmolLM2-135M's 30 blocks.
- Rows count their responses, plain text all of its tokens, in estimation and in recovery.
- Memory: estimation takes one more copy of the weights that can go (`mixed` two); LoRA little more than the model;
  gkd the whole model, the pruned one, and three times the pruned one's weights for training, all in fp32.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fleetune.adapters import Lora
from fleetune.common.settings import setting
from fleetune.compression.methods import gkd
from fleetune.compression.pruning import decision, hidden_width
from fleetune.compression.pruning.decision import Decision
from fleetune.compression.pruning.depth import with_blocks
from fleetune.compression.pruning.importance import AGGREGATES, KINDS, Shares, choose, count_kept, estimate
from fleetune.compression.pruning.recovery import LoraRecovery
from fleetune.data import Encoded
from fleetune.errors import DataError, FleetuneError, RecipeError
from fleetune.models.families.widths import FAMILIES, KeptUnits, blocks_of, cut, width_of
from fleetune.models.model import Model, digest, named_tensors
from fleetune.planning import compression_cost
from fleetune.planning.shapes import shape_of
from fleetune.planning.workload import SIZES

PAPER = "Ma et al., NeurIPS 2023, arXiv 2305.11627"
KEPT = "kept.json"


@dataclass(frozen=True)
class Pruner:
    """Settings with the paper's symbols."""

    ratio: float = setting(0.2, "ρ", "share of the groups that goes")
    importance: str = setting("first", "I", "magnitude, first, second or mixed (orders in w)")
    aggregate: str = setting("sum", "Σ", "of a group's layers: sum, mean, max or prod")
    scope: str = setting("local", "S", "local: every block alike; or global")
    mode: str = setting("width", "M", "width: heads and channels; depth: blocks; hidden: the residual width")
    first: int = setting(4, "a", "first blocks that are spared")
    last: int = setting(2, "z", "last blocks that are spared")
    round_to: int = setting(32, "m", "channels are left in multiples of it")
    samples: int = setting(10, "N", "texts or rows that tell the importance")
    recover: str = setting("lora", "R", "lora, gkd (on rows alone) or none")
    r: int = setting(8, "r", "of lora: its rank")
    alpha: float = setting(16.0, "α", "of lora: factors count alpha / r")
    dropout: float = setting(0.05, "p", "of lora, in training")
    steps: int = setting(200, "K", "batches of the recovery")
    batch_size: int = setting(8, "B", "rows a batch")
    lr: float = setting(1e-4, "η", "AdamW's learning rate at its highest")
    warmup: float = setting(0.1, "w", "share of the steps in which it rises, before it falls")
    save_every: int = setting(50, "s", "steps after which all is kept for --resume")

    def __post_init__(self) -> None:
        for name, known in (
            ("importance", KINDS), ("aggregate", tuple(AGGREGATES)), ("scope", ("local", "global")),
            ("mode", ("width", "depth", "hidden")), ("recover", ("lora", "gkd", "none")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r} is not one of {', '.join(known)}")
        for name in ("scope", "first", "last") if self.mode == "hidden" else ():
            if getattr(self, name) != getattr(Pruner, name):
                raise ValueError(f"{name} is not for mode=hidden: all blocks lose the same channels")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio = {self.ratio} is not between 0 and 1")
        for name in ("round_to", "samples", "r", "steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is below 1")
        for name in ("first", "last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} is below 0")
        for name in ("alpha", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if not (0 <= self.dropout < 1 and 0 <= self.warmup <= 1):
            raise ValueError(f"dropout = {self.dropout} and warmup = {self.warmup} are not both shares")

    def check(self, model: Model, length: int, *, plain: bool) -> None:
        """RecipeError with everything in the way of the model and of rows of `length` tokens (`plain`: of text)."""
        hint = "settings: fleetune compress --list llm-pruner"
        kind = model.net.config.model_type
        if kind not in FAMILIES:
            raise RecipeError(
                [f"models of type '{kind}' are not pruned; {', '.join(FAMILIES)} are"],
                hint="use sparsegpt or optq",
            )
        blocks = blocks_of(model.net)
        numbers = self._numbers(len(blocks))
        if not numbers:
            problem = f"first = {self.first} and last = {self.last} spare all {len(blocks)} blocks"
            raise RecipeError([problem], hint="--set first=1 --set last=1, or less")
        problems = self._too_little(model.net, numbers)
        if any(not torch.isfinite(p).all() for p in model.net.parameters()):
            problems.append("the model holds values that are not finite")
        if self.recover == "gkd" and plain:
            problems.append("recover=gkd trains on rows, not on plain text: give --data, or recover=lora")
        if problems:
            raise RecipeError(problems, hint=hint)
        if self.recover == "gkd":
            self._gkd().check(model, dataclasses.replace(model), length)

    def disk(self, model: Model) -> int:
        """Bytes of the states that are kept and of the result, at their most: those of the whole model."""
        shape = shape_of(model.net.config)
        if self.recover == "gkd":
            return compression_cost.training_disk(shape, math.ceil(self.steps / self.save_every))
        return SIZES[model.dtype] * shape.params

    def prune(
        self,
        model: Model,
        rows: Sequence[Encoded],
        folder: Path,
        on_row: Callable[[int, int], None] = lambda row, rows: None,
    ) -> Model:
        """The smaller model; what stays is written into `folder`, and read where it is there already.

        Before recover=gkd `model` is left as it was; else its net is cut in place, so that no second one is in
        memory.  DataError when no row has a token to score; FleetuneError when the importance is not finite.
        """
        kept = self._kept(model, rows, folder, on_row)
        net = model.net
        if isinstance(kept, dict) and len(kept) < len(blocks_of(net)):
            net = with_blocks(net, sorted(kept))
        elif self.recover == "gkd":
            net = copy.deepcopy(net)
        if isinstance(kept, dict):
            cut(net, [kept[i] for i in sorted(kept)])
        else:
            hidden_width.narrow(net, kept)
        return dataclasses.replace(model, net=net, digest=digest(named_tensors(net)))

    def train(
        self,
        pruned: Model,
        whole: Model,
        rows: Sequence[Encoded],
        seed: int,
        folder: Path,
        on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    ) -> Model:
        """The pruned model after its recovery, in place; goes on with what `folder` holds already.

        `on_step(step, steps, loss)` is called after every step and may raise Interrupted, which keeps the step.
        """
        taught = self._gkd()
        if self.recover == "gkd":
            pruned = taught.student(pruned)
            taught.train(pruned, whole, rows, seed, folder, lambda t, steps, loss, _: on_step(t, steps, loss))
        elif self.recover == "lora":
            rates = [taught.rate(t) for t in range(self.steps)]
            lora = Lora(self.r, self.alpha, self.dropout)
            LoraRecovery(lora, self.steps, self.batch_size, rates, self.save_every).train(
                pruned, rows, seed, folder, on_step
            )
        return pruned

    def _gkd(self) -> gkd.Trainer:
        """Distillation from the whole model with our steps; the rest as that method has it."""
        return gkd.Trainer(
            teacher="same", steps=self.steps, batch_size=self.batch_size, lr=self.lr, warmup=self.warmup,
            save_every=self.save_every,
        )  # fmt: skip

    # ---------------------------------------------------------------- what goes

    def _numbers(self, blocks: int) -> list[int]:
        """The blocks that are not spared."""
        return list(range(blocks) if self.mode == "hidden" else range(self.first, blocks - self.last))

    def _too_little(self, net: PreTrainedModel, numbers: Sequence[int]) -> list[str]:
        """What is wrong where nothing would go."""
        if self.mode == "hidden":
            return hidden_width.nothing_removed(net.config, self.ratio, self.round_to)
        if self.mode == "depth":
            gone, whole = self._gone(len(numbers)), len(blocks_of(net))
            what = f"ratio = {self.ratio} of {len(numbers)} blocks is "
            little = [] if gone else [f"{what}less than half a block"]
            return [f"{what}all of them, and nothing else is spared"] if gone == whole else little
        blocks = blocks_of(net)
        widths = {width_of(blocks[i]) for i in numbers}
        narrow = min(w.intermediate_size for w in widths)
        if self.round_to > narrow:
            return [f"round_to = {self.round_to} is more than the {narrow} channels of a block"]
        if all(
            count_kept(w.num_key_value_heads, w.num_key_value_heads * (1 - self.ratio), 1)
            == w.num_key_value_heads
            and count_kept(w.intermediate_size, w.intermediate_size * (1 - self.ratio), self.round_to)
            == w.intermediate_size
            for w in widths
        ):
            most = max(widths)
            return [
                f"ratio = {self.ratio} takes nothing from {most.num_key_value_heads} key heads "
                f"and {most.intermediate_size} channels in steps of {self.round_to}"
            ]
        return []

    def _gone(self, blocks: int) -> int:
        return min(blocks, int(blocks * self.ratio + 0.5))

    def _kept(
        self, model: Model, rows: Sequence[Encoded], folder: Path, on_row: Callable[[int, int], None]
    ) -> Decision:
        """What stays: as the file says, or found and written there."""
        scored = [row for row in rows if len(row.ids) > max(1, row.n_prompt)]
        if not scored:
            raise DataError(f"none of {len(rows)} rows has a token to score", hint="give rows with responses")
        few = scored[:: max(1, len(scored) // self.samples)][: self.samples]
        origin, file = self._origin(model, few), folder / KEPT
        if file.is_file():
            return decision.read(file, origin)
        kept = (self._channels if self.mode == "hidden" else self._blocks)(model, few, on_row)
        decision.write(file, origin, kept)
        return kept

    def _blocks(self, model: Model, few: Sequence[Encoded], on_row: Callable[[int, int], None]) -> Decision:
        """What stays of each block that stays, by its number."""
        blocks = blocks_of(model.net)
        shares = estimate(model, few, self.importance, self._numbers(len(blocks)), on_row)
        for i, both in shares.items():
            _check_finite(both, f"in block {i}")
        return self.select(blocks, shares)

    def _channels(self, model: Model, few: Sequence[Encoded], on_row: Callable[[int, int], None]) -> Decision:
        """Which channels of the residual stream stay."""
        shares = hidden_width.estimate(model, few, self.importance, on_row)
        _check_finite([shares], "of the hidden channels")
        step = hidden_width.width_step(model.net.config, self.round_to)
        return hidden_width.select(shares, self.aggregate, self.ratio, step)

    def select(self, blocks: Sequence[Any], shares: Mapping[int, Shares]) -> dict[int, KeptUnits]:
        """What stays of each of a net's blocks that stays, by its number, given the shares of those not spared."""
        widths = [width_of(block) for block in blocks]
        kept = {
            i: KeptUnits([*range(w.num_key_value_heads)], [*range(w.intermediate_size)])
            for i, w in enumerate(widths)
        }
        scores = {i: tuple(AGGREGATES[self.aggregate](share) for share in both) for i, both in shares.items()}
        if self.mode == "depth":
            totals = {i: float(sum(score.sum() for score in both)) for i, both in scores.items()}
            for i in sorted(totals, key=lambda i: totals[i])[: self._gone(len(totals))]:
                del kept[i]
            return kept
        whole = self.scope == "global"
        heads: dict[int, Tensor] = {i: both[0] for i, both in scores.items()}
        channels: dict[int, Tensor] = {i: both[1] for i, both in scores.items()}
        stay = choose(heads, self.ratio, 1, whole), choose(channels, self.ratio, self.round_to, whole)
        return kept | {i: KeptUnits(stay[0][i], stay[1][i]) for i in scores}

    def _origin(self, model: Model, rows: Sequence[Encoded]) -> str:
        """SHA-256 of all that the choice is a function of."""
        mine = {
            name: getattr(self, name)
            for name in ("ratio", "importance", "aggregate", "scope", "mode", "first", "last", "round_to")
        }
        sha = hashlib.sha256(json.dumps([mine, model.digest], sort_keys=True).encode())
        for row in rows:
            sha.update(f"{len(row.ids)} {row.n_prompt} ".encode() + row.ids.tobytes())
        return sha.hexdigest()


def _check_finite(shares: Sequence[Tensor], where: str) -> None:
    if not all(bool(torch.isfinite(share).all()) for share in shares):
        raise FleetuneError(f"the importance {where} is not finite", hint="use --dtype fp32")
