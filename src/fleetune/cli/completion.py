# SPDX-License-Identifier: Apache-2.0
"""Complete words in a shell with argcomplete: commands, options, methods, settings of the chosen method, runs, models.

The script of `fleetune completion SHELL` calls `fleetune` itself on every Tab, which then loads neither torch nor rich.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from fleetune.cli import recipe_flags, setting_flags, unknown
from fleetune.common import setting_names
from fleetune.common.extras import pip_install
from fleetune.errors import UsageError

SHELLS: Final = ("bash", "zsh", "fish")
INSTALL: Final = pip_install("completion")
RUNS: Final = ("--resume", "RUN", "FILE|RUN")
SUBJECTS: Final = ("RUN|FOLDER|MODEL", "FOLDER|RUN|MODEL", "RUN|MODEL")


def library() -> ModuleType:
    """Import argcomplete; UsageError when it is not installed."""
    try:
        import argcomplete
    except ImportError as error:
        raise UsageError("completion needs argcomplete", hint=INSTALL) from error
    module: ModuleType = argcomplete
    return module


def script(shell: str) -> str:
    """Return the script that a shell reads at its start."""
    return str(library().shellcode(["fleetune"], shell=shell)).strip() + "\n"


def answer() -> None:
    """Print the words that fit what was typed, and end the process; nothing where argcomplete is not installed."""
    try:
        complete = library().autocomplete
    except UsageError:
        os._exit(1)
    complete(_parser(os.environ.get("COMP_LINE", "")), always_complete_options=False)


def _parser(line: str) -> argparse.ArgumentParser:
    from fleetune.cli import command_line

    typed = [word for word in line.split()[1:] if not word.startswith("-")]
    command = typed[0] if typed and typed[0] in command_line.COMMANDS.members() else ""
    parser = command_line.build_parser(command)
    if command:
        sub = command_line.sub_parser(parser, command)
        for action in sub._actions:
            if (words := _words(action, command)) is not None:
                action.completer = words  # type: ignore[attr-defined]  # argcomplete's own attribute
    return parser


def _words(action: argparse.Action, command: str) -> Callable[..., Iterable[str]] | None:
    """Return what completes an argument; None for what argcomplete completes itself: choices, files."""
    name = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
    registry = setting_flags.registry_of(command)
    if name == "--method" and registry is not None:
        return lambda **_: registry.members()
    if name == "--set" and registry is not None:
        return lambda parsed_args, **_: _settings(command, parsed_args)
    if command == "methods" and name == "NAME":
        return lambda **_: _methods()
    if name == "--to" and command == "export":
        return lambda **_: _targets()
    if name in RUNS:
        return lambda parsed_args, **_: _runs(parsed_args)
    if name in SUBJECTS:
        return lambda parsed_args, **_: [*_runs(parsed_args), *_models()]
    if choices := _choices(action):
        return lambda **_: choices
    if name in ("MODEL", "--model") or (command == "models" and name == "NAME"):
        return lambda **_: _models()
    return None


def _settings(command: str, args: Any) -> list[str]:
    args.command = command
    registry = setting_flags.registry_of(command)
    assert registry is not None
    return [f"{name}=" for name in setting_names.of_method(registry, unknown.method_of(args))]


def _choices(action: argparse.Action) -> list[str]:
    """Return the values that a flag of a recipe allows; none where it is free."""
    from fleetune.tuning import recipe

    name = action.dest.removeprefix(recipe_flags.PREFIX)
    return recipe.choices(name) if name != action.dest else []


def _methods() -> Iterable[str]:
    from fleetune.tuning import methods

    return methods.REGISTRY.members()


def _targets() -> Iterable[str]:
    from fleetune.deploy import targets

    return targets.every()


def _runs(args: Any) -> list[str]:
    """Return the folders under `--out` that begin with a number, and latest."""
    out = Path(getattr(args, "out", None) or "runs")
    try:
        found = sorted(p.name for p in out.iterdir() if p.name[:4].isdigit() and p.is_dir())
    except OSError:
        return []
    return [*found, "latest"] if found else []


def _models() -> list[str]:
    from fleetune.models import short_names

    return short_names.every()
