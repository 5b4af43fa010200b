# SPDX-License-Identifier: Apache-2.0
"""The chat page in headless Chromium: what a person does with it, and that nothing of a model's text runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Page
from serve_harness import Upstream, door

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.binary() is None, reason="there is no Chromium on the PATH"),
]

LAST = "[...document.querySelectorAll('.turn.assistant .text')].at(-1)?.textContent"
IDLE = "document.getElementById('stop').hidden"
ERROR = "document.getElementById('error').textContent"


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def tab(upstream: Upstream, tmp_path: Path) -> Iterator[Page]:
    with door(upstream) as front, browser.page(front.url + "/", tmp_path / "profile") as found:
        yield found


def say(tab: Page, text: str) -> None:
    tab.js("document.getElementById('text').focus()")
    tab.type(text)
    tab.key("Enter")


def bodies(upstream: Upstream) -> list[dict[str, Any]]:
    return [json.loads(body) for method, _, _, body in upstream.seen if method == "POST"]


def test_a_conversation(tab, upstream):
    assert tab.wait("document.getElementById('model').textContent") == "tiny.gguf"
    assert tab.js("document.activeElement.id") == "text"  # one can type at once
    say(tab, "Capital of France?")
    tab.wait(f"{LAST} === 'Paris.' && {IDLE}")
    assert (
        tab.js("document.getElementById('said').textContent") == "Model: Paris."
    )  # what a screen reader says
    tab.js("document.getElementById('system').value = 'Be short.'")
    tab.js(
        "document.getElementById('temperature').value = '0.2'; document.getElementById('tokens').value = '7'"
    )
    say(tab, "And of Italy?")
    tab.wait(f"document.querySelectorAll('.turn').length === 4 && {IDLE}")
    first, second = bodies(upstream)
    assert first["messages"] == [{"role": "user", "content": "Capital of France?"}]
    assert second["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy?"},
    ]
    assert (second["temperature"], second["max_tokens"], second["stream"]) == (0.2, 7, True)
    tab.js("document.getElementById('new').click()")
    assert tab.js("document.querySelectorAll('.turn').length") == 0
    say(tab, "Anew")
    tab.wait(f"{LAST} === 'Paris.' && {IDLE}")
    assert len(bodies(upstream)[-1]["messages"]) == 2  # the system prompt and this
    assert tab.complaints() == []


def test_an_answer_is_seen_while_it_is_written_and_can_be_stopped(tab, upstream):
    upstream.go.clear()
    upstream.answer = ["One", " two", *[" more"] * 50_000]
    say(tab, "Count")
    tab.wait(f"{LAST} === 'One'")
    assert not tab.js(IDLE)
    tab.key("Escape")
    tab.wait(IDLE)
    assert tab.js(LAST) == "One"
    assert tab.js("document.querySelector('.note').textContent") == "stopped"
    upstream.go.set()
    assert upstream.gone.wait(20)  # the engine is told, too
    upstream.answer = ["Again"]
    say(tab, "Go on")
    tab.wait(f"{LAST} === 'Again' && {IDLE}")
    assert [m["content"] for m in bodies(upstream)[-1]["messages"]] == ["Count", "One", "Go on"]


def test_nothing_that_a_model_writes_is_run_or_drawn(tab, upstream):
    evil = "<img src=x onerror='window.hit=1'><script>window.hit=1</script><b>bold</b> [a](javascript:hit())"
    upstream.answer = [evil[:20], evil[20:]]
    say(tab, evil)
    tab.wait(f"{LAST} === {json.dumps(evil)} && {IDLE}")
    assert tab.js("document.querySelectorAll('.turn img, .turn script, .turn b, .turn a').length") == 0
    assert tab.js("window.hit === undefined")
    assert tab.js("new Promise(done => { const s = document.createElement('script'); s.textContent = 'window.hit = 2';"
                  " document.body.append(s); setTimeout(() => done(window.hit === undefined), 50) })")  # fmt: skip
    assert any("Content Security Policy" in text for text in tab.complaints())


def test_errors_are_shown_and_the_question_is_not_lost(tab, upstream):
    upstream.mode = "refuse"
    say(tab, "A long question")
    tab.wait(f"{ERROR} === 'the context is full'")
    assert tab.js("document.getElementById('text').value") == "A long question"
    assert tab.js("document.querySelectorAll('.turn').length") == 0
    upstream.mode = "answer"
    tab.key("Enter")
    tab.wait(f"{LAST} === 'Paris.' && {IDLE}")
    assert tab.js("document.getElementById('error').hidden")
    upstream.mode = "die"
    say(tab, "Another")
    tab.wait(f"{ERROR}.includes('broke off') && {IDLE}")
    assert tab.js(LAST) == "Par"


def test_the_token_is_asked_for_and_kept_for_the_tab(upstream, tmp_path):
    with door(upstream, "secret") as front, browser.page(front.url + "/", tmp_path / "profile") as tab:
        tab.wait(f"{ERROR} === 'This server asks for a token.'")
        assert tab.js("document.activeElement.id") == "key"
        tab.type("secret")
        tab.key("Enter")
        tab.js("document.getElementById('key').blur()")
        assert tab.wait("document.getElementById('model').textContent") == "tiny.gguf"
        assert tab.js("document.getElementById('error').hidden")
        tab.call("Page.reload")
        assert tab.wait("document.getElementById('model')?.textContent") == "tiny.gguf"
        say(tab, "Capital?")
        tab.wait(f"{LAST} === 'Paris.' && {IDLE}")


def test_every_control_has_a_name_and_the_page_fits_a_telephone(upstream, tmp_path):
    with door(upstream) as front, browser.page(front.url + "/", tmp_path / "profile", width=320) as tab:
        tab.js("document.getElementById('settings').open = true")
        tab.call("Accessibility.enable")
        nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
        controls = [
            n
            for n in nodes
            if n["role"]["value"] in ("button", "textbox", "spinbutton", "DisclosureTriangle")
        ]
        names = {n["name"]["value"] for n in controls if not n["ignored"]}
        assert {
            "New chat",
            "Settings",
            "System prompt",
            "Temperature",
            "Tokens at most",
            "Your message",
            "Send",
        } <= names
        assert "" not in names
        upstream.answer = ["w" * 500]
        say(tab, "u" * 300)
        tab.wait(f"{LAST}?.length === 500 && {IDLE}")
        assert tab.js("document.documentElement.scrollWidth <= innerWidth")


def test_it_asks_nobody_else(tab):
    say(tab, "Capital?")
    tab.wait(f"{LAST} === 'Paris.' && {IDLE}")
    threading.Event().wait(0.1)
    asked = {
        e["params"]["request"]["url"] for e in tab.events if e.get("method") == "Network.requestWillBeSent"
    }
    own = tab.js("location.origin")
    assert {url.partition("?")[0] for url in asked if not url.startswith("data:")} <= {
        own + "/", own + "/v1/models", own + "/v1/chat/completions"
    }  # fmt: skip
