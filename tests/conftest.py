"""One thread for the tiny models, each step timed once, a cache of their own, and the same examples at every run.

`make test` is to say the same of the same code twice, so its property tests draw fixed examples; `make fuzz`
runs them with new ones, in which a failure is a fault to mend and an example to add.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import settings

from fault_report import injected, pytest_addoption, pytest_sessionfinish  # noqa: F401
from steady_heap import pytest_collection, pytest_runtest_setup  # noqa: F401

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
for harnesses in ("contract", "deploy", "hostile"):
    sys.path.insert(0, str(Path(__file__).parent / harnesses))
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("fuzz", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile("fixed")


def pytest_collection_finish() -> None:
    from fleetune.tuning.prepare import estimate

    estimate.REPEATS = 1  # type: ignore[misc]  # every run times its steps before it begins: once will do for tiny models


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model as a directory, saved once."""
    from fleetune import models

    return str(models.tiny_llama().save(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def as_commands(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let errors speak as on the command line, but in modules that test how they speak in Python."""
    from fleetune.errors import as_written

    with nullcontext() if hasattr(request.module, "PYTHON") else as_written():
        yield


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that we are in, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test fill a cache of its own."""
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "cache"))
