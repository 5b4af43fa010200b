# SPDX-License-Identifier: Apache-2.0
"""Say in plain words what is wrong with the values of a recipe, its method's settings included."""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fleetune.common.shell import quoted
from fleetune.data.examples import looks_like_model, looks_like_rows
from fleetune.errors import FleetuneError, RecipeError, UsageError, suggest
from fleetune.models.cache.names import hub_of

CHOICES: Final = re.compile(r"\^\(([\w|]+)\)\$")
AUTO: Final = "auto"  # the method of a recipe that names none
SHOWN: Final = 80  # characters of a refused value
KINDS: Final[Mapping[str, str]] = {
    "int_parsing": "an integer",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "dict_type": "a table",
    "int_parsing_size": "an integer of a usual size",
}
BOUNDS: Final[Mapping[str, tuple[str, str]]] = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def told(error: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors as "rounds = 0: must be at least 1"."""
    name = ".".join(str(part) for part in error["loc"])
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return f"{name} is missing"
    shown = _shown(value)
    if kind in BOUNDS:
        key, words = BOUNDS[kind]
        return f"{name} = {shown}: must be {words} {context[key]:,}"
    if kind in KINDS:
        return f"{name} = {shown}: is not {KINDS[kind]}"
    if kind == "string_pattern_mismatch" and (found := CHOICES.fullmatch(context["pattern"])):
        known = found[1].split("|")
        return f"{name} = {shown}: none of {', '.join(known)}.{suggest(str(value), known)}"
    return f"{name} = {shown}: {str(error['msg']).lower()}"


def _shown(value: object) -> str:
    """Return a value as it was written: a number from the command line is a text, and is not put in quotes."""
    number = isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", value, re.IGNORECASE)
    text = str(value) if number else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}.."


def unknown(key: str, names: Sequence[str], values: Mapping[str, Any]) -> str:
    """Return what to say of a key that is no option: the option that was meant, or that it is a setting of the method."""
    methods = importlib.import_module("fleetune.tuning.methods")
    method = str(values.get("method") or AUTO)
    if known := [name for name in methods.having([key]) if method in (AUTO, name)]:
        return (
            f"unknown option '{key}'. It is a setting of the method{'s' if len(known) > 1 else ''} {', '.join(known)}: "
            f"settings={{{key!r}: {values[key]!r}}} in Python, {key} = {values[key]} under [set] in a recipe, "
            f"--set {key}={values[key]} as a flag"
        )
    close = difflib.get_close_matches(key, names, n=1)
    return f"unknown option '{key}'." + (f" Did you mean '{close[0]}'?" if close else "")


def of_no_method(chosen: Sequence[str]) -> list[str]:
    """Say which of these settings no method has, with suggestions; or that no method has all of them."""
    methods = importlib.import_module("fleetune.tuning.methods")
    if odd := [name for name in chosen if not methods.having([name])]:
        every = sorted({s.name for method in methods.entries() for s in methods.settings(method)})
        return [f"no method has a setting '{name}'.{suggest(name, every, cutoff=0.5)}" for name in odd]
    return [f"no method has all of the settings {', '.join(chosen)}"]


def of_settings(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the method and its settings; an empty list where they cannot be looked at."""
    method, chosen = values.get("method"), values.get("set")
    if not chosen or not isinstance(chosen, Mapping):
        return []
    methods = importlib.import_module(
        "fleetune.tuning.methods"
    )  # by name: a method's module may import the recipe
    try:
        if (method or AUTO) != AUTO:
            methods.make(method, chosen)
        elif found := methods.having(chosen):
            methods.make(found[0], chosen)
        else:
            return of_no_method([str(name) for name in chosen])
    except RecipeError as error:
        return error.problems
    except FleetuneError as error:
        return [error.message]
    except Exception:  # a value that is no text or number: pydantic has refused it
        return []
    return []


def of_scales(
    method: str, chosen: Mapping[str, Any], base: str, device: str, able: Sequence[str]
) -> tuple[list[str], str]:
    """Say what of a recipe cannot train the scales of a quantised base, and what to change; [] and "" where all can.

    `chosen` are the method's settings, `able` the methods that can.
    """
    train = "train = scales"
    found: list[tuple[str, str]] = []
    if method not in able:
        found.append(
            (f"{train} is for {', '.join(able)}, not for {method}", f"--method {able[0]}, or --train weights")
        )
    elif (module := chosen.get("module", "scales")) != "scales":
        found.append((f"{train} is the module scales, not {module}", "--set module=scales"))
    if base == "memory":
        found.append((f"{train} reads the base from its GGUF file, base = memory does not", "--base mapped"))
    if device not in ("auto", "cpu"):
        found.append((f"{train} runs on the CPU, not on device = {device}", "--device cpu"))
    if chosen.get("law") == "gaussian":
        found.append(
            (f"{train} takes integer sums of directions, which law = gaussian has not", "--set law=hashed")
        )
    return [problem for problem, _ in found], "; ".join(change for _, change in found)


def check_order(model: str, rows: str) -> None:
    """Raise UsageError where the model is the data, and the data are the model."""
    if looks_like_rows(model) and (os.path.isfile(model) or hub_of(rows) or looks_like_model(rows)):
        raise UsageError(
            f"MODEL and DATA are swapped: {model} holds rows"
            + (f", {rows} is a model" * looks_like_model(rows)),
            hint=f"fleetune tune {quoted(rows)} {quoted(model)}",
        )
