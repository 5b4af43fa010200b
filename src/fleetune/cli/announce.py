# SPDX-License-Identifier: Apache-2.0
"""Say on a terminal that torch is loading, which takes seconds, when it is first imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

from fleetune.cli.console import Ui

SLOW: Final = ("torch", "transformers")  # the packages that take seconds to import
LOADING: Final = "loading torch and transformers .."


class _Watch(MetaPathFinder):
    """Call `say` once, when one of SLOW is looked for; find nothing itself."""

    def __init__(self, say: Callable[[], None]) -> None:
        self.say = say

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in SLOW:
            remove(self)
            self.say()
        return None


def remove(watch: MetaPathFinder) -> None:
    """End a watch; nothing happens where it has ended."""
    if watch in sys.meta_path:
        sys.meta_path.remove(watch)


@contextmanager
def announcing(ui: Ui) -> Iterator[None]:
    """Announce the first slow import of the block on stderr, where that is a terminal."""
    if not ui.on_terminal or any(name in sys.modules for name in SLOW):
        yield
        return
    watch = _Watch(lambda: ui.note(LOADING))
    sys.meta_path.insert(0, watch)
    try:
        yield
    finally:
        remove(watch)
