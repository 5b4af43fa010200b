# SPDX-License-Identifier: Apache-2.0
"""Write a folder for Ollama: the GGUF file, and a Modelfile that says how it is asked.

    ollama create NAME -f FOLDER/Modelfile

The Modelfile (docs.ollama.com/modelfile) has the chat template that the model was tuned with in Ollama's own language
(`_ollama_template.py`), the system message that the template gives itself, and the tokens that end an answer.  Without it
Ollama takes the known template that looks most alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fleetune.data.encode import DATE, stop_ids
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Report, _gguf_vocabulary, _ollama_template, gguf
from fleetune.errors import FleetuneError
from fleetune.models import chat_template as plain

TARGETS: Final = {
    "ollama": "a folder with the GGUF file and a Modelfile: ollama create NAME -f FOLDER/Modelfile",
    "ollama:q8_0": "the same, plain weights rounded to 8.5 bits",
}
BLOCK_WIDTHS: Final = True
PROVENANCE: Final = True
ORDER: Final = 20
FILE: Final = "model.gguf"
QUOTES: Final = '"""'  # of a text of several lines in a Modelfile


def check(model: Checkpoint, kind: str | None) -> None:
    """Raise UsageError when the model has no place in GGUF."""
    gguf.check(model, kind)


def write(model: Checkpoint, folder: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write `model` and its Modelfile into the empty `folder`; raises what `gguf.write` does."""
    report = gguf.write(model, folder / FILE, kind, made)
    notes = add_modelfile(_gguf_vocabulary.load(model.folder), folder)
    return dataclasses.replace(
        report,
        path=folder,
        to="ollama" if kind is None else f"ollama:{kind}",
        bytes=sum(file.stat().st_size for file in folder.iterdir()),
        notes=(*report.notes, *notes),
    )


def add_modelfile(tokenizer: Any, folder: Path) -> list[str]:
    """Write the Modelfile of a model with this tokenizer; return notes for the user."""
    text, notes = modelfile(tokenizer)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return notes


def modelfile(tokenizer: Any) -> tuple[str, list[str]]:
    """Return a Modelfile, and notes."""
    template = plain.template(tokenizer) if plain.is_plain(tokenizer) else None

    def render(messages: Sequence[Mapping[str, str]], asking: bool) -> str:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=asking, date_string=DATE,
        )  # fmt: skip
        return str(text)

    lines, (stops, notes) = [f"FROM ./{FILE}"], _stops(tokenizer)
    turns = _ollama_template.read(render, _first(tokenizer))
    if turns is None or any(QUOTES in text for text in (_ollama_template.go(turns), turns.usual or "")):
        note = "the chat template has no form in Ollama's language, which takes its own guess: compare its prompts"
        return "\n".join([*lines, *stops, ""]), [note, *notes]
    lines.append(f"TEMPLATE {QUOTES}{_ollama_template.go(turns)}{QUOTES}")
    if turns.usual:
        lines.append(f"SYSTEM {QUOTES}{turns.usual}{QUOTES}")
    if "system" not in turns.around:
        notes.insert(0, "the chat template has no system message: Ollama's are left out")
    return "\n".join([*lines, *stops, ""]), notes


def _first(tokenizer: Any) -> str:
    """Return the token that is put in front of every text, "" for none."""
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return str(tokenizer.bos_token) if begins and tokenizer.bos_token_id is not None else ""


def _stops(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Return the lines that name the tokens which end an answer, and a note on those that a Modelfile cannot quote."""
    try:
        ids = sorted(stop_ids(tokenizer))
    except FleetuneError:  # a template that refuses a question and its answer
        ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    odd = [token for token in tokens if '"' in token or not token.isprintable()]
    note = f"a Modelfile cannot quote {', '.join(map(ascii, odd))}: answers that end so do not stop there"
    return [f'PARAMETER stop "{token}"' for token in tokens if token not in odd], [note] * bool(odd)
