# SPDX-License-Identifier: Apache-2.0
"""What a model's files may claim: counts, sizes and values; foreign errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fleetune import models
from fleetune.common.memory import is_out_of_memory
from fleetune.errors import DataError, FitError, ModelError
from fleetune.models import checks
from fleetune.models.families import foreign
from fleetune.models.families.foreign import foreign_file

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
    foreign.check_blocks(272, 272, HERE)
    with pytest.raises(ModelError, match="273 blocks, but there are 272 tensors"):
        foreign.check_blocks(273, 272, HERE)


# ---------------------------------------------------------------- errors of other packages


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
    tiny = models.tiny_llama()
    models.save(tiny.net, tiny.tokenizer, tmp_path / "m")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr("fleetune.models.loading._read_tensors", full)
    with pytest.raises(FitError, match="does not fit the memory of 'cpu'"):
        models.load(str(tmp_path / "m"), device="cpu")
