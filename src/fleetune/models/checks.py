"""Check that a folder is a complete Hugging Face directory, and that its configuration and its weights can be used.

transformers builds as many blocks as a configuration claims, so the claims are first compared with the tensors in the files.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers.models.auto import modeling_auto

from fleetune.errors import ModelError
from fleetune.models.cache import names
from fleetune.models.families.foreign import AGAIN, check_range, foreign_file
from fleetune.models.families.widths import KEY, base_type, config_from
from fleetune.models.lazy import LazyWeight

SIZES: Final = re.compile(  # at least 1
    r"n_(layer|embd|head)|(vocab|hidden|intermediate)_size|max_position_embeddings|"
    r"num_(hidden_layers|attention_heads|key_value_heads)"
)
# ways to compute attention and experts; any other is code that transformers fetches
PLAIN: Final = (None, "eager", "sdpa", "batched_mm", "grouped_mm")
COUNT: Final = re.compile(r"(layer|expert|label)s?$")  # transformers makes a list or a module for each
MOST: Final = 65_536
SIZE: Final = re.compile(r"(size|dim|embd|embeddings|heads?|positions|_id)$")
LARGEST: Final = (1 << 31) - 1  # files for runtimes have 32 bits for a size
AGAIN_KIND: Final = "use a causal language model or a BERT-style encoder, such as: fleetune models"
ENCODERS: Final = (
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    & modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys()
)
CAUSAL_CLASSES: Final = frozenset(
    name
    for entry in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for name in ((entry,) if isinstance(entry, str) else entry)
)
SLACK: Final = 1 << 22  # parameters that a net may have beyond twice those in its files: a new head
TABLES: Final = 1 << 28  # elements that a net may compute for itself: masks, sines
COMPUTED: Final = re.compile(  # buffers that older files hold
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(position|token_type)_ids|\.(attn\.|attention\.|masked_)bias)$"
)


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
        if names.is_master(folder):
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
        if names.is_adapter(folder):
            raise names.adapter_refused(folder, folder)
        files = sorted(folder.glob("*.gguf"))
        hint = f"give the file: {files[0]}" if files else names.NAME_HINT
        raise ModelError(f"'{folder}' is not a model directory: it has no config.json", hint=hint)
    with foreign_file(file, "is not a model configuration"):
        raw = json.loads(file.read_bytes())
        kind = base_type(raw["model_type"]) if KEY in raw else raw["model_type"]
        _check_kind(folder, raw, kind)
        _check_code(raw, file)
    _check_sizes(raw, file)
    with foreign_file(file):  # a configuration class may raise anything for a wrong value
        if KEY in raw:
            return config_from(raw)
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _check_kind(folder: Path, raw: dict[str, Any], kind: str) -> None:
    """Raise ModelError for a model that is neither causal nor an encoder, or whose weights are quantised."""
    stated, quantised = raw.get("architectures") or [], raw.get("quantization_config")
    encoder, hint = _is_encoder(kind, stated), AGAIN_KIND
    if kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not encoder:
        own = "needs code of its own, which is never run" if "auto_map" in raw else "is not one of these"
        what = f"is of type '{kind}', which {own} (transformers {transformers.__version__})"
    elif stated and not encoder and not set(stated) & CAUSAL_CLASSES:
        what = f"holds a {stated[0]}, which does not generate text from left to right"
    elif raw.get("is_encoder_decoder"):
        what = f"holds an encoder-decoder ({kind})"
    elif quantised:
        how = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        what, hint = f"is quantised ({how}); plain weights are needed", "use the model it was made from"
    else:
        return
    raise ModelError(f"{folder} {what}", hint=hint)


def _check_sizes(raw: dict[str, Any], file: Path) -> None:
    """Raise ModelError for sizes (blocks, heads, ..) below 1 or above `LARGEST`, and counts above `MOST`."""
    for name, value in raw.items():
        most = MOST if COUNT.search(name) else LARGEST if SIZE.search(name) else math.inf
        if type(value) is int and ((SIZES.fullmatch(name) and value < 1) or value > most):
            why = "below 1" if value < 1 else f"more than {most:,}"
            raise ModelError(f"{file} says {name} = {value!r:.30}, {why}", hint=AGAIN)


def _check_code(raw: Mapping[str, Any], file: Path) -> None:
    """Raise ModelError where a configuration names code to compute attention or experts with, at any depth."""
    for name, value in raw.items():
        if name.endswith("_implementation") and value not in PLAIN:
            raise ModelError(f"{file} says {name} = {value!r:.60}: never run", hint=f"remove {name} from it")
        if isinstance(value, dict):
            _check_code(value, file)


def is_encoder(config: Any) -> bool:
    """Return whether a configuration is of an encoder, which gets a classification head (else: a causal model)."""
    return _is_encoder(config.model_type, config.architectures or [])


def _is_encoder(kind: str, stated: list[str]) -> bool:
    """Return whether transformers knows the type as a masked language model; some of these can be made causal too."""
    return kind in ENCODERS and not set(stated) & CAUSAL_CLASSES


def check_size(net: torch.nn.Module, elements: int, path: Path) -> None:
    """Raise ModelError when a net (on the meta device) is much larger than what the files hold, or its tables are huge."""
    wanted = sum(p.numel() for p in net.parameters())
    tables = sum(b.numel() for b in net.buffers())
    if wanted > 2 * elements + SLACK or tables > elements + TABLES:
        raise ModelError(
            f"config.json in {path} describes {wanted:,} parameters (and tables of {tables:,}), "
            f"the files hold {elements:,}",
            hint="config.json is of another model than the weights: " + AGAIN,
        )


def finite(
    tensors: Iterable[tuple[str, torch.Tensor]], path: Path, hint: str = AGAIN
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) as they come; ModelError for weights that are NaN, infinite or beyond `LARGEST_WEIGHT`.

    One pass over each tensor, which takes no memory.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            for _, part in tensor.pieces() if isinstance(tensor, LazyWeight) else [(0, tensor.detach())]:
                low, high = (float(end) for end in torch.aminmax(part))
                check_range(low, high, name, path, hint)
        yield name, tensor


def check_step(net: Any, path: Path) -> None:
    """Raise ModelError unless a model of transformers can be run, and its first outputs are finite."""
    ids = torch.zeros((1, 2), dtype=torch.int64, device=net.device)
    with foreign_file(path, "holds a model that cannot be run"), torch.no_grad():
        finite_outputs = bool(torch.isfinite(net(input_ids=ids).logits).all())
    if not finite_outputs:
        raise ModelError(
            f"the model in {path} gives outputs that are not finite", hint="try --dtype fp32, or " + AGAIN
        )


def check_tensors(
    path: Path, kind: type, found: Mapping[str, Iterable[object]], missing: Sequence[str], *, head: bool
) -> None:
    """Raise ModelError unless the files have just the tensors that the model needs; `found` is transformers' report."""
    if wrong := sorted([*missing, *map(str, found["mismatched_keys"])]):
        raise ModelError(
            f"{path} lacks {len(wrong)} tensors of a {kind.__name__} (or they have other shapes): "
            + ", ".join(wrong[:3]),
            hint="the directory holds another or an incomplete model: fetch it again",
        )
    # with a head (an encoder) the blocks' tensors alone count: a checkpoint has other ones as well
    place = re.compile(r"\.\d+\." if head else "")
    names = map(str, found["unexpected_keys"])
    if left := sorted(n for n in names if place.search(n) and not COMPUTED.search(n)):
        raise ModelError(
            f"{path} has {len(left)} tensors that a {kind.__name__} of its config.json has no place for: "
            + ", ".join(left[:3]),
            hint="config.json is of another model than the weights (does it say fewer blocks?): fetch the model again",
        )
