# SPDX-License-Identifier: Apache-2.0
"""Short names of models on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fleetune import models
from fleetune.models.cache import cache, names


def test_a_short_name_is_its_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def pull(hub: str, **given: Any) -> Path:
        asked.append(hub)
        return tmp_path

    monkeypatch.setattr(cache, "pull_hub", pull)
    for name in names.SHORT_NAMES:
        models.pull(name)
    assert asked == [short.hub for short in names.SHORT_NAMES.values()]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", hub) for hub in asked)
    assert not {*names.SHORT_NAMES} & {*cache.ORIGINS}


def test_a_folder_of_that_name_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = models.tiny_llama()
    models.save(tiny.net, tiny.tokenizer, tmp_path / "qwen3-0.6b")
    assert models.resolve("qwen3-0.6b") == Path("qwen3-0.6b")
    assert names.hub_of("qwen3-0.6b") is names.licence_of("qwen3-0.6b") is None
    monkeypatch.chdir(tmp_path.parent)
    assert (names.hub_of("qwen3-0.6b"), names.licence_of("qwen3-0.6b")) == ("Qwen/Qwen3-0.6B", "apache-2.0")
    assert names.hub_of("smollm2-135m") == cache.SMOLLM2_135M.hub
    assert names.hub_of("any/other") is None
