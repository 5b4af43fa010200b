# SPDX-License-Identifier: Apache-2.0
"""A server's door with a stand-in for the engine behind it; GGUF files on a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy_harness import BLOCKS, gguf_of
from serve_harness import Upstream, door

from fleetune.deploy.serving.front import Front


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def front(upstream: Upstream) -> Iterator[Front]:
    with door(upstream) as found:
        yield found


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
