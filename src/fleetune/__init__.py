"""Fine-tune language models across a fleet of edge devices, and make the result small enough to run on them.

The functions are described in `fleetune.api`.  Public names are imported when first used: `import fleetune` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from fleetune.common import __version__

if TYPE_CHECKING:
    from fleetune import errors as errors
    from fleetune.api.deployment import chat as chat
    from fleetune.api.deployment import compress as compress
    from fleetune.api.deployment import export as export
    from fleetune.api.deployment import measure as measure
    from fleetune.api.deployment import release as release
    from fleetune.api.deployment import resume_compression as resume_compression
    from fleetune.api.deployment import serve as serve
    from fleetune.api.deployment import verify as verify
    from fleetune.api.evaluation import evaluate as evaluate
    from fleetune.api.evaluation import generate as generate
    from fleetune.api.names import compressors as compressors
    from fleetune.api.names import list_runs as list_runs
    from fleetune.api.names import methods as methods
    from fleetune.api.names import open as open
    from fleetune.api.names import targets as targets
    from fleetune.api.tuning import plan as plan
    from fleetune.api.tuning import resume_run as resume_run
    from fleetune.api.tuning import resume_sweep as resume_sweep
    from fleetune.api.tuning import sweep as sweep
    from fleetune.api.tuning import tune as tune
    from fleetune.common import events as events
    from fleetune.compression.jobs.job import CompressResult as CompressResult
    from fleetune.deploy.export import ExportResult as ExportResult
    from fleetune.deploy.measure import MeasureResult as MeasureResult
    from fleetune.deploy.serve import Conversation as Conversation
    from fleetune.deploy.serve import Session as Session
    from fleetune.models.net.model import Model as Model
    from fleetune.planning.plan import Plan as Plan
    from fleetune.runs.listener import Listener as Listener
    from fleetune.runs.listener import Progress as Progress
    from fleetune.runs.listener import Silent as Silent
    from fleetune.seeds import ledger as _ledger
    from fleetune.seeds.ledger import Ledger as Ledger
    from fleetune.subject import Compressed as Compressed
    from fleetune.subject import Plain as Plain
    from fleetune.subject import Run as Run
    from fleetune.tuning.recipe.recipe import Recipe as Recipe
    from fleetune.tuning.result.finished import TuneResult as TuneResult
    from fleetune.tuning.sweep import SweepResult as SweepResult

    load_ledger = _ledger.load

_PLACES: Final = {
    "fleetune.api.deployment": "chat compress export measure release resume_compression serve verify",
    "fleetune.api.evaluation": "evaluate generate",
    "fleetune.api.names": "compressors list_runs methods open targets",
    "fleetune.api.tuning": "plan resume_run resume_sweep sweep tune",
    "fleetune.compression.jobs.job": "CompressResult",
    "fleetune.deploy.export": "ExportResult",
    "fleetune.deploy.measure": "MeasureResult",
    "fleetune.deploy.serve": "Conversation Session",
    "fleetune.models.net.model": "Model",
    "fleetune.planning.plan": "Plan",
    "fleetune.runs.listener": "Listener Progress Silent",
    "fleetune.seeds.ledger": "Ledger",
    "fleetune.subject": "Compressed Plain Run",
    "fleetune.tuning.recipe.recipe": "Recipe",
    "fleetune.tuning.result.finished": "TuneResult",
    "fleetune.tuning.sweep": "SweepResult",
}
_PUBLIC: Final = {name: f"{module}:{name}" for module, names in _PLACES.items() for name in names.split()} | {
    "errors": "fleetune.errors:",
    "events": "fleetune.common.events:",
    "load_ledger": "fleetune.seeds.ledger:load",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


if not TYPE_CHECKING:  # or a checker would take every name for one that there is

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'fleetune' has no attribute '{name}'")
        module, _, attribute = _PUBLIC[name].partition(":")
        loaded = importlib.import_module(module)
        return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
