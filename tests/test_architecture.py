"""The layers of `docs/architecture.toml` hold: arrows go down only, without circles, lazy and type-only imports included."""

import ast
import functools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "fleetune"
TABLE = tomllib.loads((ROOT / "docs" / "architecture.toml").read_text())["layer"]
LAYERS = [layer["name"] for layer in TABLE]
GROUPS = {layer["name"]: layer["groups"] for layer in TABLE if "groups" in layer}
DOORS = {"fleetune", "fleetune.__main__"}  # they open the house; only commands may import them


def name_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in PACKAGE.rglob("*.py")}


def imported(text: str, modules: Mapping[str, object], of: Sequence[str] = ("fleetune",)) -> Iterator[str]:
    """The modules of packages that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in of:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in of)


@functools.cache
def arrows() -> dict[str, set[str]]:
    texts = {name: file.read_text(encoding="utf-8") for name, file in MODULES.items()}
    return {name: set(imported(text, MODULES)) - {name} for name, text in texts.items()}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of the graph, [] for none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for below in sorted(graph.get(node, ())):
            if found := walk(below, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def layer_of(module: str) -> str:
    return module.split(".")[1]


def test_the_tree_is_the_table():
    found = {p.stem for p in PACKAGE.iterdir() if not p.name.startswith("_") and p.suffix in ("", ".py")}
    assert found == set(LAYERS)


def test_every_import_goes_down():
    up = [
        f"{module} imports {below}"
        for module, found in arrows().items()
        if module not in DOORS
        for below in sorted(found - {"fleetune"} if module.startswith("fleetune.cli.commands.") else found)
        if below in DOORS or LAYERS.index(layer_of(below)) < LAYERS.index(layer_of(module))
    ]
    assert not up


@pytest.mark.parametrize("layer", GROUPS)
def test_inside_a_layer_every_import_goes_down(layer):
    groups = GROUPS[layer]

    def group_of(module: str) -> int | None:
        parts = module.split(".")
        return groups.index(parts[2]) if parts[1:2] == [layer] and len(parts) > 2 else None

    rooms = {p.stem for p in (PACKAGE / layer).iterdir() if p.name[0] != "_"}
    assert rooms == set(groups)
    up = [
        f"{module} imports {below}"
        for module, found in arrows().items()
        for below in sorted(found)
        if (own := group_of(module)) is not None and (other := group_of(below)) is not None and other < own
    ]
    assert not up


@pytest.mark.parametrize("layer", TABLE, ids=lambda layer: layer["name"])
def test_a_layer_has_no_more_lines_than_it_may(layer):
    """A larger number in the table is a commit of its own, which says what went for it."""
    place = PACKAGE / layer["name"]
    files = list(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    lines = sum(file.read_text(encoding="utf-8").count("\n") for file in files)
    assert lines <= layer["most"]


def test_there_is_no_circle_of_modules():
    assert circle(arrows()) == []


@pytest.mark.parametrize("folder", [layer for layer in LAYERS if (PACKAGE / layer).is_dir()])
def test_the_folders_of_a_layer_form_no_circle(folder):
    start = f"fleetune.{folder}."

    def box(module: str) -> str:
        return module.removeprefix(start).split(".")[0]

    graph: dict[str, set[str]] = {}
    for module, found in arrows().items():
        if module.startswith(start):
            inside = {box(below) for below in found if below.startswith(start)}
            graph.setdefault(box(module), set()).update(inside - {box(module)})
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("packages", "where"),
    [
        (("flwr",), "fleetune.fleet.flower"),
        (("starlette", "uvicorn", "httpx", "prometheus_client"), "fleetune.fleet"),
        (("fastapi",), ""),
    ],
)
def test_packages_of_the_network_are_imported_in_one_folder(packages, where):
    folders = {
        name.rpartition(".")[0]
        for name, file in MODULES.items()
        if any(imported(file.read_text(encoding="utf-8"), {}, packages))
    }
    assert folders == ({where} if where else set())


@pytest.mark.parametrize(
    "text",
    [
        "from fleetune.b import x",
        "def f():\n    from fleetune import b",
        "import fleetune.b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fleetune.b import X",
    ],
)
def test_any_kind_of_import_is_seen(text):
    modules = {"fleetune.a": 0, "fleetune.b": 0}
    assert set(imported(text, modules)) == {"fleetune.b"} or "typing" in text
    assert circle({"fleetune.a": set(imported(text, modules)), "fleetune.b": {"fleetune.a"}}) != []


def test_names_of_test_files_are_their_own():
    """Pytest takes two files of one basename for one module: the second is an error of collection."""
    names = [file.name for file in Path(__file__).parent.rglob("*.py") if file.name != "conftest.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


# one class per method or compressor, and what a method remembers
CONTRACTS = {"Method", "Pruner", "Solver", "State", "Trainer"}


def test_a_class_has_a_name_of_its_own():
    names = [
        n.name
        for p in PACKAGE.rglob("*.py")
        for n in ast.parse(p.read_text("utf-8")).body
        if isinstance(n, ast.ClassDef)
    ]
    assert {name for name in names if names.count(name) > 1} <= CONTRACTS
