# SPDX-License-Identifier: Apache-2.0
"""Know what other programs call a value, so that `bfloat16` is answered with `bf16`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final

from fleetune.errors import suggest

OTHERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bfloat16": "bf16", "bfloat": "bf16", "float32": "fp32", "float": "fp32", "single": "fp32", "f32": "fp32",
        "float16": "fp16", "half": "fp16", "f16": "fp16", "gpu": "cuda", "metal": "mps",
    }
)  # fmt: skip


def meant(value: str, known: Collection[str]) -> str:
    """Return " Did you mean 'bf16'?" for the known value that `value` is another spelling of, "" when there is none."""
    other = OTHERS.get(value.lower().removeprefix("torch."))
    return f" Did you mean '{other}'?" if other in known else suggest(value.lower(), known)
