"""Write the generated pages, and the generated parts of hand-written ones.  `--check` only compares the parts.

    python docs/build.py

Pages, which git ignores: docs/methods/*.md, docs/compress/*.md, docs/recipe.md, docs/commands.md, docs/events.md and its
JSON schema, docs/faults.md (from docs/faults.json, which `make faults` writes).
Parts, which are committed, between the marks `<!-- NAME -->` and `<!-- /NAME -->`: the table of the layers in
docs/architecture.md (`architecture`), the table in docs/export.md (`targets`), the one of families and formats in
docs/models.md (`formats`), which takes what a family can be tuned and compressed with from the page's own `matrix`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter

from fleetune import compression
from fleetune.cli.main import EXAMPLES, command_parsers
from fleetune.common import events, settings
from fleetune.deploy import targets
from fleetune.deploy.formats import mlx
from fleetune.models.families import table
from fleetune.tuning import methods
from fleetune.tuning.recipe import recipe

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "src" / "fleetune"
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
    needs = {"Trainer": "Needs rows and a teacher.", "Pruner": "Takes rows or text."}.get(
        cls.__name__, "Needs calibration text." if getattr(cls, "data", False) else "Needs no data."
    )
    how = f"`fleetune compress RUN|MODEL --method {name}`. {needs}"
    return "\n".join([MADE, f"# {name}\n", how + "\n", text + "\n", *_settings(settings.of(cls))])


def _settings(found: list[settings.Setting]) -> list[str]:
    rows = [f"| `{s.name}` | {s.symbol} | {s.type.__name__} | `{s.shown}` | {_cell(s.help)} |" for s in found]
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
    parts = [MADE, "# Commands\n", "```\n" + EXAMPLES + "```\n"]
    for name, sub in command_parsers().items():
        parts.append(f"## fleetune {name}\n\n{sub.description}\n")
        if sub.epilog:
            parts.append("```\n" + textwrap.dedent(sub.epilog.partition("\n")[2]).rstrip() + "\n```\n")
        parts.append("| argument | meaning |\n|---|---|")
        for action in sub.known:
            if "--help" in action.option_strings:
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
        source = {"model": "any model", "codes": "a compressed model", "adapter": "a run"}[target.takes]
        rows.append(
            f"| `{target.name}` | {_cell(target.help)} | {source} | {target.states('RUNTIME') or ''} |"
        )
    return "\n".join(rows)


# Families ----------------------------------------------------------------------------------------

WEIGHTS = (
    "fedkseed",
    "onebyte",
    "mezo",
    "zosgd",
    "bitfit",
    "full",
)  # the columns that move a model's own weights
ADAPTERS = ("lora", "adapter", "prefix", "prompt")
COMPRESSORS = ("rtn", "optq", "qronos", "sparsegpt", "llm-pruner")


def formats_table(page: str) -> str:
    """Every family of decoders, alike ones in a row: what it is tuned, compressed and written with."""
    head = (
        "| family | tune | adapters | compress | GGUF (llama.cpp's names) | MLX | GPTQ, compressed-tensors |"
    )
    alike: dict[tuple[str, ...], list[str]] = {}
    for family, cells in matrix(page).items():
        if cells["rtn"] != ENCODER:
            columns = (
                *(_fine(cells, names) for names in (WEIGHTS, ADAPTERS, COMPRESSORS)),
                "yes" if family in table.FAMILIES else "-",
                "yes" if family in mlx.ARCHITECTURES else "-",
                "yes" if cells["rtn"] == "ok" else "-",
            )
            alike.setdefault(columns, []).append(family)
    rows = [head, "|---" * 7 + "|"]
    for columns, families in alike.items():
        gguf = (
            ", ".join(f"`{table.FAMILIES[f].architecture}`" for f in families if f in table.FAMILIES) or "-"
        )
        rows.append(f"| {', '.join(families)} | {' | '.join([*columns[:3], gguf, *columns[4:]])} |")
    return "\n".join(rows)


def matrix(page: str) -> dict[str, dict[str, str]]:
    """The table of every method on every family in a page, by family and column; a note's number is its text."""
    text = page.partition("<!-- matrix -->")[2].partition("<!-- /matrix -->")[0]
    said = dict(re.findall(r"(?m)^(\d+)\. (.*)$", text))
    (_, *columns), _, *rows = (
        [c.strip() for c in r.strip("|").split("|")] for r in re.findall(r"(?m)^\|.*\|$", text)
    )
    return {
        name: {
            c: said.get(x, x) for alike, x in zip(columns, cells, strict=True) for c in alike.split("<br>")
        }
        for names, *cells in rows
        for name in names.split(", ")
    }


ENCODER = "an encoder cannot be compressed"


def _fine(cells: dict[str, str], names: Sequence[str]) -> str:
    fine = [name for name in names if cells[name] == "ok"]
    return "all" if len(fine) == len(names) else ", ".join(fine) or "-"


# Events ------------------------------------------------------------------------------------------


def events_page() -> str:
    """Every event of `--json` with its fields, under the headings of `common/events.py`."""
    about = (inspect.getdoc(events) or "").partition("\n\n")[2]
    schema = "Machines read [the JSON schema](events.schema.json)."
    out = [MADE, "# Events\n", f"The lines of `--json`. {about}\n", schema + "\n"]
    fields = _fields(events)
    titles = {first: title for title, first in events.SECTIONS.items()}
    for event in events.classes():
        if event in titles:
            out.append(f"## {titles[event]}\n")
        shared = [field for base in event.__bases__ for field in fields.get(base.__name__, ())]
        out += _event(event, [*fields[event.__name__], *shared])
    return "\n".join(out)


Field = tuple[ast.AnnAssign, str]  # and the remark at the end of its line


def _fields(file: ModuleType) -> dict[str, list[Field]]:
    """The fields of every class of a file, by the class's name."""
    source = inspect.getsource(file)
    lines = source.splitlines()
    return {
        node.name: [
            (field, lines[(field.end_lineno or 0) - 1].partition("  # ")[2])
            for field in node.body
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation)
        ]
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def _event(event: type[events.Event], fields: Sequence[Field]) -> list[str]:
    rows = []
    for field, remark in fields:
        optional, kind = field.value is not None, _json_type(field.annotation)
        kind = kind.removesuffix(" or null") if optional else kind
        name = ast.unparse(field.target)
        rows.append(f"| `{name}` | {_cell(kind)} | {'optional' if optional else ''} | {_cell(remark)} |")
    title = [f"### {event.event}: {event.__name__}\n", f"{inspect.getdoc(event)}\n"]
    return [*title, "| field | type | | meaning |", "|---|---|---|---|", *rows, ""]


JSON_TYPES = {
    "int": "integer",
    "float": "number",
    "str": "text",
    "bool": "true or false",
    "Any": "anything",
    "None": "null",
    "Value": "text, number, true or false",
    "MatrixSolved": "object (name, error, notes)",
}


def _json_type(annotation: ast.expr) -> str:
    match annotation:
        case ast.BinOp(left, _, right):
            return f"{_json_type(left)} or {_json_type(right)}"
        case ast.Subscript(ast.Name("Mapping"), ast.Tuple([_, value])):
            return f"object of {_json_type(value)}"
        case ast.Subscript(ast.Name("Sequence"), value):
            return f"list of {_json_type(value)}"
        case _:
            return JSON_TYPES.get(ast.unparse(annotation), ast.unparse(annotation))


def events_schema() -> str:
    """The JSON schema of a line of `--json`: any of the events."""
    defs, choices = {}, []
    for event in events.classes():
        schema = TypeAdapter(event).json_schema(ref_template="#/$defs/{model}")
        defs |= schema.pop("$defs", {})
        schema["properties"] = {
            "v": {"const": events.VERSION},
            "event": {"const": event.event},
            **schema["properties"],
        }
        schema["required"] = ["v", "event", *schema.get("required", [])]
        defs[event.__name__] = schema | {"additionalProperties": False}
        choices.append({"$ref": f"#/$defs/{event.__name__}"})
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "anyOf": choices, "$defs": defs}
    return json.dumps(_nullable(whole), indent=1) + "\n"


def _nullable(schema: Any) -> Any:
    # A number that is not finite is printed as null.
    if isinstance(schema, list):
        return [_nullable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kind = ["number", "null"] if schema.get("type") == "number" else schema.get("type")
    return {key: kind if key == "type" else _nullable(value) for key, value in schema.items()}


# Faults ------------------------------------------------------------------------------------------


def faults_page() -> str:
    """What `make faults` has injected and what was survived, from docs/faults.json."""
    kinds = json.loads((DOCS / "faults.json").read_text(encoding="utf-8"))["kinds"]
    rows = ["| injected | times | survived | which means | commit, date |", "|---|---|---|---|---|"]
    rows += [
        f"| {kind} | {e['injected']:,} | {e['survived']:,} | {_cell(e['means'])} | {e['commit']}, {e['date']} |"
        for kind, e in kinds.items()
    ]
    machines = dict.fromkeys(f"{e['cpu']}, {e['cores']} cores, {e['versions']}" for e in kinds.values())
    return "\n".join([MADE, FAULTS, *rows, "", "Machines:\n", *(f"- {m}" for m in machines), ""])


FAULTS = """\
# Faults

Faults that were injected, and how many of them were survived. Every row is counted by the tests that inject the faults:

    make faults

It writes `docs/faults.json`, from which `docs/build.py` makes this page. A row has the numbers of its last run.
`FLEETUNE_KILLS=N` says how many processes each of the two kill tests kills (12 unless told otherwise).
What is not injected is in [what does not hold](security.md#what-does-not-hold).
"""


# The layers --------------------------------------------------------------------------------------


def layers() -> list[dict[str, Any]]:
    """The layers of docs/architecture.toml, from the top."""
    found: list[dict[str, Any]] = tomllib.loads((DOCS / "architecture.toml").read_text(encoding="utf-8"))[
        "layer"
    ]
    return found


def _shown(layer: str) -> str:
    return f"{layer}/" if (PACKAGE / layer).is_dir() else f"{layer}.py"


def architecture_table(found: Sequence[dict[str, Any]]) -> str:
    """The layers with what they hold: a table."""
    rows = ["| layer | does | holds |", "|---|---|---|"]
    for layer in found:
        holds = [f"`{names}` {text}" for names, text in layer.get("holds", ())]
        rows.append(f"| `{_shown(layer['name'])}` | {_cell(layer['does'])} | {_cell('<br>'.join(holds))} |")
    return "\n".join(rows)


def with_part(text: str, mark: str, part: str) -> str:
    """`text` with `part` between the marks `<!-- mark -->` and `<!-- /mark -->`; as it is where it has none."""
    between = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.S)
    return between.sub(lambda m: f"{m[1]}\n{part}\n\n{m[2]}", text)


def parts() -> dict[Path, str]:
    """Every hand-written page that has a generated part, with that part as it should be."""
    found = layers()
    written = {
        DOCS / "architecture.md": ("architecture", architecture_table(found)),
        DOCS / "export.md": ("targets", targets_table()),
        DOCS / "models.md": ("formats", formats_table((DOCS / "models.md").read_text(encoding="utf-8"))),
    }
    return {path: with_part(path.read_text(encoding="utf-8"), *part) for path, part in written.items()}


# Writing -----------------------------------------------------------------------------------------


def makers() -> dict[Path, Callable[[], str]]:
    """Every page that is generated as a whole: its path, and what makes its text."""
    made: dict[Path, Callable[[], str]] = {}
    for name in methods.entries():
        made[DOCS / "methods" / f"{name}.md"] = partial(method_page, name)
    for name in compression.entries():
        made[DOCS / "compress" / f"{name}.md"] = partial(compress_page, name)
    made |= {DOCS / "recipe.md": recipe_page, DOCS / "commands.md": commands_page}
    made |= {DOCS / "faults.md": faults_page, DOCS / "events.md": events_page}
    return made | {DOCS / "events.schema.json": events_schema}


def pages() -> dict[Path, str]:
    """The text of every generated page, by its path."""
    return {path: make() for path, make in makers().items()}


def main() -> int:
    """Write the pages and parts, or with `--check` name the hand-written pages whose parts are out of date."""
    if "--check" in sys.argv:
        stale = [path for path, text in parts().items() if path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: python docs/build.py")
        return bool(stale)
    for path, text in (pages() | parts()).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
