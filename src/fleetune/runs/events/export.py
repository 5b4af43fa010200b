# SPDX-License-Identifier: Apache-2.0
"""Report an export: the file, its copy on the Hub, its perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fleetune.runs.events.base import Event


@dataclass(frozen=True, kw_only=True)
class ExportDone(Event):
    """A file or folder is written and read back."""

    event: ClassVar[str] = "export"
    to: str  # export target
    path: str  # of the new file or folder
    digest: str | None = None  # SHA-256 of a run's weights; only of a run as `hf`
    bytes: int | None = None  # of all files
    files: int | None = None  # of a copied adapter: files equal to the source's
    tensors: int | None = None  # number of tensors
    exact: int | None = None  # tensors that hold the source's values bit for bit
    types: Mapping[str, int] | None = None  # number of tensors by their type in the file
    notes: Sequence[str] | None = None  # fallbacks and warnings


@dataclass(frozen=True, kw_only=True)
class PatchMade(Event):
    """`patch make`: a patch is written."""

    event: ClassVar[str] = "patch"
    path: str  # of the patch
    bytes: int  # of the patch
    base: str  # SHA-256 of the file that it is for
    result: str  # SHA-256 of the file that it makes


@dataclass(frozen=True, kw_only=True)
class PatchApplied(Event):
    """`patch apply`: a file has other scales now."""

    event: ClassVar[str] = "patched"
    path: str  # of the new file
    result: str  # its SHA-256


@dataclass(frozen=True, kw_only=True)
class ExportPushed(Event):
    """`export --push`: a file or folder is in a repository on the Hub."""

    event: ClassVar[str] = "pushed"
    path: str  # of the file or folder here
    repository: str  # OWNER/NAME
    url: str  # of the commit
    private: bool  # whether a new repository was asked to be private


@dataclass(frozen=True, kw_only=True)
class ExportChecked(Event):
    """`export --text`: perplexity of the written file, run in its runtime; `runtime` is null where none is installed."""

    event: ClassVar[str] = "check"
    path: str  # of the file or folder
    runtime: str | None  # name of the program that ran it
    source: float | None = None  # perplexity of the source in torch
    file: float | None = None  # perplexity of the file in its runtime
    tokens: int | None = None  # predicted tokens
    ratio: float | None = None  # `file` / `source`; 1 for the same
