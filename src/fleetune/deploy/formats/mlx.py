# SPDX-License-Identifier: Apache-2.0
"""Write a directory for MLX (mlx-lm) on Apple computers: the codes in its "affine" quantisation.

A quantised layer NAME of shape [R, C] in groups of G columns (mlx.core.quantize, mlx 0.32):

    NAME.weight  uint32 [R, C bits / 32]    codes, the first in the lowest bits; 3, 5 and 6 bits run on over words
    NAME.scales  [R, C / G]
    NAME.biases  [R, C / G]                 w = scales * code + biases, so biases = -scale * zero

The experts of a mixture are three such layers for a block, gate_proj, up_proj and down_proj, whose tensors have the experts as a
dimension in front: [E, R, ..].

Scales and biases are fp16 where every scale * zero of the model is exact in it (a zero in the middle of the codes, or scales of
few bits: grids `ggml` and `universal`), else both are fp32, and mlx computes in fp32 then.  config.json names group and bits, and
the layers that have others; a layer without scales (a router, the head) is a plain one to mlx-lm.

What else mlx-lm needs of a family stands in `_mlx_families.py`.
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
from fleetune.deploy.formats import Misfit, Report, _hf_writer, _mlx_families
from fleetune.models.artefact import Quantised

TARGETS: Final = {
    "mlx": "a directory for MLX on Apple computers: codes of 2 to 8 bits in groups of 32, 64 or 128",
}
TAKES: Final = "codes"
RUNTIME: Final = "mlx-lm"
ORDER: Final = 50
TARGET: Final = "mlx"
BITS: Final = (2, 3, 4, 5, 6, 8)
GROUPS: Final = (32, 64, 128)
ARCHITECTURES: Final = tuple(_mlx_families.FAMILIES)


def check(model: Checkpoint, kind: str | None) -> None:
    """Raise Misfit when the architecture or the codes have no place in MLX, UsageError for plain weights."""
    _grids(model)


def write(model: Checkpoint, folder: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write the master artefact `model` into the empty `folder`; raises what `check` does before it writes."""
    grids = _grids(model)
    dtype = torch.float16 if all(_exact(model, name) for name in grids) else torch.float32
    settings = quantization(model.config, grids)
    config = {"dtype": "float16", "quantization": settings, "quantization_config": settings}
    note = "scale * zero is not exact in fp16: scales and biases are fp32, in which MLX computes then"
    return _hf_writer.write_codes(
        model,
        folder,
        TARGET,
        partial(parts, dtype=dtype),
        _decode,
        config | _mlx_families.fields(model.config),
        layers=partial(_mlx_families.layers, model.config),
        experts=True,
        notes=[*_mlx_families.notes(model.config), *([note] if dtype == torch.float32 else [])],
    )


def parts(name: str, q: Quantised, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a quantised layer."""
    layer, rows = name.removesuffix(".weight"), q.shape[:-1]
    yield f"{layer}.weight", _hf_writer.words(q.codes, q.bits).view(torch.uint32).view(*rows, -1)
    yield f"{layer}.scales", q.scale.to(dtype).view(*rows, -1)
    yield f"{layer}.biases", _biases(q).to(dtype).view(*rows, -1)


def quantization(config: Any, grids: Mapping[str, Quantised]) -> dict[str, Any]:
    """Return "quantization" of config.json: the commonest group and bits, and each layer that has others."""
    kinds = {
        layer.removesuffix(".weight"): (q.group, q.bits)
        for name, q in grids.items()
        for layer, _ in _mlx_families.parts(config, name)
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
    q = _hf_writer.codes_of(model, name, experts=True)
    assert q is not None
    return bool((_biases(q).half().float() == _biases(q)).all())


def _grids(model: Checkpoint) -> dict[str, Quantised]:
    """Return the grids of linear layers and experts; Misfit when MLX cannot hold the model."""
    if (problem := _mlx_families.misfit(model.config)) is not None:
        raise Misfit(f"{TARGET} has no place for {problem}")
    for name in model.names:
        if _mlx_families.is_absent(model.config, name) and bool(model.weight(name).any()):
            raise Misfit(f"{TARGET} has no place for {name}: mlx-lm leaves it out, and it is not 0")
    grids = _hf_writer.matrices(model, TARGET, experts=True)
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
    codes = _hf_writer.unwords(packed, q.bits, q.codes.shape[1]).float()
    scales, biases = (
        file.get_tensor(f"{layer}.{part}").float().flatten(0, -2).repeat_interleave(q.group, 1)
        for part in ("scales", "biases")
    )
    weight: Tensor = scales * codes + biases
    return weight.view(q.shape)
