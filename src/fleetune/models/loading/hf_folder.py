# SPDX-License-Identifier: Apache-2.0
"""Check that a folder is a complete Hugging Face directory, without reading weights.

The layout is transformers' own: config.json, model.safetensors (or shards and their index), tokenizer.json,
tokenizer_config.json, generation_config.json, chat_template.jinja.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from fleetune.errors import ModelError
from fleetune.models.cache import adapter_folder
from fleetune.models.cache.names import NAME_HINT
from fleetune.models.families.foreign import AGAIN, foreign_file
from fleetune.models.families.widths import KEY, base_type, config_from

SIZES: Final = (
    "num_hidden_layers",
    "n_layer",
    "hidden_size",
    "n_embd",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
COUNT: Final = re.compile(r"(layer|expert|label)s?$")  # transformers makes a list or a module for each
MOST: Final = 65_536


def check_folder(folder: Path) -> None:
    """Raise ModelError unless the directory holds a configuration, safetensors weights and a tokenizer."""
    config_of(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with foreign_file(index, "is damaged"):
            shards = {_plain_name(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        missing = sorted(s for s in shards if not (folder / s).is_file())
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of its weight files: {missing[0]}, ..", hint="fetch it again"
            )
    elif not (folder / "model.safetensors").is_file():
        from fleetune.models.artefact.artefact_folder import is_master

        if is_master(folder):
            raise ModelError(
                f"{folder} holds a compressed model, in a file of Fleetune's own",
                hint="fleetune export RUN --to hf",
            )
        pickled = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        raise ModelError(
            f"{folder} has a configuration but no weights (model.safetensors)"
            + (f"; {pickled[0]} is a pickle, which is never read" if pickled else ""),
            hint="save it as safetensors (save_pretrained does)" if pickled else AGAIN,
        )
    if not any(
        (folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        raise ModelError(
            f"{folder} has no tokenizer (tokenizer.json)", hint="save the tokenizer beside the model"
        )


def _plain_name(name: object) -> str:
    """Return a shard's file name; ValueError for what is none, such as a path that leads elsewhere."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
        raise ValueError(f"{name!r:.80} is no name of a weight file")
    return name


def config_of(folder: Path) -> Any:
    """Read a directory's configuration; ModelError unless it is a causal language model or an encoder."""
    file = folder / "config.json"
    if not file.is_file():
        if adapter_folder.is_adapter(folder):
            raise adapter_folder.refused(folder, folder)
        raise ModelError(f"'{folder}' is not a model directory: it has no config.json", hint=_instead(folder))
    with foreign_file(file, "is not a model configuration"):
        raw = json.loads(file.read_bytes())
        kind = base_type(raw["model_type"]) if KEY in raw else raw["model_type"]
        _check_kind(folder, raw, kind)
    _check_sizes(raw, file)
    with foreign_file(file):  # a configuration class may raise anything for a wrong value
        if KEY in raw:
            return config_from(raw)
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _check_kind(folder: Path, raw: dict[str, Any], kind: str) -> None:
    """Raise ModelError for a model that is neither causal nor an encoder, or whose weights are quantised."""
    again = "use a causal language model or a BERT-style encoder, such as: fleetune models"
    stated = raw.get("architectures") or []
    encoder = _is_encoder(kind, stated)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not encoder:
        own = (
            "needs code of its own, which is never run"
            if "auto_map" in raw
            else "is not a causal language model or an encoder"
        )
        raise ModelError(
            f"{folder} is of type '{kind}', which {own} (transformers {transformers.__version__})", hint=again
        )
    if stated and not encoder and not set(stated) & _causal_classes():
        raise ModelError(
            f"{folder} holds a {stated[0]}, which does not generate text from left to right", hint=again
        )
    if raw.get("is_encoder_decoder"):
        raise ModelError(f"{folder} holds an encoder-decoder ({kind})", hint=again)
    if quantised := raw.get("quantization_config"):
        how = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        raise ModelError(
            f"{folder} is quantised ({how}); plain weights are needed", hint="use the model it was made from"
        )


def _check_sizes(raw: dict[str, Any], file: Path) -> None:
    """Raise ModelError for sizes (blocks, heads, ..) below 1 and counts above `MOST`, which transformers itself accepts."""
    for name, value in raw.items():
        if type(value) is int and ((name in SIZES and value < 1) or (value > MOST and COUNT.search(name))):
            why = "below 1" if value < 1 else f"more than {MOST:,}"
            raise ModelError(f"{file} says {name} = {value}, {why}", hint=AGAIN)


def is_encoder(config: Any) -> bool:
    """Return whether a configuration is of an encoder, which gets a classification head (else: a causal model)."""
    return _is_encoder(config.model_type, config.architectures or [])


def _is_encoder(kind: str, stated: list[str]) -> bool:
    """Return whether transformers knows the type as a masked language model; some of these can be made causal too."""
    encoders = (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() & MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys()
    )
    return kind in encoders and not set(stated) & _causal_classes()


def _causal_classes() -> set[str]:
    names: set[str] = set()
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update((entry,) if isinstance(entry, str) else entry)
    return names


def _instead(folder: Path) -> str:
    if files := sorted(folder.glob("*.gguf")):
        return f"give the file: {files[0]}"
    return NAME_HINT
