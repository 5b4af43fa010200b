# SPDX-License-Identifier: Apache-2.0
"""Tune any parameter-efficient module in a federation, averaged by FedAvg (FedPETuning).

Zhang, Yang, Dai, Wang, Yu, Qu, Xu: "FedPETuning: When Federated Learning Meets the Parameter-Efficient Tuning
Methods of Pre-trained Language Models", ACL Findings 2023, arXiv 2212.10025 (section 3, Algorithm 1).

## Algorithm

A round: the server sends the module; a device trains it for an epoch on its own rows with a fresh AdamW, whose
rate falls to 0 within the round, and sends it back; the server averages, weighted by rows.

| module | what is trained | size | traffic |
|---|---|---|---|
| full | every weight | | most |
| prefix | keys and values of virtual tokens in each layer | tokens | |
| adapter | two bottlenecks a layer, in series, and the norms | inner size | |
| lora | B A beside the query and value projections (or the one matrix of both) | rank (alpha = rank) | |
| bitfit | the biases; in a model without biases the norms' weights | | |
| prompt | embeddings of virtual tokens at the input (not in the paper) | tokens | least |
| scales | the scales of a quantised base (PEQA, arXiv 2305.14152; not in the paper) | | more than LoRA |

A classification head, where the model has one, is trained with any of them and travels too, as in the paper.

## Options

`lr` and `size` 0 stand for the module's own: the paper's best ones for QNLI (its appendix; `lr` 5e-5 for full,
5e-4 for prefix, 1e-3 for adapter, lora and bitfit, 3e-2 for prompt).  Its fleets are 100
clients of which 10 % take part in a round; cross-silo, 10 that all do; large-scale cross-device, 1,000 of which
10 % do: `recipe:fedpetuning_cross_silo` and `recipe:fedpetuning_cross_device`.

LoRA may start elsewhere than at PEFT's default (`start`): see `fedit`.

For devices of unlike data: `mu` (FedProx), `scaffold`, and a server that steps along the mean instead of taking it
(`server`: FedAvgM, FedAdagrad, FedYogi, FedAdam); their papers are in `methods/_adapter.py` and `server_rules.py`.

## Differences from the paper

- It sends the whole model, frozen weights too, and computes what it would have saved; here that is saved.
- It takes the plain mean; here devices weigh as much as their rows.  Its devices have equally many, so it is
  the same there.
- Its prefixes come from a network of 10 M numbers, which travels; here the keys and values are trained
  themselves (P-Tuning v2), and travel alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from fleetune import adapters
from fleetune.common.settings import setting
from fleetune.data import Batches
from fleetune.models.model import Model
from fleetune.models.shapes import Shape
from fleetune.tuning import server_rules
from fleetune.tuning.footprint import Footprint, lora_layers, lora_module, scales_module
from fleetune.tuning.messages import Payload, ReplySpec
from fleetune.tuning.methods import Reply, _adapter, _lora_start
from fleetune.tuning.methods._adapter import State, Training
from fleetune.tuning.robust import MEAN, Rule

KIND = "adapter"
PAPER = "Zhang et al., ACL Findings 2023, arXiv 2212.10025"
SENDS = "the module's numbers (and a classification head's), up and down"
RECOMMENDED = 2


@dataclass(frozen=True)
class Method:
    """Hyper-parameters with the paper's defaults for QNLI."""

    module: str = setting("lora", "module", "full, prefix, adapter, lora, bitfit, prompt or scales")
    size: int = setting(0, "r", "rank, inner size or tokens (0: lora 16, adapter 16, prefix 64, prompt 20)")
    lr: float = setting(
        0.0, "η", "AdamW learning rate (0: the module's own, between 5e-5 and 3e-2)", found=True
    )
    epochs: int = setting(1, "E", "local epochs a round", only_if="steps=0")
    batch_size: int = setting(32, "B", "rows a step")
    steps: int = setting(0, "τ", "local steps a round instead of epochs (0: epochs)")
    warmup: int = setting(0, "w", "steps at the beginning of a round in which the rate rises")
    weight_decay: float = setting(0.0, "λ", "AdamW weight decay")
    clip: float = setting(1.0, "c", "largest norm of a gradient (0: any)")
    targets: str = setting(
        "query-value", "W", "lora: query-value, all-linear, or the layers' names", only_if="module=lora"
    )
    start: str = setting(
        "default",
        "A₀, B₀",
        "lora: where A and B start: default, gaussian, shared, orthogonal, pissa, olora, eva",
        only_if="module=lora",
    )
    start_data: str = setting(
        "demo", "X", "start=eva: rows the server has, a file or demo (32 are read)", only_if="start=eva"
    )
    places: str = setting(
        "houlsby", "places", "adapter: houlsby (two a layer) or pfeiffer (one)", only_if="module=adapter"
    )
    server: str = setting("avg", "server", "the server's rule: avg, avgm, adagrad, yogi, adam")
    server_lr: float = setting(0.0, "η_s", "the server's learning rate (0: 1 for avg and avgm, else 1e-3)")
    mu: float = setting(0.0, "μ", "FedProx: pull towards the global module (0.01 is usual)")
    scaffold: bool = setting(False, "c_k", "SCAFFOLD: correct a device's drift (its c goes down too)")
    checkpointing: bool = setting(True, "ckpt", "compute activations twice: less memory, more time")
    wire: str = setting("fp32", "wire", "fp32, or fp16 to halve the traffic")

    def __post_init__(self) -> None:
        if self.module not in MODULES:
            raise ValueError(f"module = {self.module!r} is none of {', '.join(MODULES)}")
        if self.places not in ("houlsby", "pfeiffer"):
            raise ValueError(f"places = {self.places!r} is neither houlsby nor pfeiffer")
        if self.size < 0 or self.lr < 0:
            raise ValueError(f"size = {self.size} and lr = {self.lr} must be positive (0: the module's own)")
        self.check_fits()
        _lora_start.check(
            self.start, self.size or MODULES[self.module].size, dropout=0.0, wire=self.wire,
            start_data=self.start_data,
        )  # fmt: skip
        self.training().check()
        server_rules.check(self.server, lr=self.server_lr)

    def written_out(self) -> Method:
        """Return the method with the module's own size and rate in place, and the server's."""
        own, rate = MODULES[self.module], server_rules.rate(self.server, self.server_lr)
        return replace(self, size=self.size or own.size, lr=self.lr or own.lr, server_lr=rate)

    def check_fits(self) -> None:
        """Raise ValueError for a setting that the module does not have."""
        if self.start != "default" and self.module != "lora":
            raise ValueError(f"start = {self.start!r} is a start of LoRA; it needs module=lora")
        if self.targets != "query-value" and self.module != "lora":
            raise ValueError(f"targets = {self.targets!r} are layers for LoRA; it needs module=lora")
        _lora_start.check_targets(self.targets)
        if self.places != "houlsby" and self.module != "adapter":
            raise ValueError(f"places = {self.places!r} is where adapters go; it needs module=adapter")
        if self.size and not MODULES[self.module].size:
            raise ValueError(f"size = {self.size}, but module={self.module} has no size to choose")

    def training(self) -> Training:
        """Return how a device trains."""
        return Training(
            lr=self.lr or MODULES[self.module].lr, epochs=self.epochs, steps=self.steps, batch_size=self.batch_size,
            warmup=self.warmup, decay=True, clip=self.clip, weight_decay=self.weight_decay, mu=self.mu,
            scaffold=self.scaffold, checkpointing=self.checkpointing, wire=self.wire,
        )  # fmt: skip

    def attach(self, model: Model, seed: int, start: str = "default") -> None:
        """Give `model` its module, unless it has it.  (A device is sent the start's numbers.)"""
        if model.attachment is None:
            kind = MODULES[self.module]
            spec = kind.spec(self, self.size or kind.size)
            if isinstance(spec, adapters.Lora) and start in adapters.INITS:
                spec = replace(spec, init=start)
            adapters.attach(model, spec, seed=seed)

    def init(self, model: Model, key: int) -> State:
        seed = key >> 1  # fits a signed 64-bit scalar
        self.attach(model, seed, self.start)
        if self.start == "eva":
            _lora_start.see(model, self.start_data)
        return _adapter.begin(model, seed, self.wire)

    def broadcast(self, state: State) -> Payload:
        return _adapter.broadcast(state, self.wire)

    def expects(self, state: State) -> ReplySpec:
        return _adapter.expects(state, self.wire)

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        self.attach(model, payload.int("seed"))
        return _adapter.local(model, payload, batches, key, memory, self.training())

    def distance(self, state: State, reply: Reply) -> float:
        return _adapter.distance(state.tensors, reply, self.training())

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        return _adapter.aggregate(state, replies, self.training(), self.server, self.server_lr, rule)

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        return _adapter.cannot_combine(rule)

    def apply(self, model: Model, state: State) -> None:
        self.attach(model, state.seed)
        _adapter.apply(model, state)

    def check_files(self) -> None:
        _lora_start.check_files(self.start, self.start_data)

    def local_steps(self, rows: int) -> int:
        return self.training().count(rows)

    def sized(self, steps: int, batch_size: int) -> Method:
        warmup = self.training().warmup_in(steps)
        return replace(self, steps=steps, batch_size=batch_size, warmup=warmup)

    def footprint(self, shape: Shape) -> Footprint | None:
        if self.module not in ("lora", "scales"):
            return None  # the other modules are not counted yet
        if self.module == "scales":
            return _adapter.footprint(scales_module(shape), self.training())
        layers = lora_layers(shape, self.targets)
        module = lora_module(layers, shape.head, self.size or MODULES["lora"].size)
        return _adapter.footprint(module, self.training())


class Kind(NamedTuple):
    """A module: its usual learning rate and size, and how it is described to `adapters`."""

    lr: float
    size: int
    spec: Callable[[Method, int], adapters.AdapterSpec]


MODULES: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "full": Kind(5e-5, 0, lambda method, size: adapters.Full()),
        "prefix": Kind(5e-4, 64, lambda method, size: adapters.Prefix(size)),
        "adapter": Kind(1e-3, 16, lambda method, size: adapters.Bottleneck(size, method.places)),
        "lora": Kind(1e-3, 16, lambda method, size: adapters.Lora(size, size, targets=method.targets)),
        "bitfit": Kind(1e-3, 0, lambda method, size: adapters.Bitfit()),
        "prompt": Kind(3e-2, 20, lambda method, size: adapters.Prompt(size)),
        "scales": Kind(2e-3, 0, lambda method, size: adapters.Scales()),
    }
)
