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
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from fleetune.common.settings import Value
from fleetune.data import sources
from fleetune.errors import DataError, ModelError, RecipeError
from fleetune.runs import rundir

FOLDER: Final = "objects"


def model_name(model: object, tokenizer: object, out: Path) -> str:
    """Return a model's name: itself if it is one, else the directory that it is saved into.

    `model` may be a name, a path, a `Model`, a transformers model or a PEFT model, whose adapters are merged into a copy
    (these two with `tokenizer`).  ModelError for anything else, and for weights or a tokenizer that cannot be used.
    """
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ModelError("a model that is named has its own tokenizer", hint="leave out tokenizer=..")
        return str(model)
    net, words = _parts(model, tokenizer)
    digest = _content_digest(net, words)
    folder = _folder(out) / f"model-{digest[:16]}"
    if not (folder / "config.json").is_file():
        from fleetune import models

        models.save(net, words, folder)
    return str(folder)


def is_model(value: object) -> bool:
    """Whether a value is a model in memory: a `Model`, or a transformers or PEFT model."""
    return hasattr(value, "named_parameters") or (hasattr(value, "net") and hasattr(value, "tokenizer"))


def is_adapted(model: object) -> bool:
    """Whether a value is a PEFT model, whose adapters are merged."""
    return hasattr(model, "merge_and_unload")


def _parts(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The plain net and the tokenizer of a model in memory, checked."""
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fleetune import models

    if isinstance(model, models.Model):
        if model.attachment is not None:
            raise ModelError(
                "the model carries a tuning that is not merged into its weights",
                hint="export the run to hf, and tune that directory",
            )
        net, words = model.net, model.tokenizer
    else:
        net, words = _plain_net(model), tokenizer
        if not isinstance(net, PreTrainedModel):
            raise ModelError(
                f"a {type(model).__name__} is not a model",
                hint="give a name, a path, a transformers or PEFT model with its tokenizer, or a fleetune.Model",
            )
    if not isinstance(words, PreTrainedTokenizerBase):
        raise ModelError(
            "a model in memory needs its tokenizer", hint="give tokenizer=.., a transformers tokenizer"
        )
    if any(p.is_meta for p in net.parameters()):
        raise ModelError("the model has no weights: it is on the meta device", hint="load its weights first")
    if len(words) > (rows := net.get_input_embeddings().weight.shape[0]):
        raise ModelError(
            f"the tokenizer has {len(words)} tokens, the model {rows}", hint="give the model's own tokenizer"
        )
    return net, words


def _content_digest(net: Any, tokenizer: Any) -> str:
    """SHA-256 of all that a saved directory holds: weights, configuration, tokenizer and chat template."""
    from fleetune import models
    from fleetune.models.net.model import stored_tensors

    parts = [
        models.digest(stored_tensors(net)),
        net.config.to_json_string(),
        models.tokenizer_digest(tokenizer),
        str(tokenizer.chat_template),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _plain_net(model: Any) -> Any:
    """A PEFT model as a copy with its adapters merged; anything else as it is."""
    if not is_adapted(model):
        return model
    import copy

    return copy.deepcopy(model).merge_and_unload()


def _folder(out: Path) -> Path:
    """The folder of saved objects, made if it is not there; StorageError when it cannot be."""
    rundir.check_writable(out / FOLDER)
    return out / FOLDER


def data_name(data: Any, out: Path) -> str:
    """Return the name of a data set: "" for None, itself if it is one, else the JSONL file that its rows are written into.

    `data` may be a name, a path, "-" (rows as JSONL from standard input), or any iterable of mappings: a list of dicts, a
    `datasets.Dataset`, a DataFrame.  DataError for anything else.
    """
    if isinstance(data, str) and data == sources.STDIN:
        return str(sources.store_stdin(_folder(out)))
    if data is None or isinstance(data, str | Path):
        return str(data or "")
    if hasattr(data, "to_dicts"):  # a polars DataFrame
        data = data.to_dicts()
    elif hasattr(data, "to_dict") and hasattr(
        data, "columns"
    ):  # a pandas DataFrame, whose missing values are NaN
        data = data.to_dict("records")
        data = [{name: None if _is_missing(value) else value for name, value in row.items()} for row in data]
    if not isinstance(data, Iterable) or isinstance(data, Mapping | bytes):
        raise DataError(
            f"a {type(data).__name__} is not rows",
            hint="give a file, a hub id, or rows as dicts (of one split)",
        )
    lines = []
    for number, row in enumerate(data, 1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {number} is a {type(row).__name__}, not a dict", hint="rows map fields to texts"
            )
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, default=_plain_value).encode() + b"\n")
        except (TypeError, ValueError) as error:
            raise DataError(
                f"row {number} cannot be written as JSON: {error}", hint="rows map fields to texts"
            ) from error
    return str(sources.store_rows(b"".join(lines), _folder(out)))


def _is_missing(value: Any) -> bool:
    """Whether a cell of a DataFrame holds nothing: None, NaN, or pandas' NA and NaT."""
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError):  # NA is neither; an array has no truth
        return type(value).__name__ == "NAType"


def _plain_value(value: Any) -> Any:
    """A value that JSON lacks: a numpy number or array, or a date as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not a text, a number or a list of them")


def setting_values(settings: Mapping[str, Value | Callable[..., Any]]) -> dict[str, Value]:
    """Return the settings as plain values: a function as its import path, a result as its folder.

    RecipeError for what is none of these.
    """
    if not isinstance(settings, Mapping):
        raise RecipeError([f"settings are a dict of names and values, not a {type(settings).__name__}"])
    return {str(name): _setting_value(str(name), value) for name, value in settings.items()}


def _setting_value(name: str, value: Any) -> Value:
    if isinstance(folder := getattr(value, "folder", None), Path):
        return str(folder)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a numpy number
        value = value.item()
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    if callable(value) and not isinstance(value, type):
        return function_name(value)
    raise RecipeError([f"{name} = {value!r} is not a text, a number, true or false, or a function"])


def function_name(function: Callable[..., Any]) -> str:
    """Return `module:function` for a function that can be imported; else register it for this process alone."""
    from fleetune.evaluation.objectives import GIVEN

    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "") or ""
    if name.isidentifier() and module not in ("", "__main__"):
        with suppress(ImportError):
            if getattr(importlib.import_module(module), name, None) is function:
                return f"{module}:{name}"
    place = ModuleType(f"{GIVEN}{id(function):x}", "A function that a caller gave.")
    place.__dict__["function"] = function
    sys.modules[place.__name__] = place  # where an import path is looked up; it lives as long as the process
    return f"{place.__name__}:function"
