"""A step of `fedit` against the loop that everybody writes: PEFT's LoRA, padded rows, AdamW.

The rows are random tokens, as many as the first 12 rows of the demo and of a cut of Dolly have, with as long prompts (SmolLM2's
tokenizer, at most 250).  Rank 8 on all linear layers; memory is the peak of a process of its own.
"""

import functools
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from benchmarks import shape
from benchmarks.harness import Result, Row, Setting, child, compare, measure
from fleetune.common.memory import peak_rss, release_memory
from fleetune.data import Batches, Encoded
from fleetune.models.net.packed import packing
from fleetune.tuning.methods import fedit

# (tokens, of the prompt) of each row; rows a step
ROWS: Final = {
    "demo by fours": (
        "109,47 104,44 103,41 97,41 117,69 107,42 105,46 103,46 111,48 106,44 152,88 128,44",
        4,
    ),
    "Dolly by sixes": ("211,37 250,47 78,39 49,44 209,46 51,33 181,42 96,47 42,38 111,42 51,36 118,43", 6),
}
WAYS: Final = ("plain", "kept", "checkpoints")


def run(setting: Setting) -> Result:
    """Seconds and peaks of an epoch over each kind of rows."""
    result = Result()
    for name in ROWS:
        times = measure({way: work(setting.quick, name, way) for way in WAYS}, setting.repeats(3))
        result.keep(f"adapter step, {name}", times)
        peaks = {way: child("adapter_step", setting.quick, name, way) for way in WAYS}
        for way, target, most in (("kept", 0.75, None), ("checkpoints", 1.0, 0.7)):
            of, plain = f"fedit, {name}, {way}", "plain"
            result.rows.append(compare(f"{of}: time", times[way], times[plain], "cost", target))
            ratio = peaks[way] / peaks[plain]
            result.rows.append(Row(f"{of}: peak", peaks[way], peaks[plain], "MB", ratio, "cost", most))
    return result


def one(quick: bool, name: str, way: str) -> int:
    """In the child: return the peak of an epoch."""
    torch.set_num_threads(1)
    epoch = work(quick, name, way)
    release_memory()
    epoch()
    return peak_rss()


def work(quick: bool, name: str, way: str) -> Callable[[], None]:
    """Return what trains an epoch over the rows of that name."""
    (lengths, size), model, rng = ROWS[name], shape.model(quick), np.random.default_rng(0)
    pairs = [map(int, pair.split(",")) for pair in lengths.split()]
    rows = [Encoded(rng.integers(0, 4096, n, dtype=np.int32), prompt) for n, prompt in pairs]
    batches = functools.partial(Batches, rows, 257, 1)
    if way == "plain":
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
        net = get_peft_model(model.net, lora).train()

        def plain() -> None:
            optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), 1e-4, fused=True)
            for ids, mask, labels, *_ in batches().epochs(1, size):
                net(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        return plain
    again = "true" if way == "checkpoints" else "false"
    method = fedit.Method(lr=1e-4, r=8, alpha=16, dropout=0.0, batch_size=size, checkpointing=again)
    method.attach(model, 1)

    def ours() -> None:
        own = batches()
        with packing(model.net) as own.packed:
            method.train(model, own, 1, {})

    return ours
