# SPDX-License-Identifier: Apache-2.0
"""Collect where a model comes from, as strings for a GGUF header; no time and no path are among them.

    fleetune.method           the tuning or compression method
    fleetune.settings         its settings, as canonical JSON
    fleetune.base_digest      SHA-256 of the weights it started from (`models.digest`)
    fleetune.artefact_digest  SHA-256 of the compressed model's master.safetensors, where there is one
    general.license           where it is known: of the built-in models

So the same work gives the same bytes; `fleetune ledger verify` or the artefact itself proves the digests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fleetune.deploy.checkpoint import Checkpoint
from fleetune.models.artefact import ArtefactHead, Master
from fleetune.models.cache import names
from fleetune.runs import rundir
from fleetune.tuning.recipe import objects
from fleetune.tuning.recipe.recipe import Recipe


def of_artefact(model: Checkpoint) -> dict[str, str]:
    """Return the provenance of a master artefact; {} for a plain directory."""
    if not isinstance(model.source, Master):
        return {}
    return of_head(model.source.head, model.source.digest())


def of_head(head: ArtefactHead, digest: str) -> dict[str, str]:
    """Return the provenance of an artefact with this head and the digest of its file."""
    return _made(head.method, head.settings, head.base) | {"fleetune.artefact_digest": digest}


def of_run(run: Path, recipe: Recipe) -> dict[str, str]:
    """Return the provenance of a tuned run, from its recipe and its env.json; StorageError when that is damaged."""
    settings = objects.method_settings(recipe)
    return _made(recipe.method, settings, rundir.base_digest(run)) | of_base(recipe.model)


def of_base(name: str) -> dict[str, str]:
    """Return the licence of a built-in model or a short name; {} for others."""
    licence = names.licence_of(name)
    return {} if licence is None else {"general.license": licence}


def _made(method: str, settings: Mapping[str, Any], base: str) -> dict[str, str]:
    text = json.dumps(dict(settings), sort_keys=True, separators=(",", ":"))
    found = {"fleetune.method": method, "fleetune.settings": text, "fleetune.base_digest": base}
    return {key: value for key, value in found.items() if value}
