# SPDX-License-Identifier: Apache-2.0
"""Settings say when they have an effect, and the header of a run shows those that have one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fleetune import compression
from fleetune.common import setting_names, settings
from fleetune.common.settings import setting
from fleetune.tuning import describe, methods, server_rules
from fleetune.tuning.methods._lora_start import STARTS


@dataclass(frozen=True)
class Some:
    kind: str = setting("lora", "k", "lora, adapter or full")
    share: float = setting(0.0, "s", "a share")
    rank: int = setting(8, "r", "of lora and adapter", only_if="kind=lora|adapter")
    rate: float = setting(0.5, "e", "of the share", only_if="share")
    epochs: int = setting(1, "E", "without a share", only_if="share=0.0")


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (Some(), ["kind", "share", "rank", "epochs"]),
        (Some(kind="adapter", share=0.5), ["kind", "share", "rank", "rate"]),
        (Some(kind="full"), ["kind", "share", "epochs"]),
    ],
)
def test_a_setting_has_an_effect_by_the_value_of_another(chosen: Some, names: list[str]) -> None:
    assert [s.name for s in settings.of(Some) if s.has_effect(chosen)] == names


@pytest.mark.parametrize("name", methods.entries())
def test_conditions_name_settings_of_the_method(name: str) -> None:
    method = methods.module_of(name).Method()
    known = [s.name for s in methods.settings(name)]
    for s in methods.settings(name):
        assert not s.only_if or s.only_if.partition("=")[0] in known
        assert isinstance(s.has_effect(method), bool)


SHOWN = {
    "no client back-propagates": ("fedkseed", {}, ["K 1,024"], ["backprop_lr", "backprop_steps"]),
    "some do": ("fedkseed", {"backprop": 0.5}, ["backprop_lr 0.0003", "backprop_steps 10"], []),
    "no start from rows": ("fedit", {}, ["start default", "epochs 1"], ["start_data", "steps"]),
    "a start from rows": ("fedit", {"start": "eva"}, ["start_data demo"], []),
    "steps instead of epochs": ("fedit", {"steps": 3}, ["steps 3"], ["epochs"]),
    "another module": ("fedpetuning", {"module": "bitfit"}, ["module bitfit"], ["start", "places"]),
}


@pytest.mark.parametrize("case", SHOWN)
def test_the_header_shows_settings_that_have_an_effect(case: str) -> None:
    name, values, there, not_there = SHOWN[case]
    text = describe.letters(methods.make(name, values), name)
    assert all(word in text for word in there), text
    assert not any(word in text for word in not_there), text


def test_the_settings_of_every_method_are_read_from_its_text() -> None:
    """What is listed without an import is what the class says."""
    for name in methods.entries():
        found = setting_names.settings_of(methods.REGISTRY.member(name).module, "Method")
        assert found == settings.of(methods.module_of(name).Method), name
    for name in compression.entries():
        cls = compression.method_class(name)
        assert setting_names.settings_of(cls.__module__, cls.__name__) == settings.of(cls), name
    helps = {s.name: s.help for s in methods.settings("fedit")}
    assert helps["start"].endswith(", ".join(STARTS))
    assert helps["server"].endswith(", ".join(server_rules.ETA))


@pytest.mark.parametrize(
    "field",
    [
        "x: int = 3",
        "x: int = setting(int('3'), 'x', 'help')",
        "x: list = setting(3, 'x', 'help')",
        "x: int = setting(3)",
    ],
)
def test_a_class_whose_text_does_not_say_all_is_imported(
    tmp_path: Path, monkeypatch: Any, field: str
) -> None:
    good = (
        "class Method:\n    name: ClassVar[str] = 'x'\n    y: float = setting(1.0, 'y', 'help', auto=True)\n"
    )
    for name, text in (("said_all", good), ("said_some", good + f"    {field}\n")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    (only,) = setting_names.settings_of("said_all", "Method") or []
    assert (only.name, only.type, only.default, only.auto) == ("y", float, 1.0, True)
    assert setting_names.settings_of("said_some", "Method") is None
    assert setting_names.settings_of("said_none", "Method") is None
