"""Narrow the heads and MLP channels of single blocks of llama-like nets, and save and load such nets.

Where all blocks are alike and transformers accepts the numbers, the configuration is a plain one.  Else config.json gets

    "model_type": "fleetune_llama"      a name that transformers does not know, so that it refuses rather than guesses
    "fleetune_widths": {"num_attention_heads": [9, 6, ..], "num_key_value_heads": [3, 2, ..], "intermediate_size": [..]}

and `class_of` gives the class whose layers are narrowed once they are made.  Only the linear layers change: attention takes its
number of heads from its projections, and `num_key_value_groups` stays.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ALONE: Final = (
    threading.RLock()
)  # transformers sets globals while it builds or loads a net: one thread at a time

FAMILIES: Final = ("llama", "qwen2", "qwen3")
KEY: Final = "fleetune_widths"
DECI: Final = "deci"  # llama.cpp's architecture of such llamas
PREFIX: Final = "fleetune_"  # of the model type


class Width(NamedTuple):
    """The widths of a block; the fields are the configuration's names."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


class KeptUnits(NamedTuple):
    """The key heads (with their query heads) and MLP channels of a block that stay, in ascending order."""

    heads: Sequence[int]
    channels: Sequence[int]


def blocks_of(net: PreTrainedModel) -> list[Any]:
    """Return the decoder blocks of a net of one of the `FAMILIES`."""
    return list(cast(Any, net).model.layers)


def width_of(block: Any) -> Width:
    """Return the widths of a decoder block, by its linear layers."""
    attention = block.self_attn
    heads = [
        int(linear.out_features) // attention.head_dim for linear in (attention.q_proj, attention.k_proj)
    ]
    return Width(heads[0], heads[1], int(block.mlp.gate_proj.out_features))


def has_block_widths(config: Any) -> bool:
    """Return whether a configuration's blocks have widths of their own."""
    return hasattr(config, KEY)


def block_widths(config: Any) -> list[Width]:
    """Return every block's widths by the configuration."""
    count = int(config.num_hidden_layers)
    if has_block_widths(config):
        table = getattr(config, KEY)
        return [Width(*(int(table[name][i]) for name in Width._fields)) for i in range(count)]
    return [Width(*(int(getattr(config, name)) for name in Width._fields))] * count


# ---------------------------------------------------------------- cutting


def cut(net: PreTrainedModel, kept: Sequence[KeptUnits]) -> None:
    """Leave only the units `kept` of each block, in place, and record the widths in the configuration."""
    blocks = blocks_of(net)
    for block, stays in zip(blocks, kept, strict=True):
        _cut_block(block, stays)
    write_widths(net.config, [width_of(block) for block in blocks], blocks[0].self_attn.head_dim)


def _cut_block(block: Any, stays: KeptUnits) -> None:
    a, f, device = block.self_attn, block.mlp, block.mlp.gate_proj.weight.device
    keys = unit_positions(torch.tensor(stays.heads), a.head_dim).to(device)
    queries = unit_positions(torch.tensor(stays.heads), a.num_key_value_groups * a.head_dim).to(device)
    channels = torch.tensor(stays.channels).to(device)
    for linear, rows in (
        (a.q_proj, queries),
        (a.k_proj, keys),
        (a.v_proj, keys),
        (f.gate_proj, channels),
        (f.up_proj, channels),
    ):
        keep_positions(linear, rows, 0)
    for linear, columns in ((a.o_proj, queries), (f.down_proj, channels)):
        keep_positions(linear, columns, 1)


def unit_positions(units: Tensor, size: int) -> Tensor:
    """Return the positions of units of `size` neighbours each: int64 [n] -> [n size]."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def keep_positions(layer: nn.Linear, places: Tensor, dim: int) -> None:
    """Keep rows (dim 0, with their biases) or columns (dim 1) of a linear layer, in place."""
    biased = dim == 0 and layer.bias is not None
    for name in ["weight", "bias"] if biased else ["weight"]:
        whole = layer.get_parameter(name)
        part = whole.data.index_select(dim, places)
        setattr(layer, name, nn.Parameter(part, requires_grad=whole.requires_grad))
    layer.out_features, layer.in_features = layer.weight.shape


def write_widths(config: Any, found: Sequence[Width], head_dim: int) -> None:
    """Write the blocks' widths into a configuration: in transformers' own keys where those can say it."""
    if has_block_widths(config):
        delattr(config, KEY)
    config.head_dim = int(head_dim)
    plain = found[0]._asdict()
    if len(set(found)) == 1 and config_accepts(config, plain):
        for name, value in plain.items():
            setattr(config, name, value)
    else:
        setattr(config, KEY, {name: [getattr(w, name) for w in found] for name in Width._fields})


def config_accepts(config: Any, plain: Mapping[str, int]) -> bool:
    """Return whether transformers takes these numbers (a llama's heads must divide its hidden size, for one)."""
    try:
        type(config).from_dict(config.to_dict() | plain)
    except Exception:  # a configuration class may raise anything for a wrong value
        return False
    return True


# ---------------------------------------------------------------- making again


def class_of(
    config: Any, inspect: Callable[[PreTrainedModel], None] = lambda net: None, *, encoder: bool = False
) -> type[PreTrainedModel]:
    """Return the class of a causal language model (transformers' own, or one that narrows its blocks once made), or of an
    encoder with a classification head.

    `inspect` is called with a whole net of it on the meta device, before anything takes memory.
    """
    with torch.device("meta"):
        net = (AutoModelForSequenceClassification if encoder else AutoModelForCausalLM).from_config(config)
    inspect(net)
    kind = type(net)
    if not has_block_widths(config):
        return kind

    def init(self: PreTrainedModel, config: Any) -> None:
        kind.__init__(self, config)
        cut(
            self,
            [
                KeptUnits(range(w.num_key_value_heads), range(w.intermediate_size))
                for w in block_widths(config)
            ],
        )

    made = type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
    return cast(type[PreTrainedModel], made)


def build(config: Any, inspect: Callable[[PreTrainedModel], None] = lambda net: None) -> PreTrainedModel:
    """Build a net of a configuration on the meta device, fp32: names and shapes without values; `inspect` as in `class_of`."""
    with ALONE, torch.device("meta"):
        return class_of(config, inspect)._from_config(config, dtype=torch.float32)


def config_from(raw: Mapping[str, Any]) -> Any:
    """Return the configuration that a config.json with block widths describes.  ValueError when it makes no sense."""
    base = base_type(raw["model_type"])
    if base not in FAMILIES:
        raise ValueError(f"blocks of different widths are read for {', '.join(FAMILIES)}")
    config = CONFIG_MAPPING[base].from_dict({**raw, "model_type": base})
    table, count = raw[KEY], config.num_hidden_layers
    whole = [int(getattr(config, name)) for name in Width._fields]
    ratio = whole[0] // whole[1]
    for name, most in zip(Width._fields, whole, strict=True):
        given = table.get(name) if isinstance(table, dict) else None
        if not isinstance(given, list) or len(given) != count:
            raise ValueError(f"{KEY} has no list of {count} numbers for {name}")
        if any(not isinstance(n, int) or not 1 <= n <= most for n in given):
            raise ValueError(f"{KEY}: {name} is not everywhere from 1 to {most}")
    if any(w.num_attention_heads != ratio * w.num_key_value_heads for w in block_widths(config)):
        raise ValueError(f"{KEY}: not every key head has {ratio} query heads")
    return config


def base_type(model_type: str) -> str:
    """Return the family behind a model type of ours; another type as it is."""
    return model_type.removeprefix(PREFIX)


def mark_config(folder: Path) -> None:
    """Give a fresh config.json with block widths a model type that transformers refuses."""
    file = folder / "config.json"
    raw = json.loads(file.read_bytes())
    if KEY in raw:
        raw["model_type"] = PREFIX + base_type(raw["model_type"])
        file.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
