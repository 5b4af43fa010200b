# SPDX-License-Identifier: Apache-2.0
"""Tell an adapter's folder by its files, and say how it becomes a model; nothing heavy is imported for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from fleetune.common.shell import quoted
from fleetune.errors import ModelError
from fleetune.models.cache import cache

PEFT: Final = "adapter_config.json"
OURS: Final = "module.json"
WEIGHTS: Final = "adapter_model.safetensors"
BASE: Final = "base_model_name_or_path"
MODEL: Final = "config.json"  # a folder that has it is a model's
PAGE: Final = "docs/models.md#tuning-on-from-an-adapter"
UNMERGED: Final = (
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
)  # tokens before the text, not a change of weights
MERGE: Final = (
    "from peft import PeftModel; from transformers import {auto}, AutoTokenizer; "
    "PeftModel.from_pretrained({auto}.from_pretrained({base}), {adapter}).merge_and_unload()"
    '.save_pretrained("merged"); AutoTokenizer.from_pretrained({base}).save_pretrained("merged")'
)


def is_adapter(folder: Path) -> bool:
    """Return whether this is an adapter's folder: PEFT's, one fetched without its settings, or one of our own layout."""
    return not (folder / MODEL).is_file() and any((folder / file).is_file() for file in (PEFT, WEIGHTS, OURS))


def of_peft(name: object) -> Path | None:
    """Return the folder of PEFT's adapter that a text or path is; None for all else, and for the one in a run's folder."""
    if not isinstance(name, str | Path) or str(name) in cache.ORIGINS:
        return None
    folder = Path(name).expanduser()
    in_run = (folder.parent / "run.toml").is_file()
    return folder if (folder / PEFT).is_file() and not (folder / MODEL).is_file() and not in_run else None


def base_of(folder: Path) -> str:
    """Return the base that an adapter says it is of: a built-in name where that has the hub id; "" where it says none."""
    base = str(_settings(folder).get(BASE) or "")
    return next((name for name, origin in cache.ORIGINS.items() if origin.hub == base), base)


def check(name: str) -> None:
    """Raise ModelError for a name that is the folder of an adapter."""
    if name not in cache.ORIGINS and is_adapter(folder := Path(name).expanduser()):
        raise refused(name, folder)


def refused(name: object, folder: Path) -> ModelError:
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
        found = json.loads((folder / PEFT).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
