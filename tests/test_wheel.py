"""The wheel holds all that the source tree does, and works where there is no source tree.

It is built here and installed without its dependencies into a folder of its own, which comes before all else on the path.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LISTED = ["git", "-C", str(ROOT), "ls-files", "--", "docs/*.md"]
WRITTEN = [ROOT / name for name in subprocess.run(LISTED, capture_output=True, text=True).stdout.split()]
PACKAGE = ROOT / "src" / "fleetune"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert importlib.util.find_spec("hatchling"), "pip install -e '.[dev]' brings what builds the wheel"
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*command, "--disable-pip-version-check", "--target", target, wheel], check=True)
    return target


def run(site: Path, cwd: Path, *command: str) -> str:
    """Run Python with the installed wheel, elsewhere than in the repository."""
    path = {"PYTHONPATH": str(site), "FLEETUNE_HOME": str(cwd), "HF_HOME": str(cwd)}
    how = {"env": os.environ | path, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, *command], cwd=cwd, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package(wheel):
    tree = {p.relative_to(ROOT / "src").as_posix() for p in PACKAGE.rglob("*") if p.is_file()}
    tree = {name for name in tree if "__pycache__" not in name and not name.endswith((".nbi", ".nbc"))}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    pages = {
        f"fleetune/docs/{page.relative_to(ROOT / 'docs').as_posix()}"
        for page in WRITTEN
        if page.name != "index.md"
    }
    assert held == tree | pages | {f"fleetune/deploy/{path.name}" for path in (ROOT / "deploy").iterdir()}
    kinds = {Path(name).suffix for name in held}
    assert {".toml", ".css", ".jsonl", ".typed"} <= kinds, "recipes, pages, demo rows, types"


def test_its_metadata_name_the_command_the_licence_and_every_extra(wheel):
    archive = zipfile.ZipFile(wheel)
    names = [name for name in archive.namelist() if ".dist-info/" in name]
    texts = {Path(name).name: archive.read(name).decode() for name in names}
    stated = Parser().parsestr(texts["METADATA"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(stated.get_all("Provides-Extra") or ()) == set(project["optional-dependencies"])
    always = {line for line in stated.get_all("Requires-Dist") or () if "extra" not in line}
    assert "argcomplete<4,>=3.4" in always, "a Tab completes words in any install"
    assert stated["License-Expression"] == "Apache-2.0"
    assert "LICENSE" in texts
    assert "fleetune = fleetune.__main__:main" in texts["entry_points.txt"]


def test_the_command_recipes_and_demo_work_outside_the_repository(site, tmp_path):
    script = (
        "import fleetune, json, sys\n"
        "from fleetune.cli.main import main\n"
        "from fleetune import data, recipes\n"
        "rows = data.read('demo', offline=True)\n"
        "main(['recipes', '-qq'])\n"
        "print(json.dumps([fleetune.__file__, len(rows), sorted(recipes.every())]))\n"
    )
    place, rows, names = json.loads(run(site, tmp_path, "-c", script))
    assert Path(place).is_relative_to(site)
    assert rows == len((PACKAGE / "data" / "demo.jsonl").read_text(encoding="utf-8").splitlines())
    assert names == sorted(p.stem for p in (PACKAGE / "recipes").glob("*.toml"))
    assert "--quick" in run(site, tmp_path, "-m", "fleetune", "demo", "--help")
    text = (PACKAGE / "recipes" / "fedit.toml").read_text(encoding="utf-8")
    assert text.strip() in run(site, tmp_path, "-m", "fleetune", "recipes", "fedit")


def test_the_pages_are_read_where_there_is_no_source_tree(site, tmp_path):
    assert run(site, tmp_path, "-m", "fleetune", "help", "data").startswith("# My data\n")
    unit = (ROOT / "deploy" / "fleetune-device.service").read_text(encoding="utf-8")
    assert run(site, tmp_path, "-m", "fleetune", "help", "fleetune-device.service") == unit
    assert "## DataError\n" in run(site, tmp_path, "-m", "fleetune", "help", "DataError")


def test_an_editable_install_finds_the_source(tmp_path):
    script = "import hatchling.build as b, sys; print(b.build_editable(sys.argv[1]))"
    name = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    archive = zipfile.ZipFile(tmp_path / name)
    (path,) = [n for n in archive.namelist() if n.endswith(".pth")]
    assert archive.read(path).decode().split() == [str(ROOT / "src")]
