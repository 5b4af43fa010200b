# SPDX-License-Identifier: Apache-2.0
"""Perplexity after every way of compressing, as a Markdown table.

    python -m benchmarks.compression smollm2-135m CALIBRATION.txt TEST.txt [--only NAMES]

The built-in model comes from a 4-bit file, so its weights already lie on a 4-bit grid and rounding them to one would
prove nothing.  So hidden dimensions, MLP channels and head dimensions are permuted first, which leaves the function
as it was (the dense row says so) and takes the weights off that grid.

LLM-Pruner takes a fifth of the heads and channels out of all blocks but the first four and the last two, told by 10 of
80 windows of 256 tokens of the calibration file, and trains what is left on these windows once: LoRA, or all weights by
distillation from the whole model, on the text as it is.  Scales are trained on the same 80 windows.

Calibration is the first 16 windows of 256 tokens of one file, the test the first 24 windows of 512 of the other; a
difference of 0.5 in perplexity is noise at that size.  Seconds are the processor's, on one thread.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fleetune import compression, data, models
from fleetune.compression.distillation import scales
from fleetune.compression.jobs.scales import Trained
from fleetune.compression.layerwise import driver
from fleetune.compression.methods import gkd
from fleetune.compression.training.steps import Checkpoints
from fleetune.data import Encoded
from fleetune.models import Model

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "RTN, ggml grid, 4 bit g32": ("rtn", {}),
    "**OPTQ**, ggml grid, 4 bit g32": ("optq", {}),
    "**Qronos**, ggml grid, 4 bit g32": ("qronos", {}),
    "**OPTQ**, the same, order static": ("optq", {"order": "static"}),
    "**OPTQ**, the same, order gar": ("optq", {"order": "gar"}),
    "**OPTQ**, the same, true sequential": ("optq", {"true_sequential": True}),
    "RTN, iq4_nl grid, 4 bit g32": ("rtn", {"grid": "iq4_nl"}),
    "**OPTQ**, iq4_nl grid, 4 bit g32": ("optq", {"grid": "iq4_nl"}),
    "**Qronos**, iq4_nl grid, 4 bit g32": ("qronos", {"grid": "iq4_nl"}),
    "**OPTQ**, iq4_nl grid, true sequential": ("optq", {"grid": "iq4_nl", "true_sequential": True}),
    "RTN, symmetric grid, 4 bit g32": ("rtn", {"grid": "symmetric"}),
    "**OPTQ**, symmetric grid, 4 bit g32": ("optq", {"grid": "symmetric"}),
    "RTN, asymmetric grid, 4 bit g32": ("rtn", {"grid": "asymmetric"}),
    "**OPTQ**, asymmetric grid, 4 bit g32": ("optq", {"grid": "asymmetric"}),
    "**OPTQ**, universal grid, 4 bit g32": ("optq", {"grid": "universal"}),
    "RTN, asymmetric grid, 4 bit g64": ("rtn", {"grid": "asymmetric", "group": 64}),
    "**OPTQ**, asymmetric grid, 4 bit g64": ("optq", {"grid": "asymmetric", "group": 64}),
    "RTN, asymmetric grid, 3 bit g32": ("rtn", {"grid": "asymmetric", "bits": 3}),
    "**OPTQ**, asymmetric grid, 3 bit g32": ("optq", {"grid": "asymmetric", "bits": 3}),
    "**Qronos**, asymmetric grid, 3 bit g32": ("qronos", {"grid": "asymmetric", "bits": 3}),
    "**OPTQ**, asymmetric grid, 3 bit g32, then its scales trained": (
        "optq",
        {"grid": "asymmetric", "bits": 3, "train_scales": 120},
    ),
    "**Qronos**, asymmetric grid, 3 bit g32, then its scales trained": (
        "qronos",
        {"grid": "asymmetric", "bits": 3, "train_scales": 120},
    ),
    "magnitude 50 %": ("", {}),
    "**SparseGPT** 50 %": ("sparsegpt", {}),
    "**SparseGPT** 50 %, true sequential": ("sparsegpt", {"true_sequential": True}),
    "**SparseGPT** 2:4": ("sparsegpt", {"n": 2}),
    "**SparseGPT** 50 % + 4 bit g32": ("sparsegpt", {"bits": 4}),
    "SparseGPT 50 %, then OPTQ 4 bit g32": ("sparsegpt+optq", {}),
    "**LLM-Pruner** 20 %": ("llm-pruner", {"recover": "none"}),
    "**LLM-Pruner** 20 %, then LoRA": ("llm-pruner", {"recover": "lora", "lr": 1e-3}),
    "**LLM-Pruner** 20 %, then GKD": ("llm-pruner", {"recover": "gkd"}),
    "**LLM-Pruner** 20 %, magnitude": ("llm-pruner", {"recover": "none", "importance": "magnitude"}),
    "**LLM-Pruner** 20 %, mixed": ("llm-pruner", {"recover": "none", "importance": "mixed"}),
    "**LLM-Pruner** 20 %, global": ("llm-pruner", {"recover": "none", "scope": "global"}),
}
STEPS, BATCH = 40, 2  # of a recovery: each window once


@torch.no_grad()
def permute(model: Model, seed: int = 0) -> None:
    """Reorder hidden, MLP and value dimensions of a llama-like model: the same function, other groups of weights."""
    net: Any = model.net
    config, g = net.config, torch.Generator().manual_seed(seed)
    hidden = torch.randperm(config.hidden_size, generator=g)
    width = config.hidden_size // config.num_attention_heads
    net.model.embed_tokens.weight.data = net.model.embed_tokens.weight.data[:, hidden].contiguous()
    net.model.norm.weight.data = net.model.norm.weight.data[hidden]
    for layer in net.model.layers:
        a, f = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = norm.weight.data[hidden]
        columns = [a.q_proj, a.k_proj, a.v_proj, f.gate_proj, f.up_proj]
        rows = [a.o_proj, f.down_proj]
        for linear in columns:
            linear.weight.data = linear.weight.data[:, hidden]
        for linear in rows:
            linear.weight.data = linear.weight.data[hidden]
        channel, value = (
            torch.randperm(config.intermediate_size, generator=g),
            torch.randperm(width, generator=g),
        )
        f.gate_proj.weight.data, f.up_proj.weight.data = (
            f.gate_proj.weight.data[channel],
            f.up_proj.weight.data[channel],
        )
        f.down_proj.weight.data = f.down_proj.weight.data[:, channel].contiguous()
        kv = torch.cat([value + i * width for i in range(config.num_key_value_heads)])
        q = torch.cat([value + i * width for i in range(config.num_attention_heads)])
        a.v_proj.weight.data = a.v_proj.weight.data[kv].contiguous()
        a.o_proj.weight.data = a.o_proj.weight.data[:, q].contiguous()
    net.tie_weights()


def windows(model: Model, path: str, length: int, count: int) -> Tensor:
    """The first windows of a text file's tokens."""
    ids = [
        torch.tensor(model.tokenizer(text, verbose=False)["input_ids"]).numpy()
        for text in data.read_text(path)
    ]
    return driver.windows(ids, length, count)


@torch.inference_mode()
def perplexity(model: Model, test: Tensor) -> float:
    """exp of the mean over all predicted tokens; windows are apart."""
    net: Any = model.net
    total = 0.0
    for window in test:
        logits = net(input_ids=window[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (test.shape[0] * (test.shape[1] - 1)))


def row(
    model: Model, name: str, values: dict[str, Any], calibration: Tensor, more: Tensor, test: Tensor
) -> tuple[float, float]:
    """(perplexity, processor seconds of the compression) of one way."""
    linears = {n: m for _, found in driver.linears_of(model) for n, m in found.items()}
    dense = {n: m.weight.data for n, m in linears.items()}
    own = {n: v for n, v in values.items() if n not in ("true_sequential", "train_scales")}
    began = time.process_time()
    try:
        for method in name.split("+") if name else ():
            solver = compression.make(method, own)
            with tempfile.TemporaryDirectory() as folder:
                parts = driver.run(
                    model, solver, calibration if solver.data else None, Path(folder),
                    true_sequential="true_sequential" in values,
                )  # fmt: skip
                weights: Any = parts
                if steps := values.get("train_scales", 0):
                    student, kept = (
                        scales.student_of(model, parts),
                        Checkpoints(Path(folder) / "s", "", steps),
                    )
                    scales.train(model, student, more, steps, 0, kept, lambda step, steps, loss: None)
                    weights = Trained(parts, student.scales)
                for n, m in linears.items():
                    weight = weights[f"{n}.weight"]
                    m.weight.data = weight if isinstance(weight, Tensor) else weight.dense()
        for n, m in linears.items() if not name else ():
            cut = dense[n].abs().flatten().kthvalue(dense[n].numel() // 2).values
            m.weight.data = dense[n] * (dense[n].abs() > cut)
        seconds = time.process_time() - began
        return perplexity(model, test), seconds
    finally:
        for n, m in linears.items():
            m.weight.data = dense[n]


def pruned(model: Model, values: dict[str, Any], rows: list[Encoded], test: Tensor) -> tuple[float, float]:
    """Perplexity of a smaller copy of the model after its recovery, and the processor's seconds."""
    made = compression.make("llm-pruner", values | {"steps": STEPS, "batch_size": BATCH})
    assert isinstance(made, compression.Pruner)
    small = dataclasses.replace(model, net=copy.deepcopy(model.net))
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        small = made.prune(small, rows, Path(folder), lambda row, rows: None)
        at = Path(folder) / "recovery"
        if made.recover == "gkd":  # the method itself also has the model write, which takes long
            teacher = gkd.Trainer(teacher="same", lmbda=0.0, steps=STEPS, batch_size=BATCH)
            teacher.train(small, model, rows, 0, at)
        else:
            small = made.train(small, model, rows, 0, at, lambda step, steps, loss: None)
    seconds = time.process_time() - began
    return perplexity(small, test), seconds


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser("benchmarks.compression", description="Perplexity after compressing.")
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = models.load(options.model, device="cpu")
    test = windows(model, options.test, 512, 24)
    print(f"Dense: {perplexity(model, test):.3f}, ", end="", flush=True)
    permute(model)
    calibration = windows(model, options.calibration, 256, 16)
    count = STEPS * BATCH
    more = windows(model, options.calibration, 256, count)
    rows = [Encoded(ids.numpy().astype("int32"), 1) for ids in more]
    print(f"permuted: {perplexity(model, test):.3f}; {test.shape[0] * (test.shape[1] - 1):,} tokens\n")
    print("| how | perplexity | processor s |\n|---|---|---|", flush=True)
    for name, (method, values) in ROWS.items():
        if options.only.lower() in name.lower():
            if method == "llm-pruner":
                found, seconds = pruned(model, values, rows, test)
            else:
                found, seconds = row(model, method, values, calibration, more, test)
            print(f"| {name} | {found:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
