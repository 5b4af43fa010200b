# SPDX-License-Identifier: Apache-2.0
"""What a model's files may claim: counts, constants, sizes and values; foreign errors; the first render of a template."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fleetune import models
from fleetune.common.memory import is_out_of_memory
from fleetune.errors import DataError, FitError, ModelError
from fleetune.models import bounds, template_trial
from fleetune.models.foreign import foreign_file

HERE = Path("x")


class PanicException(BaseException):
    """What a Rust package raises, by name."""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1_025), ("n_layer", 10**9), ("encoder_layers", 9_999), ("num_labels", 65_537),
        ("_num_labels", 10**9), ("n_routed_experts", 10**6), ("num_local_experts", 4_097), ("num_experts", 1e30),
        ("rms_norm_eps", 0), ("layer_norm_epsilon", 1), ("eps", -1e-5), ("eps", math.inf), ("rope_theta", 0),
        ("rope_theta", math.inf), ("rotary_emb_base", -1), ("anything", math.nan),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_any_depth(key: str, value: float) -> None:
    for raw in ({key: value}, {"text_config": {"a": [{key: value}]}}):
        with pytest.raises(ModelError, match=f"x says {key} = "):
            bounds.check_config(raw, HERE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 126), ("shared_expert_intermediate_size", 20_480), ("moe_intermediate_size", 18_432),
        ("num_experts_per_tok", 8), ("num_attention_heads", 128), ("max_position_embeddings", 10_485_760),
        ("vocab_size", 262_144), ("layer_norm_eps", 1e-12), ("num_steps", 10**6), ("rope_theta", 5e8),
        ("time_step_limit", [0.0, math.inf]), ("bos_token_id", None), ("use_cache", True),
        ("num_labels", 2), ("n_group", 8), ("initializer_range", 0.02), ("attention_dropout", 0.0),
    ],
)  # fmt: skip
def test_what_real_models_say_is_taken(key: str, value: object) -> None:
    bounds.check_config({key: value}, HERE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    words = "are no numbers" if math.isnan(value) else "go from"
    for size in (1, 7, 64, 1_000, 70_001):
        for at in {0, size // 3, size - 1}:
            tensor = torch.ones(size, dtype=dtype)
            assert list(bounds.finite([("w", tensor)], HERE))
            tensor[at] = value
            with pytest.raises(ModelError, match=f"the weights of w {words}"):
                list(bounds.finite([("w", tensor)], HERE))


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
    bounds.check_size(net, 10_001_000, HERE)
    bounds.check_size(net, 5_000_000, HERE)  # a new head
    with pytest.raises(ModelError, match="describes 10,001,000 parameters"):
        bounds.check_size(net, 2_000_000, HERE)
    net.register_buffer("table", torch.empty(1 << 29, device="meta"))
    with pytest.raises(ModelError, match="tables of 536,870,912"):
        bounds.check_size(net, 10_001_000, HERE)
    bounds.check_blocks(272, 272, HERE)
    with pytest.raises(ModelError, match="273 blocks, but there are 272 tensors"):
        bounds.check_blocks(273, 272, HERE)


# ---------------------------------------------------------------- errors of other packages


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("gone"), "KeyError: 'gone'"), (TypeError("no"), "TypeError: no"), (ValueError("bad"), "bad"),
        (RecursionError("deep"), "nested too deeply"), (AssertionError(), "AssertionError"),
        (PanicException("index out of range"), "PanicException: index out of range"),
    ],
)  # fmt: skip
def test_any_error_of_a_foreign_file_becomes_ours(error: BaseException, said: str) -> None:
    with pytest.raises(ModelError) as caught, foreign_file(HERE, "is damaged"):
        raise error
    assert caught.value.message == f"x is damaged ({said})"
    assert caught.value.hint == "fetch the model again"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), KeyboardInterrupt(), DataError("ours"), torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)  # fmt: skip
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
    tiny = models.tiny_llama()
    models.save(tiny.net, tiny.tokenizer, tmp_path / "m")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr("fleetune.models.loading._read_tensors", full)
    with pytest.raises(FitError, match="does not fit the memory of 'cpu'"):
        models.load(str(tmp_path / "m"), device="cpu")


# ---------------------------------------------------------------- the first render


def with_template(text: str) -> Any:
    tokenizer = models.tiny_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
        "{{ raise_exception('only user turns') }}",
        "{{ strftime_now('%d') }}{{ date_string }}{{ bos_token }}{{ messages | tojson(indent=2) }}",
        "{% set n = namespace(x=1) %}{% for i in range(99999) %}{% set n.x = i %}{% endfor %}{{ n.x }}",
        "{% include 'x' %}", "{{ 1 / 0 }}", "{% broken",
    ],
)  # fmt: skip
def test_a_template_that_ends_is_used_whatever_it_does(text: str) -> None:
    with template_trial.template_trial(with_template(text), HERE):
        pass


def test_a_trial_is_over_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the block ends the child; a child that cannot be started is no fault of the model."""
    endless = with_template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    began = time.monotonic()
    with pytest.raises(KeyError), template_trial.template_trial(endless, HERE):
        raise KeyError("in the block")
    assert time.monotonic() - began < 2
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with template_trial.template_trial(endless, HERE):
        pass


def test_a_template_for_one_of_several_uses_is_tried_too() -> None:
    tokenizer = with_template("")
    tokenizer.chat_template = {"default": "a", "tool_use": "{{ 'a' * 4000000000 }}"}
    with (
        pytest.raises(ModelError, match="1024 MiB"),
        template_trial.template_trial(tokenizer, HERE),
    ):
        pass
    tokenizer.chat_template = "x" * 2_000_000
    with (
        pytest.raises(ModelError, match="2,000,000 characters"),
        template_trial.template_trial(tokenizer, HERE),
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the child's own time is told on Unix")
def test_the_trial_of_an_honest_template_is_cheap() -> None:
    tiny = models.tiny_llama()
    before = os.times().children_user
    with template_trial.template_trial(tiny.tokenizer, HERE):
        pass
    assert os.times().children_user - before < 1  # some 0.05 s on an idle machine
