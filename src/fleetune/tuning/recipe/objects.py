"""Write the Python objects that a library user hands over to files, so that a run can be repeated and resumed.

A model in memory becomes a Hugging Face directory, rows a JSONL file, each once under the digest of its content in `OUT/objects`.
"""

import copy
import hashlib
import importlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from fleetune.common.display import quoted
from fleetune.common.registry import Listed
from fleetune.common.settings import Value
from fleetune.data import sources
from fleetune.errors import DataError, ModelError, RecipeError, UsageError
from fleetune.runs import rundir
from fleetune.tuning import methods
from fleetune.tuning.recipe.recipe import AUTO_METHOD, Recipe

PREFIX: Final = "fleetune_given_method_"
# in a run's folder, by the method's KIND
RESULT: Final = {"ledger": "ledger.safetensors", "adapter": "adapter"}
STATED: Final = ("KIND", "PAPER", "SENDS", "CLIENTS")
HINT: Final = "what a method is: CONTRIBUTING.md#add-a-tuning-method"


def registered(method: object) -> str:
    """Make the class of a method known in this process, and return its name; UsageError for what is no method."""
    cls = type(method)
    who = f"{cls.__name__} of {cls.__module__}"
    if not isinstance(method, methods.Method):
        raise UsageError(f"{who} is no method: it does not inherit fleetune.tuning.methods.Method", hint=HINT)
    constants = {name: value for name in STATED if (value := _stated(cls, name)) is not None}
    if constants.get("KIND") not in RESULT:
        raise UsageError(
            f"{who} does not state KIND = {' or '.join(map(repr, RESULT))}, what a run leaves",
            hint=f"state it in its module or as a ClassVar of the class; {HINT}",
        )
    name = name_of(cls)
    known = methods.entries().get(name)
    if name == AUTO_METHOD or (known is not None and not known.module.startswith(PREFIX)):
        raise UsageError(f"{who} has the name of the method '{name}'", hint="rename it")
    place = ModuleType(f"{PREFIX}{name}", cls.__doc__)
    place.__dict__["Method"] = cls
    sys.modules[place.__name__] = place
    doc = (cls.__doc__ or "").strip().split("\n")[0]
    doc = "" if doc.startswith(f"{cls.__name__}(") else doc  # one that dataclass wrote
    methods.REGISTRY.give(Listed(name, place.__name__, doc, constants))
    return name


def name_of(cls: type) -> str:
    """Return a class's name as a method's: of a class `Method` that of its module, in lower case, with "-" between words."""
    text = cls.__name__
    if text == "Method":
        text = cls.__module__.rpartition(".")[2]
        if text == "__main__":
            text = Path(getattr(sys.modules["__main__"], "__file__", None) or "method").stem
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", text)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "method"


def entry_of(run: Path, recipe: Recipe) -> methods.MethodEntry:
    """Return the method of a run; of one that is not known here what the run's result tells, which suffices to use it.

    A class that was given later with the same name is another method where its runs leave another result.
    """
    kind = next((kind for kind, name in RESULT.items() if (run / name).exists()), None)
    try:
        known = methods.entry(recipe.method)
    except UsageError:
        if kind is None:
            raise
    else:
        if kind in (None, known.kind) or not known.module.startswith(PREFIX):
            return known
    return methods.MethodEntry(recipe.method, kind, "", "", "", "", max(1, recipe.clients), 0)


def method_settings(recipe: Recipe) -> dict[str, Value]:
    """Return all settings of a run's method by name; of one that is not known here those that the run wrote down: all."""
    known = methods.entries().get(recipe.method.replace("_", "-"))
    if known is None:
        return dict(recipe.set)
    try:
        return methods.values_of(methods.make(recipe.method, recipe.set))
    except RecipeError:
        if not known.module.startswith(PREFIX):
            raise
        return dict(recipe.set)  # of a class that was given before


def check_known(name: str, run: Path) -> None:
    """UsageError where a run's method is not known in this process."""
    if name.replace("_", "-") not in methods.entries():
        raise UsageError(
            f"{run} was made by the method '{name}', which is not known here",
            hint="one that was given as an object is known in its own process alone: register it (CONTRIBUTING.md), "
            f"then: fleetune tune --resume {quoted(run)}",
        )


def _stated(cls: type, name: str) -> Any:
    """Return a constant of a class, or of the first module in its order of inheritance that has it; None for none."""
    if (own := getattr(cls, name, None)) is not None:
        return own
    homes = (vars(sys.modules.get(base.__module__, object)) for base in cls.__mro__)
    return next((home[name] for home in homes if name in home), None)


FOLDER: Final = "objects"
NOT_CONTENT: Final = ("architectures", "transformers_version", "use_cache")  # saving sets them, or use does


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
        net = copy.deepcopy(model).merge_and_unload() if is_adapted(model) else model
        words = tokenizer
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
    from fleetune import models
    from fleetune.models.net.model import stored_tensors

    stated = {n: v for n, v in json.loads(net.config.to_json_string()).items() if n not in NOT_CONTENT}
    parts = [
        models.digest(stored_tensors(net)),
        json.dumps([type(net).__name__, stated], sort_keys=True),
        models.tokenizer_digest(tokenizer),
        str(tokenizer.chat_template),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _folder(out: Path) -> Path:
    rundir.check_writable(out / FOLDER)
    return out / FOLDER


def data_name(data: Any, out: Path) -> str:
    """Return the name of a data set: "" for None, itself if it is one, else the JSONL file that its rows are written into.

    `data` may be a name, a path, "-" (rows as JSONL from standard input), or any iterable of mappings: a list of dicts, a
    `datasets.Dataset`, a DataFrame; or a dict of columns, each a list.  DataError for anything else.
    """
    if isinstance(data, str) and data == sources.STDIN:
        return str(sources.store_stdin(_folder(out)))
    if data is None or isinstance(data, str | Path):
        return str(data or "")
    if hasattr(data, "to_dicts"):  # a polars DataFrame
        data = data.to_dicts()
    elif hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas, whose missing values are NaN
        data = data.to_dict("records")
        data = [{name: None if _is_missing(value) else value for name, value in row.items()} for row in data]
    elif isinstance(data, dict) and {*map(type, data.values())} == {list}:  # columns
        data = [dict(zip(data, row, strict=True)) for row in itertools.zip_longest(*data.values())]
    if not isinstance(data, Iterable) or isinstance(data, Mapping | bytes):
        raise DataError(
            f"a {type(data).__name__} is not rows", hint="give a file, a hub id, or dicts (of one split)"
        )
    lines = []
    for number, row in enumerate(data, 1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {number} is a {type(row).__name__}, not a dict", hint='{"prompt": .., "response": ..}'
            )
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, default=_plain_value).encode() + b"\n")
        except (TypeError, ValueError) as error:
            raise DataError(
                f"row {number} cannot be written as JSON: {error}", hint="rows map fields to texts"
            ) from error
    return str(sources.store_rows(b"".join(lines), _folder(out)))


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError):  # NA is neither; an array has no truth
        return type(value).__name__ == "NAType"


def _plain_value(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not a text, a number or a list of them")


def setting_values(settings: Mapping[str, Value | Callable[..., Any]]) -> dict[str, Value]:
    """Return the settings as plain values: a function as its import path, a result as its folder.

    RecipeError for what is not one of these.
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
