"""Other quantisers and ours: how far from the dense model, at which size, on several texts, as a Markdown table.

    python -m benchmarks.rivals MODEL TEXT.txt.. --out FOLDER [--only PART..] [--python auto_round=PYTHON..] [--shuffle]

All calibrate on the windows that `fleetune compress` takes by default, and run in turn, on one thread.  `--python` names the
environment of auto_round, llm_compressor or gptqmodel; without, their rows are left out.  What is compared are the values that
a file holds, in torch in fp32, on the first 2 windows of 512 tokens of each text.  A rival that leaves the embedding in 16 bits
gets Q8_0 for it, in its values and its size.  `--shuffle` permutes the dimensions of a llama first: the built-in model comes
from a file of 4 bits, and its values leave that grid.  Rows that are in the folder's `results.json` are not made again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import torch
from safetensors.torch import load_file

from benchmarks.harness import ROOT
from fleetune import models
from fleetune.compression.jobs import inputs
from fleetune.data import Encoded
from fleetune.deploy import export
from fleetune.evaluation import losses
from fleetune.models import Model

GPTQ: Final = {"method": "GPTQ", "num_bits": 4, "group_size": 32, "symmetric": True}
ROUND: Final = {"scheme": "W4A16", "group_size": 32}
# name -> kind, settings, bits of a layer's weight: 0 where a GGUF file tells them
RIVALS: Final[Mapping[str, tuple[str, dict[str, Any], float]]] = {
    "": ("importance", {}, 0),  # the importance matrix of llama.cpp
    "**ours, 78 MB**": ("ours", {"bytes": "78MB"}, 0),
    "llama.cpp IQ3_S, embedding Q5_1": ("llama_cpp", {"kind": 26, "embedding": 7}, 0),
    "**ours, default**": ("ours", {}, 0),
    "llama.cpp Q4_0": ("llama_cpp", {"kind": 2}, 0),
    "llama.cpp IQ4_NL": ("llama_cpp", {"kind": 25}, 0),
    "llama.cpp Q5_0, embedding IQ4_NL": ("llama_cpp", {"kind": 8, "embedding": 20}, 0),
    "AutoRound, 4 bits": ("auto_round", {**ROUND, "iters": 200}, 4.5),
    "AutoRound, 4 bits, 50 steps of 4": ("auto_round", {**ROUND, "iters": 50, "batch_size": 4}, 4.5),
    "AutoRound, 4 bits, rounded": ("auto_round", {**ROUND, "iters": 0}, 4.5),
    "llm-compressor, GPTQ": ("llm_compressor", GPTQ, 4.5),
    "llm-compressor, AWQ": ("llm_compressor", {**GPTQ, "method": "AWQ", "symmetric": False}, 4.625),
    "GPTQModel, 4 bits": ("gptqmodel", {"bits": 4, "group_size": 32}, 4.625),
    "**ours, 105 MB**": ("ours", {"bytes": "105MB"}, 0),
    "llama.cpp Q4_K_M": ("llama_cpp", {"kind": 15}, 0),
    "llama.cpp Q5_K_M, embedding Q5_1": ("llama_cpp", {"kind": 17, "embedding": 7}, 0),
    "AutoRound, gguf:q4_k_m": (
        "auto_round",
        {"scheme": "GGUF:Q4_K_M", "export": "gguf:q4_k_m", "iters": 50, "batch_size": 4},
        0,
    ),
}  # fmt: skip
WINDOWS: Final = (32, 512)
TEST: Final = (2, 512)
MAKE: Final = (
    "import json, sys; from benchmarks.rivals_make import main; main(*map(json.loads, sys.argv[1:]))"
)


def main() -> None:
    """Make, measure and print."""
    options = _options()
    out, results = options.out.resolve(), options.out / "results.json"
    made, pythons = out / "made", dict.fromkeys(("ours", "importance", "llama_cpp"), sys.executable)
    pythons |= dict(each.split("=") for each in options.python)
    files = ("dense", "f32.gguf", "windows", "importance", "made")
    places = {file.removesuffix(".gguf"): str(out / file) for file in files}
    made.mkdir(parents=True, exist_ok=True)
    os.environ["FLEETUNE_HOME"] = str(out / "home")  # copies of the files that are read
    torch.set_num_threads(1)
    model = models.load(options.model, device="cpu")
    if options.shuffle:
        _shuffle(model.net)
    if not Path(places["f32"]).exists():
        shutil.rmtree(places["dense"], ignore_errors=True)  # of a run that was stopped
        model.save(places["dense"])
        windows, _ = inputs.of_package(model, WINDOWS[1], WINDOWS[0])
        Path(places["windows"]).write_text(json.dumps(windows.tolist()))
        export.write(Path(places["dense"]), "gguf:f32", Path(places["f32"]))
    texts = {Path(path).stem: _reference(model, path, out) for path in options.texts}
    found = json.loads(results.read_text()) if results.exists() else {}
    for name, (kind, settings, bits) in RIVALS.items():
        wanted = not name or any(part in name for part in options.only)
        if name in found or not wanted or kind not in pythons:
            continue
        shutil.rmtree(made)
        made.mkdir()
        row = _make(pythons[kind], kind, places, settings)
        row["seconds"] += found[""]["seconds"] if kind == "llama_cpp" else 0
        found[name] = row | (_measured(made, bits, places, texts) if name and row["peak"] else {})
        results.write_text(json.dumps(found, indent=1))
        print(name, json.dumps(found[name]), flush=True)
    print("| | MB | bits | " + " | ".join(texts) + " | same top | processor s | peak GB |")
    print("|---" * (len(texts) + 6) + "|")
    for name, row in ((name, found[name]) for name in RIVALS if "KL" in found.get(name, {})):
        kl = " | ".join(f"{row['KL'][text]:.4f}" for text in texts)
        top, used = sum(row["top"].values()) / len(texts), f"{row['seconds']:.0f} | {row['peak'] / 1e9:.1f}"
        print(f"| {name} | {row['bytes'] / 1e6:.1f} | {row['bits']:.2f} | {kl} | {top:.1f} % | {used} |")


def _make(python: str, kind: str, places: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, float]:
    """Make a file in a process of its own; return its seconds of processor time and its peak of memory, 0 if it failed."""
    with Path(places["made"]).with_name("log.txt").open("w") as log:
        arguments = [python, "-c", MAKE, *map(json.dumps, (kind, places, settings))]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    peak = 0 if status else 1024 * int(Path(places["made"], "peak.txt").read_text())
    return {"seconds": used.ru_utime + used.ru_stime, "peak": peak}


def _reference(model: Model, path: str, out: Path) -> losses.Reference:
    """Return the dense model's logits on a text."""
    ids = model.tokenizer(Path(path).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    windows = torch.tensor(ids[: TEST[0] * TEST[1]]).view(TEST)
    rows = [Encoded(ids=window.numpy(), n_prompt=1) for window in windows]
    return losses.keep_logits(model, rows, out / f"{Path(path).stem}.logits")


def _measured(
    made: Path, bits: float, places: Mapping[str, str], texts: Mapping[str, losses.Reference]
) -> dict[str, Any]:
    file, Q8_0 = made / "model.gguf", gguf.GGMLQuantizationType.Q8_0
    size, layers, rest = _sizes(file if file.exists() else Path(places["f32"]))
    model = models.load(str(file) if file.exists() else places["dense"], device="cpu")
    if not file.exists():
        values, table = load_file(made / "values.safetensors"), model.net.get_input_embeddings().weight
        unknown = model.net.load_state_dict(values, strict=False).unexpected_keys
        if unknown or sum(x.numel() for x in values.values() if x.dim() == 2) != layers:
            raise ValueError(f"these are not the values of all layers: {unknown}")
        rounded = gguf.quants.quantize(table.detach().numpy(), Q8_0)
        table.data = torch.from_numpy(gguf.quants.dequantize(rounded, Q8_0))
        size, rest = bits * layers / 8, rest - 4 * table.numel() + rounded.nbytes
    compared = {name: text.compare(model)[0] for name, text in texts.items()}
    kl, top = (
        {n: getattr(each, key) for n, each in compared.items()} for key in ("kl_divergence", "same_top")
    )
    return {"bytes": size + rest, "bits": 8 * size / layers, "KL": kl, "top": top}


def _sizes(file: Path) -> tuple[float, int, float]:
    """Return the bytes of a GGUF file's layers, their weights, and all other bytes."""
    layers = [t for t in gguf.GGUFReader(file).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    size = sum(int(t.n_bytes) for t in layers)
    return size, sum(int(t.n_elements) for t in layers), file.stat().st_size - size


def _shuffle(net: Any) -> None:
    """Permute the hidden, inner and value dimensions of a llama, which changes no output."""
    random, c = torch.Generator().manual_seed(7), net.config
    heads, width = c.num_attention_heads, c.hidden_size // c.num_attention_heads
    hidden = torch.randperm(c.hidden_size, generator=random)
    for module in (net.get_input_embeddings(), net.model.norm):
        module.weight.data = module.weight.data[..., hidden].contiguous()
    for block in net.model.layers:
        a, m, inner = block.self_attn, block.mlp, torch.randperm(c.intermediate_size, generator=random)
        values = [torch.randperm(width, generator=random) for _ in range(c.num_key_value_heads)]
        rows = torch.cat([each + width * k for k, each in enumerate(values)])
        columns = torch.cat([values[k * len(values) // heads] + width * k for k in range(heads)])
        of_rows = {a.o_proj: hidden, m.down_proj: hidden, a.v_proj: rows}
        of_rows |= {m.gate_proj: inner, m.up_proj: inner}
        for module in (block.input_layernorm, block.post_attention_layernorm):
            module.weight.data = module.weight.data[hidden]
        for module in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj):
            weight = module.weight.data[:, {a.o_proj: columns, m.down_proj: inner}.get(module, hidden)]
            module.weight.data = weight[of_rows[module]] if module in of_rows else weight.contiguous()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.rivals", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", help="text files")
    parser.add_argument("--out", type=Path, required=True, help="a folder for all that is made")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the rows wanted")
    parser.add_argument("--python", nargs="+", default=[], help="KIND=PYTHON: a rival's environment")
    parser.add_argument("--shuffle", action="store_true", help="permute the dimensions of a llama first")
    return parser.parse_args()


if __name__ == "__main__":
    main()
