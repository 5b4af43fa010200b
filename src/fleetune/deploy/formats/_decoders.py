# SPDX-License-Identifier: Apache-2.0
"""Say which decoders are written as a computation of their own, for ONNX Runtime and ExecuTorch."""

from __future__ import annotations

from typing import Any, Final

from fleetune.deploy.formats import Misfit
from fleetune.models.families import rope

ARCHITECTURES: Final = ("llama", "mistral", "qwen2", "qwen3")
ROTARY: Final = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the text


def check(config: Any, to: str, *, whole_heads: bool) -> None:
    """Raise Misfit for a configuration that the target `to` has no place for; with `whole_heads` heads are rotated whole."""
    problem = None
    if config.model_type not in ARCHITECTURES:
        problem = f"'{config.model_type}': it is written for {', '.join(ARCHITECTURES)}"
    elif config.hidden_act != "silu":
        problem = f"the activation '{config.hidden_act}'"
    elif (scaling := rope.kind(config)) not in ROTARY:
        problem = f"rotary scaling '{scaling}'"
    elif whole_heads and rope.width(config) != rope.head_dim(config):
        problem = "partly rotated heads"
    if problem is not None:
        raise Misfit(f"{to} has no place for {problem}")
