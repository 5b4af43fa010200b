# SPDX-License-Identifier: Apache-2.0
"""Render a model's chat template for the first time where it can do no harm.

A chat template is a program from elsewhere.  The sandbox that transformers renders it in stops access to anything, but
neither time nor memory: two nested loops or `'a' * 4000000000` run without end, in C code that no exception reaches.
So a child process renders it first (`template_child.py`), for a few short and long conversations, with a limit of
processor time, of memory and of output, and is killed when it goes beyond them.  It runs while the weights are read.

What a template does in other conversations than these is not limited: Ctrl-C ends it.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetune.errors import ModelError
from fleetune.models.chat_template import is_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CHILD: Final = Path(__file__).with_name("template_child.py")
SECONDS: Final = 2  # of processor time for all conversations; usual templates take 0.02
PATIENCE: Final = 20.0  # seconds until the child is killed, however little of the processor it got
MEMORY: Final = 1 << 30  # bytes
OUTPUT: Final = 1 << 24  # characters of a rendered conversation; usual ones have thousands
SOURCE: Final = 1 << 20  # characters of a template
HINT: Final = "the template is at fault: take it out of the tokenizer's files, or use another model"
DATE: Final = "26 Jul 2024"
_PASSED: Final[set[str]] = set()  # tasks that a child of this process has passed: a template is tried once
WHY: Final = {3: f"writes more than {OUTPUT:,} characters", 4: f"takes more than {MEMORY >> 20} MiB"}


@contextmanager
def template_trial(tokenizer: PreTrainedTokenizerBase, path: Path) -> Iterator[None]:
    """Try the chat template of a tokenizer while the block runs; ModelError after it when the trial failed.

    ModelError at once for what is no template, or is too long.
    """
    templates = _templates(tokenizer, path)
    if not templates:
        yield
        return
    task = _task(templates, tokenizer)
    if task in _PASSED:
        yield
        return
    child = _start(task)
    if child is None:
        log.warning("no process could be started to try the chat template of %s; it is used as it is", path)
        yield
        return
    try:
        yield
        _judge(child, path)
        _PASSED.add(task)
    finally:
        child.kill()
        child.wait()


def _templates(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[str]:
    """Return a tokenizer's templates (there may be several, by name); none where it has only the plain form."""
    if is_plain(tokenizer):
        return []
    found: Any = tokenizer.chat_template
    templates = list(found.values()) if isinstance(found, dict) else [found]
    for template in templates:
        if not isinstance(template, str):
            raise ModelError(
                f"the chat template in {path} is no text but {type(template).__name__}", hint=HINT
            )
    if (size := sum(map(len, templates))) > SOURCE:
        raise ModelError(
            f"the chat template in {path} has {size:,} characters, more than {SOURCE:,}", hint=HINT
        )
    return templates


def _task(templates: list[str], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the child is given, as JSON: the templates, and the variables that they see."""
    special = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    }
    return json.dumps({"templates": templates, "variables": {**special, "date_string": DATE}})


def _start(task: str) -> subprocess.Popen[bytes] | None:
    """Start the child and give it its task; None where the system starts none."""
    places = [
        Path(str(spec.origin)).parents[1] for name in ("jinja2", "markupsafe") if (spec := find_spec(name))
    ]
    command = [sys.executable, "-I", "-S", str(CHILD), *map(str, (SECONDS, MEMORY, OUTPUT, *places))]
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except OSError:
        return None
    with suppress(OSError):  # it is judged by its end
        assert child.stdin is not None
        with child.stdin as pipe:
            pipe.write(task.encode())
    return child


def _judge(child: subprocess.Popen[bytes], path: Path) -> None:
    try:
        code = child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        code = -1
    if code in WHY or code < 0:  # it says so, or was killed
        why = WHY.get(code, f"does not end within {SECONDS} s")
        raise ModelError(f"the chat template in {path} {why} when it is rendered", hint=HINT)
    if code:
        log.warning(
            "the chat template of %s could not be tried (exit code %d); it is used as it is", path, code
        )
