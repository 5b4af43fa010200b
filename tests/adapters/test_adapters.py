# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: start, numbers in and out, PEFT directories, merge, detach."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from fleetune import adapters, models
from fleetune.data import Example
from fleetune.data.encode import DATE, encode, prompt_ids
from fleetune.errors import MessageError, ModelError, StorageError
from fleetune.models import Model
from fleetune.models.cache import cache

PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LEAVES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


def tiny(dtype: torch.dtype = torch.float32) -> Model:
    model = models.tiny_llama()
    model.net.to(dtype)
    return model


def attached(seed: int = 1, *, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    model = tiny(dtype)
    adapters.attach_lora(model, **({"r": 4, "alpha": 8, "dropout": 0.0} | options), seed=seed)
    return model


def tuned(seed: int = 1, **options: Any) -> Model:
    """With numbers in B too, as after training."""
    model = attached(seed, **options)
    random = np.random.default_rng(seed)
    arrays = {n: random.normal(0, 0.1, a.shape).astype(np.float32) for n, a in adapters.export(model).items()}
    adapters.load_(model, arrays)
    return model


def logits(net: Any) -> torch.Tensor:
    with torch.inference_mode():
        return net(IDS).logits


# ---------------------------------------------------------------- the start


def test_all_linear_layers_but_the_head_and_nothing_else_is_trainable() -> None:
    model = attached()
    names = list(adapters.trainable(model))
    assert names == sorted(names)
    assert len(names) == 2 * 7 * 2
    assert {n.split(".")[-3] for n in names} == set(LEAVES)
    assert names[0] == "model.layers.0.mlp.down_proj.lora_A.weight"
    grads = {n.replace(".default.", ".") for n, p in model.net.named_parameters() if p.requires_grad}
    assert grads == set(names)
    shapes = {n: tuple(p.shape) for n, p in adapters.trainable(model).items()}
    assert shapes["model.layers.1.self_attn.k_proj.lora_A.weight"] == (4, 32)
    assert shapes["model.layers.1.self_attn.k_proj.lora_B.weight"] == (16, 4)
    assert shapes["model.layers.1.mlp.down_proj.lora_A.weight"] == (4, 72)


def test_the_start_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one = adapters.export(attached(7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert adapters.digest(one) == adapters.digest(adapters.export(attached(7)))
    assert adapters.digest(one) != adapters.digest(adapters.export(attached(8)))
    some = adapters.export(attached(7, targets="v_proj, q_proj"))
    assert len(some) == 8
    for name, array in some.items():  # keyed by name: other layers make no difference
        assert np.array_equal(array, one[name])
    assert adapters.digest(one) == "43e57b989cc825c8938f5023e497bf5d8d1dfd8548933ce649e51202282a7cab"


@PEFT_WARNS
def test_a_is_kaiming_uniform_as_in_peft_and_b_is_zero() -> None:
    model = attached(r=32)
    theirs = get_peft_model(tiny().net, LoraConfig(r=32, target_modules=LEAVES))
    reference = {n: p for n, p in theirs.named_parameters() if ".lora_A." in n}
    for name, array in adapters.export(model).items():
        if ".lora_B." in name:
            assert not array.any()
            continue
        bound = array.shape[1] ** -0.5
        assert np.abs(array).max() <= bound
        assert np.abs(array).max() > 0.97 * bound
        assert array.std() == pytest.approx(bound / 3**0.5, rel=0.08)
        other = reference[f"base_model.model.{name.replace('.lora_A.', '.lora_A.default.')}"].detach().numpy()
        assert array.std() == pytest.approx(other.std(), rel=0.12)
        assert array.std() != other.std()


def test_a_fresh_adapter_changes_nothing() -> None:
    assert torch.equal(logits(attached().net), logits(tiny().net))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_fp32_on_a_16_bit_base(dtype: torch.dtype) -> None:
    model = attached(dtype=dtype)
    assert {p.dtype for p in adapters.trainable(model).values()} == {torch.float32}
    assert {a.dtype for a in adapters.export(model).values()} == {np.dtype(np.float32)}
    assert adapters.digest(adapters.export(model)) == adapters.digest(adapters.export(attached()))
    assert torch.equal(logits(model.net), logits(tiny(dtype).net))
    assert logits(tuned(dtype=dtype).net).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r = 0"),
        ({"alpha": 0}, "alpha = 0"),
        ({"dropout": 1.0}, r"dropout = 1\.0"),
        ({"init": "magic"}, "no LoRA start named 'magic'"),
        ({"targets": "q_proj,w_proj"}, "no linear layer named 'w_proj'"),
        ({"targets": "lm_head"}, "no linear layer named 'lm_head'"),
        ({"targets": []}, "no linear layer"),
    ],
)
def test_what_cannot_be_attached(options: dict[str, Any], message: str) -> None:
    model = tiny()
    with pytest.raises(ModelError, match=message) as caught:
        adapters.attach_lora(model, **({"r": 4, "alpha": 8.0, "seed": 0} | options))
    assert caught.value.hint
    assert model.attachment is None
    assert models.digest(models.named_tensors(model.net)) == model.digest


def test_one_adapter_at_a_time_and_none_is_said() -> None:
    model = attached()
    with pytest.raises(ModelError, match="already carries a Lora"):
        adapters.attach_lora(model, r=2, alpha=2, seed=0)
    with pytest.raises(ModelError, match="carries no adapter"):
        adapters.export(tiny())


# ---------------------------------------------------------------- numbers in and out


def test_export_and_load_are_inverse_and_export_is_a_copy() -> None:
    model, other = tuned(2), attached(3)
    arrays = adapters.export(model)
    adapters.load_(other, arrays)
    assert torch.equal(logits(other.net), logits(model.net))
    assert adapters.digest(adapters.export(other)) == adapters.digest(arrays)
    for array in arrays.values():
        array += 1
    assert adapters.digest(adapters.export(model)) == adapters.digest(adapters.export(other))


def test_load_refuses_what_is_not_its_own_and_changes_nothing() -> None:
    model = tuned()
    good = adapters.export(model)
    before, first, last = adapters.digest(good), next(iter(good)), list(good)[-1]
    fresh = {n: a + 1 for n, a in good.items()}
    spoilt = [
        ({n: a for n, a in fresh.items() if n != last}, "differ in 1 names"),
        (fresh | {"extra": fresh[first]}, "'extra'"),
        ({("x" if n == last else n): a for n, a in fresh.items()}, "differ in 2 names"),
        (fresh | {last: fresh[last][:-1]}, r"is float32 \[31, 4\]|is float32 \[15, 4\]"),
        (fresh | {last: fresh[last].T.copy()}, "is float32"),
        (fresh | {last: fresh[last].astype(np.float16)}, "is float16"),
        (fresh | {last: fresh[last].astype(np.float64)}, "is float64"),
    ]
    for arrays, message in spoilt:
        with pytest.raises(MessageError, match=message):
            adapters.load_(model, arrays)
        assert adapters.digest(adapters.export(model)) == before


def test_load_takes_arrays_that_are_not_contiguous() -> None:
    model = tuned()
    arrays = adapters.export(model)
    adapters.load_(model, {n: np.asfortranarray(a) for n, a in arrays.items()})
    assert adapters.digest(adapters.export(model)) == adapters.digest(arrays)


def test_pairs_name_the_factors_of_every_layer() -> None:
    arrays = adapters.export(attached())
    pairs = adapters.pairs(arrays)
    assert len(pairs) == 14
    assert {n for pair in pairs.values() for n in pair} == set(arrays)
    b, a = pairs["model.layers.0.self_attn.v_proj"]
    assert arrays[b].shape == (16, 4)
    assert arrays[a].shape == (4, 32)


# ---------------------------------------------------------------- training


def train(model: Model, key: int) -> str:
    optimizer = torch.optim.AdamW(adapters.trainable(model).values(), lr=1e-2, weight_decay=0.0)
    with adapters.training(model, key):
        for _ in range(3):
            loss = model.net(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return adapters.digest(adapters.export(model))


def test_training_is_a_function_of_its_key_and_lowers_the_loss() -> None:
    model = attached(dropout=0.2)
    with torch.no_grad():
        before = model.net(IDS, labels=IDS).loss.item()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = train(model, 2**63 + 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert train(attached(dropout=0.2), 2**63 + 5) == first
    assert train(attached(dropout=0.2), 6) != first
    with torch.no_grad():
        assert model.net(IDS, labels=IDS).loss.item() < before - 0.05
    assert not model.net.training
    assert not any(module.training for module in model.net.modules())
    assert all(p.grad is None for p in model.net.parameters())
    adapters.detach(model)
    assert models.digest(models.named_tensors(model.net)) == model.digest


def test_training_ends_in_eval_mode_after_an_error() -> None:
    model = attached()
    work = adapters.training(model, 1)
    work.__enter__()
    assert model.net.training
    work.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not model.net.training


# ---------------------------------------------------------------- leaving the model


def test_detach_restores_the_base_exactly() -> None:
    base, model = tiny(), tuned()
    assert not torch.equal(logits(model.net), logits(base.net))
    adapters.detach(model)
    assert model.attachment is None
    assert models.digest(models.named_tensors(model.net)) == model.digest == base.digest
    assert torch.equal(logits(model.net), logits(base.net))
    assert {n: type(m) for n, m in model.net.named_modules()} == {
        n: type(m) for n, m in base.net.named_modules()
    }
    assert set(vars(model.net)) == set(vars(base.net))
    assert not any(p.requires_grad for p in model.net.parameters())
    adapters.attach_lora(model, r=2, alpha=2, seed=0)  # and it can be used again


def test_merge_means_the_adapter() -> None:
    base, model = tiny(), tuned(alpha=6)
    arrays = adapters.export(model)
    with_adapter = logits(model.net)
    adapters.merge(model)
    assert torch.allclose(logits(model.net), with_adapter, atol=2e-5)
    assert (logits(base.net) - with_adapter).abs().max() > 1e-2
    assert model.digest == models.digest(models.named_tensors(model.net)) != base.digest
    weights, stored = dict(model.net.named_parameters()), dict(base.net.named_parameters())
    for layer, (b, a) in adapters.pairs(arrays).items():
        expected = stored[f"{layer}.weight"].numpy() + 6 / 4 * arrays[b] @ arrays[a]
        np.testing.assert_allclose(weights[f"{layer}.weight"].numpy(), expected, atol=1e-6)
    untouched = [n for n in stored if n.removesuffix(".weight") not in adapters.pairs(arrays)]
    assert all(torch.equal(stored[n], weights[n]) for n in untouched)


def test_merge_into_16_bits_rounds_once() -> None:
    base, model = tiny(torch.bfloat16), tuned(dtype=torch.bfloat16)
    arrays = adapters.export(model)
    adapters.merge(model)
    weights, stored = dict(model.net.named_parameters()), dict(base.net.named_parameters())
    for layer, (b, a) in adapters.pairs(arrays).items():
        delta = torch.from_numpy(arrays[b]) @ torch.from_numpy(arrays[a]) * 2
        expected = (stored[f"{layer}.weight"].float() + delta).bfloat16()
        assert torch.equal(weights[f"{layer}.weight"], expected)


def test_a_model_with_an_adapter_is_not_saved_as_a_model(tmp_path: Path) -> None:
    model = tuned()
    with pytest.raises(ModelError, match="still carries adapters"):
        models.save(model.net, model.tokenizer, tmp_path / "out")
    adapters.merge(model)
    models.save(model.net, model.tokenizer, tmp_path / "out")
    assert models.load(str(tmp_path / "out"), device="cpu").digest == model.digest


# ---------------------------------------------------------------- PEFT directories


@PEFT_WARNS
def test_peft_loads_what_we_save(tmp_path: Path) -> None:
    model = tuned(alpha=12)
    adapters.save(model, tmp_path / "adapter")
    base = tiny()
    models.save(base.net, base.tokenizer, tmp_path / "base")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(logits(theirs), logits(model.net))
    assert not torch.equal(logits(theirs), logits(base.net))


@PEFT_WARNS
def test_the_files_are_those_that_peft_would_write(tmp_path: Path) -> None:
    model = tuned()
    adapters.save(model, tmp_path / "ours")
    theirs = get_peft_model(
        tiny().net, LoraConfig(r=4, lora_alpha=8, target_modules=LEAVES, task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(tmp_path / "theirs")
    keys = []
    for folder in ("ours", "theirs"):
        with safe_open(tmp_path / folder / "adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            keys.append({k: file.get_slice(k).get_shape() for k in file.keys()})  # noqa: SIM118
    assert keys[0] == keys[1]
    ours, other = (
        json.loads((tmp_path / f / "adapter_config.json").read_bytes()) for f in ("ours", "theirs")
    )
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


def test_the_card_of_a_gguf_base_says_how_transformers_reads_it(tmp_path: Path) -> None:
    (tmp_path / "base-q8.gguf").touch()
    model = tuned()
    model.name = str(tmp_path / "base-q8.gguf")
    adapters.save(model, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'from_pretrained("FOLDER OF base-q8.gguf", gguf_file="base-q8.gguf")' in card


def test_the_card_says_in_which_form_to_prompt(tmp_path: Path) -> None:
    model = tuned()
    model.name = str(tmp_path)
    adapters.save(model, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f'from_pretrained("PATH OF {tmp_path.name}")' in card
    assert (
        "`apply_chat_template(turns, add_generation_prompt=True)`. An answer ends with `<|im_end|>`" in card
    )
    assert "tokenised together with its prompt" in card
    model.tokenizer.chat_template += "{{ date_string }}"
    adapters.save(model, tmp_path / "adapter")
    assert f'True, date_string="{DATE}")' in (tmp_path / "adapter" / "README.md").read_text()
    model.tokenizer.chat_template = None
    adapters.save(model, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    prompt = eval(re.search(r"tokenizer\((.*?)\)", card)[1], {"prompt": "hello"})
    example = Example((("user", "hello"),), "a")
    assert model.tokenizer(prompt)["input_ids"] == prompt_ids(example, model.tokenizer, 64).tolist()
    row = encode(example, model.tokenizer, 64).ids
    assert f"An answer ends with `{model.tokenizer.convert_ids_to_tokens(int(row[-1]))}`" in card


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_adapter_files_have_plain_modes_and_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    model = tuned()
    old = os.umask(0o022)
    try:
        adapters.save(model, tmp_path / "adapter")
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "adapter").iterdir()} == {0o644}
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("")
    with pytest.raises(StorageError, match="something else"):
        adapters.save(model, tmp_path / "other")
    adapters.save(attached(5), tmp_path / "adapter")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "other"]
