"""Tune any parameter-efficient module in a federation, averaged by FedAvg (FedPETuning).

Zhang, Yang, Dai, Wang, Yu, Qu, Xu: "FedPETuning: When Federated Learning Meets the Parameter-Efficient Tuning Methods of
Pre-trained Language Models", ACL Findings 2023, arXiv 2212.10025 (section 3, Algorithm 1).

## Algorithm

A round: the server sends the module; a device trains it for an epoch on its own rows with a fresh AdamW, whose rate falls to 0
within the round, and sends it back; the server averages, weighted by rows.

| module | what is trained | size | traffic |
|---|---|---|---|
| full | every weight | | most |
| prefix | keys and values of virtual tokens in each layer | tokens | |
| adapter | two bottlenecks a layer, in series, and the norms | inner size | |
| lora | B A beside the query and value projections (or the one matrix of both) | rank (alpha = rank) | |
| bitfit | the biases; in a model without biases the norms' weights | | |
| prompt | embeddings of virtual tokens at the input (not in the paper) | tokens | least |
| scales | the scales of a quantised base (PEQA, arXiv 2305.14152; not in the paper) | | more than LoRA |

A classification head, where the model has one, is trained with any of them and travels too, as in the paper.  An `lr` or
`size` of 0 is the module's own, the paper's best for QNLI (its appendix).  `start`, `mu`, `scaffold` and `server` are `fedit`'s.

## Differences from the paper

- The paper sends frozen weights too, and takes the plain mean over devices with equally many rows.
- Its prefixes come from a network of 10 M numbers, which travels; here the keys and values are trained (P-Tuning v2), and travel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, NamedTuple, Self

from fleetune import adapters
from fleetune.common.settings import setting
from fleetune.models.net.model import Model
from fleetune.models.shapes import Shape
from fleetune.tuning.exchange.footprint import Footprint, lora_layers, lora_module, scales_module
from fleetune.tuning.methods import _adapter

KIND = "adapter"
PAPER = "Zhang et al., ACL Findings 2023, arXiv 2212.10025"
SENDS = "the module's numbers (and a classification head's), up and down"
RECOMMENDED = 3


@dataclass(frozen=True)
class Method(_adapter.Averaged):
    """Hyper-parameters with the paper's defaults for QNLI."""

    module: str = setting("lora", "module", "full, prefix, adapter, lora, bitfit, prompt or scales")
    size: int = setting(0, "r", "rank, inner size or tokens (0: lora 16, adapter 16, prefix 64, prompt 20)")
    lr: float = setting(
        0.0, "η", "AdamW learning rate (0: the module's own, between 5e-5 and 3e-2)", found=True
    )
    batch_size: int = setting(32, "B", "rows a step")
    clip: float = setting(1.0, "C", "largest norm of a gradient (0: any)")
    targets: str = setting(
        "query-value", "W", "lora: query-value, all-linear, or the layers' names", only_if="module=lora"
    )
    start: str = setting(
        "default",
        "A₀, B₀",
        "lora: where A and B start: default, gaussian, shared, orthogonal, pissa, olora, eva, gradient",
        only_if="module=lora",
    )
    places: str = setting(
        "houlsby", "places", "adapter: houlsby (two a layer) or pfeiffer (one)", only_if="module=adapter"
    )

    def __post_init__(self) -> None:
        if self.module not in MODULES:
            raise ValueError(f"module = {self.module!r} is none of {', '.join(MODULES)}")
        if self.places not in ("houlsby", "pfeiffer"):
            raise ValueError(f"places = {self.places!r} is neither houlsby nor pfeiffer")
        if self.size < 0 or self.lr < 0:
            raise ValueError(f"size = {self.size} and lr = {self.lr} must be positive (0: the module's own)")
        if self.module in ("prefix", "prompt") and self.size > adapters.MOST_TOKENS:
            raise ValueError(f"size = {self.size}: a {self.module} has {adapters.MOST_TOKENS} tokens at most")
        if self.start != "default" and self.module != "lora":
            raise ValueError(f"start = {self.start!r} is a start of LoRA; it needs module=lora")
        if self.targets != "query-value" and self.module != "lora":
            raise ValueError(f"targets = {self.targets!r} are layers for LoRA; it needs module=lora")
        if self.places != "houlsby" and self.module != "adapter":
            raise ValueError(f"places = {self.places!r} is where adapters go; it needs module=adapter")
        if self.size and not MODULES[self.module].size:
            raise ValueError(f"size = {self.size}, but module={self.module} has no size to choose")
        r = self.size or MODULES[self.module].size
        _adapter.check_start(self.start, r, dropout=0.0, wire=self.wire, start_data=self.start_data)
        super().__post_init__()

    def written_out(self) -> Self:
        own = MODULES[self.module]
        return replace(super().written_out(), size=self.size or own.size, lr=self.lr or own.lr)

    @property
    def packs(self) -> bool:
        return self.module not in ("prefix", "prompt")

    @property
    def own_lr(self) -> float:
        return self.lr or MODULES[self.module].lr

    def attach(self, model: Model, seed: int, start: str = "default") -> None:
        if model.attachment is None:
            kind = MODULES[self.module]
            spec = kind.spec(self, self.size or kind.size)
            if isinstance(spec, adapters.Lora) and start in adapters.INITS:
                spec = replace(spec, init=start)
            adapters.attach(model, spec, seed=seed)

    def footprint(self, shape: Shape) -> Footprint | None:
        if self.module not in ("lora", "scales"):
            return None  # the other modules are not counted yet
        if self.module == "scales":
            return self.work_on(scales_module(shape))
        layers = lora_layers(shape, self.targets)
        module = lora_module(layers, shape.head, self.size or MODULES["lora"].size)
        return self.work_on(module)


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
