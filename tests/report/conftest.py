"""A run of 24 clients, made once for a module."""

from pathlib import Path

import pytest
from report_harness import fake_run


@pytest.fixture(scope="module")
def run24(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs"))
