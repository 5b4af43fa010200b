# SPDX-License-Identifier: Apache-2.0
"""GGUF files of architecture deci by other hands: read as llama.cpp reads them, or refused up front."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from deci_harness import FOUND, foreign, logits, narrowed, pruned
from transformers import AutoModelForCausalLM

from fleetune import models
from fleetune.errors import ModelError
from fleetune.models.families import widths
from fleetune.models.families.widths import KEY, Width
from fleetune.models.gguf import convert

HEADS: Final = "attention.head_count"
KEYS: Final = "attention.head_count_kv"
CHANNELS: Final = "feed_forward_length"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for what the importer converts."""
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))


def test_a_file_of_others_is_read_by_its_lists(tmp_path: Path) -> None:
    model = pruned()
    back = models.load(str(foreign(tmp_path / "m.gguf", model, FOUND)), device="cpu")
    assert widths.block_widths(back.net.config) == FOUND
    assert torch.equal(logits(back.net), logits(model.net))
    assert back.tokenizer("hello 12").input_ids == model.tokenizer("hello 12").input_ids
    written = json.loads((back.path / "config.json").read_bytes())
    assert (written["model_type"], written["num_attention_heads"], written["num_key_value_heads"]) == (
        "fleetune_llama",
        4,
        2,
    )


def test_blocks_that_are_alike_are_a_plain_llama(tmp_path: Path) -> None:
    """Whatever says so: transformers reads the directory."""
    found = [Width(2, 1, 96)] * 2
    model = narrowed([(1, 96)] * 2)
    said = {key: [n] * 2 for key, n in zip((HEADS, KEYS, CHANNELS), found[0], strict=True)}
    back = models.load(str(foreign(tmp_path / "m.gguf", model, found, said)), device="cpu")
    written = json.loads((back.path / "config.json").read_bytes())
    assert written["model_type"] == "llama"
    assert KEY not in written
    assert not widths.has_block_widths(models.load_config(str(tmp_path / "m.gguf")))
    theirs = AutoModelForCausalLM.from_pretrained(back.path, local_files_only=True)
    for net in (back.net, theirs):
        assert torch.equal(logits(net), logits(model.net))


def test_what_a_file_leaves_out_is_llama_cpps_default(tmp_path: Path) -> None:
    """Heads as wide as the first block's share, as many key heads as query heads, a base of 10000."""
    model = narrowed([(2, 64), (4, 32)], 1, 4, head_dim=32)
    left_out = (
        *(KEYS, "attention.key_length", "attention.value_length"),
        *("rope.dimension_count", "rope.freq_base", "vocab_size"),
    )
    said = dict.fromkeys(left_out)
    found = [Width(2, 2, 64), Width(4, 4, 32)]
    back = models.load(str(foreign(tmp_path / "m.gguf", model, found, said)), device="cpu")
    assert (back.net.config.head_dim, back.net.config.vocab_size) == (32, 264)
    assert torch.equal(logits(back.net), logits(model.net))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({HEADS: [4, 0, 4], KEYS: [2, 0, 2]}, r"block 1 has no attention \(head_count 0\)"),
        ({CHANNELS: [128, 0, 32]}, r"block 1 has no MLP \(feed_forward_length 0\)"),
        ({KEYS: [2, 2, 2]}, "block 1 has 1 query heads to a key head, block 0 has 2"),
        ({"attention.value_length": 32}, r"16 wide, and attention.value_length is 32"),
    ],
)
def test_what_is_no_narrower_llama_is_refused_up_front(
    tmp_path: Path, said: dict[str, Any], why: str
) -> None:
    path = foreign(tmp_path / "m.gguf", pruned(), FOUND, said)
    for use in (models.load_config, models.load):
        with pytest.raises(ModelError, match=rf"m.gguf is no llama with narrower blocks: .*{why}") as caught:
            use(str(path))
        assert f"fleetune serve {path}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({HEADS: [4, 2]}, "attention.head_count has 2 numbers for 3 blocks"),
        ({KEYS: [2, -1, 2]}, "attention.head_count_kv of block 1 is -1"),
        ({CHANNELS: "wide"}, "feed_forward_length of block 0 is 'wide'"),
        ({"block_count": 0}, "block_count is 0"),
        ({"attention.key_length": 15}, "heads are 15 wide"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(tmp_path: Path, said: dict[str, Any], why: str) -> None:
    path = foreign(tmp_path / "m.gguf", pruned(), FOUND, said)
    with pytest.raises(ModelError, match=f"unusable metadata .*{why}"):
        models.load_config(str(path))


@pytest.mark.parametrize(
    "said",
    [
        {HEADS: [2, 4, 4], KEYS: [1, 2, 2]},
        {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
    ],
)
def test_lists_that_are_not_the_tensors_are_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    path = foreign(tmp_path / "m.gguf", pruned(), FOUND, said)
    with pytest.raises(ModelError, match=r"blk.[01].* has shape"):
        models.load(str(path))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="has shape"):
        convert.convert(path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
