# SPDX-License-Identifier: Apache-2.0
"""The live page in headless Chromium: it follows the run without flicker, and nothing that a device is called runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import browser
import fleet_run
import pytest
from browser import Page
from fleet_run import EVIL, client, done, front, run

from fleetune.deploy.serving.front import Front
from fleetune.fleet import page
from fleetune.fleet.page import LivePage

__all__ = ["front", "run"]  # fixtures

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.binary() is None, reason="there is no Chromium on the PATH"),
]

ROWS = "document.querySelectorAll('#part-devices tbody tr').length"
STATE = "document.getElementById('state').textContent"


@pytest.fixture
def tab(front: Front, tmp_path: Path) -> Iterator[Page]:
    with browser.page(front.url + "/", tmp_path / "profile") as found:
        found.wait(f"{ROWS} === 3")
        yield found


def add(run: Path, round: int) -> None:
    """Let the run go on by a round."""
    lines = [*(client(round, c) for c in range(3)), *done(round)]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    fleet_run.word(run, round=round + 1)


def test_it_follows_the_run_and_leaves_alone_what_stays(tab, run):
    assert tab.js("document.title") == "round 3 of 8 · loss 3.600 · 0001-fedkseed-tiny"
    tab.js("window.stays = document.querySelector('#part-configuration section');"
           "window.moves = document.querySelector('#part-devices section');"
           "document.querySelector('#part-fleet details').open = true")  # fmt: skip
    add(run, 3)
    tab.wait("document.title.startsWith('round 4 of 8 · loss 3.400')")
    tab.wait("document.querySelector('#part-fleet').textContent.includes('2 of 9 replies')")
    assert tab.js("document.querySelector('#part-configuration section') === window.stays")
    assert tab.js("document.querySelector('#part-devices section') !== window.moves")
    assert tab.js("document.querySelector('#part-fleet details').open")
    assert tab.complaints() == []


def test_selected_text_stays_until_it_is_let_go(tab, run):
    tab.js("getSelection().selectAllChildren(document.querySelector('#part-devices tbody th'))")
    add(run, 3)
    tab.wait("document.title.startsWith('round 4 of 8')")
    assert tab.js("String(getSelection())") == "bakery"
    tab.js("getSelection().removeAllRanges()")
    tab.wait("document.querySelector('#part-devices').textContent.includes('4 of 8')")


def test_nothing_that_a_device_is_called_is_run_or_drawn(tab):
    assert tab.js("document.querySelectorAll('#parts img, #parts script, #parts a').length") == 0
    assert tab.js("[...document.querySelectorAll('#part-devices tbody th')].at(-1).textContent") == EVIL
    assert tab.js("window.hit === undefined")
    # and if markup did get in, the policy would keep it from running
    tab.js(
        "document.getElementById('parts').insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit=1\">')"
    )
    tab.wait("document.querySelector('#parts img').complete")
    assert tab.js("new Promise(done => setTimeout(() => done(window.hit === undefined), 50))")
    assert any("Content Security Policy" in text for text in tab.complaints())


def test_it_says_when_the_server_has_gone(tab, front):
    front.shutdown()
    front.server_close()
    tab.wait(f"{STATE}.startsWith('No answer since')", 30)
    assert tab.js(ROWS) == 3  # what was last is still there


def test_the_token_comes_in_the_link_or_is_asked_for(run, tmp_path):
    live = LivePage()
    with page.listening("127.0.0.1", 0, "secret", live) as front:
        live.show(run)
        with browser.page(front.url + "/#secret", tmp_path / "one") as tab:
            tab.wait(f"{ROWS} === 3")
            assert tab.js("location.hash") == ""  # not left where others may see it
            tab.call("Page.reload")
            tab.wait(f"{ROWS} === 3")
        with browser.page(front.url + "/", tmp_path / "two") as tab:
            tab.wait(f"{STATE} === 'This page asks for a token.'")
            tab.type("wrong")
            tab.key("Enter")
            tab.wait(f"{STATE} === 'This is not the token.'")
            tab.js("document.getElementById('token').value = ''")
            tab.type("secret")
            tab.key("Enter")
            tab.wait(f"{ROWS} === 3")


@pytest.mark.parametrize("width", [360, 420, 1280])
def test_it_fits(front, tmp_path, width):
    with browser.page(front.url + "/", tmp_path / "profile", width=width) as tab:
        tab.wait(f"{ROWS} === 3")
        assert tab.js("document.documentElement.scrollWidth <= innerWidth")
        assert tab.js("getComputedStyle(document.querySelector('.cards tr')).display") == (
            "grid" if width < 560 else "table-row"
        )
        assert tab.js(
            "document.querySelector('.cards').scrollWidth <= document.querySelector('.cards').parentElement.clientWidth + 1"
        )
