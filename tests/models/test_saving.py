# SPDX-License-Identifier: Apache-2.0
"""A model as a directory: whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from fleetune import models
from fleetune.errors import StorageError


def test_saved_and_loaded_is_the_same_model(tmp_path: Path) -> None:
    tiny = models.tiny_llama(3)
    target = tmp_path / "out"
    models.save(tiny.net, tiny.tokenizer, target, card="# card\n")
    again = models.load(str(target), device="cpu")
    assert (again.digest, again.tokenizer_digest) == (tiny.digest, tiny.tokenizer_digest)
    assert (again.dtype, again.device, again.path, again.name) == ("fp32", "cpu", target, str(target))
    ids = torch.tensor([[1, 2, 3, 200]])
    assert torch.equal(again.net(ids).logits, tiny.net(ids).logits)
    assert again.tokenizer.chat_template == tiny.tokenizer.chat_template
    assert again.tokenizer("ab 12")["input_ids"] == tiny.tokenizer("ab 12")["input_ids"]
    assert again.net.generation_config.eos_token_id == 257
    assert not again.net.training
    assert not any(p.requires_grad for p in again.net.parameters())
    assert (target / "README.md").read_text() == "# card\n"
    with safe_open(target / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    models.save(again.net, again.tokenizer, tmp_path / "second")
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert str(tmp_path) not in (tmp_path / "second" / file).read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_modes_follow_the_umask(tmp_path: Path, mask: int, file_mode: int, folder_mode: int) -> None:
    tiny = models.tiny_llama()
    old = os.umask(mask)
    try:
        models.save(tiny.net, tiny.tokenizer, tmp_path / "out")
    finally:
        os.umask(old)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {file_mode}, modes
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode


def test_save_replaces_a_model_and_nothing_else(tmp_path: Path, saved: Path) -> None:
    other = models.tiny_llama(9)
    models.save(other.net, other.tokenizer, saved)
    assert models.load(str(saved), device="cpu").digest == other.digest
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(StorageError, match="something else"):
        models.save(other.net, other.tokenizer, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "tiny"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_the_old_model(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    before = models.load(str(saved), device="cpu").digest
    tiny = models.tiny_llama(4)
    monkeypatch.setattr(tiny.tokenizer, "save_pretrained", fail)
    for target in (saved, tmp_path / "new"):
        with pytest.raises(StorageError, match="disk is full"):
            models.save(tiny.net, tiny.tokenizer, target)
    assert models.load(str(saved), device="cpu").digest == before
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
