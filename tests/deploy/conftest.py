# SPDX-License-Identifier: Apache-2.0
"""GGUF files on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
from deploy_harness import BLOCKS, gguf_of


@pytest.fixture(scope="module", params=BLOCKS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind of blocks."""
    return gguf_of(tmp_path_factory.mktemp("gguf"), request.param)


@pytest.fixture
def file(base: Path, tmp_path: Path) -> Path:
    """A copy on the device."""
    copy = tmp_path / "device" / "m.gguf"
    copy.parent.mkdir()
    copy.write_bytes(base.read_bytes())
    return copy
