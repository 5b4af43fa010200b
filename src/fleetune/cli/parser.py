"""Parse a command line, and say what was meant; options cannot be abbreviated.

A line in the words of other tools (`common/words.py`) is read as one in ours.
"""

import argparse
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias

from fleetune.common import words as tables
from fleetune.errors import UsageError, closest, suggest

Add: TypeAlias = Callable[..., argparse.Action]  # adds an argument
OPTION: Final = re.compile(r"--?[A-Za-z]")
SWITCH: Final = re.compile(r"true|false|\d+", re.IGNORECASE)  # what may follow an option that needs no value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UsageErrors; `known` are its arguments, `commands` the parsers of its commands."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.known: list[argparse.Action] = []
        self.commands: dict[str, Parser] = {}
        plain: dict[str, Any] = {
            "allow_abbrev": False,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        }
        super().__init__(*args, **{**plain, **options})

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument, as argparse does; a value that is none of its `choices` is told in our words."""
        return self._keep(super().add_argument, *names, **options)

    def group(self, title: str) -> Add:
        """Return what adds an argument to a new group with this heading."""
        return partial(self._keep, self.add_argument_group(title).add_argument)

    def _keep(self, add: Add, *names: str, **options: Any) -> argparse.Action:
        if choices := options.get("choices"):
            name = "/".join(names) if names[0].startswith("-") else options.get("metavar", names[0])
            options["type"] = partial(one_of, choices, name, f"{self.prog} --help")
        self.known.append(action := add(*names, **options))
        return action

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """The options, by each of their names."""
        return {flag: action for action in self.known for flag in action.option_strings}

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the usage and ending the process."""
        raise UsageError(message.removeprefix("argument "), hint=f"{self.prog} --help")


def one_of(known: Collection[str], name: str, hint: str, value: str) -> str:
    """Return the value; UsageError with the one that was meant for one that is not `known`."""
    if value in known:
        return value
    raise UsageError(f"{name} {value} is not one of {', '.join(known)}.{suggest(value, known)}", hint=hint)


def in_our_command(words: Sequence[str], known: Collection[str]) -> list[str]:
    """Return the words with the command first, and with the one that is meant where theirs is none of `known`."""
    at = next((i for i, word in enumerate(words) if not word.startswith("-")), 0)
    words = [*words[at : at + 1], *words[:at], *words[at + 1 :]]
    ours = tables.COMMANDS.get(words[0].lower()) if words and words[0] not in known else None
    return [*ours.split(), *words[1:]] if ours else words


def in_our_action(words: Sequence[str], sub: Parser) -> list[str]:
    """Return the words with the action that is meant; the usual one where its argument is given in its place."""
    first = next((a for a in sub.known if not a.option_strings), None)
    if first is None or first.choices is None or len(words) < 2 or words[1] in first.choices:
        return list(words)
    if meant := tables.ACTIONS.get(words[0], {}).get(words[1]):
        return [words[0], meant, *words[2:]]
    if words[0] == "fleet" and words[1] in tables.ELSEWHERE:
        raise UsageError(f"fleet has no {words[1]}", hint=tables.ELSEWHERE[words[1]])
    usual, name = tables.USUAL_ACTION.get(words[0], ""), words[1]
    if usual and not name.startswith("-") and (os.path.exists(name) or not closest(name, first.choices)):
        return [words[0], usual, *words[1:]]
    return list(words)


class OptionReader:
    """The options of one command, and what it calls those of other tools."""

    def __init__(self, name: str, sub: Parser) -> None:
        self.sub, self.flags = sub, sub.flags
        self.places = [str(a.metavar or a.dest).lower().split("|") for a in sub.known if not a.option_strings]
        self.table: Mapping[str, str] = (
            tables.RECIPE if "--rounds" in self.flags else tables.OPTIONS.get(name, {})
        )
        self.remarks: dict[str, None] = {}
        self.first: list[str] = []  # arguments that were given as options, by their place
        self.last: list[str] = []

    def read(self, words: Sequence[str]) -> list[str]:
        """Return the words after the command in ours."""
        self.each_round = any(word.partition("=")[0] == "--rounds" for word in words)
        found, rest = list[str](), list(words)
        while rest and rest[0] != "--":
            found += self._one(rest) if rest[0].startswith("-") else [rest.pop(0)]
        return [*self.first, *found, *self.last, *rest]

    def _one(self, rest: list[str]) -> list[str]:
        """Take the first of the words, an option, and its value if it is not ours; return what it is in ours."""
        word = rest.pop(0)
        given, equals, text = word.partition("=")
        key = given.lstrip("-").replace("-", "_")
        flag = given if given in self.flags else f"--{key.replace('_', '-')}"
        known = self.flags.get(flag)
        value = text if equals else rest[0] if rest and not OPTION.match(rest[0]) else None
        if known is not None and known.nargs == 0:
            return [flag + equals + text]
        if key in tables.DONE_ANYWAY and (known is None or value not in (known.choices or ())):
            return []
        ours = key if known is not None else self.table.get(key, key if self._place(key) is not None else "")
        if flag == "--out" and "--path" in self.flags and value and value.lower().endswith(".gguf"):
            ours = "path"
        if not ours or (value is None and "=" not in ours):
            return [word]
        if known is not None and ours == key and (value or "").lower() not in tables.VALUES.get(key, ()):
            return [flag + equals + text]
        if not equals and value is not None and ("=" not in ours or SWITCH.fullmatch(value)):
            rest.pop(0)
        return self._written(ours, value)

    def _written(self, ours: str, value: str | None) -> list[str]:
        try:
            said = tables.meaning(ours, value, each_round=self.each_round)
        except ValueError as error:
            raise UsageError(f"{value!r} is no number of steps") from error
        counted = [ours] if "rounds" in said else []
        pairs = (*counted, *(f"{n}={v}" for n, v in said.items()))
        self.remarks |= {r: None for pair in pairs if (r := tables.REMARKS.get(pair))}
        found = []
        for name, one in said.items():
            kind, _, setting = name.partition(".")
            flag = f"--{name.replace('_', '-')}"
            if setting:
                found += [f"--{kind}", f"{setting}={one}"]
            elif flag in self.flags:
                found += [flag, str(one)]
            elif (place := self._place(name)) is not None:
                (self.last if place else self.first).append(str(one))
        return found

    def _place(self, name: str) -> int | None:
        return next((i for i, names in enumerate(self.places) if name in names), None)
