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
from fleetune.cli.main import main
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


@pytest.mark.parametrize("listing", [list, lambda numbers: numbers[0]])
def test_blocks_that_are_alike_are_a_plain_llama(tmp_path: Path, listing: Any) -> None:
    """Whatever says so: transformers reads the directory."""
    found = [Width(2, 1, 96)] * 2
    model = narrowed([(1, 96)] * 2)
    said = {key: listing([n] * 2) for key, n in zip((HEADS, KEYS, CHANNELS), found[0], strict=True)}
    back = models.load(str(foreign(tmp_path / "m.gguf", model, found, said)), device="cpu")
    written = json.loads((back.path / "config.json").read_bytes())
    assert written["model_type"] == "llama"
    assert KEY not in written
    assert not widths.has_block_widths(models.load_config(str(tmp_path / "m.gguf")))
    theirs = AutoModelForCausalLM.from_pretrained(back.path, local_files_only=True)
    for net in (back.net, theirs):
        assert torch.equal(logits(net), logits(model.net))


def test_the_whole_models_heads_are_those_that_are_as_wide_as_the_model(tmp_path: Path) -> None:
    """Where no block kept all of them: four of 16 for 64 columns."""
    path = foreign(
        tmp_path / "m.gguf", narrowed([(1, 64), (2, 32)], 1, 4), [Width(1, 1, 64), Width(2, 2, 32)]
    )
    config = models.load_config(str(path))
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 4, 64)


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


@pytest.mark.parametrize("count", [1, 2])
def test_a_head_may_be_wider_than_its_share(tmp_path: Path, count: int) -> None:
    """Three heads, that 64 columns are no multiple of, in all blocks; each 32 wide, where 64 / 3 is 21."""
    model = narrowed([(3, 64)] * count, 1, 4, head_dim=32)
    found = [Width(3, 3, 64)] * count
    said = {f"attention.{key}_length": 32 for key in ("key", "value")} | {"rope.dimension_count": 32}
    back = models.load(str(foreign(tmp_path / "m.gguf", model, found, said)), device="cpu")
    assert widths.block_widths(back.net.config) == found
    assert torch.equal(logits(back.net), logits(model.net))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({HEADS: [4, 0, 4], KEYS: [2, 0, 2]}, "block 1 has 0 query heads"),
        ({KEYS: [2, 1, 0]}, "block 2 has 4 query heads, 0 key heads"),
        ({CHANNELS: [128, 0, 32]}, "block 1 .* MLP of 0 channels"),
        ({HEADS: [0, 2, 4], KEYS: [0, 1, 2], CHANNELS: [0, 96, 32]}, "block 0 has 0 query heads"),
        ({HEADS: 4}, "block 1 has 4 query heads, 1 key heads"),
        ({KEYS: [2, 2, 2]}, "block 1 has 2 query heads, 2 key heads"),
        ({HEADS: [4, 2, 5]}, "block 2 has 5 query heads, 2 key heads"),
        ({"attention.value_length": 32}, r"16 wide, and attention.value_length is 32"),
        ({"rope.dimension_count": 8}, r"16 wide, and rope.dimension_count is 8"),
    ],
)
def test_what_is_no_narrower_llama_is_refused_up_front(
    tmp_path: Path, said: dict[str, Any], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(tmp_path / "m.gguf", pruned(), FOUND, said)
    for use in (models.load_config, models.load):
        with pytest.raises(ModelError, match=rf"m.gguf is no llama with narrower blocks: .*{why}") as caught:
            use(str(path))
        assert f"fleetune serve {path}" in str(caught.value.hint)
    (tmp_path / "text.txt").write_text("a text that is read first")
    assert main(["eval", str(path), "--tasks", "perplexity", "--text", str(tmp_path / "text.txt")]) == 2
    assert "no llama with narrower blocks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({HEADS: [4, 2]}, r"attention.head_count is \[4, 2\] for 3 blocks"),
        ({CHANNELS: [128, 96, 32, 32]}, "feed_forward_length is .* for 3 blocks"),
        ({KEYS: [2, -1, 2]}, r"attention.head_count_kv is \[2, -1, 2\]"),
        ({CHANNELS: "wide"}, "feed_forward_length is wide for 3 blocks"),
        ({HEADS: None}, "attention.head_count"),
        ({CHANNELS: None}, "feed_forward_length"),
        ({"embedding_length": None}, "embedding_length"),
        ({"block_count": 0}, "block_count is 0"),
        ({"attention.key_length": 15}, "heads are 15 wide"),
        ({"attention.key_length": 0}, "heads are 0 wide"),
        (
            {
                "embedding_length": 66,
                KEYS: [3, 3, 3],
                HEADS: [12, 12, 12],
                "attention.key_length": 6,
                "attention.value_length": 6,
                "rope.dimension_count": 6,
            },
            "66.* not a multiple of .*12",
        ),
    ],
)
def test_metadata_that_make_no_sense_are_refused(tmp_path: Path, said: dict[str, Any], why: str) -> None:
    path = foreign(tmp_path / "m.gguf", pruned(), FOUND, said)
    with pytest.raises(ModelError, match=f"unusable metadata .*{why}"):
        models.load_config(str(path))


def test_a_llama_has_one_number_for_all_blocks(tmp_path: Path) -> None:
    for said in ({}, {HEADS: 5, KEYS: 5, CHANNELS: 96}):
        path = foreign(tmp_path / "m.gguf", pruned(), FOUND, said, "llama")
        with pytest.raises(ModelError, match=r"unusable metadata .*(got list|not a multiple)"):
            models.load_config(str(path))


@pytest.mark.parametrize(
    "said",
    [
        {HEADS: [2, 4, 4], KEYS: [1, 2, 2]},
        {CHANNELS: [128, 32, 96]},
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
