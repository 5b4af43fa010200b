# SPDX-License-Identifier: Apache-2.0
"""Suggest export targets that can hold a model losslessly."""

from __future__ import annotations

from fleetune.deploy import targets
from fleetune.deploy.checkpoint import Checkpoint


def hint(model: Checkpoint, remedy: str = "") -> str:
    """Return a hint for a model that a target refused: the targets that hold it exactly, then the `remedy`."""
    return f"use {exact_targets(model)}" + (f", or {remedy}" if remedy else "")


def exact_targets(model: Checkpoint) -> str:
    """Return the targets that hold the model exactly: "--to compressed-tensors, --to gguf or --to hf"."""
    found = []
    for name in targets.FORMATS.members():
        exact = getattr(targets.FORMATS.load(name), "exact_target", None)
        if exact is not None and (target := exact(model)) is not None:
            found.append(f"--to {target}")
    return " or ".join([", ".join(found[:-1]), found[-1]] if found[:-1] else found)
