"""Tell what a model's name is: a built-in one, a short one, a path or a hub id; and what a folder is by its files.

A short name stands for a hub id, without a fixed revision; a folder or file of that name takes precedence.  Imports are light.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fleetune.common.display import quoted
from fleetune.errors import ModelError, suggest
from fleetune.models.cache.cache import ORIGINS, Origin

NAME_HINT: Final = "give a built-in name (fleetune models), a model directory, a .gguf file or a hub id"


def check(name: str) -> None:
    """ModelError for a name that no model can have, and for a path that leads nowhere."""
    if name not in ORIGINS and local(name) is None:
        hub_id(name)


def local(name: str) -> Path | None:
    """Return the existing path that `name` is, or None when it may be a hub id."""
    if not name:
        raise ModelError("no model was named", hint=NAME_HINT)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"'{name}' is a file, but not a .gguf file", hint=NAME_HINT)
        return path
    if path.is_symlink():
        raise ModelError(f"'{name}' is a link that leads nowhere", hint=f"remove it, or {NAME_HINT}")
    like_a_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or re.match(r"[A-Za-z]:[\\/]", name)
    if like_a_path or path.suffix.lower() == ".gguf":
        raise ModelError(f"there is no file or directory '{name}'", hint="check the path, or " + NAME_HINT)
    return None


def can_be_fetched(name: str) -> bool:
    """Whether a name, as another machine gives it, is one that we know: a built-in model's or a short name.

    A model that anybody else has put on the hub brings a chat template, which sees the rows.
    """
    return name in ORIGINS or name in SHORT_NAMES


def hub_id(name: str) -> str:
    """Return the hub id that a name is or stands for; ModelError for one that cannot be, with a built-in name that is like it."""
    if name in SHORT_NAMES:
        return SHORT_NAMES[name].hub
    if "/" not in name and (guess := suggest(name.lower(), ORIGINS) or suggest(name.lower(), SHORT_NAMES)):
        raise ModelError(f"no model named '{name}'.{guess}", hint=NAME_HINT)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name or "--" in name:
        raise ModelError(f"'{name}' is not a model's name", hint=NAME_HINT)
    return name


@dataclass(frozen=True)
class ShortName:
    """A model on the hub that has a short name."""

    name: str
    hub: str  # hub id
    params: float  # about, as the card rounds
    licence: str
    gated: bool = False  # the hub asks for an account that has accepted the licence


_ALL: Final = (
    ShortName("gemma-3-270m", "google/gemma-3-270m-it", 270e6, "gemma", gated=True),
    ShortName("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", 360e6, "apache-2.0"),
    ShortName("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 490e6, "apache-2.0"),
    ShortName("qwen3-0.6b", "Qwen/Qwen3-0.6B", 600e6, "apache-2.0"),
    ShortName("gemma-3-1b", "google/gemma-3-1b-it", 1e9, "gemma", gated=True),
    ShortName("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.1e9, "apache-2.0"),
    ShortName("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", 1.23e9, "llama3.2", gated=True),
    ShortName("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1.7e9, "apache-2.0"),
)
SHORT_NAMES: Final[Mapping[str, ShortName]] = MappingProxyType({s.name: s for s in _ALL})


def hub_of(name: str) -> str | None:
    """Return the hub id of a built-in model or a short name; None for any other name."""
    found = _known(name)
    return found.hub if found else None


def licence_of(name: str) -> str | None:
    """Return the licence of a built-in model or a short name; None for any other name."""
    found = _known(name)
    return found.licence if found else None


def _known(name: str) -> Origin | ShortName | None:
    short = SHORT_NAMES.get(name)
    return ORIGINS.get(name) or (None if short and Path(name).exists() else short)


# ---------------------------------------------------------------- folders

MASTER: Final = "master.safetensors"  # the file of an artefact of codes
ADAPTER_CONFIG: Final = "adapter_config.json"  # PEFT's
OURS: Final = "module.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
BASE: Final = "base_model_name_or_path"
MODEL: Final = "config.json"  # a folder that has it is a model's
PAGE: Final = "fleetune help models#tuning-on-from-an-adapter"
UNMERGED: Final = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")  # tokens before the text, not other weights
MERGE: Final = (
    "from peft import PeftModel; from transformers import {auto}, AutoTokenizer; "
    "PeftModel.from_pretrained({auto}.from_pretrained({base}), {adapter}).merge_and_unload()"
    '.save_pretrained("merged"); AutoTokenizer.from_pretrained({base}).save_pretrained("merged")'
)


def is_adapter(folder: Path) -> bool:
    """Return whether this is an adapter's folder: PEFT's, one fetched without its settings, or one of our own layout."""
    return not (folder / MODEL).is_file() and any(
        (folder / file).is_file() for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, OURS)
    )


def check_no_adapter(name: str) -> None:
    """Raise ModelError for a name that is the folder of an adapter."""
    if name not in ORIGINS and is_adapter(folder := Path(name).expanduser()):
        raise adapter_refused(name, folder)


def adapter_refused(name: object, folder: Path) -> ModelError:
    """Return the error for an adapter where a model is needed, with the command that merges it into its base."""
    if (folder.parent / "run.toml").is_file():
        run = quoted(folder.parent)
        return ModelError(f"{name} is the adapter of a run, not a model", hint=f"give the run: {run}")
    what = f"{name} is an adapter, not a model: its base without it is another model"
    if (folder / OURS).is_file():
        return ModelError(
            what, hint="give the run that it was made in; or write that out: fleetune export RUN --to hf"
        )
    settings = _settings(folder)
    if (kind := settings.get("peft_type")) in UNMERGED:
        return ModelError(what, hint=f"PEFT runs it beside its base; {kind} cannot be merged into weights")
    auto = (
        "AutoModelForSequenceClassification"
        if settings.get("task_type") == "SEQ_CLS"
        else "AutoModelForCausalLM"
    )
    words = (str(settings.get(BASE) or "BASE"), str(folder))
    base, adapter = (json.dumps(word, ensure_ascii=False) for word in words)
    code = quoted(MERGE.format(auto=auto, base=base, adapter=adapter))
    return ModelError(
        what,
        hint=f"merge it into its base first ({PAGE}): python -c {code}   and then give merged as the model",
    )


def _settings(folder: Path) -> dict[str, Any]:
    """Return what adapter_config.json says; {} for one that is missing or damaged."""
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_master(path: Path) -> bool:
    """Return whether this is the folder of an artefact."""
    return (path / MASTER).is_file()
