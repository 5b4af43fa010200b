# SPDX-License-Identifier: Apache-2.0
"""Write the Python objects that a library user hands over to files, so that a run can be repeated and resumed.

A recipe holds names.  So a model in memory is saved as a Hugging Face directory, rows as JSONL, each once under the
digest of its content in `OUT/objects`; a function gets an import path where it has one, and else a name that is known
in this process alone.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from fleetune.common.files import write_atomic
from fleetune.common.settings import Value
from fleetune.errors import DataError, ModelError

if TYPE_CHECKING:
    from fleetune.models.model import Model

FOLDER: Final = "objects"
PREFIX: Final = "fleetune_given_"


def model_name(model: object, tokenizer: object, out: Path) -> str:
    """Return a model's name: itself if it is one, else the directory that it is saved into.

    `model` may be a name, a path, a `Model`, a transformers model or a PEFT model, whose adapters are merged into a copy
    (these two with `tokenizer`).  ModelError for anything else.
    """
    if isinstance(model, str | Path):
        return str(model)
    from transformers import PreTrainedModel

    from fleetune import models

    if isinstance(model, models.Model):
        net, words, digest = model.net, model.tokenizer, _digest_of(model)
    else:
        net, words = _plain_net(model), tokenizer
        if words is None:
            raise ModelError("a model in memory needs its tokenizer", hint="give tokenizer=..")
        if not isinstance(net, PreTrainedModel):
            raise ModelError(
                f"a {type(model).__name__} is not a model",
                hint="give a name, a path, a transformers model or a PEFT model",
            )
        digest = models.digest(models.named_tensors(net))
    folder = out / FOLDER / f"model-{digest[:16]}"
    if not (folder / "config.json").is_file():
        models.save(net, words, folder)
    return str(folder)


def _digest_of(model: Model) -> str:
    """The digest of a model's present weights; ModelError where something is attached to them."""
    from fleetune import models

    if model.attachment is not None:
        raise ModelError(
            "the model carries a tuning that is not merged into its weights",
            hint="export the run to hf, and tune that directory",
        )
    return models.digest(models.named_tensors(model.net))


def _plain_net(model: Any) -> Any:
    """A PEFT model as a copy with its adapters merged; anything else as it is."""
    if not hasattr(model, "merge_and_unload"):
        return model
    import copy

    return copy.deepcopy(model).merge_and_unload()


def data_name(data: object, out: Path) -> str:
    """Return the name of a data set: itself if it is one, else the JSONL file that its rows are written into.

    `data` may be a name, a path, or any iterable of mappings: a list of dicts, a `datasets.Dataset`.  DataError for
    anything else.
    """
    if isinstance(data, str | Path):
        return str(data)
    if not isinstance(data, Iterable) or isinstance(data, Mapping | bytes):
        raise DataError(
            f"a {type(data).__name__} is not data", hint="give a file, a hub id, or rows as dicts"
        )
    lines = []
    for number, row in enumerate(data, 1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {number} is a {type(row).__name__}, not a dict", hint="rows map fields to texts"
            )
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False))
        except (TypeError, ValueError) as error:
            raise DataError(f"row {number} cannot be written as JSON: {error}") from error
    content = ("\n".join(lines) + "\n").encode()
    file = out / FOLDER / f"data-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content)
    return str(file)


def setting_values(settings: Mapping[str, Value | Callable[..., Any]]) -> dict[str, Value]:
    """Return the settings with every function (an objective, a reward) as its import path."""
    return {
        n: v if isinstance(v, str | int | float | bool) else function_name(v) for n, v in settings.items()
    }


def function_name(function: Callable[..., Any]) -> str:
    """Return `module:function` for a function that can be imported; else register it for this process alone."""
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "") or ""
    if name.isidentifier() and module not in ("", "__main__"):
        found = getattr(importlib.import_module(module), name, None)
        if found is function:
            return f"{module}:{name}"
    place = ModuleType(f"{PREFIX}{id(function):x}", "A function that a caller gave.")
    place.__dict__["function"] = function
    sys.modules[place.__name__] = place  # where an import path is looked up; it lives as long as the process
    return f"{place.__name__}:function"
