# SPDX-License-Identifier: Apache-2.0
"""Render chat templates in a process that may be killed; run as a script by `template_trial.py`, never imported.

Reads {"templates": [..], "variables": {..}} as JSON from the standard input and renders each template for a few
conversations in a sandbox like transformers' own.  Only how it ends is of interest, so what a template itself raises is
ignored: the model's tokenizer will meet the same.  Nothing but jinja2 and the standard library is imported, which
takes some 50 ms.
"""

import json
import sys
from contextlib import suppress
from datetime import datetime

LONG = "What is the weather like today? " * 40
TURNS = [("system", "Be brief."), ("user", "hi"), ("assistant", "a"), ("user", LONG), ("assistant", LONG)]
CONVERSATIONS = (TURNS[1:2], TURNS[1:3], TURNS[:2], TURNS[:3], TURNS[1:4], TURNS * 4)


def limit(seconds: int, memory: int) -> None:
    """Limit this process's time and memory, where the system can (the parent's clock is there in any case)."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for what, most in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", memory),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_CORE", 0),
    ):
        with suppress(ValueError, OSError):  # macOS takes no limit of memory
            resource.setrlimit(getattr(resource, what), (most, most))


def environment() -> object:
    """Return a sandbox with what transformers' has."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block around what the assistant says; it changes nothing in the text."""

        tags = {"generation"}  # noqa: RUF012  # jinja2's own way

        def parse(self, parser):  # type: ignore[no-untyped-def]
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    sandbox.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


def render(source: str, variables: dict[str, object], most: int) -> int:
    """Render a template for all conversations; the exit code for what came of it."""
    sandbox = environment()
    try:
        template = sandbox.from_string(source)  # type: ignore[attr-defined]
    except MemoryError:
        return NO_MEMORY
    except Exception:
        return 0
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        for prompt in (True, False):
            length = 0
            try:
                for piece in template.generate(messages=messages, add_generation_prompt=prompt, **variables):
                    length += len(piece)
                    if length > most:
                        return TOO_LONG
            except MemoryError:
                return NO_MEMORY
            except Exception:
                continue
    return 0


TOO_LONG, NO_MEMORY = 3, 4

if __name__ == "__main__":
    seconds, memory, most = map(int, sys.argv[1:4])
    sys.path[:0] = sys.argv[4:]
    limit(seconds, memory)
    task = json.loads(sys.stdin.buffer.read())
    sys.exit(max(render(source, task["variables"], most) for source in task["templates"]))
