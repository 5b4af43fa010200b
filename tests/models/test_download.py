# SPDX-License-Identifier: Apache-2.0
"""Wheels by pip, files by the hub's client: bounds, and errors that become ours."""

from __future__ import annotations

import errno
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fleetune.errors import ModelError, StorageError
from fleetune.models.cache import download


def make_wheel(folder: Path) -> str:
    name = "fleetune_fixture-1.0"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr(
            f"{name}.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: fleetune-fixture\nVersion: 1.0\n"
            "Requires-Dist: a-package-that-nobody-has\n",
        )
        archive.writestr(
            f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}.dist-info/RECORD", "")
    return "fleetune-fixture==1.0"


def offered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The requirement of a wheel that pip finds in `folder`/index, and nowhere else."""
    pytest.importorskip("pip")
    (folder / "index").mkdir()
    (folder / "work").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder / "index"))
    return make_wheel(folder / "index")


def test_pip_brings_a_wheel_without_its_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirement = offered(tmp_path, monkeypatch)
    wheel = download.pip_download(requirement, tmp_path / "work", 10_000)
    assert wheel == tmp_path / "work" / "fleetune_fixture-1.0-py3-none-any.whl"
    assert [p.name for p in (tmp_path / "work").iterdir()] == [wheel.name]
    with pytest.raises(download.Unreachable, match=r"did not give fleetune-fixture==2\.0"):
        download.pip_download("fleetune-fixture==2.0", tmp_path / "index" / "..", 10_000)


def test_a_wheel_larger_than_the_published_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirement = offered(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match="the published file at most 100;"):
        download.pip_download(requirement, tmp_path / "work", 100)


def test_a_download_without_an_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = (
        "import sys, time\n"
        "with open(sys.argv[1] + '/part', 'wb') as file:\n"
        "    while file.write(bytes(1 << 20)): time.sleep(0.005)"
    )
    real, began = subprocess.Popen, []

    def pip(command: list[str], **kwargs: Any) -> Any:
        began.append(real([sys.executable, "-c", endless, str(tmp_path)], **kwargs))
        return began[0]

    monkeypatch.setattr("subprocess.Popen", pip)
    with pytest.raises(ModelError, match="bytes or more"):
        download.pip_download("x==1", tmp_path, 1_000_000)
    assert began[0].poll() is not None
    assert (tmp_path / "part").stat().st_size < 500_000_000


def test_no_pip_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(download.Unreachable, match="ensurepip"):
        download.pip_download("x==1", tmp_path, 10_000)


def test_a_full_disk_under_pip_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "print('ERROR: Could not install: [Errno 28] No space left on device'); exit(1)"
    real = subprocess.Popen
    monkeypatch.setattr(
        "subprocess.Popen", lambda command, **kwargs: real([sys.executable, "-c", said], **kwargs)
    )
    with pytest.raises(StorageError, match="disk is full"):
        download.pip_download("x==1", tmp_path, 10_000)


def test_the_hub_client_s_errors_become_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(download.Unreachable, match=r"did not answer \(name or service not known\)"):
        download.hub_commit("org/model")
    with pytest.raises(download.Unreachable, match="did not arrive"):
        download.hub_snapshot("org/model", commit="abc", folder=tmp_path)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        download.hub_snapshot("org/model", commit="abc", folder=tmp_path)
