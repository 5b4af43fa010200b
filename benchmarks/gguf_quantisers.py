# SPDX-License-Identifier: Apache-2.0
"""GGUF files by size: ours beside llama.cpp's own quantiser with an importance matrix, as a Markdown table.

    python -m benchmarks.gguf_quantisers smollm2-135m CALIBRATION.txt TEST.txt [OTHER.txt] [--samples 3] [--only NAMES]

The model's dimensions are permuted first, which leaves the function as it was and takes the weights off the 4-bit grid that the
built-in model comes from (`benchmarks.compression`).  A sample is 16 windows of 256 tokens of the calibration text: the first
16, the next and so on.  llama.cpp's files are made by `llama_model_quantize` of the library in llama-cpp-py-sync, from our
export in F32 and the mean squares of the layers' inputs on the same windows.  Ours are made with the same bytes or fewer.
Each file's values are then compared with the dense model in torch, token by token, on the first 12 windows of 256 tokens of each
text.  Numbers are medians over the samples.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import gguf
import torch
from torch import Tensor

from benchmarks.compression import permute, windows
from benchmarks.rotations import rotated_heads
from benchmarks.solvers import PlainOptq
from fleetune import compression, models
from fleetune.compression.budget import token_weights
from fleetune.compression.budget.costs import Candidate, reach
from fleetune.compression.jobs import budget, calibrating
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.activations import HiddenStates
from fleetune.data import Encoded
from fleetune.deploy import export
from fleetune.evaluation import reference
from fleetune.evaluation.losses import row_perplexity
from fleetune.models import Model
from fleetune.models.artefact import ArtefactHead, dense
from fleetune.models.mapped.net import in_memory
from fleetune.runs.listener import Listener

SAMPLE: Final = (16, 256)  # windows, tokens
TEST: Final = (12, 256)
STOCK: Final = {"Q4_0": 2, "IQ4_NL": 25, "IQ4_XS": 30, "Q4_K_M": 15}  # llama.cpp's numbers of file types
# the same with the embedding, which is the head too, in a type that is asked for: llama-quantize's --token-embedding-type
MIXED: Final = {("Q4_K_M", "IQ4_NL"): 15, ("Q4_K_S", "Q5_1"): 14, ("Q5_K_M", "Q5_1"): 17}
GRIDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "Q4_0": {}, "IQ4_NL": {"grid": "iq4_nl"}, "3 bits": {"grid": "asymmetric", "bits": 3},
}  # fmt: skip
METHODS: Final = ("optq", "qronos")
TOKENS: Final[Mapping[str, Mapping[str, Any]]] = {
    "": {"tokens": "equal"}, ", tokens by gradient": {"tokens": "gradient"},
}  # fmt: skip
OURS: Final = {
    f"{method}, {grid}{about}": (method, {**settings, **tokens})
    for grid, settings in GRIDS.items()
    for method in METHODS
    for about, tokens in TOKENS.items()
}
ROTATED: Final = ", heads rotated"  # only where it is asked for
SMALLER: Final = 0.85
GPTQ: Final = "GPTQ's published loop, symmetric, Q4_0's bytes"


class Quiet(Listener):
    """Hears nothing."""


def main() -> None:
    """Make and compare all files."""
    options = _options()
    model = models.load(options.model, device="cpu")
    permute(model)
    model.net.requires_grad_(False)
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tests = [_Test(model, path, folder / f"{i}.npy") for i, path in enumerate(options.tests)]
        models.save(model.net, model.tokenizer, folder / "plain")
        export.export(folder / "plain", "gguf:f32", folder / "f32.gguf")
        count = options.samples * SAMPLE[0]
        text = windows(model, options.calibration, SAMPLE[1], count)
        for sample, calibration in enumerate(text.split(SAMPLE[0])):
            for name, row in _sample(model, calibration, tests, folder, options.only):
                found.setdefault(name, []).append(row)
                print(json.dumps({"sample": sample, "name": name, **row}), flush=True)
    for name, rows in found.items():
        print(
            "|",
            name,
            "|",
            " | ".join(f"{statistics.median(r[key] for r in rows):.4f}" for key in rows[0]),
            "|",
        )


class _Test:
    """A text, and the dense model's logits on it."""

    def __init__(self, model: Model, path: str, file: Path) -> None:
        ids = windows(model, path, TEST[1], TEST[0])
        self.rows = [Encoded(ids=window.numpy(), n_prompt=1) for window in ids]
        self.reference = reference.keep(model, self.rows, file)

    def compare(self, model: Model) -> dict[str, float]:
        """Return perplexity, KL divergence and same top token of a model."""
        compared = self.reference.compare(model)
        return {
            "perplexity": row_perplexity(model, self.rows), "kl": compared.kl_divergence, "top": compared.same_top,
        }  # fmt: skip


def _sample(
    model: Model, calibration: Tensor, tests: Sequence[_Test], folder: Path, only: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield every file's name and numbers for one sample of the calibration text."""

    def wanted(name: str) -> bool:
        return not only or any(part in name for part in only)

    def measured(weights: Mapping[str, Tensor], size: int) -> dict[str, float]:
        with _placed(model, weights):
            rows = [test.compare(model) for test in tests]
        return {"MB": size / 1e6} | {
            f"{key}{i}": value for i, row in enumerate(rows) for key, value in row.items()
        }

    importance, sizes = _mean_squares(model, calibration), dict[str, int]()
    for name, number in STOCK.items():
        file = folder / f"{name}.gguf"
        _quantise(folder / "f32.gguf", file, number, importance)
        sizes[name] = file.stat().st_size
        if wanted(f"llama.cpp, {name}"):
            yield f"llama.cpp, {name}", measured(_values(model, file), sizes[name])
    for (kind, embedding), number in MIXED.items():
        name, file = f"{kind}, embedding in {embedding}", folder / "mixed.gguf"
        _quantise(folder / "f32.gguf", file, number, importance, embedding)
        sizes[name] = file.stat().st_size
        if wanted(f"llama.cpp, {name}"):
            yield f"llama.cpp, {name}", measured(_values(model, file), sizes[name])
    head = ArtefactHead(
        "optq", {"bytes": 0, "damping": 0.01, "group": 32, "order": "none", "search": False}, "0" * 64, ""
    )
    for name, (method, settings) in OURS.items():
        solver = compression.make(method, settings)
        if wanted(name):
            yield name, _solved(model, solver, calibration, None, measured)
        if any(part == f"{name}{ROTATED}" for part in only):
            with rotated_heads(model):
                row = _solved(model, solver, calibration, None, measured)
            yield f"{name}{ROTATED}", row
    if wanted(GPTQ):
        yield GPTQ, _solved(model, PlainOptq("symmetric", stale=True), calibration, None, measured)
    limits = {f"within {name}": size for name, size in sizes.items() if name not in ("Q4_0",)}
    limits |= {f"within {SMALLER:.0%} of {name}": int(SMALLER * sizes[name]) for name in ("IQ4_NL", "Q4_K_M")}
    limits = {
        f"{method}, {name}": size
        for name, size in limits.items()
        for method in METHODS
        if wanted(f"{method}, {name}")
    }
    costs = budget.measured(Quiet(), model, calibration, 42) if limits else None
    for name, limit in limits.items():
        assert costs is not None
        others = export.size_beside(model, list(costs.options), head, "model")
        if limit - others < min_bytes(costs):
            continue
        spent = budget.chosen(costs, budget.Room(limit - others, others, reach(model)))
        solver = compression.make(name.split(",")[0], {})
        yield name, _solved(model, solver, calibration, spent, measured)


def min_bytes(costs: Any) -> int:
    """Return the fewest bytes that the grids allow."""
    return sum(min(option.bytes for option in options) for options in costs.options.values())


def _solved(model: Model, solver: Any, calibration: Tensor, spent: Any, measured: Any) -> dict[str, float]:
    """Solve all matrices; without a budget the embedding is rounded to Q8_0, as the export does."""
    kind = gguf.GGMLQuantizationType.Q8_0
    with tempfile.TemporaryDirectory() as parts:
        plan = spent.plan(solver) if spent else None
        counts = token_weights.measure(model, calibration, 42) if calibrating.weighs(solver) else None
        found = driver.run(model, solver, calibration, Path(parts), plan=plan, weights=counts)
        weights = {name: dense(found[name]) for name in found}
        size = spent.bytes if spent else _bytes(model, found)
    if not spent:
        table = model.net.get_input_embeddings().weight.numpy()
        rounded = gguf.quants.dequantize(gguf.quants.quantize(table, kind), kind)
        weights["lm_head.weight"] = torch.from_numpy(rounded)
    return measured(weights, size)


def _bytes(model: Model, found: Mapping[str, Any]) -> int:
    """Return the bytes of the file of codes of 4 bits in groups of 32, with the embedding in Q8_0."""
    head = ArtefactHead("optq", {}, "0" * 64, "")
    return export.size_beside(model, list(found), head, "model") + sum(
        Candidate("iq4_nl", 4, "IQ4_NL").bytes(*found[name].codes.shape) for name in found
    )


@contextmanager
def _placed(model: Model, weights: Mapping[str, Tensor]) -> Iterator[None]:
    own = {name: model.net.get_parameter(name) for name in weights}
    before = {name: tensor.data for name, tensor in own.items()}
    for name, tensor in own.items():
        tensor.data = weights[name].to(tensor)
    try:
        yield
    finally:
        for name, tensor in own.items():
            tensor.data = before[name]


# llama.cpp ------------------------------------------------------------------------------------------


def _mean_squares(model: Model, calibration: Tensor) -> dict[str, Tensor]:
    """Return the mean square of each input of each layer on the windows, by the name of the tensor in the file."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.net.config.num_hidden_layers)
    found = {}
    with torch.inference_mode():
        states, blocks = HiddenStates(model, calibration), driver.linears_of(model)
        for number, (block, linears) in enumerate(blocks):
            with in_memory(block):
                for name, H in states.hessians(number, linears).items():
                    found[f"{names.get_name(name)}.weight"] = H.diagonal() / (2 * calibration.numel())
                states.advance(number)
    return found


def _quantise(
    source: Path, target: Path, number: int, importance: Mapping[str, Tensor], embedding: str = ""
) -> None:
    """Run llama.cpp's quantiser; `embedding` is a type for the embedding, "" for the one that llama.cpp takes."""
    bindings = importlib.import_module("llama_cpp_py_sync._cffi_bindings")
    ffi, library = bindings.get_ffi(), bindings.get_lib()
    settings = library.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = 1, number
    if embedding:
        settings.token_embedding_type = int(gguf.GGMLQuantizationType[embedding])
    # struct llama_model_imatrix_data { const char * name; const float * data; size_t size; }, ended by a null name
    kept = [
        (ffi.new("char[]", name.encode()), ffi.from_buffer("float[]", x.contiguous().numpy()), len(x))
        for name, x in importance.items()
    ]
    table = ffi.new("uintptr_t[]", 3 * (len(kept) + 1))
    for i, (name, data, size) in enumerate(kept):
        table[3 * i : 3 * i + 3] = [int(ffi.cast("uintptr_t", name)), int(ffi.cast("uintptr_t", data)), size]
    settings.imatrix = ffi.cast("struct llama_model_imatrix_data *", table)
    quiet = ffi.callback("void(enum ggml_log_level, const char *, void *)", _say_nothing)
    library.llama_log_set(quiet, ffi.NULL)
    failed = library.llama_model_quantize(str(source).encode(), str(target).encode(), ffi.addressof(settings))
    library.llama_log_set(ffi.NULL, ffi.NULL)
    if failed:
        raise RuntimeError(f"llama.cpp did not write {target}")


def _say_nothing(level: int, text: object, data: object) -> None:
    """Drop what llama.cpp logs."""


def _values(model: Model, file: Path) -> dict[str, Tensor]:
    """Return the matrices of a file by the model's names."""
    return {name: tensor for name, tensor in models.named_tensors(export.load(file).net) if tensor.dim() == 2}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.gguf_quantisers", description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("calibration", help="a text file")
    parser.add_argument("tests", nargs="+", help="text files")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the rows wanted")
    return parser.parse_args()


if __name__ == "__main__":
    main()
