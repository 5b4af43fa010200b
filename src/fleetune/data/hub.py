# SPDX-License-Identifier: Apache-2.0
"""Fetch the training files of a data set on the Hugging Face hub, or find them in the hub's own cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from fleetune.data.readers import READERS, suggest_files
from fleetune.errors import DataError

log = logging.getLogger(__name__)

SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?(?=\.\w+$)")
SPLIT = re.compile(r"(?<![a-z])(train|test|valid|validation|val|eval|dev)(?![a-z])")
NOT_DATA = re.compile(r"(^|/)(\.[^/]*|dataset_infos?\.json|dataset_dict\.json|state\.json)$")


def files(source: str, offline: bool) -> list[tuple[Path, str]]:
    """Fetch the training files of a hub data set into the hub's own cache."""
    from huggingface_hub import constants

    repo, _, wanted = source.partition(":")
    cached = _hub_cache(Path(constants.HF_HUB_CACHE), repo)
    offline = offline or constants.HF_HUB_OFFLINE
    reason = "working offline"
    if not offline:
        try:
            return _download(source, repo, wanted)
        except DataError:
            raise
        except Exception as error:  # the hub library's transports raise types of their own, by version
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if cached is None:
        raise DataError(
            f"{repo!r} is no file here, and the hub cannot be asked for it: {reason}",
            hint=suggest_files(source)
            or "check the path or the connection, or download the data elsewhere and give the file's path; "
            "the set `demo` is always there",
        )
    log.log(
        logging.INFO if offline else logging.WARNING, "data set %s comes from the cache: %s", repo, reason
    )
    there = [p.relative_to(cached).as_posix() for p in sorted(cached.rglob("*")) if p.is_file()]
    return [(cached / name, f"{repo}:{name}") for name in _train_files(there, repo, wanted)]


def _download(source: str, repo: str, wanted: str) -> list[tuple[Path, str]]:
    """Download the files; DataError when the hub refuses, the hub library's errors when it cannot be reached."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        info = hub.HfApi().dataset_info(repo, timeout=15)
        names = _train_files([file.rfilename for file in info.siblings or []], repo, wanted)
        return [
            (Path(hub.hf_hub_download(repo, name, repo_type="dataset")), f"{repo}:{name}") for name in names
        ]
    except errors.GatedRepoError as error:
        hint = f"accept its terms at https://huggingface.co/datasets/{repo}, then: hf auth login"
        raise DataError(f"the data set {repo!r} is gated", hint=hint) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the name, or give a file's path; a private set needs `hf auth login`"
        raise DataError(
            f"{repo!r} is no file here and no data set on the hub", hint=suggest_files(source) or hint
        ) from error


def _hub_cache(cache: Path, repo: str) -> Path | None:
    """Return the folder of `repo`'s cached main revision, if there is one."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return snapshot if snapshot.is_dir() else None


def _train_files(names: Sequence[str], repo: str, wanted: str) -> list[str]:
    """Return the files (one or several parts) of `wanted`, or else of the training split.

    That is the one set named train, or the only one not named as another split; of several file types the
    first of `READERS`.
    """
    if wanted in names:
        return [wanted]
    sets: dict[str, list[str]] = {}
    for name in sorted(names):
        if Path(name).suffix.lower() in READERS and not NOT_DATA.search(name):
            sets.setdefault(SHARD.sub("", name), []).append(name)
    if wanted:
        best = [wanted] if wanted in sets else []
        what = f"no file {wanted!r}"
    else:
        split = {name: SPLIT.findall(name.lower())[-1:] for name in sets}
        fits = [name for name in sets if split[name] == ["train"]] or [
            name for name in sets if not split[name]
        ]
        rank = {name: list(READERS).index(Path(name).suffix.lower()) for name in fits}
        best = [name for name in fits if rank[name] == min(rank.values())]
        what = "several training files" if best else "no training file"
    if len(best) != 1:
        some = ", ".join(list(sets)[:8]) or "none that can be read"
        raise DataError(f"data set {repo!r} has {what}", hint=f"name one, as {repo}:FILE; data files: {some}")
    parts = sets[best[0]]
    shard = SHARD.search(parts[0])
    if shard and int(shard[2]) != len(parts):
        raise DataError(
            f"data set {repo!r}: {len(parts)} of the {int(shard[2])} parts of {best[0]} are there",
            hint="fetch it again with a connection",
        )
    return parts
