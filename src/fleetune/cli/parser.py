"""A parser that says what was meant, knows its arguments, and whose options cannot be abbreviated."""

import argparse
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NoReturn

from fleetune.errors import UsageError, suggest


class Group:
    """Arguments under a heading of a parser's help."""

    def __init__(self, add: Callable[..., argparse.Action], parser: "Parser") -> None:
        self._add, self._parser = add, parser

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument, as argparse does; a value that is none of its `choices` is told in our words."""
        if choices := options.get("choices"):
            name = "/".join(names) if names[0].startswith("-") else options.get("metavar", names[0])
            options["type"] = partial(one_of, choices, name, f"{self._parser.prog} --help")
        self._parser.known.append(action := self._add(*names, **options))
        return action


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UsageErrors; `known` are its arguments, `commands` the parsers of its commands."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.known: list[argparse.Action] = []
        self.commands: dict[str, Parser] = {}
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument, as in `Group`."""
        return Group(super().add_argument, self).add_argument(*names, **options)

    def group(self, title: str) -> Group:
        """Return a group of arguments with this heading."""
        return Group(self.add_argument_group(title).add_argument, self)

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
    raise UsageError(f"{name} {value} is none of {', '.join(known)}.{suggest(value, known)}", hint=hint)
