"""Whole models as .gguf: read back by the importer, refused when they have no place, and never half right."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from deploy_harness import LLAMA3, changed, compressed, tiny
from serve_harness import little_file
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fleetune import models
from fleetune.deploy.checkpoint import open_checkpoint
from fleetune.deploy.export import facts_of_base
from fleetune.deploy.export import write as export
from fleetune.deploy.formats import gguf
from fleetune.errors import FleetuneError, ModelError, UsageError
from fleetune.models import artefact
from fleetune.models.cache import cache
from fleetune.models.families import rope
from fleetune.models.gguf import header

pytestmark = pytest.mark.usefixtures("own_cache")
IDS = torch.tensor([[260, 12, 200, 7, 256, 258, 31, 90, 261]])


def logits(net: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return net(IDS).logits


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in package.GGUFReader(path).fields.items()}


@pytest.mark.parametrize(
    ("kind", "to", "bits", "group", "grid", "types"),
    [
        ("llama", "gguf", 4, 32, {}, "Q4_0"),
        ("qwen2", "gguf", 4, 64, {"zero": 5, "scale_bits": 7}, "Q4_1"),
        ("qwen3", "gguf", 5, 32, {}, "Q5_0"),
        ("llama", "gguf", 5, 32, {"zero": 5, "scale_bits": 6}, "Q5_1"),
        ("qwen3", "gguf", 8, 32, {}, "Q8_0"),
        ("qwen2", "gguf", 4, 32, {"name": "iq4_nl"}, "IQ4_NL"),
        ("llama", "gguf:q8_0", 4, 32, {"name": "iq4_nl"}, "Q8_0"),
        ("qwen2", "gguf:f32", 4, 16, {}, "F32"),
    ],
)
def test_the_importer_gets_the_weights_back(tmp_path, kind, to, bits, group, grid, types):
    model = tiny(kind)
    compressed(model, tmp_path / "master", bits, group, **grid)
    report = export(tmp_path / "master", to, tmp_path / "model.gguf")
    layers = 2 * 7
    assert report.types[types] >= layers
    assert report.bytes == (tmp_path / "model.gguf").stat().st_size
    assert report.tensors == len(models.named_tensors(model.net))
    back = models.load(str(report.path))
    ends = {"lm_head.weight", "model.embed_tokens.weight"}
    read = dict(models.named_tensors(back.net))
    for name, tensor in models.named_tensors(model.net):
        if name not in ends:
            assert torch.equal(read[name], tensor), name
    if to == "gguf:f32":
        assert report.exact == report.tensors
        assert torch.equal(logits(back.net), logits(model.net))
    else:  # the embedding is rounded to Q8_0, all else is not
        for name in ends & read.keys():
            model.net.get_parameter(name).copy_(read[name])
        assert torch.equal(logits(back.net), logits(model.net))
    for text in ("hello 123 he's\n\n  ll", "<|im_start|>x<|im_end|>"):
        assert back.tokenizer(text).input_ids == model.tokenizer(text).input_ids
    assert back.tokenizer.chat_template == model.tokenizer.chat_template


@pytest.mark.parametrize(
    ("to", "types", "exact"),
    [
        ("gguf", {"F16": 15, "F32": 5}, 5),
        ("gguf:bf16", {"BF16": 15, "F32": 5}, 5),
        ("gguf:f32", {"F32": 20}, 20),
        ("gguf:q8_0", {"Q8_0": 15, "F32": 5}, 5),
    ],
)
def test_a_plain_directory(tmp_path: Path, to: str, types: dict[str, int], exact: int) -> None:
    model = tiny()
    models.save(model.net, model.tokenizer, tmp_path / "plain")
    report = export(tmp_path / "plain", to, tmp_path / "x.gguf")
    rounded = next(iter(types))
    notes = () if rounded == "F32" else (f"15 tensors are rounded to {rounded}",)  # once, not a line a layer
    assert (report.types, report.exact, report.notes) == (types, exact, notes)
    back = models.load(str(report.path))
    near = {"Q8_0": 2e-3, "BF16": 2e-3, "F16": 3e-4}.get(next(iter(types)), 0)
    for (_, own), (_, read) in zip(*(models.named_tensors(m.net) for m in (model, back)), strict=True):
        assert (own - read).abs().max() <= near


def test_a_bf16_directory_in_shards_stays_bf16(tmp_path: Path) -> None:
    model = tiny("qwen2")
    model.net.to(torch.bfloat16)
    model.net.save_pretrained(tmp_path / "plain", max_shard_size="50KB")
    model.tokenizer.save_pretrained(tmp_path / "plain")
    assert len(list((tmp_path / "plain").glob("model-*.safetensors"))) > 1
    report = export(tmp_path / "plain", "gguf", tmp_path / "x.gguf")
    assert report.types == {"BF16": 16, "F32": 11}
    assert report.exact == report.tensors


def test_what_the_metadata_say(tmp_path: Path) -> None:
    model = tiny(head_dim=32)
    compressed(model, tmp_path / "m")
    found = fields(export(tmp_path / "m", "gguf", tmp_path / "little.gguf").path)
    want = {f"general.{k}": v for k, v in (("architecture", "llama"), ("name", "little"), ("file_type", 2))}
    sizes = {"context_length": 1024, "embedding_length": 64, "block_count": 2, "feed_forward_length": 128}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32}
    sizes |= {"attention.value_length": 32, "rope.dimension_count": 32, "vocab_size": 264}
    words = {"model": "gpt2", "pre": "smollm", "bos_token_id": 260, "eos_token_id": 261}
    words["add_bos_token"] = False
    want |= {f"llama.{k}": v for k, v in sizes.items()} | {f"tokenizer.ggml.{k}": v for k, v in words.items()}
    want["general.quantization_version"] = 2
    assert {key: found[key] for key in want} == want
    assert found["llama.rope.freq_base"] == 10000.0
    assert math.isclose(found["llama.attention.layer_norm_rms_epsilon"], 1e-5, rel_tol=1e-6)
    assert len(found["tokenizer.ggml.tokens"]) == 264


def test_rows_of_q_and_k_are_interleaved_and_so_are_their_biases(tmp_path: Path) -> None:
    model = tiny(attention_bias=True)
    models.save(model.net, model.tokenizer, tmp_path / "plain")
    path = export(tmp_path / "plain", "gguf:f32", tmp_path / "x.gguf").path
    stored = {t.name: np.array(t.data) for t in package.GGUFReader(path).tensors}
    layer = model.net.model.layers[0].self_attn
    order = [h * 16 + i + half for h in range(4) for i in range(8) for half in (0, 8)]
    assert np.array_equal(stored["blk.0.attn_q.weight"], layer.q_proj.weight.numpy()[order])
    assert np.array_equal(stored["blk.0.attn_q.bias"], layer.q_proj.bias.numpy()[order])
    assert np.array_equal(stored["blk.0.attn_k.bias"], layer.k_proj.bias.numpy()[order[:32]])
    assert np.array_equal(stored["blk.0.attn_v.bias"], layer.v_proj.bias.numpy())
    assert np.array_equal(stored["blk.0.attn_output.weight"], layer.o_proj.weight.numpy())


def test_llama_3_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    model = tiny(head_dim=32, rope_parameters=LLAMA3)
    compressed(model, tmp_path / "m")
    path = export(tmp_path / "m", "gguf", tmp_path / "x.gguf").path
    stored = next(t for t in package.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.net.config, "cpu")
    plain = 10000.0 ** -(np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(plain / np.array(stored.data), scaled.numpy(), rtol=1e-6)
    assert stored.data.min() == 1
    assert stored.data.max() == 8


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    model = tiny()
    model.net.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    models.save(model.net, model.tokenizer, tmp_path / "plain")
    with pytest.raises(UsageError, match=r"layers.1.mlp.up_proj.weight has values beyond F16's range"):
        export(tmp_path / "plain", "gguf:f16", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    assert export(tmp_path / "plain", "gguf:bf16", tmp_path / "x.gguf").types["BF16"] == 15


def test_weights_of_another_configuration_are_refused(tmp_path: Path) -> None:
    tiny().save(tmp_path / "plain")
    file = tmp_path / "plain" / "config.json"
    config = json.loads(file.read_text())
    for change, why in (
        ({"intermediate_size": 96}, r"has shape .* the configuration says"),
        ({"num_hidden_layers": 3}, r"lacks model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, r"holds model.layers.1.* does not have"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=why):
            export(tmp_path / "plain", "gguf", tmp_path / "x.gguf")


def test_every_damaged_byte_of_the_weights_is_noticed(tmp_path: Path) -> None:
    compressed(tiny(rope_parameters=LLAMA3), tmp_path / "m")
    path = export(tmp_path / "m", "gguf", tmp_path / "x.gguf").path
    model = open_checkpoint(tmp_path / "m")
    entries = gguf.plan(model, None, [])
    factors = rope.tensors(model.config)
    whole = path.read_bytes()
    rounded = gguf.verify(path, model, entries, factors)
    assert [entry.parameter for entry in rounded] == ["model.embed_tokens.weight"]
    for tensor in package.GGUFReader(path).tensors:
        for at in (tensor.data_offset, tensor.data_offset + tensor.n_bytes - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(FleetuneError, match=tensor.name):
                gguf.verify(path, model, entries, factors)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FleetuneError, match="is cut off"):
        gguf.verify(path, model, entries, factors)


def test_a_wrong_packer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed(tiny(), tmp_path / "m")
    right = gguf._ggml_blocks.PACKERS
    wrong = {**right, "Q4_0": lambda q: right["Q4_0"](changed(q, codes=q.codes.flip(1)))}
    monkeypatch.setattr(gguf._ggml_blocks, "PACKERS", wrong)
    with pytest.raises(FleetuneError, match=r"does not hold the values of model.layers.0.self_attn.q_proj"):
        export(tmp_path / "m", "gguf", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_the_header_says_where_the_model_comes_from(tmp_path: Path) -> None:
    model = tiny()
    compressed(model, tmp_path / "m")
    base = artefact.Master(tmp_path / "m").head.base
    found = fields(export(tmp_path / "m", "gguf", tmp_path / "x.gguf", made={"general.license": "mit"}).path)
    digest = hashlib.sha256((tmp_path / "m" / "master.safetensors").read_bytes()).hexdigest()
    made = {"method": "rtn", "settings": "{}", "base_digest": base, "artefact_digest": digest}
    stated = {k: v for k, v in found.items() if k.startswith("fleetune.") or k == "general.license"}
    assert stated == {"general.license": "mit"} | {f"fleetune.{k}": v for k, v in made.items()}
    models.save(model.net, model.tokenizer, tmp_path / "plain")
    found = fields(export(tmp_path / "plain", "gguf", tmp_path / "y.gguf").path)
    assert not [key for key in found if key.startswith("fleetune.") or key == "general.license"]
    assert facts_of_base("smollm2-135m") == {"general.license": "apache-2.0"}
    assert facts_of_base("elsewhere/model") == {}


def test_a_name_that_llamacpp_takes_for_another_vocabulary_is_spelt_otherwise(tmp_path: Path) -> None:
    """llama.cpp loads no file whose name has phi-3 in it and whose vocabulary lacks that model's tokens."""
    model = tiny()
    compressed(model, tmp_path / "model")
    export(tmp_path / "model", "gguf", tmp_path / "my-Phi-3-mini.gguf")
    assert "phi 3" in str(fields(tmp_path / "my-Phi-3-mini.gguf")["general.name"]).lower()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    compressed(tiny(), folder / "m")
    return export(folder / "m", "gguf", folder / "x.gguf").path


def test_it_says_what_the_package_reads(file: Path) -> None:
    head, reader = header.check(file), package.GGUFReader(file)
    fields = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    assert head.values == fields
    assert [(t.name, t.kind, t.shape, t.offset, t.size) for t in head.tensors] == [
        (t.name, t.tensor_type.name, tuple(t.shape[::-1].tolist()), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    for ours, theirs in zip(head.tensors, reader.tensors, strict=True):
        assert head.bytes(ours).tobytes() == theirs.data.tobytes()


@pytest.mark.parametrize("base", ["memory", "mapped"])
def test_a_split_file_is_told_before_hashing(tmp_path, base, monkeypatch):
    monkeypatch.setattr(cache.sums, "sha256", lambda path: pytest.fail("hashed"))
    path = little_file(tmp_path / "m-00002-of-00003.gguf", no=1, count=3)
    with pytest.raises(ModelError, match=r"is a part of a split model"):
        models.load(str(path), base=base)
    with pytest.raises(ModelError, match=r"is a part of a split model"):
        models.load_config(str(path))
    header.check(path)  # llama.cpp finds the others
    header.check_whole(little_file(tmp_path / "one.gguf", no=0, count=1))
