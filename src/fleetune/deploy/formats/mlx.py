"""Write a directory for MLX (mlx-lm) on Apple computers: the codes in its "affine" quantisation.

A quantised layer NAME of shape [R, C] in groups of G columns (mlx.core.quantize, mlx 0.32); with E experts, [E, R, ..]:

    NAME.weight  uint32 [R, C bits / 32]    codes, the first in the lowest bits; 3, 5 and 6 bits run on over words
    NAME.scales  [R, C / G]
    NAME.biases  [R, C / G]                 w = scales * code + biases, so biases = -scale * zero

Scales and biases are fp16 where every scale * zero of the model is exact in it, else both are fp32, in which mlx computes then.
mlx-lm (0.32) has a model class a family, which reads some fields of config.json and fixes the rest in its code: config.json
states the `STATED` fields, and a record of `FAMILIES` says which configurations have a place.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Misfit, Report, hf
from fleetune.models.artefact import Quantised
from fleetune.models.families import rope, table

TARGETS: Final = {
    "mlx": "a directory for MLX on Apple computers: codes of 2 to 8 bits in groups of 32, 64 or 128"
}
TAKES: Final = "codes"
ORDER: Final = 50
TARGET: Final = "mlx"
BITS: Final = (2, 3, 4, 5, 6, 8)
GROUPS: Final = (32, 64, 128)


def write(model: Checkpoint, folder: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write the master artefact `model` into the empty `folder`; raises what `check` does before it writes."""
    grids = check(model)
    dtype = torch.float16 if all(_exact(model, name) for name in grids) else torch.float32
    settings = quantization(model.config, grids)
    config = {"dtype": "float16", "quantization": settings, "quantization_config": settings}
    note = "scale * zero is not exact in fp16: scales and biases are fp32, in which MLX computes then"
    return hf.write_codes(
        model,
        folder,
        TARGET,
        partial(parts, dtype=dtype),
        _decode,
        config | fields(model.config),
        layers=partial(layers, model.config),
        experts=True,
        notes=[*notes(model.config), *([note] if dtype == torch.float32 else [])],
    )


def parts(name: str, q: Quantised, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a quantised layer."""
    layer, rows = name.removesuffix(".weight"), q.shape[:-1]
    yield f"{layer}.weight", hf.words(q.codes, q.bits).view(torch.uint32).view(*rows, -1)
    yield f"{layer}.scales", q.scale.to(dtype).view(*rows, -1)
    yield f"{layer}.biases", _biases(q).to(dtype).view(*rows, -1)


def quantization(config: Any, grids: Mapping[str, Quantised]) -> dict[str, Any]:
    """Return "quantization" of config.json: the commonest group and bits, and each layer that has others."""
    kinds = {
        _renamed(config, part.name).removesuffix(".weight"): (q.group, q.bits)
        for name, q in grids.items()
        for part in table.stacked(name)
    }
    main = Counter(kinds.values()).most_common(1)[0][0]
    others = {layer: _kind(kind) for layer, kind in kinds.items() if kind != main}
    return _kind(main) | others


def _kind(kind: tuple[int, int]) -> dict[str, Any]:
    return {"group_size": kind[0], "bits": kind[1]}


def _biases(q: Quantised) -> Tensor:
    """fp32 [R, C / group], exact: 11 bits times 8."""
    return -q.scale.float() * q.zero.float()


def _exact(model: Checkpoint, name: str) -> bool:
    q = hf.codes_of(model, name, experts=True)
    assert q is not None
    return bool((_biases(q).half().float() == _biases(q)).all())


def check(model: Checkpoint, kind: str | None = None) -> dict[str, Quantised]:
    """Return the grids of linear layers and experts; Misfit when MLX cannot hold the model, UsageError for plain weights."""
    if (problem := misfit(model.config)) is not None:
        raise Misfit(f"{TARGET} has no place for {problem}")
    grids = hf.matrices(model, TARGET, experts=True)
    for name, q in grids.items():
        problem = None
        if q.bits not in BITS:
            problem = f"{name} has {q.bits} bits, MLX has {', '.join(map(str, BITS))}"
        elif q.group not in GROUPS:
            problem = f"{name} has groups of {q.group}, MLX has {', '.join(map(str, GROUPS))}"
        if problem is not None:
            raise Misfit(
                f"{TARGET} cannot hold the codes: {problem}", remedy="compress again for this target"
            )
    return grids


def _decode(file: Any, layer: str, q: Quantised) -> Tensor:
    """Decode a layer from the file as mlx does."""
    packed = file.get_tensor(f"{layer}.weight").view(torch.int32).flatten(0, -2)
    codes = hf.unwords(packed, q.bits, q.codes.shape[1]).float()
    scales, biases = (
        file.get_tensor(f"{layer}.{part}").float().flatten(0, -2).repeat_interleave(q.group, 1)
        for part in ("scales", "biases")
    )
    weight: Tensor = scales * codes + biases
    return weight.view(q.shape)


# ---------------------------------------------------------------- families

# fields of transformers that mlx-lm reads under the same name, and that config.json may leave to transformers' defaults
STATED: Final = (
    "head_dim",
    "num_key_value_heads",
    "tie_word_embeddings",
    "max_position_embeddings",
    "layer_types",
    "sliding_window",
    "attention_bias",
    "mlp_bias",
    "no_rope_layers",
    "rms_norm_eps",
    "logits_scaling",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "intermediate_size",
    "hidden_act",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
)


@dataclass(frozen=True)
class MlxFamily(table.Limits):
    """How mlx-lm reads a family; functions take a configuration."""

    options: table.Options = field(default_factory=dict)
    windowless: bool = False  # mlx-lm has no window there: longer texts differ, which a note says
    names: tuple[tuple[str, str], ...] = ()  # parts of tensors' names, and mlx-lm's; the first found counts
    fields: Callable[[Any], Mapping[str, Any]] = lambda config: {}  # what mlx-lm calls otherwise


_SCALED: Final = ("default", "linear", "llama3")  # of mlx-lm's initialize_rope
_GEMMA: Final = table.only(
    hidden_activation=table.TANH, use_bidirectional_attention=(False, None), attention_bias=(False,)
)
_UNCAPPED: Final = table.only(attn_logit_softcapping=(None,), final_logit_softcapping=(None,))


def _pattern(config: Any) -> int:
    """Return each how manieth block looks at everything: the first that does; 0 for none."""
    return next((i for i, layer in enumerate(config.layer_types, 1) if layer == "full_attention"), 0)


def _gemma3_fields(config: Any) -> dict[str, Any]:
    local = config.rope_parameters["sliding_attention"]
    return {"sliding_window_pattern": _pattern(config), "rope_local_base_freq": local["rope_theta"]}


FAMILIES: Final[Mapping[str, MlxFamily]] = MappingProxyType(
    {  # by transformers' model type
        "llama": MlxFamily(table.SILU, scalings=_SCALED, square=False),
        "mistral": MlxFamily(table.SILU, scalings=_SCALED, square=False, windowless=True),
        "qwen2": MlxFamily(table.only(table.SILU, table.NO_WINDOW), scalings=_SCALED),
        "qwen3": MlxFamily(
            table.only(table.SILU, table.NO_WINDOW, attention_bias=(False,)), scalings=_SCALED, square=False
        ),
        "phi3": MlxFamily(table.SILU, partial=True, windowless=True),
        "olmo2": MlxFamily(table.SILU, scalings=_SCALED, square=False),
        "granite": MlxFamily(table.SILU, scalings=_SCALED),
        "smollm3": MlxFamily(table.only(table.SILU, table.NO_WINDOW), scalings=_SCALED, square=False),
        "gemma2": MlxFamily(
            table.only(_GEMMA, table.TIED),
            square=False,
            layers=table.WINDOWS,
            windowless=True,
            needed=("attn_logit_softcapping", "final_logit_softcapping"),
        ),
        "gemma3_text": MlxFamily(
            table.only(_GEMMA, _UNCAPPED),
            scalings=_SCALED,
            square=False,
            layers=table.WINDOWS,
            fields=_gemma3_fields,
            misfit=lambda config: table.irregular(config, _pattern(config)),
        ),
        "mixtral": MlxFamily(
            table.SILU,
            windowless=True,
            names=((".mlp.experts.", ".block_sparse_moe.switch_mlp."), (".mlp.", ".block_sparse_moe.")),
        ),
        "qwen3_moe": MlxFamily(
            table.only(table.SILU, table.NO_WINDOW, attention_bias=(False,)),
            square=False,
            names=((".mlp.experts.", ".mlp.switch_mlp."),),
            fields=lambda config: {"head_dim": rope.head_dim(config)},
        ),
    }
)
ARCHITECTURES: Final = tuple(FAMILIES)


def misfit(config: Any) -> str | None:
    """Return what of a configuration mlx-lm has no place for; None when it has one for all."""
    family = FAMILIES.get(kind := str(config.model_type))
    return family.unmet(config) if family else f"'{kind}': it is written for {', '.join(FAMILIES)}"


def fields(config: Any) -> dict[str, Any]:
    """Return what config.json states for mlx-lm, under its names; nothing that transformers could not read back from it."""
    held = (key for key in STATED if not isinstance(getattr(type(config), key, None), property))
    found = {key: value for key in held if (value := getattr(config, key, None)) is not None}
    settings = dict(rope.settings(config))
    found["rope_theta"] = settings.pop("rope_theta")
    found["partial_rotary_factor"] = settings.get("partial_rotary_factor", 1.0)
    found["rope_scaling"] = settings if rope.kind(config) != "default" else None
    return {**found, **FAMILIES[config.model_type].fields(config)}


def layers(
    config: Any, parameter: str, weight: Quantised | Tensor
) -> Iterator[tuple[str, Quantised | Tensor]]:
    """Yield the tensors that a parameter is in mlx-lm: their names there, and their values."""
    for part in table.stacked(parameter):
        order = part.order(tuple(weight.shape), True, False)
        values = weight if order is None else _rows(weight, torch.from_numpy(order), part)
        yield _renamed(config, part.name), values


def _renamed(config: Any, name: str) -> str:
    for ours, theirs in FAMILIES[config.model_type].names:
        if ours in name:
            return name.replace(ours, theirs)
    return name


def _rows(weight: Quantised | Tensor, order: Tensor, part: table.ParameterPart) -> Quantised | Tensor:
    """Return the rows of a part."""
    if isinstance(weight, Quantised):
        codes, scale, zero = (values[order] for values in (weight.codes, weight.scale, weight.zero))
        return replace(weight, codes=codes, scale=scale, zero=zero)
    shape = table.part_shape(tuple(weight.shape), part, part.name)
    return weight.reshape(len(order) * part.of, -1)[order].reshape(shape)


def notes(config: Any) -> Iterator[str]:
    """Yield what mlx-lm computes otherwise than transformers."""
    family, kind = FAMILIES[config.model_type], config.model_type
    if family.windowless and (window := config.sliding_window) is not None:
        yield f"mlx-lm has no window in a {kind}: it gives the same up to {window:,} tokens, and in longer texts sees more"
