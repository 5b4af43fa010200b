"""GGUF files as Hugging Face directories: the same numbers, the same tokens."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import NETS, write_gguf
from transformers import AutoModelForCausalLM

from fleetune import models
from fleetune.errors import ModelError
from fleetune.models.cache import cache


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
    type_ = gguf.GGMLQuantizationType[kind]
    write_gguf(path, net, "llama", type_)
    model = models.load(str(path), device="cpu")
    assert model.digest != models.digest(models.named_tensors(net))
    weight = model.net.model.layers[1].mlp.up_proj.weight
    rows = gguf.quants.quantize(net.model.layers[1].mlp.up_proj.weight.numpy(), type_)
    assert np.array_equal(weight.numpy(), gguf.quants.dequantize(rows, type_))
    theirs = pytest.importorskip("transformers").GgufConfig(dequantize=True)
    pytest.importorskip("accelerate")
    how = {"gguf_file": path.name, "dtype": torch.float32, "quantization_config": theirs}
    other = AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    assert models.digest(models.named_tensors(other)) == model.digest


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
    record = {"source": "file m.gguf", "file": "m.gguf", "sha256": {"gguf": digest}}
    assert cache.source_of(first) == {"v": 1, **record}
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
