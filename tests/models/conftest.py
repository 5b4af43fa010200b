"""A cache of its own for every test of models, and no way to the network."""

from pathlib import Path
from typing import Any

import pytest

from fleetune import models
from fleetune.models.cache import download


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hub(*args: Any, **kwargs: Any) -> Any:
        raise download.Unreachable("no hub in tests")

    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))
    for name in ("FLEETUNE_MODEL_SOURCE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "hub_commit", no_hub)
    monkeypatch.setattr(download, "hub_snapshot", no_hub)
    monkeypatch.setattr(download, "pip_download", no_hub)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return models.tiny_llama().save(tmp_path / "tiny")
