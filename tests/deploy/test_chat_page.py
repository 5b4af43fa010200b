# SPDX-License-Identifier: Apache-2.0
"""The chat page in headless Chromium: Markdown as nodes, copy, regenerate, what a reload shows, and the base beside the tuned model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from browser import Page
from serve_harness import Upstream, door
from test_beside_base import pair
from test_serve_page import IDLE, LAST, bodies, say

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.binary() is None, reason="there is no Chromium on the PATH"),
]

TEXT = """# Title with `code`

**In short:** the *crumb* softens, snake_case_stays and 2 * 3 * 4 too.
Second line.

- one
  - inner **bold**
- two

3. three
4. four

> quoted
> words

```python
if a < b: print("<b>")
```

---
[site](https://example.org/a?b=1) and [bad](javascript:alert(1)) and [worse](data:text/html,x)"""
MADE = (
    "<h3>Title with <code>code</code></h3>"
    "<p><strong>In short:</strong> the <em>crumb</em> softens, snake_case_stays and 2 * 3 * 4 too.\nSecond line.</p>"
    "<ul><li><p>one</p><ul><li><p>inner <strong>bold</strong></p></li></ul></li><li><p>two</p></li></ul>"
    '<ol start="3"><li><p>three</p></li><li><p>four</p></li></ol>'
    "<blockquote><p>quoted\nwords</p></blockquote>"
    '<pre><code>if a &lt; b: print("&lt;b&gt;")</code></pre><hr>'
    '<p><a href="https://example.org/a?b=1" target="_blank" rel="noopener noreferrer">site</a>'
    " and [bad](javascript:alert(1)) and [worse](data:text/html,x)</p>"
)
DRAWN = (
    "(text => { const d = document.createElement('div'); d.append(...markdown(text)); return d.innerHTML })"
)


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def tab(upstream: Upstream, tmp_path: Path) -> Iterator[Page]:
    with door(upstream) as front, browser.page(front.url + "/", tmp_path / "profile") as found:
        found.wait("document.getElementById('model').textContent")
        yield found


def pressed(tab: Page, text: str) -> None:
    tab.js(
        f"[...document.querySelectorAll('.act')].filter(b => b.textContent === {json.dumps(text)}).at(-1).click()"
    )


def test_markdown_is_drawn(tab: Page, upstream: Upstream) -> None:
    upstream.answer = [TEXT[:40], TEXT[40:]]
    say(tab, "go **on**")
    tab.wait(f"{IDLE} && document.querySelector('.turn.assistant .text').innerHTML === {json.dumps(MADE)}")
    assert (
        tab.js("document.querySelector('.turn.user .text').innerHTML") == "go **on**"
    )  # what one typed stays as typed
    assert tab.complaints() == []


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror='window.hit=1'>", "**<script>window.hit=1</script>**", "[a](https://x.org\"onclick=hit)",
        "[<img src=x onerror=window.hit=1>](https://x.org)", "`<b>`", "# <b>x</b>", "- <i>x</i>", "[a](JAVASCRIPT:hit())",
        "[a](  https://x.org)", "![x](https://x.org/pixel.png)", "<https://x.org>", "&lt;b&gt;",
    ],
)  # fmt: skip
def test_no_text_becomes_markup(tab: Page, text: str) -> None:
    made = tab.js(f"{DRAWN}({json.dumps(text)})")
    assert tab.js(f"""(() => {{ const d = document.createElement('div'); d.append(...markdown({json.dumps(text)}));
        return [...d.querySelectorAll('*')].every(n => ['P','STRONG','EM','CODE','A','H3','UL','LI'].includes(n.tagName)
            && (n.tagName === 'A' ? n.protocol === 'https:' && n.rel === 'noopener noreferrer' : n.attributes.length === 0)) }})()"""), (
        made
    )
    assert tab.js("window.hit === undefined")


def test_odd_text_neither_hangs_nor_gets_lost(tab: Page) -> None:
    drawn = "(text => { const d = document.createElement('div'); d.append(...markdown(text)); return d.textContent })"
    for text in ("*" * 19_000, "[" * 19_000, "`" * 9_999, "**a " * 4_000, "_" * 30_000, "[a](" * 4_000):
        found = tab.js(f"{drawn}({json.dumps('a ' + text)})")
        assert len(found) > len(text) / 6  # marks in pairs may go, words stay
    for text in ("- " * 5_000, "> " * 5_000, "1. " * 5_000, "```\nopen", "#" * 9_000, "- a\n" * 3_000):
        tab.js(f"{drawn}({json.dumps(text)})")
    assert tab.complaints() == []


def test_an_answer_can_be_copied(tab: Page, upstream: Upstream) -> None:
    upstream.answer = ["**Par", "is.**"]
    say(tab, "Capital?")
    tab.wait(f"{LAST} === 'Paris.' && {IDLE}")
    tab.js(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async t => { window.copied = t }}})"
    )
    pressed(tab, "Copy")
    tab.wait("window.copied")
    assert tab.js("window.copied") == "**Paris.**"  # the text, not the drawing
    assert tab.wait("[...document.querySelectorAll('.act')].some(b => b.textContent === 'Copied')")


def test_the_last_answer_is_written_again(tab: Page, upstream: Upstream) -> None:
    say(tab, "First")
    tab.wait(f"{LAST} === 'Paris.' && {IDLE}")
    say(tab, "Second")
    tab.wait(f"document.querySelectorAll('.turn').length === 4 && {IDLE}")
    assert tab.js("document.querySelectorAll('.again').length") == 1
    upstream.answer = ["Rome."]
    pressed(tab, "Regenerate")
    tab.wait(f"{LAST} === 'Rome.' && {IDLE}")
    assert tab.js("document.querySelectorAll('.turn').length") == 4
    assert bodies(upstream)[-1] == bodies(upstream)[-2]  # asked the same, without the answer that goes
    pressed(tab, "Regenerate")
    tab.wait(
        f"document.querySelector('.turn:last-child .note')?.textContent.includes('the temperature is 0') && {IDLE}"
    )
    upstream.mode = "refuse"
    pressed(tab, "Regenerate")
    tab.wait(f"document.getElementById('error').textContent === 'the context is full' && {IDLE}")
    assert tab.js(LAST) == "Rome."  # what was there stays
    upstream.mode = "answer"
    say(tab, "Third")
    tab.wait(f"document.querySelectorAll('.turn').length === 6 && {IDLE}")
    assert [m["content"] for m in bodies(upstream)[-1]["messages"]] == [
        "First",
        "Paris.",
        "Second",
        "Rome.",
        "Third",
    ]


def test_a_reload_shows_the_conversation_again_and_clear_forgets_it(tab: Page, upstream: Upstream) -> None:
    upstream.answer = ["**Paris**"]
    say(tab, "Capital?")
    tab.wait(f"{LAST} === 'Paris' && {IDLE}")
    tab.call("Page.reload")
    tab.wait(f"document.getElementById('model')?.textContent && {LAST} === 'Paris'")
    assert tab.js("document.querySelector('.turn.user .text').textContent") == "Capital?"
    assert tab.js("document.querySelectorAll('.turn strong').length") == 1
    say(tab, "And?")
    tab.wait(f"document.querySelectorAll('.turn').length === 4 && {IDLE}")
    assert [m["content"] for m in bodies(upstream)[-1]["messages"]] == ["Capital?", "**Paris**", "And?"]
    tab.js("localStorage.setItem('other', '1'); localStorage.setItem('fleetune-chat:gone', '[]')")
    tab.js("document.getElementById('clear').click()")
    assert tab.js("Object.keys(localStorage).join()") == "other"
    tab.call("Page.reload")
    tab.wait("document.getElementById('model')?.textContent")
    assert tab.js("document.querySelectorAll('.turn').length") == 0


def test_what_is_kept_and_damaged_is_left_alone(tab: Page) -> None:
    for kept in ("{", "3", '[{"role":"user"}]', '[{"role":"user","content":"a"}]', "[null,null]"):
        tab.js(f"localStorage.setItem('fleetune-chat:tiny.gguf', {json.dumps(kept)})")
        tab.call("Page.reload")
        tab.wait("document.getElementById('model')?.textContent")
        assert tab.js("document.querySelectorAll('.turn').length") == 0
    assert tab.complaints() == []


@pytest.mark.parametrize("width", [420, 1280])
def test_base_and_tuned_answer_side_by_side(upstream: Upstream, tmp_path: Path, width: int) -> None:
    base = Upstream()
    base.answer = ["Lyon, ", "I think."]
    columns = "[...document.querySelectorAll('.turn:last-child .answer')]"
    with pair(upstream, base) as front, browser.page(front.url + "/", tmp_path / "p", width=width) as tab:
        assert tab.wait("document.getElementById('model').textContent") == "tiny.gguf beside base.gguf"
        say(tab, "Capital?")
        tab.wait(f"{LAST} === 'Lyon, I think.' && {IDLE}")
        assert tab.js(f"{columns}.map(c => c.querySelector('.who').textContent + ': ' + c.querySelector('.text').textContent)") == [
            "Tuned: Paris.", "Base: Lyon, I think.",
        ]  # fmt: skip
        say(tab, "Sure?")
        tab.wait(f"document.querySelectorAll('.turn').length === 4 && {IDLE}")
        assert [m["content"] for m in bodies(upstream)[-1]["messages"]] == ["Capital?", "Paris.", "Sure?"]
        assert [m["content"] for m in bodies(base)[-1]["messages"]] == ["Capital?", "Lyon, I think.", "Sure?"]
        assert (bodies(upstream)[-1]["model"], bodies(base)[-1]["model"]) == ("tiny.gguf", "base.gguf")
        tops = tab.js(f"{columns}.map(c => Math.round(c.getBoundingClientRect().top))")
        assert (tops[0] == tops[1]) is (width == 1280)  # one below the other where there is no room
        assert tab.js("document.documentElement.scrollWidth <= innerWidth")
        tab.call("Page.reload")
        tab.wait(f"document.getElementById('model')?.textContent && {LAST} === 'Lyon, I think.'")
        assert tab.js("document.querySelectorAll('.answer').length") == 4
        assert tab.complaints() == []


@pytest.mark.parametrize("width", [420, 1280])
def test_long_code_and_words_stay_inside(upstream: Upstream, tmp_path: Path, width: int) -> None:
    upstream.answer = ["```\n" + "x" * 400 + "\n```\n\n" + "w" * 400 + "\n\n- " + "`" + "c" * 300 + "`"]
    with door(upstream) as front, browser.page(front.url + "/", tmp_path / "p", width=width) as tab:
        say(tab, "go")
        tab.wait(f"document.querySelectorAll('.turn pre').length === 1 && {IDLE}")
        assert tab.js("document.documentElement.scrollWidth <= innerWidth")
        assert tab.js("document.querySelector('.text').getBoundingClientRect().right <= innerWidth")
        assert tab.js(
            "document.querySelector('#talk').scrollWidth <= document.querySelector('#talk').clientWidth"
        )
