"""Write a directory in compressed-tensors' "pack-quantized" format (0.20), for vLLM, SGLang and transformers.

A quantised layer NAME of shape [R, C] in groups of G columns; codes count from the middle, 2^(bits-1):

    NAME.weight_packed      int32 [R, C bits / 32]    codes, the first in the lowest bits
    NAME.weight_scale       fp16 [R, C / G]
    NAME.weight_shape       int64 [2]
    NAME.weight_zero_point  int32 [R bits / 32, C / G]    zeros, packed along the rows; not when symmetric

Symmetric is a zero of 2^(bits-1) in every matrix: transformers (5.24) takes the first kind's settings for all, and does not load
zeros off the middle, which a note says.  config.json says dtype float16: readers bring the scales to the model's dtype, and in
bfloat16 they would lose 3 of their 11 bits.  A model stored in bf16 keeps its dense tensors in bf16.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Misfit, Report, hf
from fleetune.errors import UsageError
from fleetune.models.artefact import Quantised
from fleetune.models.families.widths import has_block_widths

TARGETS: Final = {"compressed-tensors": "a directory for vLLM, SGLang and transformers: 4- or 8-bit codes"}
TAKES: Final = "codes"
RUNTIME: Final = "transformers"
NEEDS: Final = ("compressed_tensors",)
INSTALL: Final = "pip install compressed-tensors"
ORDER: Final = 30
TARGET: Final = "compressed-tensors"
BITS: Final = (4, 8)
ASYMMETRIC: Final = (
    "transformers (5.24) does not load this format with zeros off the middle of the codes; "
    "for it, compress on a symmetric grid: --set grid=ggml, or grid=symmetric"
)


def exact_target(model: Checkpoint) -> str | None:
    """Return the target where the codes have a place in it, else None."""
    try:
        check(model)
    except UsageError:
        return None
    return None if has_block_widths(model.config) else TARGET


def write(model: Checkpoint, folder: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write the master artefact `model` into the empty `folder`; raises what `check` does before it writes."""
    grids = check(model)
    settings = quantization_config(model, grids)
    notes = ["layers are on several grids, of which transformers (5.24) takes the first for all"]
    notes = notes if len(settings["config_groups"]) > 1 else []
    middle = symmetric(grids)
    return hf.write_codes(
        model,
        folder,
        TARGET,
        partial(parts, middle=middle),
        _decode,
        {"dtype": "float16", "quantization_config": settings},
        notes=notes if middle else [*notes, ASYMMETRIC],
    )


def check(model: Checkpoint, kind: str | None = None) -> dict[str, Quantised]:
    """Return the grids; Misfit for other numbers of bits or tensors of no linear layer, UsageError for plain weights."""
    grids = hf.matrices(model, TARGET)
    for name, q in grids.items():
        if q.bits not in BITS:
            raise Misfit(
                f"{TARGET} is written with 4 or 8 bits; {name} has {q.bits}",
                remedy="compress again with 4 bits",
            )
    return grids


def symmetric(grids: Mapping[str, Quantised]) -> bool:
    """Return whether every zero of every matrix is the middle of the codes."""
    return all(bool((q.zero == 1 << (q.bits - 1)).all()) for q in grids.values())


def parts(name: str, q: Quantised, middle: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a quantised layer; without the zeros when they are in the `middle`."""
    layer = name.removesuffix(".weight")
    yield f"{layer}.weight_packed", hf.words(q.codes, q.bits)
    yield f"{layer}.weight_scale", q.scale
    yield f"{layer}.weight_shape", torch.tensor(q.codes.shape)
    if not middle:
        yield f"{layer}.weight_zero_point", hf.words(q.zero.T.contiguous(), q.bits).T.contiguous()


def quantization_config(model: Checkpoint, grids: dict[str, Quantised]) -> dict[str, Any]:
    """Return "quantization_config" of config.json: layers on one kind of grid are a group."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for name, q in grids.items():
        kind = (q.bits, hf.group_size(q, grids))
        kinds.setdefault(kind, []).append(name.removesuffix(".weight"))
    plain = sorted(name.removesuffix(".weight") for name in model.linears - grids.keys())
    one = len(kinds) == 1
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if one else layers,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric(grids),
                "dynamic": False,
                "strategy": "channel" if group < 0 else "group",
                "group_size": None if group < 0 else group,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for i, ((bits, group), layers) in enumerate(sorted(kinds.items()))
    }
    return {
        "quant_method": TARGET,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
    }


def _decode(file: Any, layer: str, q: Quantised) -> Tensor:
    """Decode a layer from the file as a runtime would."""
    R, C = (int(n) for n in file.get_tensor(f"{layer}.weight_shape"))
    codes = hf.unwords(file.get_tensor(f"{layer}.weight_packed"), q.bits, C)
    zero = torch.full_like(q.zero, 1 << (q.bits - 1))
    if f"{layer}.weight_zero_point" in file.keys():  # noqa: SIM118
        zero = hf.unwords(file.get_tensor(f"{layer}.weight_zero_point").T, q.bits, R).T
    return Quantised(codes, file.get_tensor(f"{layer}.weight_scale"), zero, q.bits, q.group).dense()
