"""Remove whole heads and MLP channels from a model, then train what is left (LLM-Pruner).

Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, arXiv 2305.11627
(sections 3.1 to 3.3).

## Algorithm

1. Estimate on a few short texts how much the loss would rise without each group of weights that only make sense together: a key
   head with its query heads, or an MLP channel.
2. Remove the least important groups.  With `scope=global` heads and channels are ranked apart: a head has far more weights.
3. Recover: train the smaller model with LoRA, or distil the whole model into it (`gkd`).

## Importance

    a key head g            rows of k and v; rows of q and columns of o of its n_rep query heads g n_rep .. (g + 1) n_rep - 1
    an MLP channel c        row c of gate and of up, column c of down

The biases of removed rows go with them.  With g the gradient of the mean loss, and F the mean of the squared gradients of each
text's loss (Fisher's diagonal in place of the Hessian's), a weight w has the importance |w| (magnitude), |w g| (first), w^2 F
(second) or |w g - w^2 F / 2| (mixed; the paper's element-wise equations 3 and 5).  g is not 0: the texts are new.

## Differences from the paper

- The reference code credits query head h to key head h % n_kv; here it is h // n_rep, as in attention itself.  In 13 of
  SmolLM2-135M's 30 blocks (9 query and 3 key heads) the two choose different heads.
- Rows count the tokens of their responses, plain text all of its tokens, in estimation and in recovery.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from fleetune.adapters import Lora, attach, detach, merge, trainable, training
from fleetune.common.settings import setting
from fleetune.compression.training import Checkpoints, clipped_step, fingerprint, learning_rate
from fleetune.data import Batches, Encoded, collate
from fleetune.data.encode import Batch
from fleetune.errors import DataError, FleetuneError, RecipeError
from fleetune.evaluation.losses import pad_id
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.families.widths import FAMILIES, KeptUnits, Width, blocks_of, cut, width_of
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import Model, digest, named_tensors
from fleetune.models.shapes import shape_of

PAPER = "Ma et al., NeurIPS 2023, arXiv 2305.11627"
CLIP = 1.0  # of the gradient's norm in the recovery
KINDS: Final = ("magnitude", "first", "second", "mixed")


class LayerGroups(NamedTuple):
    """The part of one linear layer that belongs to groups of one kind."""

    layer: nn.Linear
    rows: bool  # whether a group is rows of the weight (with their biases), or columns
    groups: int

    def parameters(self) -> list[nn.Parameter]:
        """Return the weight, and the bias where groups are rows."""
        biased = self.rows and self.layer.bias is not None
        return [self.layer.get_parameter(name) for name in (["weight", "bias"] if biased else ["weight"])]


class Shares(NamedTuple):
    """The importance of the groups of a block in each linear layer: float64 [layers, groups]."""

    heads: Tensor  # of q, k, v, o
    channels: Tensor  # of gate, up, down


def group_layers(block: Any) -> tuple[list[LayerGroups], list[LayerGroups]]:
    """Return the linear layers of the head groups, and those of the channel groups, of a decoder block."""
    a, f, width = block.self_attn, block.mlp, width_of(block)
    g, c = width.num_key_value_heads, width.intermediate_size
    heads = [
        LayerGroups(linear, linear is not a.o_proj, g) for linear in (a.q_proj, a.k_proj, a.v_proj, a.o_proj)
    ]
    channels = [
        LayerGroups(linear, linear is not f.down_proj, c) for linear in (f.gate_proj, f.up_proj, f.down_proj)
    ]
    return heads, channels


def estimate(
    model: Model,
    rows: Sequence[Encoded],
    kind: str,
    numbers: Sequence[int],
    on_row: Callable[[int, int], None] = lambda row, rows: None,
) -> dict[int, Shares]:
    """Return the shares of all groups in the blocks `numbers`, from the mean loss of each row.

    `on_row(row, rows)` is called after each row and may raise to stop.  `magnitude` reads no row.
    """
    blocks = blocks_of(model.net)
    found = {i: group_layers(blocks[i]) for i in numbers}
    every = [m for both in found.values() for part in both for m in part]
    sums = GradientSums(kind, len(rows))
    if kind != "magnitude":
        sums.gather(model, rows, every, on_row)
    return {i: Shares(*(sums.shares(part) for part in both)) for i, both in found.items()}


class GradientSums:
    """The sums g and F of parameters, as far as the kind of importance needs them."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count
        self.g: dict[nn.Parameter, Tensor] = {}
        self.F: dict[nn.Parameter, Tensor] = {}

    def gather(
        self,
        model: Model,
        rows: Sequence[Encoded],
        layers: Sequence[LayerGroups],
        on_row: Callable[[int, int], None],
    ) -> None:
        """Add the gradients of the mean loss of every row."""
        parameters = [p for layer in layers for p in layer.parameters()]
        with _hooked_gradients(parameters, self.add), by_layer(model.net), torch.enable_grad():
            for done, row in enumerate(rows, 1):
                loss_tensor(model, collate([row], pad_id(model), model.device)).backward()  # type: ignore[no-untyped-call]
                on_row(done, len(rows))

    def add(self, parameter: nn.Parameter) -> None:
        """Add the gradient of one row's loss, and free it."""
        grad = parameter.grad
        assert grad is not None
        grad = grad.float()
        if self.kind in ("second", "mixed"):
            _add(self.F, parameter, grad.square())
        if self.kind in ("first", "mixed"):
            _add(self.g, parameter, grad)
        parameter.grad = None

    def importance(self, parameter: nn.Parameter) -> Tensor:
        """Return the importance of every weight: float32, of the parameter's shape."""
        w = parameter.detach().float()
        if self.kind == "magnitude":
            return w.abs()
        if self.kind == "first":
            return (w * self.g[parameter] / self.count).abs()
        second = w.square() * self.F[parameter] / self.count
        return second if self.kind == "second" else (w * self.g[parameter] / self.count - second / 2).abs()

    def shares(self, layers: Sequence[LayerGroups]) -> Tensor:
        """Return the importance of the groups in each of these layers: float64 [layers, groups]."""
        return torch.stack([self._share(layer) for layer in layers])

    def _share(self, layer: LayerGroups) -> Tensor:
        """Return float64 [groups]; each group is a run of neighbouring rows or columns."""
        total = torch.zeros(layer.groups, dtype=torch.float64)
        for parameter in layer.parameters():
            found = self.importance(parameter)
            along = found if found.dim() == 1 else found.sum(1 if layer.rows else 0, dtype=torch.float64)
            total += along.double().view(layer.groups, -1).sum(1).cpu()
        return total


def _add(sums: dict[nn.Parameter, Tensor], parameter: nn.Parameter, more: Tensor) -> None:
    if parameter in sums:
        sums[parameter].add_(more)
    else:
        sums[parameter] = more.clone()


@contextmanager
def _hooked_gradients(
    parameters: Sequence[nn.Parameter], add: Callable[[nn.Parameter], None]
) -> Iterator[None]:
    """Compute gradients of `parameters` while the block runs; pass each to `add` when it is complete."""
    handles = []
    for parameter in parameters:
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(add))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for parameter, handle in zip(parameters, handles, strict=True):
            handle.remove()
            parameter.grad = None
            parameter.requires_grad_(False)


AGGREGATES: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "sum": lambda shares: shares.sum(0),
    "mean": lambda shares: shares.mean(0),
    "max": lambda shares: shares.amax(0),
    "prod": lambda shares: shares.prod(0),
}


def select_units(
    blocks: Sequence[Any],
    shares: Mapping[int, Shares],
    aggregate: str,
    ratio: float,
    round_to: int,
    *,
    across_blocks: bool,
) -> list[KeptUnits]:
    """Return the heads and channels that stay in each block; blocks without shares keep all of theirs."""
    heads = {i: AGGREGATES[aggregate](share.heads) for i, share in shares.items()}
    channels = {i: AGGREGATES[aggregate](share.channels) for i, share in shares.items()}
    stay = choose(heads, ratio, 1, across_blocks), choose(channels, ratio, round_to, across_blocks)
    return [
        KeptUnits(
            stay[0].get(i, range(width.num_key_value_heads)), stay[1].get(i, range(width.intermediate_size))
        )
        for i, width in enumerate(map(width_of, blocks))
    ]


def count_kept(n: int, stay: float, step: int) -> int:
    """Round `stay`, the number of n groups that should stay, to a multiple of `step`: at least one step, at most n."""
    return min(n, max(1, int(stay / step + 0.5)) * step)


def choose(
    scores: Mapping[int, Tensor], ratio: float, step: int, across_blocks: bool
) -> dict[int, list[int]]:
    """Return the groups that stay in each block, ascending, by their scores [groups].

    Each block loses the same share.  With `across_blocks` the share is of all blocks together, and a block keeps as many
    as it has among the best, to the nearest multiple of `step`.  Among equal groups the first stays.
    """
    stay = {i: len(score) * (1 - ratio) for i, score in scores.items()}
    if across_blocks:
        owner = torch.cat([torch.full((len(score),), i) for i, score in scores.items()])
        best = _ranked(torch.cat(list(scores.values())))[: int(len(owner) * (1 - ratio) + 0.5)]
        stay = {i: float((owner[best] == i).sum()) for i in scores}
    return {
        i: sorted(_ranked(score)[: count_kept(len(score), stay[i], step)].tolist())
        for i, score in scores.items()
    }


def _ranked(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True)


def width_problems(widths: set[Width], ratio: float, round_to: int) -> list[str]:
    """Say why `ratio` removes no head and no channel from blocks of these widths; [] when it removes some."""
    narrow = min(w.intermediate_size for w in widths)
    if round_to > narrow:
        return [f"round_to = {round_to} is more than the {narrow} channels of a block"]
    if any(
        count_kept(n, n * (1 - ratio), step) != n
        for w in widths
        for n, step in ((w.num_key_value_heads, 1), (w.intermediate_size, round_to))
    ):
        return []
    most = max(widths)
    return [
        f"ratio = {ratio} takes nothing from {most.num_key_value_heads} key heads "
        f"and {most.intermediate_size} channels in steps of {round_to}"
    ]


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
