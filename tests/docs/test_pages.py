"""The docs are those of this code: generated parts are up to date, links and commands exist."""

import argparse
import ast
import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from fleetune.cli import main
from fleetune.errors import UsageError
from fleetune.tuning import methods

ROOT = Path(__file__).parents[2]


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, hooks = _module("build"), _module("hooks")
MAKERS = build.makers()  # of the generated pages, which are not committed
WRITTEN = [page for page in (ROOT / "docs").rglob("*.md") if page not in MAKERS]
READ_ON_GITHUB = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = sorted([*READ_ON_GITHUB, *WRITTEN, *(page for page in MAKERS if page.suffix == ".md")])


@functools.cache
def text_of(page: Path) -> str:
    return MAKERS[page]() if page in MAKERS else page.read_text(encoding="utf-8")


def test_generated_parts_are_up_to_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    script = ROOT / "docs" / "build.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--check"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code, capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", text_of(page)):
        if not target.startswith(("http:", "https:")):
            place = (page.parent / target).resolve()
            made = place in MAKERS and page not in READ_ON_GITHUB  # on the site alone
            assert made or (place.exists() and place not in MAKERS), target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"(?m)^#{1,6} (.*)$", text_of(page.resolve()))
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in headings]
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_anchors_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)]+)\)", text_of(page)):
        assert anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


def test_the_site_names_every_page_once():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = list(leaves(site["nav"]))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in PAGES if p not in READ_ON_GITHUB}
    brought_in = {"contributing.md", "benchmarks.md"}  # by docs/hooks.py
    assert sorted(named) == sorted(pages | brought_in)


def leaves(nav):
    """The pages of a navigation, however deep."""
    for entry in nav if isinstance(nav, list) else nav.values():
        yield from [entry] if isinstance(entry, str) else leaves(entry)


@functools.cache
def known_commands() -> dict[str, argparse.ArgumentParser]:
    return main.command_parsers()


def fault(line: str, *, whole: bool = True) -> str:
    """What is wrong with a command line, "" for nothing; not `whole`: its command and flags alone are looked at."""
    words = shlex.split(line, comments=True)[1:]
    known = known_commands()
    if words[0] not in known:
        return f"there is no command {words[0]}"
    sub = known[words[0]]
    flags = sub.flags
    if wrong := [w for w in words[1:] if w.startswith("--") and w.partition("=")[0] not in flags]:
        return f"{words[0]} has no {wrong[0]}"
    if not whole:
        return ""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _, unknown = sub.parse_known_args(words[1:])
    except UsageError as error:
        return error.message
    except SystemExit:  # --help
        return ""
    return f"{words[0]} does not take {' '.join(unknown)}" if unknown else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_in_the_docs_parses(page):
    text = text_of(page)
    blocks = [b.replace("\\\n", " ") for b in re.findall(r"(?ms)^```(?:sh|console|text)?\n(.*?)^```", text)]
    typed = ["\n".join(re.findall(r"(?m)^\$ .*$", b)) or b for b in blocks]  # the rest is output
    lines = "\n".join([*typed, *re.findall(r"(?m)^    (.*)$", text)])
    for line in re.findall(r"(?m)^\s*(?:\$ )?(fleetune [a-z].*?)(?:\s{3,}.*)?$", lines):
        assert not fault(line), line
    prose = re.sub(r"(?ms)^```.*?^```", "", text)
    for line in re.findall(r"`(fleetune [a-z][^`\n]*)`", prose):
        assert not fault(line, whole=False), line


def test_the_readme_lists_every_method():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in methods.entries())


def test_a_wrong_command_is_seen():
    for line in ("tuna a demo", "tune a b --round 3", "tune a b c d", "ledger prove a"):
        assert fault(f"fleetune {line}"), line


@pytest.mark.parametrize("page", ["architecture.md", "view.md", "ledger.md", "glossary.md"])
def test_every_source_file_that_a_page_names_exists(page: str):
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert not [n for n in named if not (ROOT / "src" / "fleetune" / n).exists() and not (ROOT / n).exists()]


LAYERS = tomllib.loads((ROOT / "docs" / "architecture.toml").read_text())["layer"]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer["name"])
def test_what_a_layer_holds_exists(layer: dict):
    for names, _ in layer.get("holds", ()):
        for name in names.split(", "):
            assert (ROOT / "src" / "fleetune" / layer["name"] / name).exists(), name


def _defined(file: Path) -> set[str]:
    """The functions, classes, methods (`Class.method`) and constants of a module."""
    top = ast.parse(file.read_text(encoding="utf-8")).body
    inside = [(f"{c.name}.", node) for c in top if isinstance(c, ast.ClassDef) for node in c.body]
    names = {prefix + n.name for prefix, n in [*(("", n) for n in top), *inside] if hasattr(n, "name")}
    targets = [t for n in top if isinstance(n, ast.Assign | ast.AnnAssign) for t in ast.walk(n)]
    return names | {t.id for t in targets if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)}


def test_where_is_what_names_what_exists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = text.partition("## Where is what")[2].partition("\n## ")[0]
    found = re.findall(r"`([\w/]+\.py)`((?:(?:: |, )`[\w.]+`)*)", places)
    assert len(found) > 40
    for file, names in found:
        defined = _defined(ROOT / "src" / "fleetune" / file)
        assert not set(re.findall(r"`([\w.]+)`", names)) - defined, file


def test_every_file_that_a_docstring_names_exists():
    places = [ROOT / folder for folder in ("src", "tests", "benchmarks", "docs")]
    everything = [p.relative_to(ROOT).as_posix() for place in places for p in place.rglob("*.py")]
    ends = {file.split("/", start)[-1] for file in everything for start in range(file.count("/") + 1)}
    for file in everything:
        named = re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", (ROOT / file).read_text(encoding="utf-8"))
        assert set(named) <= ends, file
