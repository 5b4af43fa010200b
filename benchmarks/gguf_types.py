# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp computes from a GGUF type beside what torch computes from the same file, as a Markdown table.

    python -m benchmarks.gguf_types smollm2-135m CALIBRATION.txt TEST.txt [--only q4_0 91.7MB ..]

A model, off the grid that it comes from (`benchmarks.compression`), is compressed to each type: every matrix by rounding, or
for a number of bytes by OPTQ in types of several kinds (super-blocks, Q2_K .., where rows divide by 256).  Of each file torch
runs the values that are read back in fp32, and llama.cpp runs the file itself.  Compared are their logits, token by token, on
the first 12 windows of 256 tokens of a text.  llama.cpp rounds activations to 8 bits where weights are codes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf

import fleetune
from benchmarks.compression import permute, windows
from fleetune import models
from fleetune.data import Encoded
from fleetune.deploy import export
from fleetune.deploy.measure import llamacpp
from fleetune.evaluation import kl_divergence, reference
from fleetune.models.mapped.net import in_memory

TEST: Final = (12, 256)  # windows, tokens
ROUNDED: Final[Mapping[str, Mapping[str, Any]]] = {
    "q4_0": {"bits": 4}, "q4_1": {"grid": "universal", "bits": 4}, "q5_0": {"bits": 5},
    "q5_1": {"grid": "universal", "bits": 5}, "q8_0": {"bits": 8}, "iq4_nl": {"grid": "iq4_nl"},
}  # fmt: skip
PLAIN: Final = ("f32", "f16", "bf16")
BUDGETS: Final = ("72MB", "91.7MB", "105MB")


def main() -> None:
    """Write, run and compare a file of each type."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration", help="a text file")
    parser.add_argument("text", help="a text file")
    every = (*PLAIN, *ROUNDED, *BUDGETS)
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = models.load(options.model, device="cpu")
        permute(source)
        ids = windows(source, options.text, TEST[1], TEST[0])
        models.save(source.net, source.tokenizer, folder / "plain")
        del source
        rows = [Encoded(ids=window.numpy(), n_prompt=1) for window in ids]
        print("| type | matrices | KL divergence | standard error | same top token |\n|---|---|---|---|---|")
        for kind in options.only:
            file = _written(folder, kind, options.calibration)
            found = _compared(file, rows, folder / "torch.npy")
            print(
                f"| {kind} | {_kinds(file)} | {found.kl_divergence:.1e} | {found.kl_divergence_error:.0e} |"
                f" {found.same_top:.2f} % |",
                flush=True,
            )
            file.unlink()


def _written(folder: Path, kind: str, calibration: str) -> Path:
    """Write the model's file of a type."""
    file, how = (
        folder / f"{kind}.gguf",
        {"windows": 16, "length": 256, "out": folder / "runs", "progress": False},
    )
    if kind in PLAIN:
        export.export(folder / "plain", f"gguf:{kind}", file)
        return file
    if kind in BUDGETS:
        done = fleetune.compress(folder / "plain", text=calibration, bytes=kind, **how)
    else:
        done = fleetune.compress(folder / "plain", method="rtn", settings=ROUNDED[kind], **how)
    export.export(done.path, "gguf", file)
    return file


def _compared(file: Path, rows: list[Encoded], scratch: Path) -> kl_divergence.Compared:
    """Return how far llama.cpp's logits are from torch's on the same values."""
    model = export.load(file)
    with in_memory(model.net):
        reference.keep(model, rows, scratch)
    with llamacpp.opened(file, 1) as engine:
        found = kl_divergence.compare(scratch, engine.scored_logits([(row.ids.tolist(), 1) for row in rows]))
    scratch.unlink()
    return found


def _kinds(file: Path) -> str:
    """Return how many matrices of each type a file has."""
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) == 2]
    return ", ".join(
        f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds), key=kinds.count, reverse=True)
    )


if __name__ == "__main__":
    main()
