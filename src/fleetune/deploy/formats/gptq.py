"""Write a directory in the GPTQ format, for GPTQModel, vLLM and other readers.

A quantised layer NAME of shape [R, C] = [out, in] in groups of G inputs (AutoGPTQ; checkpoint format "gptq"):

    NAME.qweight  int32 [C bits / 32, R]        the codes of an output down its column, the first in the lowest bits
    NAME.qzeros   int32 [C / G, R bits / 32]    zero - 1 of each output along the row
    NAME.scales   fp16 [C / G, R]
    NAME.g_idx    int32 [C]                     c // G: groups are in the order of the inputs

Three bits run on over the ends of words: 32 codes are 3 words.  dtype float16 as in `compressed_tensors.py`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Misfit, Report, hf
from fleetune.deploy.formats.compressed_tensors import symmetric
from fleetune.models.artefact import Quantised

TARGETS: Final = {"gptq": "a directory in GPTQ's format: 2-, 3-, 4- or 8-bit codes"}
TAKES: Final = "codes"
RUNTIME: Final = "transformers"
NEEDS: Final = ("gptqmodel", "optimum")
INSTALL: Final = "pip install gptqmodel optimum"
ORDER: Final = 40
TARGET: Final = "gptq"
REMEDY: Final = "compress again for this target"
BITS: Final = (2, 3, 4, 8)
HEAD: Final = "lm_head.weight"


def write(model: Checkpoint, folder: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write the master artefact `model` into the empty `folder`; raises what `check` does before it writes."""
    grids = check(model)
    settings = quantize_config(grids)
    return hf.write_codes(
        model,
        folder,
        TARGET,
        parts,
        _decode,
        {"dtype": "float16", "quantization_config": settings},
        files={"quantize_config.json": json.dumps(settings, indent=2, sort_keys=True) + "\n"},
    )


def parts(name: str, q: Quantised) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a quantised layer."""
    layer, q = name.removesuffix(".weight"), from_the_other_end(q)
    yield f"{layer}.qweight", hf.words(q.codes, q.bits).T.contiguous()
    yield f"{layer}.qzeros", hf.words((q.zero - 1).T.contiguous(), q.bits)
    yield f"{layer}.scales", q.scale.T.contiguous()
    yield f"{layer}.g_idx", (torch.arange(q.codes.shape[1]) // q.group).to(torch.int32)


def from_the_other_end(q: Quantised) -> Quantised:
    """Return the same weights without a zero of 0: where it is 0, code c becomes top - c, the zero top, the scale negative."""
    top, flat = (1 << q.bits) - 1, q.zero == 0
    codes = torch.where(flat.repeat_interleave(q.group, 1), top - q.codes, q.codes)
    return replace(
        q, codes=codes, scale=torch.where(flat, -q.scale, q.scale), zero=q.zero.masked_fill(flat, top)
    )


def quantize_config(grids: dict[str, Quantised]) -> dict[str, Any]:
    """Return "quantization_config" of config.json, which is quantize_config.json too, for grids of one kind."""
    first = next(iter(grids.values()))
    return {
        "quant_method": TARGET,
        "checkpoint_format": "gptq",
        "bits": first.bits,
        "group_size": hf.group_size(first, grids),
        "sym": symmetric(grids),
        "desc_act": False,
        "lm_head": False,
        "true_sequential": False,
    }


def check(model: Checkpoint, kind: str | None = None) -> dict[str, Quantised]:
    """Return the grids of the linear layers; Misfit when the format cannot hold them, UsageError for plain weights."""
    grids = hf.matrices(model, TARGET)
    plain = model.linears - grids.keys() - {HEAD}
    # runtimes hold gates of one output plain
    missing = sorted(name for name in plain if model.shapes[name][0] > 1)
    if missing or HEAD in grids:
        what = f"{missing[0]} is not quantised" if missing else f"{HEAD} is"
        raise Misfit(f"{TARGET} wants all linear layers but the head quantised; {what}", remedy=REMEDY)
    first, usual = next((name, (q.bits, hf.group_size(q, grids))) for name, q in grids.items())
    for name, q in grids.items():
        R, C = model.shapes[name]
        problem, group = None, hf.group_size(q, grids)
        if q.bits not in BITS:
            problem = f"{name} has {q.bits} bits, the format has {', '.join(map(str, BITS))}"
        elif (q.bits, group) != usual:
            problem = (
                f"{first} has {usual[0]} bits in groups of {usual[1]}, {name} {q.bits} in groups of {group}"
            )
        elif R * q.bits % 32 or C * q.bits % 32:
            problem = f"{name} of shape [{R}, {C}] does not fill words of 32 bits with codes of {q.bits}"
        if problem is not None:
            raise Misfit(f"{TARGET} cannot hold the codes: {problem}", remedy=REMEDY)
    return grids


def _decode(file: Any, layer: str, q: Quantised) -> Tensor:
    """Decode a layer from the file as a runtime would."""
    R, C = q.codes.shape
    codes = hf.unwords(file.get_tensor(f"{layer}.qweight").T, q.bits, C)
    zero = hf.unwords(file.get_tensor(f"{layer}.qzeros"), q.bits, R).T.float() + 1
    scale: Tensor = file.get_tensor(f"{layer}.scales").T.float()
    at = file.get_tensor(f"{layer}.g_idx").long()
    return scale[:, at] * (codes.float() - zero[:, at])
