# SPDX-License-Identifier: Apache-2.0
"""The garbage collector goes through what a test has made, and not through all that the tests stand on."""

from __future__ import annotations

import gc
import weakref


class Ring:
    """An object that holds itself."""

    def __init__(self) -> None:
        self.own = self


def test_what_was_there_before_is_set_aside_and_what_a_test_makes_is_collected() -> None:
    gc.collect()
    assert gc.isenabled()
    assert len(gc.get_objects()) < gc.get_freeze_count()
    seen = weakref.ref(Ring())
    gc.collect()
    assert seen() is None
