# SPDX-License-Identifier: Apache-2.0
"""Push an exported file or folder to a model repository on the Hub, with its own client.

The token is the Hub's own (HF_TOKEN, or `hf auth login`); it is never an argument.  HF_ENDPOINT names another Hub.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleetune.common.events import ExportPushed
from fleetune.common.files import read_text, write_atomic
from fleetune.errors import FleetuneError, UsageError, cut_reason


def check(repository: str, *, private: bool, offline: bool) -> None:
    """UsageError without a network; FleetuneError where the Hub does not know the token, or has a public repository already."""
    if offline:
        raise UsageError(
            f"nothing can be pushed to {repository} without the network", hint="leave out --push"
        )
    with _told(repository, "log in with a token that may write: hf auth login, or set HF_TOKEN"):
        _hub().whoami()
        public = private and _hub().repo_exists(repository) and not _hub().model_info(repository).private
    if public:
        raise UsageError(f"{repository} is public already, and a push would not make it private")


def push(path: Path, repository: str, *, private: bool) -> ExportPushed:
    """Create the repository if it is not there, and put the file or the folder's files into it.

    The card's lines on how to load it name the repository then.  FleetuneError for what the Hub or the network refuses.
    """
    from fleetune.tuning.run.model_card import CARD, HERE

    with _told(repository, f"the export is at {path}; again: hf upload {repository} {path}"):
        _hub().create_repo(repository, private=private or None, exist_ok=True)
        if not path.is_dir():
            done = _hub().upload_file(repo_id=repository, path_or_fileobj=path, path_in_repo=path.name)
        else:
            if (card := path / CARD).is_file():
                write_atomic(card, read_text(card).replace(HERE, repository))
            done = _hub().upload_folder(repo_id=repository, folder_path=path)
    return ExportPushed(path=str(path), repository=repository, url=str(done.commit_url), private=private)


def _hub() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="fleetune")


@contextmanager
def _told(repository: str, hint: str) -> Iterator[None]:
    """Say what the Hub, its client or the network did."""
    try:
        yield
    except Exception as error:
        raise FleetuneError(f"the Hub and {repository}: {cut_reason(str(error))}", hint=hint) from error
