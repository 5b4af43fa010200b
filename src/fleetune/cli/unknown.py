# SPDX-License-Identifier: Apache-2.0
"""Answer arguments that a command does not have: a setting with `--set NAME=VALUE`, a typo with the option that was meant."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from fleetune.cli import setting_flags
from fleetune.common import setting_names
from fleetune.common.shell import command, quoted
from fleetune.errors import UsageError, suggest

TEXTS: Final[Mapping[str, str]] = {
    "chat": "--prompt"
}  # the option of a command that a text without one is meant for


def check_set(command: str, words: Sequence[str]) -> None:
    """Raise UsageError for `--set lr 1e-4`, which must be written as `--set lr=1e-4`."""
    wrong = []
    for at, word in enumerate(words[:-2]):
        name, value = words[at + 1 : at + 3]
        if word == "--set" and name.isidentifier() and not value.startswith("--") and _is_value(value):
            wrong.append(f"--set {name} {value} has no '=': --set {name}={quoted(value)}")
    if wrong:
        raise UsageError("\n  ".join(wrong), hint=f"one --set for each setting: fleetune {command} --help")


def _is_value(text: str) -> bool:
    """Whether a word after `--set NAME` can only be its value: a number, true or false."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false", "yes", "no", "on", "off")
    return True


def error(
    args: argparse.Namespace,
    words: Sequence[str],
    unknown: Sequence[str],
    flags: Callable[[], Mapping[str, Sequence[str]]],
    plain: Sequence[str],
) -> UsageError:
    """Return what to say of all `unknown` words; `flags` gives every command's options, `plain` this one's arguments without."""
    asked = [word for word in unknown if _is_flag(word)]
    found = [_flag(args, words, word, flags, plain) for word in asked]
    taken = {_after(words, word) for word in asked}
    for word in unknown:
        if not _is_flag(word) and word not in taken:
            name, equals, _ = word.partition("=")
            is_setting = equals and name.isidentifier() and "--set" in flags().get(args.command, ())
            again = f": write --set {quoted(word)}" if is_setting else ""
            found.append(f"'{word}' is one word too many{again}")
    option = TEXTS.get(args.command)
    if option and not asked:
        text = " ".join(unknown)
        again = command(args.command, args.subject, option, text)
        return UsageError(f"'{text}' needs {option} before it", hint=again)
    return UsageError("\n  ".join(found), hint=f"all of them: fleetune {args.command} --help")


def _is_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not _is_value(word)


def _after(words: Sequence[str], flag: str) -> str:
    """Return the value that was given to an unknown flag, "" for none."""
    if "=" in flag:
        return flag.partition("=")[2]
    at = list(words).index(flag) if flag in words else len(words)
    following = words[at + 1] if at + 1 < len(words) else ""
    return "" if _is_flag(following) else following


def _flag(
    args: argparse.Namespace,
    words: Sequence[str],
    word: str,
    flags: Callable[[], Mapping[str, Sequence[str]]],
    plain: Sequence[str],
) -> str:
    flag, value = word.partition("=")[0], _after(words, word)
    told, owner = _as_setting(args, flag, value, chosen=True)
    if owner:
        return told
    by_command = flags()
    own = by_command.get(args.command, ())
    if (name := flag.removeprefix("--")) in plain:
        return f"unknown argument '{flag}': {name.upper()} is given without a flag before it"
    owners = [name for name, theirs in by_command.items() if flag in theirs]
    near = suggest(flag, own, cutoff=0.9 if owners else 0.75)
    if not near and not owners:
        told, owner = _as_setting(args, flag, value, chosen=False)
        if owner:
            return told
    guess = near or (f" It is for {', '.join(owners)}." if owners else suggest(flag, own))
    return f"unknown argument '{flag}'.{guess}"


def _as_setting(args: argparse.Namespace, flag: str, value: str, *, chosen: bool) -> tuple[str, str]:
    """Return (answer, method) where a flag is a setting of the `chosen` method, or of another; ("", "") where of none."""
    registry = setting_flags.registry_of(args.command)
    if registry is None or not flag.startswith("--"):
        return "", ""
    method = method_of(args)
    auto = method == "auto"
    names = [method] if chosen and not auto else [name for name in registry.members() if name != method]
    for name in names:
        if setting := setting_flags.close_to(flag, setting_names.of_method(registry, name)):
            pair = f"--set {setting}={quoted(value) if value else 'VALUE'}"
            if chosen:
                return (
                    f"'{flag}': {setting} is a setting of the method{'' if auto else f' {name}'}: {pair}",
                    name,
                )
            return (
                f"'{flag}': {method} has no such setting; {setting} is one of {name}: --method {name} {pair}",
                name,
            )
    return "", ""


def method_of(args: argparse.Namespace) -> str:
    """Return the method that the command would use."""
    given = getattr(args, "recipe_method", None) or getattr(args, "method", None)
    if given:
        return str(given)
    if args.command == "compress":
        from fleetune import compression

        return compression.DEFAULT  # that of devices has the same settings
    from pathlib import Path

    from fleetune.tuning import recipe as recipes

    file = getattr(args, "config", None) or getattr(args, "recipe", None)
    try:
        stated = recipes.read(Path(file)).get("method") if file else None
    except UsageError:
        stated = None
    return str(stated or recipes.fields()["method"][1])
