"""Read a YAML file of axolotl, LLaMA-Factory or mlx-lm as a recipe, and name what of it has no place in one.

They tune in one place: its rows are those of one client, whose rounds are passes, unless `clients` says otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from fleetune.common import words
from fleetune.errors import RecipeError

SUFFIXES: Final = (".yml", ".yaml")
USUAL: Final = {"method": "fedit", "clients": 1}
ANYWAY: Final = (  # is so here too, or changes no weight
    "train test do_train model_type tokenizer_type processor_type type template sample_packing packing pad_to_sequence_len "
    "flash_attention attn_implementation logging_steps save_steps save_strategy save_every steps_per_report steps_per_eval "
    "plot_loss overwrite_output_dir overwrite_cache strict group_by_length mask_prompt preprocessing_num_workers "
    "dataloader_num_workers dataset_prepared_path dataset_dir save_only_model val_batches test_batches "
    "per_device_eval_batch_size eval_batch_size"
)


def read(path: Path, names: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """Return a recipe's values and what to say of them; `names` are the options of a recipe.

    RecipeError for a file that is no YAML, or holds no keys.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError([f"{path} is not YAML: {' '.join(str(error).split())}"]) from error
    except OSError as error:
        raise RecipeError([f"no recipe at {path} ({error.strerror})"]) from error
    if not isinstance(found, dict):
        raise RecipeError([f"{path} holds no keys"], hint="a recipe in TOML, or the YAML of another tool")
    theirs = _flat({str(key): value for key, value in found.items()})
    values: dict[str, Any] = dict(USUAL)
    chosen, left = dict[str, Any](), dict[str, Any]()
    for key, value in theirs.items():
        if value in ("sft", None) or value is False or value in ("", "auto", [], {}) or key in ANYWAY.split():
            continue
        said = _said(key, value, names)
        if not said:
            left[key] = value
        chosen |= {name[4:]: one for name, one in said.items() if name.startswith("set.")}
        values |= {name: one for name, one in said.items() if not name.startswith("set.")}
    values["set"] = chosen
    return values, _told(path, values, left)


def _said(key: str, value: Any, names: Mapping[str, object]) -> dict[str, Any]:
    """Return what a key says in our words; {} where it has no place."""
    word = key if key in names else words.RECIPE.get(key, "")
    if isinstance(value, list):
        value = ",".join(map(str, value)) if all(isinstance(one, str) for one in value) else None
    if not word or value is None or isinstance(value, dict):
        return {}
    if value is True and word.startswith("set."):
        value = "true"
    try:
        said = words.meaning(word, math.ceil(float(value)) if word == "epochs" else value)
    except ValueError:
        return {}
    known = all(name in names or name.startswith("set.") for name in said)
    odd = word == "method" and str(value).lower() not in words.VALUES["method"] and key != "method"
    return said if known and not odd else {}


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """Return the keys without tables in them, the batch as one number, and the data as a name."""
    lora = found.pop("lora_parameters", None)
    if isinstance(lora, dict):  # mlx-lm: `scale` is alpha / r
        rank, scale = lora.pop("rank", None), lora.pop("scale", None)
        found |= {f"lora_{key}": value for key, value in lora.items() if isinstance(key, str)}
        if isinstance(rank, int):
            found["lora_rank"] = rank
            found |= {"lora_alpha": round(scale * rank)} if isinstance(scale, int | float) else {}
    every = found.get("gradient_accumulation_steps")
    for key in ("micro_batch_size", "per_device_train_batch_size", "batch_size"):
        if isinstance(every, int) and isinstance(size := found.get(key), int):
            found[key] = size * found.pop("gradient_accumulation_steps", 1)
    sets = found.get("datasets")
    if isinstance(sets, list) and len(sets) == 1 and isinstance(sets[0], dict) and "path" in sets[0]:
        files = sets[0].get("data_files")
        found["datasets"] = files if isinstance(files, str) else sets[0]["path"]
    listed, name = Path(str(found.get("dataset_dir") or "data"), "dataset_info.json"), found.get("dataset")
    if isinstance(name, str) and listed.is_file():  # LLaMA-Factory: a name in its list
        with suppress(ValueError, KeyError, TypeError):
            found["dataset"] = str(listed.parent / json.loads(listed.read_text("utf-8"))[name]["file_name"])
    return found


def _told(path: Path, values: Mapping[str, Any], left: Mapping[str, Any]) -> list[str]:
    pairs = [f"{key} = {value}" for key, value in values.items() if key != "set"]
    told = [
        f"{path} is read as: {', '.join([*pairs, *(f'set.{k} = {v}' for k, v in values['set'].items())])}"
    ]
    if left:
        shown = [f"{k} = {v}" if isinstance(v, str | int | float) else k for k, v in left.items()]
        told.append(f"has no place here: {', '.join(shown)}")
    if values.get("base") == "mapped":
        told.append(words.REMARKS["base=mapped"])
    return told
