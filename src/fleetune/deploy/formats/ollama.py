"""Write a folder for Ollama: the GGUF file, and a Modelfile that names the tokens which end an answer."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fleetune.data.encode import stop_ids
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Report, _gguf_vocabulary, gguf
from fleetune.errors import FleetuneError

TARGETS: Final = {
    "ollama": "a folder with the GGUF file and a Modelfile: ollama create NAME -f FOLDER/Modelfile",
    "ollama:q8_0": "the same, plain weights rounded to 8.5 bits",
}
BLOCK_WIDTHS: Final = True
PROVENANCE: Final = True
ORDER: Final = 20
FILE: Final = "model.gguf"


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
    """Write the Modelfile of a model with this tokenizer; return a note on end tokens that it cannot quote."""
    try:
        ids = stop_ids(tokenizer)
    except FleetuneError:  # a template that refuses a question and its answer
        ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    odd = [token for token in tokens if '"' in token or not token.isprintable()]
    stops = [f'PARAMETER stop "{token}"' for token in tokens if token not in odd]
    (folder / "Modelfile").write_text("\n".join([f"FROM ./{FILE}", *stops, ""]), encoding="utf-8")
    note = f"a Modelfile cannot quote {', '.join(map(ascii, odd))}: answers that end so do not stop there"
    return [note] if odd else []
