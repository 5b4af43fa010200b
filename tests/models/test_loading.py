# SPDX-License-Identifier: Apache-2.0
"""A model from a name: what is loaded, what a name may be, and the hub."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fleetune import models
from fleetune.errors import ModelError
from fleetune.models.cache import cache, download


def test_loaded_weights_can_be_written_to_without_touching_the_file(saved: Path) -> None:
    before = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    model = models.load(str(saved), device="cpu")
    with torch.no_grad():
        for _, tensor in models.named_tensors(model.net):
            tensor.add_(1.0)
    assert hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest() == before
    assert (
        models.load(str(saved), device="cpu").digest
        == model.digest
        != models.digest(models.named_tensors(model.net))
    )


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_16_bit_weights_are_rounded_once_and_are_another_base(
    saved: Path, dtype: str, kind: torch.dtype
) -> None:
    full, half = models.load(str(saved), device="cpu"), models.load(str(saved), dtype=dtype, device="cpu")
    assert half.dtype == dtype
    assert half.digest != full.digest
    for (name, a), (_, b) in zip(models.named_tensors(full.net), models.named_tensors(half.net), strict=True):
        assert b.dtype == kind, name
        assert torch.equal(a.to(kind), b)
    assert half.net(torch.tensor([[1, 2]])).logits.dtype == kind


def test_sharded_directories_load(tmp_path: Path, saved: Path) -> None:
    net = models.load(str(saved), device="cpu").net
    net.save_pretrained(tmp_path / "shards", max_shard_size=60_000)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / file, tmp_path / "shards" / file)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert (
        models.load(str(tmp_path / "shards"), device="cpu").digest
        == models.load(str(saved), device="cpu").digest
    )
    next((tmp_path / "shards").glob("model-*.safetensors")).unlink()
    with pytest.raises(ModelError, match="lacks 1 of its weight files"):
        models.resolve(str(tmp_path / "shards"))


def test_a_tokenizer_of_another_model_is_refused(saved: Path) -> None:
    tokenizer = models.load(str(saved), device="cpu").tokenizer
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.save_pretrained(saved)
    with pytest.raises(ModelError, match="278 tokens, the model 264"):
        models.load(str(saved), device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", "no file or directory"),
        ("missing.gguf", "no file or directory"),
        ("a/b/c", "no file or directory"),
        ("SmolLM2", "Did you mean 'smollm2-135m'"),
        ("two words", "not a model's name"),
        ("org/no..dots", "not a model's name"),
        ("", "no model was named"),
    ],
)
def test_names_that_are_nothing(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        models.load(name, device="cpu")
    assert caught.value.hint


def test_other_files_dtypes_and_devices(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"not a \.gguf file"):
        models.load(str(saved / "config.json"))
    with pytest.raises(ModelError, match="no dtype named 'int4'"):
        models.load(str(saved), dtype="int4")
    with pytest.raises(ModelError, match="no device named 'tpu'"):
        models.load(str(saved), device="tpu")


def test_a_device_that_torch_lacks(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(ModelError, match=f"device '{device}': torch .*(without|no such)") as caught:
            models.load(str(saved), device=device)
        assert "--device cpu" in str(caught.value.hint)
    assert models.load(str(saved), device="auto").device == "cpu"


def test_offline_asks_nobody_and_uses_the_hub_cache(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot(hub: str, **kwargs: Any) -> Path:
        asked.append(kwargs)
        return saved

    def never(hub: str) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(cache, "hub_snapshot", snapshot)
    monkeypatch.setattr(cache, "hub_commit", never)
    assert models.resolve("org/model", offline=True) == saved
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert models.resolve("org/model") == saved
    assert models.load_config("org/model").vocab_size == 264
    assert [a["local"] for a in asked] == [True, True, True]
    assert asked[2]["files"] == ("config.json",)


def test_a_hub_that_answers_is_used_and_one_that_breaks_off_falls_back(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(hub: str, *, commit: str | None = None, local: bool = False, **kwargs: Any) -> Path:
        if not local and commit == "c0ffee":
            return saved
        if local:
            return saved.parent / "cached"
        raise download.Unreachable("broke off")

    monkeypatch.setattr(cache, "hub_snapshot", snapshot)
    monkeypatch.setattr(cache, "hub_commit", lambda hub: ("c0ffee", 10))
    assert models.resolve("org/model") == saved
    monkeypatch.setattr(cache, "hub_commit", lambda hub: ("other", 10))
    assert cache.pull_hub("org/model") == saved.parent / "cached"
