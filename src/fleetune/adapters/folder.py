"""Save and load an adapter as a PEFT directory where PEFT supports it, else as two files of our own; both are exact to the bit.

PEFT has LoRA (a classification head in `modules_to_save`), the prefix in every layer of a decoder, and a decoder's soft prompt.
Our files are module.json (the spec, and its base) and module.safetensors (the fp32 tensors by name).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from fleetune import models
from fleetune.adapters.attachment import AdapterSpec, Attachment, attach, attachment_of, detach, load_
from fleetune.adapters.bitfit import Bitfit, Full
from fleetune.adapters.bottleneck import Bottleneck
from fleetune.adapters.lora import ADAPTER, Lora, LoraPart
from fleetune.adapters.prefix import Prefix
from fleetune.adapters.prompt import Prompt
from fleetune.adapters.scales import Scales
from fleetune.common import sums
from fleetune.common.files import staged
from fleetune.data.encode import DATE, end_id
from fleetune.errors import FleetuneError, ModelError, VersionError
from fleetune.models.cache import cache, names
from fleetune.models.net.chat_template import is_plain, own_system
from fleetune.models.net.layers import head_of, is_causal, layers_of
from fleetune.models.net.model import Model

FRONT: Final = "base_model.model."  # of PEFT's tensor names
VERSION: Final = 1
MOST_JSON: Final = 1 << 20  # bytes of a configuration; a large model's layers, all named, are a fifth of it
REMEDY: Final = (
    "copy the folder again from its run, which writes its own again: fleetune tune --resume RUN; "
    f"if it was changed on purpose, remove {sums.FILE} from it"
)
# settings of PEFT that change no output, and the targets: the names of the tensors hold these
FREE: Final = {"base_model_name_or_path", "lora_dropout", "peft_version", "revision", "target_modules"}
# by the name in module.json; LoRA is always in PEFT's layout
KINDS: Final[Mapping[str, type[Any]]] = MappingProxyType(
    {
        "bottleneck": Bottleneck,
        "bitfit": Bitfit,
        "full": Full,
        "prefix": Prefix,
        "prompt": Prompt,
        "scales": Scales,
    }
)


def save(model: Model, path: Path, *, private: bool = False) -> None:
    """Write a model's adapter as a directory, in PEFT's layout where it has one for it.

    `base_model_name_or_path` is the hub id (of a built-in too) or the last part of a local path, never a
    path of this machine; `revision` the hub commit where it is known.  Whole or not at all; file modes by
    the umask, or for the owner alone (`private`).  StorageError when the disk is full or not writable.
    """
    attachment = attachment_of(model)
    in_peft = _peft(model, attachment)
    head, tensors = in_peft or _ours(model, attachment)
    stem = "adapter_{}" if in_peft else "module"
    config, file = f"{stem.format('config')}.json", f"{stem.format('model')}.safetensors"
    with staged(path, replace=config, private=private) as folder, models.disk_errors(path):
        contiguous = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        save_file(contiguous, folder / file, metadata={"format": "pt"})
        text = json.dumps(head, indent=2, sort_keys=True, default=_plain)
        (folder / config).write_text(text + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(model, attachment.spec, bool(in_peft)), encoding="utf-8")
        sums.write(folder)


def load(model: Model, path: Path) -> None:
    """Attach a saved adapter; ModelError, with nothing attached, if it is missing, damaged or another model's."""
    try:
        ours = (path / "module.json").is_file()
        file = "module.json" if ours else "adapter_config.json"
        if (path / file).stat().st_size > MOST_JSON:
            raise ValueError(f"{file} has more than {MOST_JSON:,} bytes")
        config = json.loads((path / file).read_text(encoding="utf-8"))
        tensors = load_file(path / ("module.safetensors" if ours else "adapter_model.safetensors"))
        spec, arrays = _from_ours(config, tensors) if ours else _from_peft(config, tensors, model)
        _check_size(spec, arrays)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ModelError(
            f"{path} is not a usable adapter ({error})", hint="finish or repeat the run"
        ) from error
    if odd := [name for name, values in arrays.items() if not np.isfinite(values).all()]:
        raise ModelError(f"{path} has numbers in '{odd[0]}' that are not finite", hint=REMEDY)
    attach(model, spec, seed=0)
    try:
        load_(model, arrays)
        if not ours:
            _check_peft(config, model, path)
    except FleetuneError:
        detach(model)
        raise


def _check_size(spec: AdapterSpec, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError for a size that no tensor has: memory for it would be taken before they are compared."""
    for name in {"r", "tokens", "size"} & vars(spec).keys():
        size = vars(spec)[name]
        if not any(size in a.shape for a in arrays.values() if a.size):
            raise ValueError(f"its {name} is {size}, and none of its tensors has that size")


# ---------------------------------------------------------------- our own layout


def _ours(model: Model, attachment: Attachment) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    kind = next(name for name, cls in KINDS.items() if isinstance(attachment.spec, cls))
    head = {
        "format": "fleetune-module",
        "version": VERSION,
        "module": kind,
        "spec": vars(attachment.spec),
        "base": _public_name(model),
        "base_digest": model.digest,
        "dtype": model.dtype,
    }
    return head, attachment.parameters


def _from_ours(config: Mapping[str, Any], tensors: dict[str, Any]) -> tuple[AdapterSpec, dict[str, Any]]:
    if config["version"] != VERSION:
        raise VersionError("module.json")
    return KINDS[config["module"]](**config["spec"]), tensors


# ---------------------------------------------------------------- PEFT's layout


def _peft(model: Model, attachment: Attachment) -> tuple[dict[str, Any], Mapping[str, Tensor]] | None:
    """Return (configuration, tensors) as PEFT reads them; None for what PEFT cannot load."""
    spec, net = attachment.spec, model.net
    if isinstance(spec, Lora):
        config, tensors = _lora_in_peft(attachment, net)
    elif isinstance(spec, Prefix) and spec.layers is None and _prefix_fits_peft(net):
        config, tensors = _prefix_in_peft(attachment, spec, net)
    elif isinstance(spec, Prompt) and is_causal(net) and not head_of(net):
        width = net.get_input_embeddings().weight.shape[1]
        config = PromptTuningConfig(num_virtual_tokens=spec.tokens, token_dim=width).to_dict()
        text = net.config.get_text_config()
        heads = getattr(text, "num_attention_heads", 1)  # PEFT wants a number, a prompt has no use for it
        sizes = {"num_layers": text.num_hidden_layers, "num_attention_heads": heads}
        config.update(sizes, num_transformer_submodules=1, task_type=TaskType.CAUSAL_LM)
        tensors = {"prompt_embeddings": attachment.parameters["prompt.embeddings"]}
    else:
        return None
    config.update(
        inference_mode=True,
        base_model_name_or_path=_public_name(model),
        revision=cache.source_of(model.path).get("commit"),
    )
    return config, tensors


def _prefix_fits_peft(net: Any) -> bool:
    """Return whether PEFT's prefix does the same: a past, which the windows of windowed attention hide."""
    config = net.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    one = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    windows = "sliding_attention" in kinds if kinds else bool(one)
    return is_causal(net) and not head_of(net) and not windows


def _lora_in_peft(attachment: Attachment, net: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    part = attachment.parts[0]
    assert isinstance(part, LoraPart)
    config = part.tuner.peft_config[ADAPTER].to_dict()
    others = {n: p for n, p in attachment.parameters.items() if n not in part.parameters}
    tensors = others | part.factors() | _plain_lora(part)
    if part.subtracted:
        config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    config["target_modules"] = sorted(config["target_modules"])
    if head := head_of(net):
        pooler = any(".pooler." in n for n in head)
        tops = {n.split(".")[0] for n in head if not n.startswith(net.base_model_prefix + ".")}
        config["modules_to_save"] = sorted(tops | ({"pooler"} if pooler else set()))
    return config, {FRONT + n: p for n, p in tensors.items()}


def _plain_lora(part: LoraPart) -> dict[str, Tensor]:
    """Fold a subtracted start into a LoRA on the base itself: B A - B0 A0 = [B, -B0] [A; A0], rank 2 r."""
    made = {}
    for name, factor in part.subtracted.items():
        own = part.parameters[name].detach()
        side_by_side = ".lora_B." in name
        made[name] = torch.cat([own, -factor if side_by_side else factor], dim=1 if side_by_side else 0)
    return made


def _prefix_in_peft(
    attachment: Attachment, spec: Prefix, net: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layers, numbers = layers_of(net), attachment.parameters
    heads, width = layers[0].heads, layers[0].heads * layers[0].width
    made = PrefixTuningConfig(num_virtual_tokens=spec.tokens, token_dim=width, encoder_hidden_size=width)
    sizes = {"num_layers": len(layers), "num_attention_heads": heads, "num_transformer_submodules": 1}
    table = torch.cat([numbers[n].detach() for n in _prefix_names(net)], dim=1)
    return made.to_dict() | sizes | {"task_type": TaskType.CAUSAL_LM}, {"prompt_embeddings": table}


def _prefix_names(net: Any) -> list[str]:
    """Return the names of a prefix's parameters in the order of PEFT's table."""
    return [f"{layer.attention}.prefix.{which}" for layer in layers_of(net) for which in ("key", "value")]


def _from_peft(
    config: Mapping[str, Any], tensors: dict[str, Any], model: Model
) -> tuple[AdapterSpec, dict[str, Any]]:
    if (kind := config["peft_type"]) == "LORA":
        targets = [str(t) for t in config["target_modules"]]
        spec = Lora(int(config["r"]), float(config["lora_alpha"]), targets=targets)
        return spec, {n.removeprefix(FRONT): t for n, t in tensors.items()}
    tokens, table = int(config["num_virtual_tokens"]), tensors["prompt_embeddings"]
    if kind == "PROMPT_TUNING":
        return Prompt(tokens), {"prompt.embeddings": table}
    if kind != "PREFIX_TUNING":
        raise KeyError(kind)
    names = _prefix_names(model.net)
    columns = table.reshape(table.shape[0], len(names), -1).swapaxes(0, 1)
    return Prefix(tokens), dict(zip(names, columns, strict=True))


def _check_peft(config: Mapping[str, Any], model: Model, path: Path) -> None:
    """Raise ModelError for a setting that PEFT obeys and that is not the one that `save` writes, such as use_rslora."""
    written, _ = _peft(model, attachment_of(model)) or ({}, {})
    written = json.loads(json.dumps(written, default=_plain))
    for name in sorted(config.keys() & written.keys() - FREE):
        if config[name] != written[name]:
            what = f"says {name} = {config[name]!r:.80}, an adapter of Fleetune has {written[name]!r:.80}"
            raise ModelError(f"{path / 'adapter_config.json'} {what}", hint=REMEDY)


# ---------------------------------------------------------------- words


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _public_name(model: Model) -> str:
    """Return a name of the base that others can find: a hub id, or the bare name of a local file or directory."""
    if (hub := names.hub_of(model.name)) is not None:
        return hub
    return Path(model.name).expanduser().name if _is_local(model) else model.name


def _is_local(model: Model) -> bool:
    local = Path(model.name).expanduser()
    return model.name not in cache.ORIGINS and (local.is_absolute() or local.exists())


def _card(model: Model, spec: AdapterSpec, in_peft: bool) -> str:
    base = _public_name(model)
    source = cache.source_of(model.path).get("source", base)
    title = "LoRA adapter" if isinstance(spec, Lora) else type(spec).__name__
    sizes = ", ".join(f"{k} = {v}" for k, v in vars(spec).items() if v not in (None, 0.0))
    auto = "AutoModelForSequenceClassification" if head_of(model.net) else "AutoModelForCausalLM"
    place = f'"PATH OF {base}"' if _is_local(model) else f'"{base}"'
    if _is_local(model) and base.endswith(".gguf"):
        place = f'"FOLDER OF {base}", gguf_file="{base}"'
    part = attachment_of(model).parts[0]
    subtracts = isinstance(part, LoraPart) and part.subtracted
    where = ', base="blocks"' if isinstance(spec, Scales) else ""
    use = _WITH_PEFT.format(base=place, auto=auto) if in_peft else _WITH_FLEETUNE.format(where=where)
    form = "" if head_of(model.net) else _form(model.tokenizer)
    return f"""---
base_model: {base}
library_name: {"peft" if in_peft else "fleetune"}
tags:
- {type(spec).__name__.lower()}
- fleetune
---

# {title} for {base}

Tuned with Fleetune.

- base weights as loaded: {source}, {model.dtype}, SHA-256 `{model.digest}`
- {title}{sizes and f": {sizes}"}{_RESIDUAL if subtracts else ""}

{use}{form}"""


def _form(tokenizer: Any) -> str:
    """Say how rows were written as tokens (`data/encode.py`), so that others prompt the model in that form."""
    last = end_id(tokenizer)
    end = "no end token" if last is None else f"`{tokenizer.convert_ids_to_tokens(last)}`"
    if is_plain(tokenizer):
        how = 'plain lines, every turn with a line break after it: `tokenizer(prompt + "\\n")`'
    else:
        date = f', date_string="{DATE}"' if "date_string" in str(tokenizer.chat_template) else ""
        how = f"the base's chat template: `apply_chat_template(turns, add_generation_prompt=True{date})`"
        how += f", where turns[0] is the system's {text!r}" if (text := own_system(tokenizer)) else ""
    return f"\nPrompt it in the form that it was tuned in, {how}. An answer ends with {end}.\n"


_RESIDUAL = """
- the files hold twice that rank: what was learned, less what the start had taken out of the base"""
_WITH_PEFT = """```python
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained({base}), "PATH OF THIS FOLDER")
```
"""
_WITH_FLEETUNE = """PEFT has no such module, so this folder is Fleetune's own: `module.json` says what it is, `module.safetensors`
holds its fp32 tensors by name.

```python
from pathlib import Path

from fleetune import adapters, models

model = models.load("THE BASE"{where})
adapters.load(model, Path("PATH OF THIS FOLDER"))
```
"""
