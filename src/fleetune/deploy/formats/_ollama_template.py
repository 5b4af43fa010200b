# SPDX-License-Identifier: Apache-2.0
"""State a chat template as one of Ollama, which are in Go's language of templates.

A chat template of transformers is a program in Jinja.  What it puts around the turns is found by running it on a few
conversations.  The Go template that puts the same around them is then compared with it on others.  A template that does more
than that (it drops old turns, say) has no such form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Final, NamedTuple

Message = Mapping[str, str]
Render = Callable[
    [Sequence[Message], bool], str
]  # of the conversation; with True up to where an answer begins

SYSTEM, USER, ANSWER, AGAIN = "Rules0", "Question0", "Reply0", "Question1"
CHECKED: Final = (  # roles of the conversations that are compared
    ("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user", "assistant", "user"),
)  # fmt: skip


class Turns(NamedTuple):
    """What stands around the turns of a conversation."""

    start: str  # in front of the first turn
    around: Mapping[str, tuple[str, str]]  # role -> what stands before and after its text
    answer: str  # what an answer begins after
    # the system message that the template gives itself where there is none; None for none, "" for a turn without a text
    usual: str | None


def read(render: Render, bos: str) -> Turns | None:
    """Return what a template puts around turns; None where that does not describe it.

    `bos` is the token that the runtime itself puts in front, "" for none: it is left out.  Where system messages have no turn of
    their own, the result has none for them.
    """

    def own(messages: Sequence[Message], asking: bool) -> str:
        return render(messages, asking).removeprefix(bos)

    try:
        plain = _without_system(own)
    except Exception:  # a template raises what it likes, jinja2's TemplateError among others
        return None
    for find in (_with_system, lambda render, turns: turns):
        try:
            turns = find(own, plain)
            if all(own(talk, True) == rendered(turns, talk) for talk in _conversations(turns)):
                return turns
        except Exception:
            continue
    return None


def _without_system(render: Render) -> Turns:
    """Return what stands around questions and answers; what is in front of the first question is `start`."""
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    one = render([user], False)
    head, after_user = _split(one, USER)
    before_answer, rest = _split(
        _rest(render([user, answer, {"role": "user", "content": AGAIN}], False), one), ANSWER
    )
    between, _ = _split(rest, AGAIN)  # the end of an answer, and the begin of a question
    _, last = _split(render([user, answer], False), ANSWER)
    before_user = between.removeprefix(last)
    if not between.startswith(last) or not head.endswith(
        before_user
    ):  # an answer ends otherwise where it is the last
        before_user = _common_end(between, head)
    after_answer = between.removesuffix(before_user)
    around = {"user": (before_user, after_user), "assistant": (before_answer, after_answer)}
    return Turns(head.removesuffix(before_user), around, _rest(render([user], True), one), None)


def _common_end(a: str, b: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(a), reversed(b), strict=False))
    return "".join(x for x, _ in same)[::-1]


def _with_system(render: Render, plain: Turns) -> Turns:
    """Return the turns with what stands around a system message, and the one that the template gives itself."""
    before_user, after_user = plain.around["user"]
    whole = render([{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}], False)
    before, rest = _split(whole, SYSTEM)
    after = rest.removesuffix(f"{before_user}{USER}{after_user}")
    begin, room = plain.start, len(plain.start) - len(before) - len(after)
    if before and begin.startswith(before) and begin.endswith(after) and room >= 0:
        usual = begin[len(before) :][:room]
        return Turns("", {**plain.around, "system": (before, after)}, plain.answer, usual)
    return plain._replace(around={**plain.around, "system": (before.removeprefix(begin), after)})


def _rest(text: str, begin: str) -> str:
    if not text.startswith(begin):
        raise ValueError("the template changes earlier turns")
    return text[len(begin) :]


def _split(text: str, content: str) -> tuple[str, str]:
    before, after = text.split(content)
    return before, after


def _conversations(turns: Turns) -> list[list[Message]]:
    return [
        [{"role": role, "content": f"{role} says\n{i}: a b"} for i, role in enumerate(roles)]
        for roles in CHECKED
        if set(roles) <= turns.around.keys()
    ]


def rendered(turns: Turns, messages: Sequence[Message]) -> str:
    """Return what `go` makes of a conversation in Ollama."""
    if turns.usual is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": turns.usual}, *messages]
    parts = [turns.around[m["role"]][0] + m["content"] + turns.around[m["role"]][1] for m in messages]
    return turns.start + "".join(parts) + turns.answer


def go(turns: Turns) -> str:
    """Return the template in Go's language."""
    cases = " else ".join(
        f'if eq .Role "{role}" }}}}{_text(before)}{{{{ .Content }}}}{_text(after)}{{{{'
        for role, (before, after) in turns.around.items()
    )
    loop = f"{{{{ range .Messages }}}}{{{{ {cases} end }}}}{{{{ end }}}}"
    empty = (
        f"{{{{ if not .System }}}}{_text(''.join(turns.around['system']))}{{{{ end }}}}"
        if turns.usual == ""
        else ""
    )
    return _text(turns.start) + empty + loop + _text(turns.answer)


def _text(text: str) -> str:
    """Return text that stands for itself in a Go template, where an action may follow."""
    escaped = text.replace("{{", '{{ "{{" }}')
    return f'{escaped[:-1]}{{{{ "{{" }}}}' if escaped.endswith("{") else escaped
