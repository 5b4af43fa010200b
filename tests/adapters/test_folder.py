"""Adapters as folders: PEFT's layout, our own, and folders that cannot be used."""

import json
from pathlib import Path

import pytest
import torch
from adapters_harness import IDS, LEAVES, MASK, NETS, PEFT_WARNS, SPECS, each, on, out, stored, tiny, tuned
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fleetune import adapters, models
from fleetune.adapters import Bottleneck
from fleetune.errors import FleetuneError, ModelError
from fleetune.models.cache import cache


@each
def test_a_folder_holds_the_module_bit_for_bit(net: str, name: str, tmp_path: Path) -> None:
    model = on(net, SPECS[name])
    adapters.save(model, tmp_path / "module")
    other = NETS[net]()
    adapters.load(other, tmp_path / "module")
    assert adapters.digest(adapters.export(other)) == adapters.digest(adapters.export(model))
    assert torch.equal(out(other), out(model))
    files = {p.name for p in (tmp_path / "module").iterdir()}
    peft = name.startswith("lora") or (net == "llama" and name in ("prefix", "prompt"))
    assert ("adapter_config.json" in files) == peft
    text = (tmp_path / "module" / "README.md").read_text()
    assert ("from peft import" in text) == peft
    assert ("PEFT has no such module" in text) == (not peft)
    assert model.digest in text


@PEFT_WARNS
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's prefix uses it
@pytest.mark.parametrize(("name", "within"), [("lora everywhere", 0.0), ("prefix", 2e-5), ("prompt", 2e-5)])
def test_peft_loads_decoder_modules_and_says_the_same(name: str, within: float, tmp_path: Path) -> None:
    model = on("llama", SPECS[name])
    adapters.save(model, tmp_path / "module")
    base = models.tiny_llama()
    models.save(base.net, base.tokenizer, tmp_path / "base")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(net, tmp_path / "module").eval()
    for mask in (MASK, torch.ones_like(MASK)):
        with torch.inference_mode():
            logits = theirs(input_ids=IDS, attention_mask=mask).logits[:, -16:]
            ours = model.net(input_ids=IDS, attention_mask=mask).logits
        real = mask.bool()
        torch.testing.assert_close(logits[real], ours[real], rtol=0, atol=within)
        assert (ours[real] - out(base, attention_mask=mask)[: len(ours[real])][0]).abs().max() > 1e-2


@PEFT_WARNS
@pytest.mark.parametrize("net", ["bert", "roberta"])
def test_peft_loads_an_encoders_lora_with_its_head(net: str, tmp_path: Path) -> None:
    model = on(net, SPECS["lora everywhere"])
    adapters.save(model, tmp_path / "module")
    NETS[net]().save(tmp_path / "base")
    encoder = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(encoder, tmp_path / "module").eval()
    with torch.inference_mode():
        logits = theirs(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(logits, out(model), rtol=0, atol=1e-6)


@PEFT_WARNS
def test_the_files_are_those_that_peft_would_write(tmp_path: Path) -> None:
    model = tuned()
    adapters.save(model, tmp_path / "ours")
    alike = LoraConfig(r=4, lora_alpha=8, target_modules=LEAVES, task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny().net, alike)
    theirs.save_pretrained(tmp_path / "theirs")
    keys = []
    for folder in ("ours", "theirs"):
        with safe_open(tmp_path / folder / "adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            keys.append({k: file.get_slice(k).get_shape() for k in file.keys()})  # noqa: SIM118
    assert keys[0] == keys[1]
    ours, other = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs"))
    assert ours.pop("target_modules") == sorted(other.pop("target_modules")) == LEAVES
    assert ours.pop("base_model_name_or_path") == "tiny-llama"
    other.pop("base_model_name_or_path")
    for config in (ours, other):
        config.pop("auto_mapping")
    assert ours == other


def test_the_base_is_named_so_that_others_find_it(tmp_path: Path) -> None:
    for name, public in [
        ("smollm2-135m", cache.SMOLLM2_135M.hub),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        (str(tmp_path), tmp_path.name),
    ]:
        model = tuned()
        model.name = name
        adapters.save(model, tmp_path / "adapter")
        config = (tmp_path / "adapter" / "adapter_config.json").read_text()
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert json.loads(config)["base_model_name_or_path"] == public
        assert f"base_model: {public}\n" in card
        assert model.digest in card
        assert str(tmp_path) not in config + card


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    adapters.save(on("llama", Bottleneck(6)), tmp_path / "module")
    config = tmp_path / "module" / "module.json"
    good = json.loads(config.read_text())
    assert good["spec"] == {"size": 6, "places": "houlsby", "norms": True}
    for change in ({"version": 2}, {"module": "magic"}, {"spec": {"length": 1}}, {"spec": {"size": 7}}):
        config.write_text(json.dumps(good | change))
        model = models.tiny_llama()
        with pytest.raises(FleetuneError):
            adapters.load(model, tmp_path / "module")
        assert model.attachment is None
        assert stored(model) == model.digest
    with pytest.raises(ModelError, match="not a usable adapter"):
        adapters.load(models.tiny_llama(), tmp_path / "nothing")
    config.write_text(json.dumps(good) + " " * (1 << 20))
    with pytest.raises(ModelError, match="more than 1,048,576 bytes"):
        adapters.load(models.tiny_llama(), tmp_path / "module")


def test_a_folder_chooses_no_start_and_no_size_that_its_numbers_do_not_have(tmp_path: Path) -> None:
    """An orthogonal start takes a decomposition for each layer, before a tensor is compared."""
    adapters.save(on("llama", Bottleneck(6)), tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    config = tmp_path / "module.json"
    good = json.loads(config.read_text())
    save_file({"x": torch.zeros(4096, 0)}, tmp_path / "module.safetensors")
    lora = {"r": 4096, "alpha": 1.0, "init": "orthogonal"}
    for module, spec, why in (("lora", lora, "'lora'"), ("bottleneck", {"size": 4096}, "4096, and none")):
        config.write_text(json.dumps(good | {"module": module, "spec": spec}))
        with pytest.raises(ModelError, match=why):
            adapters.load(models.tiny_llama(), tmp_path)


OTHERWISE = dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), True)
OTHERWISE |= {"alpha_pattern": {"q_proj": 1}, "rank_pattern": {"q_proj": 1}, "layer_replication": [[0, 1]]}
OTHERWISE |= {"modules_to_save": ["lm_head"], "bias": "all", "init_lora_weights": "pissa"}


def test_what_peft_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    adapters.save(on("llama", SPECS["lora everywhere"]), tmp_path)
    config, model = tmp_path / "adapter_config.json", models.tiny_llama()
    good = json.loads(config.read_text())
    for name, value in OTHERWISE.items():
        config.write_text(json.dumps(good | {name: value}))
        with pytest.raises(ModelError, match=f"config.json says {name} = "):
            adapters.load(model, tmp_path)
        assert model.attachment is None
    config.write_text(json.dumps(good | {"lora_dropout": 0.5, "revision": "x"}))
    adapters.load(model, tmp_path)
