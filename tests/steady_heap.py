"""Keep what lives as long as the tests out of the garbage collector's way.

Every full collection goes through a million objects, and `release_memory` asks for one several times a run.  What is there when
tests begin, and what later imports add, is set aside (`gc.freeze`); what the tests themselves make is collected as ever.
"""

import gc
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

MANY = 100  # modules imported since, for which it is done again
_set_aside = 0
_module: ModuleType | None = None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Find the tests without collecting garbage, and set all aside."""
    gc.disable()
    try:
        return (yield)
    finally:
        _set_all_aside()
        gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Set aside what has been imported since, at a module's first test: no fixture of a module is alive."""
    global _module
    module = getattr(item, "module", None)
    if module is not _module and len(sys.modules) > _set_aside + MANY:
        _set_all_aside()
    _module = module


def _set_all_aside() -> None:
    global _set_aside
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    _set_aside = len(sys.modules)
