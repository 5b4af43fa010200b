"""Read data sets, split them over clients, and encode them as batches of tokens.

The names of `encode.py`, which needs torch, are loaded when first used.  `encode` and `partition` are imported from the modules
of the same name, which they would hide.
"""

import importlib
from typing import TYPE_CHECKING

from fleetune.data.forms import Example
from fleetune.data.partition import check_partition_spec, hold_out, keyed_order
from fleetune.data.read_rows import check_columns, digests, read, read_text

if TYPE_CHECKING:
    from fleetune.data.encode import (
        Batch,
        Batches,
        Encoded,
        collate,
        encode_all,
        encode_rows,
        prompt_ids,
        stop_ids,
    )

__all__ = [
    "Batch",
    "Batches",
    "Encoded",
    "Example",
    "check_columns",
    "check_partition_spec",
    "collate",
    "digests",
    "encode_all",
    "encode_rows",
    "hold_out",
    "keyed_order",
    "prompt_ids",
    "read",
    "read_text",
    "stop_ids",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("fleetune.data.encode"), name)
