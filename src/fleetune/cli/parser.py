# SPDX-License-Identifier: Apache-2.0
"""Parse arguments without abbreviations, and say what is wrong with them as the other errors are said."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from fleetune.common.shell import quoted
from fleetune.common.spellings import meant
from fleetune.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UsageErrors with a hint, and whose options cannot be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the usage and ending the process."""
        words = self.prog.removeprefix("fleetune").strip()
        raise UsageError(
            self._told(message), hint=f"{self.prog} --help" if words else "the commands: fleetune help"
        )

    def _told(self, message: str) -> str:
        """Return argparse's message in our words."""
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            return f"{self.prog} needs {found[1]}"
        if found := re.fullmatch(r"argument (.*): invalid (int|float) value: '(.*)'", message):
            kind = "an integer" if found[2] == "int" else "a number"
            point = found[3].replace(",", ".")
            near = (
                f". Did you mean {point}?"
                if re.fullmatch(r"-?\d+,\d+", found[3]) and found[2] == "float"
                else ""
            )
            return f"{found[1]} {found[3]} is not {kind}{near}"
        if found := re.fullmatch(r"argument (.*): expected (?:one|at least one) argument", message):
            return f"{found[1]} needs a value"
        return message.removeprefix("argument ")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise UsageError for a value that is none of the choices, with the one that was meant."""
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        near = meant(str(value), known)
        if isinstance(action, argparse._SubParsersAction):
            raise UsageError(
                f"no command '{value}'.{near}", hint=f"the commands: {', '.join(known)} (fleetune help)"
            )
        name = "/".join(action.option_strings) or str(action.metavar or action.dest)
        if not near and len(known) == 1:
            near = f" Did you mean: {self.prog} {known[0]} {quoted(value)}"
        raise UsageError(f"{name} {value} is none of {', '.join(known)}.{near}", hint=f"{self.prog} --help")
