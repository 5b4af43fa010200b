# SPDX-License-Identifier: Apache-2.0
"""Fleetune: fine-tune language models across a fleet of edge devices.

    import fleetune
    done = fleetune.tune(model="smollm2-135m", data="demo", method="fedkseed", rounds=2)
    model = fleetune.load_tuned(done["run"])          # base + ledger, the base's weights untouched
    ledger = fleetune.load_ledger(done["result"])     # the fine-tune itself

The public names are imported when they are first used: `import fleetune` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from fleetune.common.version import __version__

_PUBLIC = {
    "Ledger": "fleetune.seeds.ledger:Ledger",
    "Model": "fleetune.models:Model",
    "Recipe": "fleetune.tuning.recipe:Recipe",
    "errors": "fleetune.errors:",
    "load_ledger": "fleetune.seeds.ledger:load",
    "load_model": "fleetune.models:load",
    "load_tuned": "fleetune.tuning.finished:load",
    "tune": "fleetune.tuning.run:run",
}

__all__ = [
    "Ledger",
    "Model",
    "Recipe",
    "__version__",
    "errors",
    "load_ledger",
    "load_model",
    "load_tuned",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fleetune' has no attribute '{name}'")
    module, _, attribute = _PUBLIC[name].partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
