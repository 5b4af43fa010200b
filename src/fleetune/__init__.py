# SPDX-License-Identifier: Apache-2.0
"""Fine-tune language models across a fleet of edge devices, and make the result small enough to run on them.

    import fleetune

    run = fleetune.tune("smollm2-135m", "demo", method="fedkseed", rounds=2)
    small = fleetune.compress(run)
    file = fleetune.export(small, to="gguf")
    model = fleetune.open("latest").load()

`fleetune.api` is the pipeline as functions.  The public names are imported when they are first used: `import fleetune`
loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fleetune.common import __version__

if TYPE_CHECKING:
    from fleetune import errors
    from fleetune.api import (
        chat,
        compress,
        compressors,
        evaluate,
        export,
        generate,
        list_runs,
        measure,
        methods,
        open,
        plan,
        resume_compression,
        resume_run,
        resume_sweep,
        serve,
        sweep,
        targets,
        tune,
    )
    from fleetune.common import events
    from fleetune.compression.jobs.job import CompressResult
    from fleetune.deploy.export_subject import ExportResult
    from fleetune.deploy.measure.job import MeasureResult
    from fleetune.deploy.serving.client import Conversation
    from fleetune.deploy.serving.engines import Session
    from fleetune.models.net.model import Model
    from fleetune.planning.plan import Plan
    from fleetune.runs.listener import Listener, Silent
    from fleetune.runs.progress import Progress
    from fleetune.seeds.ledger import Ledger
    from fleetune.seeds.ledger import load as load_ledger
    from fleetune.subject import Compressed, Plain, Run
    from fleetune.tuning.recipe.recipe import Recipe
    from fleetune.tuning.result.result import TuneResult
    from fleetune.tuning.sweep.sweep import SweepResult

_PLACES = {
    "fleetune.api": (
        "chat",
        "compress",
        "compressors",
        "evaluate",
        "export",
        "generate",
        "list_runs",
        "measure",
        "methods",
        "open",
        "plan",
        "resume_compression",
        "resume_run",
        "resume_sweep",
        "serve",
        "sweep",
        "targets",
        "tune",
    ),
    "fleetune.compression.jobs.job": ("CompressResult",),
    "fleetune.deploy.export_subject": ("ExportResult",),
    "fleetune.deploy.measure.job": ("MeasureResult",),
    "fleetune.deploy.serving.client": ("Conversation",),
    "fleetune.deploy.serving.engines": ("Session",),
    "fleetune.models.net.model": ("Model",),
    "fleetune.planning.plan": ("Plan",),
    "fleetune.runs.listener": ("Listener", "Silent"),
    "fleetune.runs.progress": ("Progress",),
    "fleetune.seeds.ledger": ("Ledger",),
    "fleetune.subject": ("Compressed", "Plain", "Run"),
    "fleetune.tuning.recipe.recipe": ("Recipe",),
    "fleetune.tuning.result.result": ("TuneResult",),
    "fleetune.tuning.sweep.sweep": ("SweepResult",),
}
_PUBLIC = {name: f"{module}:{name}" for module, names in _PLACES.items() for name in names} | {
    "errors": "fleetune.errors:",
    "events": "fleetune.common.events:",
    "load_ledger": "fleetune.seeds.ledger:load",
}

__all__ = [
    "CompressResult",
    "Compressed",
    "Conversation",
    "ExportResult",
    "Ledger",
    "Listener",
    "MeasureResult",
    "Model",
    "Plain",
    "Plan",
    "Progress",
    "Recipe",
    "Run",
    "Session",
    "Silent",
    "SweepResult",
    "TuneResult",
    "__version__",
    "chat",
    "compress",
    "compressors",
    "errors",
    "evaluate",
    "events",
    "export",
    "generate",
    "list_runs",
    "load_ledger",
    "measure",
    "methods",
    "open",
    "plan",
    "resume_compression",
    "resume_run",
    "resume_sweep",
    "serve",
    "sweep",
    "targets",
    "tune",
]


if not TYPE_CHECKING:  # or a checker would take every name for one that there is

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'fleetune' has no attribute '{name}'")
        module, _, attribute = _PUBLIC[name].partition(":")
        loaded = importlib.import_module(module)
        return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
