"""A model from a name: what is loaded, what a name may be, and the hub."""

import errno
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from command_line import Patch
from fleetune import models
from fleetune.errors import ModelError, StorageError
from fleetune.models.cache import cache, download, names


def test_loaded_weights_can_be_written_to_without_touching_the_file(saved: Path) -> None:
    before = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    model = models.load(str(saved), device="cpu")
    with torch.no_grad():
        for _, tensor in models.named_tensors(model.net):
            tensor.add_(1.0)
    assert hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest() == before
    again = models.load(str(saved), device="cpu").digest
    assert again == model.digest != models.digest(models.named_tensors(model.net))


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_16_bit_weights_are_rounded_once_and_are_another_base(saved: Path, dtype: str, kind: Any) -> None:
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
    whole, shards = (models.load(str(at), device="cpu").digest for at in (saved, tmp_path / "shards"))
    assert whole == shards
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
        *((name, "no file or directory") for name in ("./missing", "missing.gguf", "a/b/c")),
        ("SmolLM2", "Did you mean 'smollm2-135m'"),
        *((name, "not a model's name") for name in ("two words", "org/no..dots")),
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

    monkeypatch.setattr(download, "hub_snapshot", snapshot)
    monkeypatch.setattr(download, "hub_commit", never)
    assert models.resolve("org/model", offline=True) == saved
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert models.resolve("org/model") == saved
    assert models.load_config("org/model").vocab_size == 264
    assert [a["local"] for a in asked] == [True, True, True]
    assert asked[2]["files"] == ("config.json",)


def test_a_hub_that_answers_is_used_one_that_breaks_off_is_not(saved: Path, monkeypatch: Patch) -> None:
    def snapshot(hub: str, *, commit: str | None = None, local: bool = False, **kwargs: Any) -> Path:
        if not local and commit == "c0ffee":
            return saved
        if local:
            return saved.parent / "cached"
        raise download.Unreachable("broke off")

    monkeypatch.setattr(download, "hub_snapshot", snapshot)
    monkeypatch.setattr(download, "hub_commit", lambda hub: ("c0ffee", 10))
    assert models.resolve("org/model") == saved
    monkeypatch.setattr(download, "hub_commit", lambda hub: ("other", 10))
    assert cache.pull_hub("org/model") == saved.parent / "cached"


def test_a_short_name_is_its_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def pull(hub: str, **given: Any) -> Path:
        asked.append(hub)
        return tmp_path

    monkeypatch.setattr(cache, "pull_hub", pull)
    for name in names.SHORT_NAMES:
        models.pull(name)
    assert asked == [short.hub for short in names.SHORT_NAMES.values()]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", hub) for hub in asked)
    assert not {*names.SHORT_NAMES} & {*cache.ORIGINS}


def test_a_folder_of_that_name_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    models.tiny_llama().save(tmp_path / "qwen3-0.6b")
    assert models.resolve("qwen3-0.6b") == Path("qwen3-0.6b")
    assert names.hub_of("qwen3-0.6b") is names.licence_of("qwen3-0.6b") is None
    monkeypatch.chdir(tmp_path.parent)
    assert (names.hub_of("qwen3-0.6b"), names.licence_of("qwen3-0.6b")) == ("Qwen/Qwen3-0.6B", "apache-2.0")
    assert names.hub_of("smollm2-135m") == cache.SMOLLM2_135M.hub
    assert names.hub_of("any/other") is None


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


FULL = "No space left on device"
FULLS = [
    OSError(errno.ENOSPC, FULL),
    SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"),
]


@pytest.mark.parametrize("error", FULLS)
def test_a_full_disk_leaves_the_old_model(
    saved: Path, tmp_path: Path, monkeypatch: Patch, error: Any
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    before = models.load(str(saved), device="cpu").digest
    tiny = models.tiny_llama(4)
    monkeypatch.setattr(tiny.tokenizer, "save_pretrained", fail)
    for target in (saved, tmp_path / "new"):
        with pytest.raises(StorageError, match="disk is full"):
            models.save(tiny.net, tiny.tokenizer, target)
    assert models.load(str(saved), device="cpu").digest == before
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
