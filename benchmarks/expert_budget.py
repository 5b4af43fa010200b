# SPDX-License-Identifier: Apache-2.0
"""A byte budget on a mixture of experts, beside one grid for all of its layers in a file of the same size.

    python -m benchmarks.expert_budget MODEL calibration.txt held-out.txt     a mixture on the disk
    python -m benchmarks.expert_budget random calibration.txt held-out.txt    a random one of 7 million weights
    python -m benchmarks.expert_budget trained calibration.txt held-out.txt   the same, trained on the calibration text first

It is a Qwen3-MoE, or a gpt-oss with `--family gpt_oss`.

Told is the KL divergence from the dense model on the held-out text, of each grid with embedding and head in 8 bits, as `export`
writes them, and of a budget of as many bytes for the whole file, with what it expected.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import fleetune
from fleetune import models
from fleetune.common.display import human_bytes
from fleetune.common.events import BudgetSpent
from fleetune.deploy.export import export
from fleetune.runs.listener import Silent

GRIDS = ("q3_k", "iq4_xs", "iq4_nl", "q4_k", "q5_k")
STEPS, BATCH, LENGTH, RATE = 400, 8, 128, 2e-3


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with a merge, as GGUF wants one."""
    vocab = {text: i for i, text in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "he"])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def mixture(family: str, text: str, steps: int) -> tuple[Any, PreTrainedTokenizerFast]:
    """A mixture of 8 experts a layer, 2 of which a token is sent to, trained for so many steps on a text."""
    words = tokenizer()
    config = AutoConfig.for_model(
        family, vocab_size=264, hidden_size=256, intermediate_size=256, moe_intermediate_size=256,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=8,
        num_local_experts=8, num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=512, output_router_logits=True,
        router_aux_loss_coef=0.01, bos_token_id=257, eos_token_id=258, pad_token_id=258,
        initializer_range=0.006 if steps else 0.08,
    )  # fmt: skip
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config)
    ids = torch.tensor(words(text, add_special_tokens=False)["input_ids"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 30) * (1 - 0.95 * step / steps)
        firsts = torch.randint(0, len(ids) - LENGTH, (BATCH,)).tolist()
        x = torch.stack([ids[first : first + LENGTH] for first in firsts])
        loss = net(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step}: loss {float(loss):.3f}", flush=True)
    net.config.output_router_logits = False
    return net.eval(), words


class Spent(Silent):
    """Keeps what a budget was spent on."""

    found: BudgetSpent

    def event(self, event: Any) -> None:
        if isinstance(event, BudgetSpent):
            self.found = event


def compare(
    model: str, text: str, held: str, method: str, windows: int, length: int, grids: list[str]
) -> None:
    """Compress a mixture on each grid, and by a budget of the size of that file; print both divergences."""
    print(f"{'grid':8}{'file':>10}{'one grid':>20}{'a budget':>20}{'expected':>10}   types")
    for grid in grids:
        with TemporaryDirectory() as folder:
            given: dict[str, Any] = {
                "method": method, "text": text, "eval_text": held, "windows": windows, "length": length,
                "out": Path(folder) / "runs",
            }  # fmt: skip
            one = fleetune.compress(model, settings={"grid": grid}, listener=Silent(), **given)
            size = export(one.folder / "model", "gguf", Path(folder) / f"{one.folder.name}.gguf").bytes
            spent = Spent()
            other = fleetune.compress(model, bytes=size, listener=spent, **given)
        kinds = ", ".join(f"{count} {kind}" for kind, count in spent.found.kinds.items())
        expected = f"{spent.found.kl_divergence:.5f}"
        print(
            f"{grid:8}{human_bytes(size):>10}{told(one):>20}{told(other):>20}{expected:>10}   {kinds}",
            flush=True,
        )


def told(done: Any) -> str:
    """A divergence with its standard error."""
    after = done.done.after
    return f"{after['kl_divergence']:.5f} ± {after['kl_divergence_error']:.5f}"


def main() -> None:
    """Compare on the mixture that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expert_budget")
    for name in ("model", "text", "held"):
        parser.add_argument(name)
    parser.add_argument("--family", choices=["qwen3_moe", "gpt_oss"], default="qwen3_moe")
    parser.add_argument("--method", default="qronos")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--grids", nargs="+", default=list(GRIDS))
    asked = parser.parse_args()
    given = (asked.text, asked.held, asked.method, asked.windows, asked.length, asked.grids)
    if asked.model not in ("random", "trained"):
        compare(asked.model, *given)
        return
    text = Path(asked.text).read_text(encoding="utf-8")
    with TemporaryDirectory() as folder:
        net, words = mixture(asked.family, text, STEPS if asked.model == "trained" else 0)
        models.save(net, words, Path(folder) / "m")
        compare(str(Path(folder) / "m"), *given)


if __name__ == "__main__":
    main()
