# SPDX-License-Identifier: Apache-2.0
"""Reports in headless Chromium, on a telephone and on a desk: nothing is cut, nothing complains, the plots shrink."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import browser
import pytest
from browser import Page
from test_report import fake_run, lines_of
from test_report_page import restated, with_clients

from fleetune import report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.binary() is None, reason="there is no Chromium on the PATH"),
]

NAMES = [f"a-client-of-the-data-{i}" for i in range(24)]
# what is wider than its box, of boxes that would hide the rest or give it a scroll bar
CUT = """[...document.querySelectorAll('main, figure, .scroll, table, section, dl, header')]
    .filter(e => e.getClientRects().length && e.scrollWidth > e.clientWidth + 1)
    .map(e => e.tagName + '.' + e.className + ' ' + e.scrollWidth + ' > ' + e.clientWidth)"""
# texts of drawings that leave their card
OUT = """[...document.querySelectorAll('figure')].flatMap(f => { const box = f.getBoundingClientRect();
    return [...f.querySelectorAll('svg text')].filter(t => { const r = t.getBoundingClientRect();
        return r.left < box.left - 1 || r.right > box.right + 1 }).map(t => t.textContent) })"""
SMALLEST = (
    """Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"""
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's page with all that there can be, and one of many clients."""
    at = tmp_path_factory.mktemp("runs")
    run = restated(
        fake_run(at), names=NAMES, partition="column:client", changed=["model", "rounds", "set.lr"]
    )
    base = [2.0 + 0.05 * (i % 7) for i in range(24)]
    with_clients(
        run, rows="held-out", n=[4] * 24, base=base, tuned=[b - 0.2 + 0.02 * i for i, b in enumerate(base)]
    )
    large = fake_run(
        at, "0008-fedkseed-smollm2-135m", clients=200, rounds=4, asked=10, up=260, down=4170, seed=5
    )
    events = lines_of(large)
    for event in events:
        if event["event"] == "round":
            event["rss"] = 10**9 * int(str(event["round"]))
    (large / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return {"run": report.write(run), "large": report.write(large)}


@contextmanager
def shown(page: Path, folder: Path, width: int, dark: bool = False) -> Iterator[Page]:
    with browser.page(page.as_uri(), folder / "profile", width=width, dark=dark) as tab:
        yield tab


@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("name", ["run", "large"])
def test_nothing_is_cut(pages: dict[str, Path], tmp_path: Path, name: str, width: int) -> None:
    with shown(pages[name], tmp_path, width) as tab:
        assert tab.js("document.documentElement.scrollWidth <= innerWidth")
        assert tab.js(CUT) == []
        assert tab.js(OUT) == []
        assert tab.js(
            "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width <= s.closest('figure').clientWidth)"
        )
        assert tab.js(SMALLEST) >= 9
        assert tab.complaints() == []


def test_the_clients_names_and_the_marks_are_there(pages: dict[str, Path], tmp_path: Path) -> None:
    with shown(pages["run"], tmp_path, 1280) as tab:
        for ident in ("partition", "per-client"):
            drawn = f"document.querySelector('svg[aria-labelledby^=\"{ident}-t\"]')"
            assert tab.js(f"{drawn}.textContent").count("a-client-of-the-data-") >= 24
        assert tab.js("document.querySelectorAll('svg .break').length") >= 2
        assert tab.js("document.querySelector('.pill').textContent") == "✓ done"


def test_a_link_downloads_what_it_names(pages: dict[str, Path], tmp_path: Path) -> None:
    with shown(pages["run"], tmp_path, 1280) as tab:
        tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        tab.js("[...document.querySelectorAll('a[download=\"clients.csv\"]')].at(0).click()")
        tab.wait("true")
        file = tmp_path / "clients.csv"
        for _ in range(200):
            if file.is_file() and file.stat().st_size:
                break
            tab.js("new Promise(done => setTimeout(done, 50))")
        assert file.read_text() == (pages["run"].parent / "plots" / "clients.csv").read_text()


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_both_schemes(pages: dict[str, Path], tmp_path: Path, dark: bool) -> None:
    """The contrast of what is written in the cards is 4.5 at least (WCAG 2.2, 1.4.3)."""
    lightness = """(c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => { v /= 255;
        return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 }); return .2126 * r + .7152 * g + .0722 * b })"""
    with shown(pages["run"], tmp_path, 1280, dark) as tab:
        contrast = tab.js(f"""(() => {{ const l = {lightness}, card = l(getComputedStyle(document.querySelector('figure')).backgroundColor);
            return Math.min(...['figure svg text', 'figcaption span', '.files a', 'td.good', 'caption'].map(q => {{
                const e = document.querySelector(q), style = getComputedStyle(e), own = l(e.closest('svg') ? style.fill : style.color);
                return (Math.max(own, card) + .05) / (Math.min(own, card) + .05) }})) }})()""")
        assert contrast >= 4.5
