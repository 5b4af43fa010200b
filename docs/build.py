# SPDX-License-Identifier: Apache-2.0
"""Writes the generated pages: docs/methods/*.md, docs/compress/*.md, docs/recipe.md, docs/commands.md, and the table in
docs/export.md.  `--check` only compares.

python docs/build.py
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from pathlib import Path

from fleetune import compression
from fleetune.cli import main as cli
from fleetune.common import settings
from fleetune.deploy import targets
from fleetune.tuning import methods, recipe

DOCS = Path(__file__).parent
MADE = "<!-- made by docs/build.py; edit the source instead -->\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def method_page(name: str) -> str:
    """A method's page: its docstring and its settings."""
    entry = methods.entry(name)
    text = inspect.getdoc(methods.module_of(name)) or ""
    what = f"Sends {entry.sends}. Leaves {'a seed ledger' if entry.kind == 'ledger' else 'a PEFT adapter'}."
    return "\n".join([MADE, f"# {name}\n", what + "\n", text + "\n", *_settings(methods.settings(name))])


def compress_page(name: str) -> str:
    """A compression method's page."""
    cls = compression.method_class(name)
    text = inspect.getdoc(inspect.getmodule(cls)) or ""
    needs = {
        "Trainer": "Needs rows and a teacher.",
        "Pruner": "Needs rows or text; a model without either writes its own.",
    }.get(cls.__name__, "Needs calibration text." if getattr(cls, "data", False) else "Needs no data.")
    how = f"`fleetune compress RUN|MODEL --method {name}`. {needs}"
    return "\n".join([MADE, f"# {name}\n", how + "\n", text + "\n", *_settings(settings.of(cls))])


def _settings(found: list[settings.Setting]) -> list[str]:
    rows = [
        f"| `{s.name}` | {s.symbol} | {s.type.__name__} | `{s.default}` | {_cell(s.help)} |" for s in found
    ]
    head = ["## Settings (`--set NAME=VALUE`)\n", "| name | symbol | type | default | meaning |"]
    return [*head, "|---|---|---|---|---|", *rows, ""]


def recipe_page() -> str:
    """Every option of a recipe."""
    rows = []
    for name, (kind, default, text) in recipe.fields().items():
        shown = "required" if default is dataclasses.MISSING else f"`{default!r}`"
        rows.append(f"| `{name}` | {kind.__name__ if isinstance(kind, type) else kind} | {shown} | {text} |")
    head = (
        "# The recipe\n\nKeys of a TOML recipe and of every `run.toml`; `fleetune tune` has a flag for each "
        "(`eval_every` is `--eval-every`).\n"
    )
    return "\n".join([MADE, head, "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def commands_page() -> str:
    """Every command with its arguments."""
    parts = [MADE, "# Commands\n", "```\n" + cli.EXAMPLES + "```\n"]
    for name, sub in cli.command_parsers().items():
        parts.append(f"## fleetune {name}\n\n{sub.description}\n")
        parts.append("| argument | meaning |\n|---|---|")
        for action in sub._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            flag = ", ".join(f"`{o}`" for o in action.option_strings) or f"`{action.metavar or action.dest}`"
            choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
            parts.append(f"| {flag} | {_cell(action.help or '')}{choices} |")
        parts.append("")
    return "\n".join(parts)


def targets_table() -> str:
    """Every export target: its name, what it writes, and the runtime that `--text` runs it in."""
    rows = ["| `--to` | writes | of | run by |", "|---|---|---|---|"]
    for target in targets.every().values():
        needs = " ".join(f"`{module}`" for module in target.states("NEEDS") or ())
        runtime = f"{target.states('RUNTIME') or ''}{f' with {needs}' if needs else ''}"
        source = {"model": "any model", "codes": "a compressed model", "adapter": "a run"}[target.takes]
        rows.append(f"| `{target.name}` | {_cell(target.help)} | {source} | {runtime} |")
    return "\n".join(rows)


def export_page() -> str:
    """The page on exports, with the table of targets between its markers."""
    text = (DOCS / "export.md").read_text(encoding="utf-8")
    before, first, rest = text.partition("<!-- targets: ")
    comment, _, rest = rest.partition("\n")
    _, last, after = rest.partition("<!-- end of targets -->")
    return f"{before}{first}{comment}\n{targets_table()}\n{last}{after}"


def pages() -> dict[Path, str]:
    """Every generated page by its path."""
    made = {DOCS / "methods" / f"{name}.md": method_page(name) for name in methods.entries()}
    made |= {DOCS / "compress" / f"{name}.md": compress_page(name) for name in compression.entries()}
    return made | {
        DOCS / "recipe.md": recipe_page(),
        DOCS / "export.md": export_page(),
        DOCS / "commands.md": commands_page(),
    }


def main() -> int:
    """Write the pages, or with `--check` name those that are out of date."""
    stale = [p for p, text in pages().items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(DOCS.parent)} is out of date: python docs/build.py")
        return bool(stale)
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
