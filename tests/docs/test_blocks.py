"""Every Python block of README.md and docs/ runs, as it stands on its page.

The blocks of a page run in order, in one namespace and one empty folder.  There `smollm2-135m` is a random tiny llama, and
clients take few local steps.  A page that talks to a server finds one at the address that it names.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fleetune
from fleetune import models
from fleetune.models.cache import cache
from fleetune.tuning import methods
from fleetune.tuning.prepare import rates

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "deploy"))
ELSEWHERE = {
    "CONTRIBUTING.md": "docs/test_contributing.py",
    "docs/ledger.md": "docs/test_ledger_page.py",
    "docs/export.md": "contract/test_target_contract.py",
}


def blocks(page: str) -> list[str]:
    return re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"))


PAGES = [
    name
    for path in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
    if blocks(name := path.relative_to(ROOT).as_posix())
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and a cache that holds a tiny llama as smollm2-135m."""
    from deploy_harness import tiny

    model = tiny()  # groups of 32 divide its rows, and its tokenizer has merges, as GGUF needs
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "cache"))
    models.save(model.net, model.tokenizer, cache.hub_target(cache.SMOLLM2_135M.hub))
    monkeypatch.setattr(methods.REGISTRY, "_given", {})  # a page hands over a method of its own
    monkeypatch.setattr(methods, "make", functools.partial(_quick, methods.make))
    monkeypatch.setattr(rates, "wanted", lambda recipe: [])  # no rate is searched for
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def _quick(make: Callable[..., Any], name: str, values: Mapping[str, Any]) -> Any:
    """A method that takes two local steps a round where nothing else is asked for."""
    steps = {"tau": 2} if any(s.name == "tau" for s in methods.settings(name)) else {}
    return make(name, {**steps, **values})


@contextmanager
def served(text: str) -> Iterator[str]:
    """The page's blocks with the address of a stand-in for an engine, if they name one."""
    if (named := re.search(r"http://127\.0\.0\.1:\d+", text)) is None:
        yield text
        return
    from serve_harness import little_file, stand_in

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(stand_in(Path("bin"))))
        with fleetune.serve(little_file(Path("smol.gguf")), port=0) as session:
            yield text.replace(named[0], session.url)


@pytest.mark.parametrize("page", [p for p in PAGES if p not in ELSEWHERE])
def test_the_blocks_of_a_page_run(page: str, place: Path):
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for block in blocks(page):
        with served(block) as code:
            exec(compile(code, page, "exec"), namespace)


def test_no_block_is_forgotten():
    for page, test in ELSEWHERE.items():
        assert page in PAGES
        assert Path(page).name in (ROOT / "tests" / test).read_text(encoding="utf-8")
    assert {"README.md", "docs/serve.md", "docs/tutorials/your-own-data.md"} <= set(PAGES)
