# SPDX-License-Identifier: Apache-2.0
"""Compare the folder that a model is loaded from with the digests that it states (`seals.py`, `common/sums.py`).

All files are read and compared, save in the cache, whose weights are large.  There the base digest, which loading
computes anyway, is compared with those of earlier loads: `fleetune_loaded.json` holds the base digests of loads after
which all files were found to be what is stated.  A new one (another dtype, another head) or one that a damaged file gives
has all files compared once more.  So damage is found whatever the times of the file say, and loading costs no second hash.

A cached folder of an earlier version states no digests.  Those of its files are written down when it is first loaded,
after its weights are compared with what `fleetune_source.json` says of them, where it does.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Final

from fleetune.common import sums
from fleetune.common.files import write_atomic
from fleetune.common.shell import quoted
from fleetune.errors import ModelError, StorageError
from fleetune.models import cache, seals

log = logging.getLogger(__name__)

LOADED: Final = "fleetune_loaded.json"
KEPT: Final = 16  # base digests


def check(folder: Path) -> None:
    """Raise ModelError, with both digests, for a file that is not what the folder states; all files are read."""
    _state(folder)
    seals.check(folder, remedy=_remedy(folder), seal=_seal(folder))


def before(folder: Path) -> None:
    """Compare a folder that is about to be loaded, without its weights where `after` compares them."""
    _state(folder)
    files = [*folder.glob("*.safetensors"), *folder.glob(cache.GGUF)]
    weights = [file.name for file in files] if _loaded(folder) else []
    seals.check(folder, remedy=_remedy(folder), skip=weights, seal=_seal(folder))


def after(folder: Path, base: str) -> None:
    """Compare the base digest of a folder that was loaded with those of earlier loads, or else all its files."""
    known = _loaded(folder)
    if not _is_cached(folder) or base in known:
        return
    check(folder)
    with suppress(StorageError):  # a cache that cannot be written to is compared each time
        write_atomic(folder / LOADED, json.dumps([*known, base][-KEPT:]) + "\n")


def _is_cached(folder: Path) -> bool:
    return folder.absolute().parent == cache.cache() / "models"


def _seal(folder: Path) -> sums.Seal | None:
    """Return what the record of a cached folder states of the folder's list; None outside the cache."""
    if not _is_cached(folder):
        return None
    return sums.Seal(str(cache.source_of(folder).get("sums_sha256", "")), cache.SOURCE_FILE)


def _loaded(folder: Path) -> list[str]:
    """Return the base digests of earlier loads; [] outside the cache."""
    if not _is_cached(folder):
        return []
    try:
        found = json.loads((folder / LOADED).read_bytes())
    except (OSError, ValueError):
        return []
    return [str(d) for d in found] if isinstance(found, list) else []


def _state(folder: Path) -> None:
    """Write down the digests of a cached folder that states none."""
    if not _is_cached(folder) or (folder / sums.FILE).exists():
        return
    source = cache.source_of(folder)
    if source.get("sums_sha256"):  # there was a list, so it is missing: `seals.check` says so
        return
    known = source.get("sha256")
    for file in folder.glob("*.safetensors"):
        expected = (known.get(file.name) or known.get("safetensors")) if isinstance(known, dict) else None
        if expected and (found := sums.sha256(file)) != expected:
            raise ModelError(
                sums.differs(file, found, str(expected), cache.SOURCE_FILE), hint=_remedy(folder)
            )
    with suppress(StorageError):
        sums.write(folder)
        log.info("%s stated no digests: those of its files are written down now", folder)


def _remedy(folder: Path) -> str:
    if seals.seal_of(folder):
        return f"compress again; if it was changed on purpose, copy the folder and remove {sums.FILE} from the copy"
    if not _is_cached(folder):
        return f"make or copy the folder again; if it was changed on purpose, remove {sums.FILE} from it"
    for origin in cache.ORIGINS.values():
        mapped = folder.name == cache.index_target(origin, weights=False).name
        if mapped or folder.name in (cache.hub_target(origin.hub).name, cache.index_target(origin).name):
            flag = " --base mapped" * mapped
            return f"rm -r {quoted(folder)}   and then: fleetune models pull {origin.name}{flag}"
    return f"rm -r {quoted(folder)}   and repeat the command: the .gguf file is converted again"
