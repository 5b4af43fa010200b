"""Write a LoRA adapter as one .gguf file, which llama.cpp adds to a GGUF file of its base (llama-cli --lora FILE).

The file (llama.cpp's src/llama-adapter.cpp says what it reads) has general.type "adapter", adapter.type "lora", the base's
architecture, adapter.lora.alpha, and for each adapted matrix NAME two tensors in fp32, of which (alpha / r) B A x is added:

    NAME.lora_a  [r, in]      A as it is
    NAME.lora_b  [out, r]     B, with its rows in the order of the base's file (`gguf.py`)
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Report
from fleetune.deploy.formats.gguf import check_config, tensor_name
from fleetune.errors import ModelError, UsageError
from fleetune.models.families import table
from fleetune.models.gguf import header
from fleetune.models.net.saving import damaged

TARGETS: Final = {"gguf:lora": "a run's LoRA adapter, for llama.cpp beside a GGUF file of the base"}
TAKES: Final = "adapter"
SUFFIX: Final = ".gguf"
PROVENANCE: Final = True
ORDER: Final = 20
TARGET: Final = "gguf:lora"
FRONT: Final = "base_model.model."  # of PEFT's tensor names
SUFFIXES: Final = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
INSTEAD: Final = "merge it into the base: --to gguf:f16, or fleetune compress and --to gguf"
PLAIN: Final[Mapping[str, Any]] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
}
EMPTY: Final = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
)


def write(adapter: Path, base: Checkpoint, path: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write the PEFT directory `adapter` of a model like `base` to the new file `path`, and read it back.

    `made` are strings for the header, which has the file's name as the adapter's.  UsageError before anything is
    written for an adapter that is no plain LoRA or a base without a place in GGUF; ModelError when the adapter is
    damaged or of another model; FleetuneError when the file does not hold what was written.
    """
    check_config(base.config)
    settings, factors = _read(adapter)
    tensors = dict(_tensors(factors, base))
    writer = gguf.GGUFWriter(path, table.architecture(base.config))
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(path.stem)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
        for key, text in made.items():
            writer.add_string(key, text)
        for tensor, values in tensors.items():
            writer.add_tensor(tensor, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    _verify(path, tensors, float(settings["lora_alpha"]))
    return Report(
        path=path,
        to=TARGET,
        bytes=path.stat().st_size,
        tensors=len(tensors),
        exact=len(tensors),
        types={"F32": len(tensors)},
    )


def check(adapter: Path, kind: str | None) -> None:
    """Raise UsageError unless the directory holds a plain LoRA in PEFT's layout; ModelError when it is damaged."""
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise UsageError("the result has no LoRA, which is all that gguf:lora writes", hint=INSTEAD)
    try:
        settings = json.loads(file.read_bytes())
        wrong = [k for k, value in PLAIN.items() if (settings.get(k) or value) != value]
        wrong += [k for k in EMPTY if settings.get(k)]
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{file} is damaged ({error})", hint="finish or repeat the run") from error
    if wrong:
        raise UsageError(
            f"GGUF has no place for this adapter: {wrong[0]} is {settings[wrong[0]]!r}", hint=INSTEAD
        )


def _read(adapter: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return adapter_config.json, and the factors by PEFT's names, in fp32 (which holds bf16 and fp16 exactly)."""
    check(adapter, None)
    try:
        settings: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_bytes())
        tensors = load_file(adapter / "adapter_model.safetensors")
        return settings, {name: factor.float().numpy() for name, factor in tensors.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{adapter} is not a usable adapter ({error})", hint="finish or repeat the run"
        ) from error


def _tensors(factors: Mapping[str, np.ndarray], base: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of the file in the order of their names."""
    config = base.config
    for name in sorted(factors):
        part = next((s for s in SUFFIXES if name.endswith(s)), None)
        if part is None or not name.startswith(FRONT):
            raise UsageError(f"GGUF has no place for {name} of the adapter", hint=INSTEAD)
        layer = name.removeprefix(FRONT).removesuffix(part) + ".weight"
        if layer not in base.shapes:
            why = "is the input embedding too" if layer in base.linears else "is not in the base"
            raise UsageError(f"the adapter adapts {layer}, which {why}", hint=INSTEAD)
        own = factors[name]
        other = factors.get(name.replace("_A.", "_B.") if "_A." in name else name.replace("_B.", "_A."))
        _check_shapes(layer, own, other, base.shapes[layer], part)
        for piece in table.parts(layer):
            tensor = str(tensor_name(config, piece.name))
            values = own
            if part == ".lora_B.weight":
                order = piece.order(base.shapes[layer], True, False)
                order = table.row_order(config, tensor, len(own)) if order is None else order
                values = own if order is None else own[order]
            yield tensor + SUFFIXES[part], np.ascontiguousarray(values, dtype=np.float32)


def _check_shapes(
    layer: str, values: np.ndarray, other: np.ndarray | None, shape: tuple[int, ...], part: str
) -> None:
    A, B = (values, other) if part == ".lora_A.weight" else (other, values)
    if A is None or B is None or (len(B), A.shape[1]) != shape or len(A) != B.shape[1]:
        found = [None if factor is None else factor.shape for factor in (A, B)]
        raise ModelError(
            f"the adapter's A and B of {layer} have shapes {found[0]} and {found[1]}, the matrix has {shape}",
            hint="the adapter belongs to another model: give the run it was made in",
        )


def _verify(path: Path, tensors: Mapping[str, np.ndarray], alpha: float) -> None:
    """Raise FleetuneError unless the file holds these tensors bit for bit, and this alpha."""
    head = header.read(path)
    found = {tensor.name: tensor for tensor in head.tensors}
    if sorted(found) != sorted(tensors):
        raise damaged(path, "it does not hold the tensors that were written")
    for name, values in tensors.items():
        read = found[name]
        if (read.kind, read.shape) != ("F32", values.shape) or head.bytes(read).tobytes() != values.tobytes():
            raise damaged(path, f"{name} does not hold what was written")
    if head.values[gguf.Keys.Adapter.LORA_ALPHA] != np.float32(alpha):
        raise damaged(path, "its alpha is not what was written")
