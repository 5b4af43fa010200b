# SPDX-License-Identifier: Apache-2.0
"""Write a directory for MLX (mlx-lm) on Apple computers: the codes in its "affine" quantisation.

A quantised layer NAME of shape [R, C] in groups of G columns (mlx.core.quantize, mlx 0.32):

    NAME.weight  uint32 [R, C bits / 32]    codes, the first in the lowest bits; 3, 5 and 6 bits run on over words
    NAME.scales  [R, C / G]
    NAME.biases  [R, C / G]                 w = scales * code + biases, so biases = -scale * zero

Both are fp16 where every scale * zero of the model is exact in it (a zero in the middle of the codes, or scales
of few bits: grids `ggml` and `universal`), else both are fp32, and mlx computes in fp32 then.  config.json names
group and bits, and the layers that have others.

mlx-lm (0.32) does not read transformers 5's "rope_parameters", and what config.json leaves out it fills with
defaults that are not transformers'; so what it needs is written out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Misfit, Report, _hf_writer
from fleetune.models.artefact import Quantised
from fleetune.models.families.rope import head_dim

TARGETS: Final = {
    "mlx": "a directory for MLX on Apple computers: codes of 2 to 8 bits in groups of 32, 64 or 128",
}
TAKES: Final = "codes"
ORDER: Final = 50
TARGET: Final = "mlx"
BITS: Final = (2, 3, 4, 5, 6, 8)
GROUPS: Final = (32, 64, 128)
ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")
# fields that config.json may leave to transformers' defaults
STATED: Final = ("head_dim", "num_key_value_heads", "tie_word_embeddings", "attention_bias", "mlp_bias")


def check(model: Checkpoint, kind: str | None) -> None:
    """Raise Misfit when the architecture or the codes have no place in MLX, UsageError for plain weights."""
    _grids(model)


def write(model: Checkpoint, folder: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write the master artefact `model` into the empty `folder`; raises what `check` does before it writes."""
    grids = _grids(model)
    dtype = torch.float16 if all(_exact(model, name) for name in grids) else torch.float32
    settings = quantization(grids)
    config = {"dtype": "float16", "quantization": settings, "quantization_config": settings}
    note = "scale * zero is not exact in fp16: scales and biases are fp32, in which MLX computes then"
    return _hf_writer.write_codes(
        model,
        folder,
        TARGET,
        partial(parts, dtype=dtype),
        _decode,
        config | _stated(model.config),
        notes=[note] if dtype == torch.float32 else [],
    )


def parts(name: str, q: Quantised, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a quantised layer."""
    layer = name.removesuffix(".weight")
    yield f"{layer}.weight", _hf_writer.words(q.codes, q.bits).view(torch.uint32)
    yield f"{layer}.scales", q.scale.to(dtype)
    yield f"{layer}.biases", _biases(q).to(dtype)


def quantization(grids: Mapping[str, Quantised]) -> dict[str, Any]:
    """Return "quantization" of config.json: the commonest group and bits, and each layer that has others."""
    kinds = {name.removesuffix(".weight"): (q.group, q.bits) for name, q in grids.items()}
    main = Counter(kinds.values()).most_common(1)[0][0]
    others = {layer: _kind(kind) for layer, kind in kinds.items() if kind != main}
    return _kind(main) | others


def _kind(kind: tuple[int, int]) -> dict[str, Any]:
    return {"group_size": kind[0], "bits": kind[1]}


def _biases(q: Quantised) -> Tensor:
    """fp32 [R, C / group], exact: 11 bits times 8."""
    return -q.scale.float() * q.zero.float()


def _exact(model: Checkpoint, name: str) -> bool:
    q = model.quantised(name)
    assert q is not None
    return bool((_biases(q).half().float() == _biases(q)).all())


def _stated(config: Any) -> dict[str, Any]:
    """Return the fields that mlx-lm reads, under its names."""
    rope = dict(config.rope_parameters)
    found = {key: value for key in STATED if (value := getattr(config, key, None)) is not None}
    scaled = rope.get("rope_type", "default") != "default"
    return found | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if scaled else None}


def _check_config(model: Checkpoint) -> None:
    config: Any = model.config
    kind, problem = config.model_type, None
    if kind not in ARCHITECTURES:
        problem = f"'{kind}': it is written for {', '.join(ARCHITECTURES)}"
    elif config.hidden_act != "silu":
        problem = f"the activation '{config.hidden_act}'"
    elif getattr(config, "use_sliding_window", False):
        problem = "sliding-window attention"
    elif (scaling := config.rope_parameters.get("rope_type", "default")) not in (
        "default",
        "linear",
        "llama3",
    ):
        problem = f"rotary scaling '{scaling}'"
    elif config.rope_parameters.get("partial_rotary_factor", 1) != 1:
        problem = "partly rotated heads"
    elif kind == "qwen2" and head_dim(config) * config.num_attention_heads != config.hidden_size:
        problem = f"qwen2 heads of {head_dim(config)}, which do not make up its width"
    elif kind == "qwen3" and config.attention_bias:
        problem = "qwen3 with biases in its attention"
    if problem is not None:
        raise Misfit(f"{TARGET} has no place for {problem}")


def _grids(model: Checkpoint) -> dict[str, Quantised]:
    """Return the grids of the linear layers; Misfit when MLX cannot hold the model."""
    _check_config(model)
    grids = _hf_writer.matrices(model, TARGET)
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
    packed = file.get_tensor(f"{layer}.weight").view(torch.int32)
    codes = _hf_writer.unwords(packed, q.bits, q.codes.shape[1]).float()
    scales, biases = (
        file.get_tensor(f"{layer}.{part}").float().repeat_interleave(q.group, 1)
        for part in ("scales", "biases")
    )
    weight: Tensor = scales * codes + biases
    return weight
