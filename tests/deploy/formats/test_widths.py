# SPDX-License-Identifier: Apache-2.0
"""Models whose blocks differ in width, on their way to runtimes: GGUF's architecture deci, and what has no place for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from deploy_harness import compressed, tiny

from fleetune import models
from fleetune.deploy import targets
from fleetune.deploy.export import write as export
from fleetune.errors import UsageError
from fleetune.models import Model
from fleetune.models.families import widths
from fleetune.models.families.widths import KeptUnits

IDS = torch.tensor([[260, 12, 200, 7, 256, 258, 31, 90, 261]])


def narrowed(kind: str, *, alike: bool = False, **sizes: Any) -> Model:
    """A model of two blocks whose second (or both) has one of two key heads and 96 of 128 channels."""
    model = tiny(kind, **sizes)
    small = KeptUnits([1], range(16, 112))
    widths.cut(model.net, [small if alike else KeptUnits([0, 1], range(128)), small])
    return model


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.net(IDS).logits


@pytest.mark.parametrize("quantised", [False, True])
def test_a_llama_of_different_widths_is_a_deci(quantised: bool, tmp_path: Path) -> None:
    model = narrowed("llama")
    if quantised:
        compressed(model, tmp_path / "m")
    else:
        models.save(model.net, model.tokenizer, tmp_path / "m")
    report = export(tmp_path / "m", "gguf" if quantised else "gguf:f32", tmp_path / "m.gguf")
    assert report.exact == report.tensors or quantised
    reader = package.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [4, 2]
    assert fields["deci.attention.head_count_kv"] == [2, 1]
    assert fields["deci.feed_forward_length"] == [128, 96]
    assert fields["deci.attention.key_length"] == fields["deci.attention.value_length"] == 16
    assert fields["deci.rope.dimension_count"] == 16
    assert fields["deci.block_count"] == 2
    found = {t.name: t for t in reader.tensors}
    assert {
        n: tuple(map(int, found[n].shape))
        for n in (
            "blk.0.attn_q.weight",
            "blk.1.attn_q.weight",
            "blk.1.attn_k.weight",
            "blk.1.attn_output.weight",
            "blk.1.ffn_down.weight",
        )
    } == {
        "blk.0.attn_q.weight": (64, 64),
        "blk.1.attn_q.weight": (64, 32),
        "blk.1.attn_k.weight": (64, 16),
        "blk.1.attn_output.weight": (32, 64),
        "blk.1.ffn_down.weight": (96, 64),
    }
    state = dict(models.named_tensors(model.net))
    for part, heads in (("q", 2), ("k", 1)):
        read = package.quants.dequantize(
            found[f"blk.1.attn_{part}.weight"].data, found[f"blk.1.attn_{part}.weight"].tensor_type
        )
        own = state[f"model.layers.1.self_attn.{part}_proj.weight"].numpy()
        for head in range(heads):
            for i in range(8):  # the rows i and i + d/2 of a head are neighbours in the file
                assert np.array_equal(read[head * 16 + 2 * i], own[head * 16 + i])
                assert np.array_equal(read[head * 16 + 2 * i + 1], own[head * 16 + 8 + i])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_gguf_has_no_place_for_others_of_different_widths(kind: str, tmp_path: Path) -> None:
    model = narrowed(kind)
    models.save(model.net, model.tokenizer, tmp_path / "m")
    with pytest.raises(UsageError, match=f"different widths in a {kind}") as caught:
        export(tmp_path / "m", "gguf:f32", tmp_path / "m.gguf")
    assert ("first=0" in str(caught.value.hint)) == (kind == "qwen3")  # of a qwen2 it would not do either
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("to", [t.name for t in targets.every().values() if t.takes == "codes"])
def test_no_other_format_has_a_place_for_them(to: str, tmp_path: Path) -> None:
    compressed(narrowed("llama"), tmp_path / "m")
    with pytest.raises(UsageError, match=f"different widths, which {to} has no place for"):
        export(tmp_path / "m", to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
