# SPDX-License-Identifier: Apache-2.0
"""The pip command of an extra names the place where this Fleetune came from, as PEP 610 notes it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fleetune.common.shell import pip_install


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    pip_install.cache_clear()
    yield
    pip_install.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, origin: object) -> None:
    """Let pip's notes be those of a package with this origin: its text, or what is written as JSON."""
    info = folder / "fleetune-9.dist-info"
    info.mkdir()
    if origin is not None:
        (info / "direct_url.json").write_text(origin if isinstance(origin, str) else json.dumps(origin))
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(info))


def test_a_package_from_an_index_is_had_by_its_name(monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path, None)
    assert pip_install("serve") == "pip install 'fleetune[serve]'"
    assert pip_install() == "pip install fleetune"


def test_one_from_a_folder_is_had_from_that_folder(monkeypatch, tmp_path):
    home = tmp_path / "a folder" / "py"
    installed(monkeypatch, tmp_path, {"url": home.parent.as_uri(), "subdirectory": "py", "dir_info": {}})
    assert shlex.split(pip_install("serve")) == ["pip", "install", f"{home}[serve]"]
    assert shlex.split(pip_install()) == ["pip", "install", str(home)]


def test_an_editable_one_stays_editable(monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path, {"url": tmp_path.as_uri(), "dir_info": {"editable": True}})
    assert shlex.split(pip_install("serve")) == ["pip", "install", "-e", f"{tmp_path}[serve]"]


@pytest.mark.parametrize(
    ("origin", "url"),
    [
        (
            {"url": "file:///w/fleetune-9-py3-none-any.whl", "archive_info": {}},
            "file:///w/fleetune-9-py3-none-any.whl",
        ),
        (
            {"url": "https://host/f.git", "vcs_info": {"vcs": "git", "commit_id": "0a"}},
            "git+https://host/f.git@0a",
        ),
        (
            {
                "url": "https://host/f.git",
                "subdirectory": "py",
                "vcs_info": {"vcs": "git", "requested_revision": "v1", "commit_id": "0a"},
            },
            "git+https://host/f.git@v1#subdirectory=py",
        ),
    ],
)
def test_one_from_a_file_or_a_repository_is_a_requirement_with_its_address(
    monkeypatch, tmp_path, origin, url
):
    installed(monkeypatch, tmp_path, origin)
    *_, wanted = shlex.split(pip_install("fleet"))
    found = Requirement(wanted)
    assert (found.name, found.extras, found.url) == ("fleetune", {"fleet"}, url)


@pytest.mark.parametrize(
    "origin",
    ["", "no JSON", "[]", {"url": None, "archive_info": {}}, {"dir_info": None}, {"vcs_info": None}],
    ids=str,
)
def test_notes_that_cannot_be_read_are_none(monkeypatch, tmp_path, origin):
    installed(monkeypatch, tmp_path, origin)
    assert pip_install("serve") == "pip install 'fleetune[serve]'"


def test_no_package_is_none(monkeypatch):
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert pip_install("serve") == "pip install 'fleetune[serve]'"
