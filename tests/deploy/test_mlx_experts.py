# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts for MLX: names, shapes and words as mlx-lm has them, what stays in 16 bits, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_harness import changed, on_codebook, on_grid
from family_harness import TEXT, save
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no package of the wheel

from benchmarks import mlx_families as bench  # noqa: E402

from fleetune import models  # noqa: E402
from fleetune.deploy.export import export  # noqa: E402
from fleetune.deploy.formats import mlx  # noqa: E402
from fleetune.errors import FleetuneError, UsageError  # noqa: E402
from fleetune.models import Model, artefact  # noqa: E402
from fleetune.models.artefact import ArtefactHead, Quantised  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
BOTH = ("mlp.experts", "mlp.gate", "mlp.switch_mlp", "mlp.gate")
GRANITE = (
    "block_sparse_moe.experts", "block_sparse_moe.router", "block_sparse_moe.switch_mlp", "block_sparse_moe.router.layer",
)  # fmt: skip
LAYOUT = {  # experts and router in transformers, and in mlx-lm
    "mixtral": ("mlp.experts", "mlp.gate", "block_sparse_moe.switch_mlp", "block_sparse_moe.gate"),
    "qwen2_moe": BOTH,
    "qwen3_moe": BOTH,
    "olmoe": BOTH,
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "ernie4_5_moe": BOTH,
}
BLOCK = "model.layers.2"
DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))


def stored(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def decoded(tensors: Mapping[str, np.ndarray], layer: str) -> np.ndarray:
    """The weights of 4-bit codes in groups of 32, by what mlx.core.quantize documents: the first code in the lowest bits."""
    codes = tensors[f"{layer}.weight"][..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)
    scales, biases = (
        np.repeat(tensors[f"{layer}.{part}"].astype(np.float32), 32, -1) for part in ("scales", "biases")
    )
    return scales * codes.reshape(*codes.shape[:-2], -1).astype(np.float32) + biases


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


# ---------------------------------------------------------------- layout


def test_words_of_two_experts_golden() -> None:
    q = Quantised(
        codes=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]] * 3 + [[15] * 8], dtype=torch.uint8),
        scale=torch.tensor([[0.5], [1.0], [2.0], [-1.0]], dtype=torch.float16),
        zero=torch.tensor([[8], [0], [1], [3]], dtype=torch.uint8),
        bits=4, group=8, experts=2,
    )  # fmt: skip
    found = {name: tensor.numpy() for name, tensor in mlx.parts("a.weight", q, torch.float16)}
    assert {name: (part.shape, part.dtype.name) for name, part in found.items()} == {
        "a.weight": ((2, 2, 1), "uint32"),
        "a.scales": ((2, 2, 1), "float16"),
        "a.biases": ((2, 2, 1), "float16"),
    }
    assert found["a.weight"].tolist() == [[[0x87654321], [0x87654321]], [[0x87654321], [0xFFFFFFFF]]]
    assert found["a.biases"].tolist() == [[[-4.0], [0.0]], [[-2.0], [3.0]]]


@pytest.mark.parametrize("family", LAYOUT)
def test_codes_of_experts_are_stacked_as_mlx_lm_has_them(family: str, tmp_path: Path) -> None:
    path, plain = bench.compressed(family, tmp_path, "asymmetric")
    tensors, own = stored(path), stored(plain)
    experts, router, theirs, their_router = (f"{BLOCK}.{part}" for part in LAYOUT[family])
    gate_up, down = own[f"{experts}.gate_up_proj"], own[f"{experts}.down_proj"]
    E, F, C = len(gate_up), gate_up.shape[1] // 2, gate_up.shape[2]
    want = {"gate_proj": gate_up[:, :F], "up_proj": gate_up[:, F:], "down_proj": down}
    for name, weight in want.items():
        rows, columns = (C, F) if name == "down_proj" else (F, C)
        shapes = {part: tensors[f"{theirs}.{name}.{part}"].shape for part in ("weight", "scales", "biases")}
        grouped = (E, rows, columns // 32)
        assert shapes == {"weight": (E, rows, columns // 8), "scales": grouped, "biases": grouped}
        assert np.array_equal(decoded(tensors, f"{theirs}.{name}"), weight), name
    assert np.array_equal(tensors[f"{their_router}.weight"], own[f"{router}.weight"].astype(np.float16))
    assert f"{their_router}.scales" not in tensors
    assert config(path)["quantization"] == {"group_size": 32, "bits": 4}


def test_gpt_oss_has_gates_and_ups_apart_with_biases(tmp_path: Path) -> None:
    """In the model they alternate, and its matrices are [in, out]."""
    path, plain = bench.compressed("gpt_oss", tmp_path, "asymmetric")
    tensors, own = stored(path), stored(plain)
    experts = f"{BLOCK}.mlp.experts"
    gate_up, bias = own[f"{experts}.gate_up_proj"], own[f"{experts}.gate_up_proj_bias"]
    weights = {
        "gate_proj": gate_up[:, :, ::2],
        "up_proj": gate_up[:, :, 1::2],
        "down_proj": own[f"{experts}.down_proj"],
    }
    biases = {
        "gate_proj": bias[:, ::2],
        "up_proj": bias[:, 1::2],
        "down_proj": own[f"{experts}.down_proj_bias"],
    }
    parts = ("weight", "scales", "biases", "bias")
    assert {name for name in tensors if name.startswith(f"{experts}.")} == {
        f"{experts}.{name}.{part}" for name in weights for part in parts
    }
    for name, weight in weights.items():
        assert np.array_equal(decoded(tensors, f"{experts}.{name}"), weight.swapaxes(1, 2)), name
        assert np.array_equal(tensors[f"{experts}.{name}.bias"], biases[name].astype(np.float16)), name
    assert f"{BLOCK}.self_attn.q_proj.scales" in tensors


def test_granite_without_shared_experts_is_a_granitemoe(tmp_path: Path) -> None:
    path, _ = bench.compressed("granitemoeshared, none, tied", tmp_path, "ggml")
    assert config(path)["model_type"] == "granitemoe"


# ---------------------------------------------------------------- codes of other kinds, and none


def grids(folder: Path, family: str = "qwen3_moe", **kinds: Any) -> tuple[Model, dict[str, Quantised]]:
    """Write a tiny mixture whose linear layers are on 4 bits and whose experts are on `kinds`; return what is quantised."""
    save(family, folder / "plain")
    model = models.load(str(folder / "plain"), device="cpu")
    found = dict[str, Quantised]()
    for name, tensor in models.named_tensors(model.net):
        if name.endswith("_proj.weight"):
            found[name] = on_grid(tensor, 4, 32)
        elif name.endswith("_proj") and kinds:
            rounded = on_codebook if "name" in kinds else on_grid
            found[name] = changed(rounded(tensor.flatten(0, 1), **kinds), experts=len(tensor))
    artefact.write(folder / "m", model, found, ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest))
    for name, q in found.items():
        model.net.get_parameter(name).data.copy_(q.dense())
    return model, found


def test_experts_of_other_bits_are_named(tmp_path: Path) -> None:
    grids(tmp_path, bits=8, group=32)
    found = config(export(tmp_path / "m", "mlx", tmp_path / "x").path)["quantization"]
    assert found == {"group_size": 32, "bits": 4} | {
        f"model.layers.{block}.mlp.switch_mlp.{name}_proj": {"group_size": 32, "bits": 8}
        for block in range(4)
        for name in ("gate", "up", "down")
    }


def test_experts_without_codes_are_in_16_bits(tmp_path: Path) -> None:
    model, _ = grids(tmp_path)
    tensors = stored(export(tmp_path / "m", "mlx", tmp_path / "x").path)
    up = model.net.get_parameter(f"{BLOCK}.mlp.experts.gate_up_proj").detach().half().numpy()[:, 64:]
    assert np.array_equal(tensors[f"{BLOCK}.mlp.switch_mlp.up_proj.weight"], up)
    assert not any("switch_mlp" in name and name.endswith(("scales", "biases")) for name in tensors)


def test_gpt_oss_s_experts_without_codes_are_turned(tmp_path: Path) -> None:
    model, _ = grids(tmp_path, "gpt_oss")
    tensors = stored(export(tmp_path / "m", "mlx", tmp_path / "x").path)
    experts = f"{BLOCK}.mlp.experts"
    own = {n: model.net.get_parameter(f"{experts}.{n}_proj").half().numpy() for n in ("gate_up", "down")}
    for name, values in {
        "gate": own["gate_up"][..., ::2],
        "up": own["gate_up"][..., 1::2],
        "down": own["down"],
    }.items():
        assert np.array_equal(tensors[f"{experts}.{name}_proj.weight"], values.swapaxes(1, 2)), name
    assert not any(experts in name and name.endswith(("scales", "biases")) for name in tensors)


@pytest.mark.parametrize(
    ("kinds", "why"),
    [
        ({"bits": 4, "group": 16}, "experts.gate_up_proj has groups of 16, MLX has 32, 64, 128"),
        ({"bits": 7, "group": 32}, "experts.gate_up_proj has 7 bits, MLX has 2, 3, 4, 5, 6, 8"),
        ({"bits": 4, "group": 32, "name": "iq4_nl"}, "experts.gate_up_proj are of the grid iq4_nl"),
    ],
)
def test_codes_of_experts_that_have_no_place(kinds: dict[str, Any], why: str, tmp_path: Path) -> None:
    grids(tmp_path, **kinds)
    with pytest.raises(UsageError, match=why) as caught:
        export(tmp_path / "m", "mlx", tmp_path / "out" / "x")
    assert "use --to" in (caught.value.hint or "")
    assert list((tmp_path / "out").iterdir()) == []


def test_ernie_s_correction_of_scores_has_no_place(tmp_path: Path) -> None:
    save("ernie4_5_moe", tmp_path / "plain")
    model = models.load(str(tmp_path / "plain"), device="cpu")
    name = "model.layers.3.mlp.gate.moe_statics.e_score_correction_bias"
    correction = model.net.get_parameter(name)
    assert correction.any()
    found = {
        n: on_grid(tensor, 4, 32)
        for n, tensor in models.named_tensors(model.net)
        if n.endswith("_proj.weight")
    }
    artefact.write(
        tmp_path / "m", model, found, ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest)
    )
    with pytest.raises(
        UsageError, match="e_score_correction_bias: mlx-lm leaves it out, and it is not 0"
    ) as caught:
        export(tmp_path / "m", "mlx", tmp_path / "x")
    assert "--to gguf" in (caught.value.hint or "")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_a_wrong_value_of_an_expert_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    grids(tmp_path, bits=4, group=32)
    right = mlx.parts

    def wrong(name: str, q: Quantised, dtype: torch.dtype) -> Any:
        for key, tensor in right(name, q, dtype):
            damaged = tensor.roll(1, 0) if key.endswith(f"switch_mlp.up_proj.{part}") else tensor
            yield key, damaged.contiguous()

    monkeypatch.setattr(mlx, "parts", wrong)
    with pytest.raises(
        FleetuneError, match=r"layers.0.mlp.switch_mlp.up_proj does not decode to its weights"
    ):
        export(tmp_path / "m", "mlx", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- mlx itself


@pytest.mark.parametrize("kinds", [{"bits": 3, "group": 32}, {"bits": 8, "group": 32, "zero": 100}, {}])
def test_mlx_lm_reads_the_same_experts_and_gives_the_same_logits(
    tmp_path: Path, kinds: dict[str, int]
) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    mx.set_default_device(mx.cpu)
    model, quantised = grids(tmp_path, **kinds)
    net, _ = utils.load_model(export(tmp_path / "m", "mlx", tmp_path / "x").path)
    if kinds:
        layer = dict(net.named_modules())["model.layers.1.mlp.switch_mlp.down_proj"]
        scales, biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
        read = mx.dequantize(layer.weight, scales, biases, group_size=layer.group_size, bits=layer.bits)
        assert np.array_equal(np.array(read), quantised[DOWN].dense().numpy())
    for name, tensor in models.named_tensors(model.net):
        if name not in quantised:  # fp16 in the file
            tensor.copy_(tensor.half().float())
    net.set_dtype(mx.float32)
    with torch.no_grad():
        own = model.net(torch.tensor([TEXT])).logits[0]
    np.testing.assert_allclose(np.array(net(mx.array([TEXT])))[0], own.numpy(), atol=2e-5)
