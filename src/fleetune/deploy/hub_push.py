# SPDX-License-Identifier: Apache-2.0
"""Push an exported file or folder to a model repository on the Hub.

The token is the Hub's own (HF_TOKEN, or `hf auth login`); it is never an argument.  HF_ENDPOINT names another Hub.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fleetune.common.files import read_text, write_atomic
from fleetune.errors import FleetuneError, UsageError, cut_reason
from fleetune.models.download import offline_by_environment
from fleetune.tuning.model_card import CARD, HERE

LOGIN: Final = "log in with a token that may write: hf auth login, or set HF_TOKEN"


@dataclass(frozen=True)
class Pushed:
    """Where a file or folder is on the Hub now."""

    repository: str  # OWNER/NAME
    url: str  # of the commit
    private: bool


class Destination:
    """A model repository that a push was asked for; whether it can be written is found out before any slow work."""

    def __init__(self, repository: str, *, private: bool, offline: bool) -> None:
        """UsageError for a name that is no OWNER/NAME, without a network, or without a token that the Hub knows.

        It is also one to ask for `private` where the repository is public already: it would stay so.
        """
        self.repository, self.private = _checked(repository), private
        if offline or offline_by_environment():
            raise UsageError(
                f"nothing can be pushed to {repository} without the network",
                hint="leave out --offline and HF_HUB_OFFLINE; the export alone: leave out --push",
            )
        from huggingface_hub import HfApi, get_token

        if get_token() is None:
            raise UsageError(f"there is no token to push to {repository} with", hint=LOGIN)
        self._api: Any = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="fleetune")
        with _told(repository):
            self._api.whoami()
            public = (
                private and self._api.repo_exists(repository) and not self._api.model_info(repository).private
            )
        if public:
            raise UsageError(
                f"{repository} is public already, and a push would not make it private",
                hint="make it private in its settings on the Hub, or name another repository",
            )

    def push(self, path: Path) -> Pushed:
        """Create the repository if it is not there, and put the file or the folder's files into it.

        The card's lines on how to load it name the repository then.  FleetuneError for what the Hub refuses, and when it
        cannot be reached; its hint is the command that repeats the upload alone.
        """
        again = f"the export is at {path}; once that is mended: hf upload {self.repository} {path}"
        if path.is_dir():
            _name_in_card(path / CARD, self.repository)
        with _told(self.repository, again):
            self._api.create_repo(self.repository, private=self.private or None, exist_ok=True)
            text = f"Upload {path.name} with Fleetune"
            if path.is_dir():
                done = self._api.upload_folder(repo_id=self.repository, folder_path=path, commit_message=text)
            else:
                done = self._api.upload_file(
                    repo_id=self.repository, path_or_fileobj=path, path_in_repo=path.name, commit_message=text
                )
        return Pushed(self.repository, str(done.commit_url), self.private)


def _checked(repository: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(
            f"--push {repository}: {cut_reason(str(error))}", hint="give OWNER/NAME, such as me/my-model"
        ) from error
    if repository.count("/") != 1:
        raise UsageError(
            f"--push {repository} has no owner", hint=f"give OWNER/NAME, such as me/{repository}"
        )
    return repository


def _name_in_card(card: Path, repository: str) -> None:
    if card.is_file():
        write_atomic(card, read_text(card).replace(HERE, repository))


@contextmanager
def _told(repository: str, again: str = "") -> Iterator[None]:
    """Say in words what the Hub or the network did."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        why = cut_reason(error.server_message or str(error))
        if status == 401:
            raise UsageError(f"the Hub does not know the token ({why})", hint=_hint(LOGIN, again)) from error
        if status == 403:
            raise UsageError(
                f"the token may not write to {repository} ({why})",
                hint=_hint("use a token with write access, or another OWNER", again),
            ) from error
        raise FleetuneError(
            f"the Hub refused {repository}: {status or ''} {why}", hint=again or None
        ) from error
    except Exception as error:  # the hub's client has changed its HTTP library, and so its errors
        what = f"the push to {repository} failed" if again else "the Hub cannot be reached"
        raise FleetuneError(
            f"{what}: {cut_reason(f'{type(error).__name__}: {error}')}",
            hint=again or "check the network; the export alone: leave out --push",
        ) from error


def _hint(first: str, again: str) -> str:
    return f"{first}; {again}" if again else first
