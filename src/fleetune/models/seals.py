# SPDX-License-Identifier: Apache-2.0
"""Compare a model's folder with its list of digests (`common/sums.py`), and the list with the record that states its digest.

    runs/NNNN-../model/           ../compress.json, `result.result_sha256`
    runs/NNNN-../base/model/      ../../compress.json, `base_sha256`
    a model in the cache          its own fleetune_source.json, `sums_sha256` (`stated.py`)

Where a record states a digest, the list must be there, be the same, and name every file that loading may read.  A record
of an earlier version states none: the files that the list names are compared, as that version did.  An artefact of codes
that lies elsewhere has no record, but its list is Fleetune's, so it must be complete.  The list of any other folder may be
its owner's, of some files only.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from fleetune.common import sums
from fleetune.common.sums import Seal
from fleetune.models.artefact_folder import is_master

COMPRESSION: Final = "compress.json"
READ: Final = (  # by transformers, PEFT or Fleetune, with any kind of tokenizer
    "*.safetensors", "*.safetensors.index.json", "*config*.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "*.jinja", "*vocab*", "merges*", "dict.txt", "*.model", "*.bpe", "*.spm",
    "*.tiktoken", "emoji.json", "normalizer.json", "byte_maps.json", "word_*.json",
    "fleetune_source.json",
)  # fmt: skip


def check(folder: Path, *, remedy: str, skip: Collection[str] = (), seal: Seal | None = None) -> None:
    """Raise ModelError for a file of a model's folder that is not what was written, is missing, or was added.

    `remedy` is the command that mends it; files named in `skip` are not read; `seal` is that of a model in the cache.
    """
    seal = seal or seal_of(folder)
    complete = is_master(folder) if seal is None else bool(seal.digest)
    sums.check(folder, remedy=remedy, skip=skip, read=READ if complete else (), seal=seal)


def seal_of(folder: Path) -> Seal | None:
    """Return what the record of a compression states of the list in a folder; None where there is no such record."""
    place = folder.absolute()
    if place.name != "model":
        return None
    if isinstance(result := _read(place.parent / COMPRESSION).get("result"), dict):
        return Seal(str(result.get("result_sha256", "")), COMPRESSION)
    if place.parent.name == "base" and (digest := _read(place.parents[1] / COMPRESSION).get("base_sha256")):
        return Seal(str(digest), COMPRESSION)
    return None


def _read(record: Path) -> dict[str, Any]:
    try:
        found = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
