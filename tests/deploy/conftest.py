# SPDX-License-Identifier: Apache-2.0
"""A server's door with a stand-in for the engine behind it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serve_harness import Upstream, door

from fleetune.deploy.serving.front import Front


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def front(upstream: Upstream) -> Iterator[Front]:
    with door(upstream) as found:
        yield found
