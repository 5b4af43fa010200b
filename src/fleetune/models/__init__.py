"""Find, load and save models.

Names are imported when they are first used, so that reading a GGUF header loads no torch.  Modules of this folder import each
other, never this facade.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fleetune.models.cache.cache import builtin
    from fleetune.models.loading import (
        DEVICES,
        DTYPES,
        check_device,
        device_memory,
        load,
        load_artefact,
        load_config,
        load_tokenizer,
        pull,
        resolve,
    )
    from fleetune.models.net.model import Model, digest, named_tensors, tokenizer_digest, uniform
    from fleetune.models.net.saving import disk_errors, save
    from fleetune.models.tiny import tiny_bert, tiny_llama, tiny_roberta, tiny_tokenizer

__all__ = [
    "DEVICES",
    "DTYPES",
    "Model",
    "builtin",
    "check_device",
    "device_memory",
    "digest",
    "disk_errors",
    "load",
    "load_artefact",
    "load_config",
    "load_tokenizer",
    "named_tensors",
    "pull",
    "resolve",
    "save",
    "tiny_bert",
    "tiny_llama",
    "tiny_roberta",
    "tiny_tokenizer",
    "tokenizer_digest",
    "uniform",
]

_PLACES = {
    "cache.cache": ("builtin",),
    "tiny": ("tiny_bert", "tiny_llama", "tiny_roberta", "tiny_tokenizer"),
    "net.model": ("Model", "digest", "named_tensors", "tokenizer_digest", "uniform"),
    "net.saving": ("disk_errors", "save"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = next((module for module, names in _PLACES.items() if name in names), "loading")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
