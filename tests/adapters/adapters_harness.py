"""Every trainable module on a tiny decoder and two tiny encoders, for the tests of `adapters`."""

from typing import Any

import numpy as np
import pytest
import torch

from fleetune import adapters, models
from fleetune.adapters import Bitfit, Bottleneck, Full, Lora, Prefix, Prompt
from fleetune.models import Model

NETS = {"llama": models.tiny_llama, "bert": models.tiny_bert, "roberta": models.tiny_roberta}
SPECS: dict[str, Any] = {
    "lora": Lora(4, 4.0, targets="query-value"),
    "lora everywhere": Lora(2, 4.0),
    "houlsby": Bottleneck(6),
    "pfeiffer": Bottleneck(6, "pfeiffer", norms=False),
    "prefix": Prefix(3),
    "some layers": Prefix(3, layers=[1]),
    "prompt": Prompt(3),
    "bitfit": Bitfit(),
    "full": Full(),
}
IDS = torch.arange(48).reshape(3, 16) * 5 % 250
MASK = (torch.arange(16) < torch.tensor([[16], [11], [4]])).long()
LEAVES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
each = pytest.mark.parametrize(("net", "name"), [(n, s) for n in ("llama", "bert") for s in SPECS])


def out(model: Model, **inputs: Any) -> torch.Tensor:
    """Logits on rows padded on the right; a decoder's at the real tokens."""
    given = {"input_ids": IDS, "attention_mask": MASK} | inputs
    with torch.inference_mode():
        logits = model.net(**given).logits
    return logits if model.labels else logits[MASK.bool()]


def on(net: str, spec: Any, seed: int = 1, *, tuned: bool = True) -> Model:
    """A model with the module on it, with other numbers everywhere than at the start if `tuned`."""
    model = NETS[net]()
    adapters.attach(model, spec, seed=seed)
    if tuned:
        move(model, seed)
    return model


def move(model: Model, seed: int = 1, size: float = 0.1) -> None:
    random, arrays = np.random.default_rng(seed), adapters.export(model)
    adapters.load_(model, {n: a + random.normal(0, size, a.shape).astype("f4") for n, a in arrays.items()})


def logits(net: Any) -> torch.Tensor:
    with torch.inference_mode():
        return net(IDS).logits


def stored(model: Model) -> str:
    return models.digest(models.named_tensors(model.net))


def tiny(dtype: torch.dtype = torch.float32) -> Model:
    model = models.tiny_llama()
    model.net.to(dtype)
    return model


def attached(seed: int = 1, *, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    model = tiny(dtype)
    adapters.attach(model, adapters.Lora(**({"r": 4, "alpha": 8, "dropout": 0.0} | options)), seed=seed)
    return model


def tuned(seed: int = 1, **options: Any) -> Model:
    model = attached(seed, **options)
    random, arrays = np.random.default_rng(seed), adapters.export(model)
    adapters.load_(model, {n: random.normal(0, 0.1, a.shape).astype("f4") for n, a in arrays.items()})
    return model
