"""A parser that says what was meant, knows its arguments, and whose options cannot be abbreviated."""

import argparse
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NoReturn, TypeAlias

from fleetune.errors import UsageError, suggest

Add: TypeAlias = Callable[..., argparse.Action]  # adds an argument


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
    raise UsageError(f"{name} {value} is none of {', '.join(known)}.{suggest(value, known)}", hint=hint)
