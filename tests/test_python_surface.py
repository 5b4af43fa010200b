# SPDX-License-Identifier: Apache-2.0
"""What a user of the library sees of it in a notebook: names, one line for each object, and where an option belongs."""

from __future__ import annotations

from pathlib import Path

import pytest

import fleetune
from fleetune.errors import RecipeError


def test_completion_shows_the_public_names_alone():
    shown = {name for name in dir(fleetune) if not name.startswith("__")}
    assert shown == {name for name in fleetune.__all__ if not name.startswith("__")}


def test_a_setting_that_is_given_as_an_option_is_sent_to_its_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="It is a setting of the method fedit") as error:
        fleetune.tune("tiny", [{"instruction": "a", "response": "b"}], method="fedit", lr=1e-4, out=tmp_path)  # type: ignore[call-arg]
    assert "settings={'lr': 0.0001}" in error.value.message
    assert not list(tmp_path.iterdir())
