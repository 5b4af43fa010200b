# SPDX-License-Identifier: Apache-2.0
"""Check what a GGUF file says of its tensors and tokens before anything is made of it.

ggml itself (gguf.cpp) takes only files whose tensors lie one after the other in the order of the table, each on the
alignment.  The package gguf reads what an offset points to, so a file whose tensors overlap, or have another type than
their bytes, would be taken as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import gguf

from fleetune.errors import ModelError

ANOTHER: Final = "fetch the file again, or give another one"
TOKEN: Final = 1_024  # bytes of a token; all ways to cut it in two are looked at
READ: Final = frozenset(
    {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, *gguf.quants._type_traits}
)


def check_claims(path: Path, reader: Any) -> None:
    """Raise ModelError unless tensors are of known types and lie as ggml wants them, and tokens are no novels."""
    if not reader.tensors:
        raise ModelError(f"{path} holds no tensors", hint=ANOTHER)
    at, alignment = 0, int(reader.alignment)
    for tensor in reader.tensors:
        if tensor.tensor_type not in READ:
            kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
            raise ModelError(f"{path}: {tensor.name:.80} is of type {kind}, which is not read", hint=ANOTHER)
        offset = int(tensor.data_offset) - int(reader.data_offset)
        if offset != at:
            raise ModelError(
                f"{path}: {tensor.name:.80} starts at {offset:,}, the tensors before it end at {at:,}",
                hint="the file is damaged: " + ANOTHER,
            )
        at = -(-(at + int(tensor.n_bytes)) // alignment) * alignment
    field = reader.fields.get("tokenizer.ggml.tokens")
    if field is not None and max((len(field.parts[i]) for i in field.data), default=0) > TOKEN:
        raise ModelError(f"{path} has a token of more than {TOKEN} bytes", hint=ANOTHER)
