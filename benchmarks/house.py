# SPDX-License-Identifier: Apache-2.0
"""Measure the structure of `src/fleetune`: sizes, types, docstrings, names, layers, climbs, circles.  `make house`.

A climb is an import that enters a layer above the one it left while a value is followed through calls; here the static
stand-in is counted: imports of a module that go up in `docs/architecture.toml` (the test holds them at 0), and the floors
of the graph of files.  With `--source DIR` another checkout is measured, for a comparison side by side.
"""

from __future__ import annotations

import argparse
import ast
import collections
import statistics
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
TUNING = ("fedit", "fedpetuning", "fedpeptao", "fwdllm", "mezo", "zosgd", "fedkseed", "onebyte")
COMPRESSORS = ("optq", "qronos", "sparsegpt", "rtn", "llm_pruner", "gkd")
TARGETS = ("compressed-tensors", "gptq", "mlx", "peft")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Tree:
    """The modules of a package, parsed."""

    def __init__(self, source: Path) -> None:
        self.package = source / "fleetune"
        self.files = {self._name(p, source): p for p in sorted(self.package.rglob("*.py"))}
        self.text = {name: path.read_text(encoding="utf-8") for name, path in self.files.items()}
        self.parsed = {name: ast.parse(text) for name, text in self.text.items()}

    @staticmethod
    def _name(path: Path, source: Path) -> str:
        parts = path.relative_to(source).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def functions(self) -> Iterator[Function]:
        """Every function, nested ones included."""
        for tree in self.parsed.values():
            yield from (n for n in ast.walk(tree) if isinstance(n, Function))

    def arrows(self) -> dict[str, set[str]]:
        """Module -> the modules that it imports anywhere, lazily and for types alone too."""
        return {name: set(self._imports(tree)) - {name} for name, tree in self.parsed.items()}

    def _imports(self, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fleetune":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole in self.files else str(node.module)
            elif isinstance(node, ast.Import):
                yield from (a.name for a in node.names if a.name.split(".")[0] == "fleetune")


def components(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan), those of one node left out."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for below in graph.get(node, ()):
            if below not in index:
                visit(below)
                low[node] = min(low[node], low[below])
            elif below in stack:
                low[node] = min(low[node], index[below])
        if low[node] == index[node]:
            at = stack.index(node)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def floors(graph: Mapping[str, set[str]]) -> int:
    """The longest chain of imports; a circle counts as one floor."""
    home = {node: node for node in graph}
    for group in components(graph):
        home |= dict.fromkeys(group, group[0])
    below: dict[str, set[str]] = collections.defaultdict(set)
    for node, found in graph.items():
        below[home[node]] |= {home[b] for b in found if b in home} - {home[node]}
    depth: dict[str, int] = {}

    def down(node: str) -> int:
        if node not in depth:
            depth[node] = 1 + max((down(b) for b in below[node]), default=0)
        return depth[node]

    return max(down(node) for node in list(below))


def spread(values: Iterable[int]) -> str:
    """Median, 90th percentile and maximum."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.0f}, {ordered[int(0.9 * (len(ordered) - 1))]}, {ordered[-1]}"


def measure(tree: Tree) -> list[tuple[str, str]]:
    """Every figure, as (what, value)."""
    functions, graph = list(tree.functions()), tree.arrows()
    length = [(f.end_lineno or f.lineno) - f.lineno + 1 for f in functions]
    arguments = [a for f in functions for a in _arguments(f)]
    typed = sum(a.annotation is not None for a in arguments)
    lines = [text.count("\n") for text in tree.text.values()]
    top = [p for p in tree.package.iterdir() if not p.name.startswith("_") and p.suffix in ("", ".py")]
    folders = [p for p in top if p.is_dir()]
    return [
        ("files, lines", f"{len(lines)}, {sum(lines):,}"),
        ("folders and files at the top", f"{len(folders)}, {len(top) - len(folders)}"),
        ("circles of files", str(len(components(graph)))),
        ("imports that go up", _up(tree, graph)),
        ("floors of the graph of files", str(floors(graph))),
        ("boxes at the top, floors, arrows between them", _boxes(graph, "fleetune.")),
        ("the same inside the commands", _boxes(graph, _commands_package(tree))),
        ("file: median, p90, max lines", spread(lines)),
        ("function: median, p90, max lines", spread(length)),
        ("functions over 40, over 60", f"{sum(n > 40 for n in length)}, {sum(n > 60 for n in length)}"),
        ("parameters: median, p90, max", spread(len(_arguments(f)) for f in functions)),
        ("typed arguments", f"{100 * typed / len(arguments):.0f} %"),
        ("docstrings: functions, classes, modules", _documented(tree)),
        ("module docstrings that begin What/Which/How/Where", _riddles(tree)),
        ("class names that mean two things or more", _clashes(tree)),
        ("imports inside functions", str(_lazy(functions))),
        ("`# fmt: skip`", str(sum(text.count("# fmt: skip") for text in tree.text.values()))),
        ("files naming one tuning method in code: median, max", _named(tree, TUNING)),
        ("... a compressor", _named(tree, COMPRESSORS)),
        ("... an export target", _named(tree, TARGETS)),
        ("lines of command files: total, max", _commands(tree)),
    ]


def _boxes(graph: Mapping[str, set[str]], package: str) -> str:
    """Files and folders right below a package as boxes: how many, their floors, and the arrows between them."""

    def box(module: str) -> str:
        return module.removeprefix(package).split(".")[0] or "__init__"

    inside: dict[str, set[str]] = {box(m): set() for m in graph if m.startswith(package)}
    for module, found in graph.items():
        if module.startswith(package):
            inside[box(module)] |= {box(b) for b in found if b.startswith(package)} - {box(module)}
    return f"{len(inside)}, {floors(inside)}, {sum(map(len, inside.values()))}"


def _commands_package(tree: Tree) -> str:
    return next(name for name in tree.files if name.endswith(".commands")) + "."


def _arguments(function: Function) -> list[ast.arg]:
    a = function.args
    found = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    return [x for x in found if x.arg not in ("self", "cls")]


def _up(tree: Tree, graph: Mapping[str, set[str]]) -> str:
    table = tree.package.parents[1] / "docs" / "architecture.toml"
    if not table.is_file():
        return "no table"
    layers = [layer["name"] for layer in tomllib.loads(table.read_text(encoding="utf-8"))["layer"]]

    def place(module: str) -> int:
        return layers.index(module.split(".")[1])

    doors = {"fleetune", "fleetune.__main__"}
    pairs = [(m, b) for m, found in graph.items() if m not in doors for b in found]
    return str(sum(b in doors or place(b) < place(m) for m, b in pairs))


def _documented(tree: Tree) -> str:
    nodes = [n for parsed in tree.parsed.values() for n in ast.walk(parsed)]
    public = [n for n in nodes if isinstance(n, Function | ast.ClassDef) and not n.name.startswith("_")]
    parts = []
    for kind in (Function, ast.ClassDef):
        chosen = [n for n in public if isinstance(n, kind)]
        parts.append(f"{sum(ast.get_docstring(n) is not None for n in chosen)}/{len(chosen)}")
    modules = [ast.get_docstring(parsed) is not None for parsed in tree.parsed.values()]
    return ", ".join([*parts, f"{sum(modules)}/{len(modules)}"])


def _riddles(tree: Tree) -> str:
    firsts = [(ast.get_docstring(p) or " ").split()[:1] for p in tree.parsed.values()]
    return str(sum(first[0].strip(",") in ("What", "Which", "How", "Where") for first in firsts if first))


def _clashes(tree: Tree) -> str:
    places = collections.defaultdict(set)
    for name, parsed in tree.parsed.items():
        for node in parsed.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].add(name)
    contracts = {"Method", "State", "Solver", "Trainer", "Pruner"}
    clashes = sorted(n for n, found in places.items() if len(found) > 1 and n.strip("_") not in contracts)
    return f"{len(clashes)}" + (f" ({', '.join(clashes)})" if clashes else "")


def _lazy(functions: Iterable[Function]) -> int:
    found = {n for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)}
    return len(found)


def _named(tree: Tree, names: Iterable[str]) -> str:
    """How many files name each, as a word in code: comments and docstrings do not count."""
    counts = []
    for name in names:
        spellings = {name, name.replace("_", "-"), name.replace("-", "_")}
        counts.append(sum(_names_it(parsed, spellings) for parsed in tree.parsed.values()))
    return f"{statistics.median(counts):g}, {max(counts)}"


def _names_it(parsed: ast.Module, spellings: set[str]) -> bool:
    docs = {
        id(n.body[0].value)
        for n in ast.walk(parsed)
        if isinstance(n, ast.Module | ast.ClassDef | Function) and n.body and isinstance(n.body[0], ast.Expr)
    }
    for node in ast.walk(parsed):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            if set(node.value.replace("=", " ").replace(",", " ").split()) & spellings:
                return True
        elif isinstance(node, ast.ImportFrom):
            parts = {*(node.module or "").split("."), *(a.name for a in node.names)}
            if parts & spellings:
                return True
        elif isinstance(node, ast.Name) and node.id in spellings:
            return True
    return False


def _commands(tree: Tree) -> str:
    found = [t.count("\n") for n, t in tree.text.items() if ".commands." in n]
    return f"{sum(found):,}, {max(found, default=0)}"


def main() -> None:
    """Print a table: of this checkout, and of another one beside it."""
    parser = argparse.ArgumentParser("house", description="The structure of src/fleetune in figures.")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="another checkout, for comparison")
    options = parser.parse_args()
    columns = [measure(Tree(ROOT / "src"))]
    if options.beside:
        columns.insert(0, measure(Tree(options.beside / "src")))
    for rows in zip(*columns, strict=True):
        print("| " + " | ".join([rows[0][0], *(value for _, value in rows)]) + " |")


if __name__ == "__main__":
    main()
