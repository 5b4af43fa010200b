"""Directories, sizes and weights that cannot be used."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fleetune import models
from fleetune.common.memory import is_out_of_memory
from fleetune.errors import DataError, FitError, ModelError
from fleetune.models import checks
from fleetune.models.families.foreign import foreign_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_bytes())
    config.update(changes)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


NORM = "model.norm.weight"
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
LEFT_OVER = "has 9 tensors that a LlamaForCausalLM .* no place for: model.layers.1.input_layernorm.weight, "
REMOTE = {"model_type": "zebra", "auto_map": {"AutoConfig": "x.y"}}
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no config.json"),
    "an adapter": (lambda f: (f / CONFIG).rename(f / "adapter_config.json"), "is an adapter, not a model"),
    "bad JSON": (lambda f: (f / CONFIG).write_text("{"), "not a model configuration"),
    "no type": (lambda f: (f / CONFIG).write_text("{}"), "not a model configuration"),
    "unknown type": (lambda f: edit_config(f, model_type="zebra"), "'zebra', which is not"),
    "remote code": (lambda f: edit_config(f, **REMOTE), "code of its own"),
    "encoder without labels": (lambda f: edit_config(f, **BERT), "is an encoder .* 0 were given"),
    "encoder-decoder": (lambda f: edit_config(f, **T5), "'t5'"),
    "no head": (lambda f: edit_config(f, architectures=["LlamaModel"]), "LlamaModel"),
    "codes": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    "absurd value": (lambda f: edit_config(f, num_attention_heads="many"), "cannot be used"),
    "a wrong value": (lambda f: edit_config(f, hidden_size=33), "is not a multiple of the number"),
    "no blocks": (lambda f: edit_config(f, num_hidden_layers=-1), "says num_hidden_layers = -1, below 1"),
    "no heads": (lambda f: edit_config(f, num_attention_heads=0), "says num_attention_heads = 0, below 1"),
    "fewer blocks than weights": (lambda f: edit_config(f, num_hidden_layers=1), LEFT_OVER),
    "a tensor of none": (
        lambda f: edit_weights(f, **{"score.weight": torch.ones(3)}),
        "has 1 .*: score.weight",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no weights"),
    "artefact": (lambda f: (f / WEIGHTS).rename(f / "master.safetensors"), "a compressed model"),
    "a pickle": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "truncated": (truncate, "cannot be loaded"),
    "a tensor missing": (lambda f: edit_weights(f, **{NORM: None}), "lacks 1 tensors of a Llama.*model.norm"),
    "a wrong shape": (lambda f: edit_weights(f, **{NORM: torch.ones(31)}), "cannot be loaded|lacks 1"),
    "no tokenizer": (no_tokenizer, "no tokenizer"),
    "bad tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"model": 1}'),
        "tokenizer .* cannot be load",
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
    models.tiny_bert().save(tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith("classifier")}
    names = ("cls.predictions.bias", "bert.embeddings.position_ids", "cls.seq_relationship.weight")
    other = {name: torch.ones(1, 3) for name in names}
    save_file(tensors | other, file)
    edit_config(tmp_path / "bert", architectures=["BertForMaskedLM"])
    assert models.load(str(tmp_path / "bert"), device="cpu", labels=("yes", "no")).labels == ("yes", "no")
    edit_config(tmp_path / "bert", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"no place for: bert\.encoder\.layer\.1\."):
        models.load(str(tmp_path / "bert"), device="cpu", labels=("yes", "no"))


HERE = Path("x")


class PanicException(BaseException):
    """What a Rust package raises, by name."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    words = "are no numbers" if math.isnan(value) else "go from"
    for size in (1, 7, 64, 1_000, 70_001):
        for at in {0, size // 3, size - 1}:
            tensor = torch.ones(size, dtype=dtype)
            assert list(checks.finite([("w", tensor)], HERE))
            tensor[at] = value
            with pytest.raises(ModelError, match=f"the weights of w {words}"):
                list(checks.finite([("w", tensor)], HERE))


def test_weights_that_overflow_in_fp16_get_another_hint(tmp_path: Path) -> None:
    tiny = models.tiny_llama()
    tiny.net.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    models.save(tiny.net, tiny.tokenizer, tmp_path / "m")
    models.load(str(tmp_path / "m"), device="cpu", dtype="bf16")
    with pytest.raises(ModelError, match=r"up_proj.weight go from .* to inf") as caught:
        models.load(str(tmp_path / "m"), device="cpu", dtype="fp16")
    assert "--dtype fp32" in str(caught.value.hint)


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tiny = models.tiny_llama()
    for layer in tiny.net.model.layers:
        layer.mlp.down_proj.weight.fill_(9e8)
        layer.mlp.up_proj.weight.fill_(9e8)
        layer.mlp.gate_proj.weight.fill_(9e8)
        layer.post_attention_layernorm.weight.fill_(9e8)
    models.save(tiny.net, tiny.tokenizer, tmp_path / "m")
    with pytest.raises(ModelError, match="outputs that are not finite"):
        models.load(str(tmp_path / "m"), device="cpu")


def test_sizes_are_compared_with_what_is_there() -> None:
    with torch.device("meta"):
        net = nn.Linear(10_000, 1_000)
    checks.check_size(net, 10_001_000, HERE)
    checks.check_size(net, 5_000_000, HERE)  # a new head
    with pytest.raises(ModelError, match="describes 10,001,000 parameters"):
        checks.check_size(net, 2_000_000, HERE)
    net.register_buffer("table", torch.empty(1 << 29, device="meta"))
    with pytest.raises(ModelError, match="tables of 536,870,912"):
        checks.check_size(net, 10_001_000, HERE)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("gone"), "KeyError: 'gone'"),
        (TypeError("no"), "TypeError: no"),
        (ValueError("bad"), "bad"),
        (RecursionError("deep"), "nested too deeply"),
        (AssertionError(), "AssertionError"),
        (PanicException("index out of range"), "PanicException: index out of range"),
    ],
)
def test_any_error_of_a_foreign_file_becomes_ours(error: BaseException, said: str) -> None:
    with pytest.raises(ModelError) as caught, foreign_file(HERE, "is damaged"):
        raise error
    assert caught.value.message == f"x is damaged ({said})"
    assert caught.value.hint == "fetch the model again"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        KeyboardInterrupt(),
        DataError("ours"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_what_says_nothing_about_the_file_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, foreign_file(HERE):
        raise error
    assert caught.value is error


def test_a_lack_of_memory_is_known_by_its_kind_its_words_or_its_cause() -> None:
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    later = OSError("no shared object")
    later.__cause__ = OSError("x.so: failed to map segment from shared object")
    assert is_out_of_memory(later)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(OSError("not found"))


def test_a_model_without_memory_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.tiny_llama().save(tmp_path / "m")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr("fleetune.models.loading._read_tensors", full)
    with pytest.raises(FitError, match="does not fit the memory of 'cpu'"):
        models.load(str(tmp_path / "m"), device="cpu")
