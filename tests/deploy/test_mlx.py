# SPDX-License-Identifier: Apache-2.0
"""Directories for MLX: golden words, what the configuration says, refusals, damage, and mlx itself where it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_harness import changed, compressed, on_grid, tiny
from safetensors.torch import load_file

import fleetune
from fleetune import models
from fleetune.cli.main import main
from fleetune.deploy import targets
from fleetune.deploy.checkpoint import open_checkpoint
from fleetune.deploy.export import export
from fleetune.deploy.formats import hf, mlx
from fleetune.deploy.measure import engines
from fleetune.errors import FleetuneError, UsageError
from fleetune.models import Model, artefact
from fleetune.models.artefact import ArtefactHead, Quantised

IDS = [260, 12, 200, 7, 256, 258, 31, 90, 261]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def matrix(codes: list[int], scale: list[float], zero: list[int], bits: int) -> Quantised:
    return Quantised(
        torch.tensor([codes], dtype=torch.uint8),
        torch.tensor([scale], dtype=torch.float16),
        torch.tensor([zero], dtype=torch.uint8),
        bits,
        len(codes) // len(scale),
    )


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return (words.view(torch.int32).to(torch.int64) & 0xFFFFFFFF).tolist()


def write(model: Model, folder: Path, grids: dict[str, Quantised]) -> Path:
    artefact.write(folder, model, grids, ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest))
    return folder


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# ---------------------------------------------------------------- bytes


def test_four_bits_golden() -> None:
    q = matrix([1, 2, 3, 4, 5, 6, 7, 15, 0, 0, 0, 0, 8, 0, 0, 9], [0.5, -2.0], [8, 3], 4)
    found = dict(mlx.parts("a.weight", q, torch.float16))
    assert list(found) == ["a.weight", "a.scales", "a.biases"]
    assert found["a.weight"].dtype == torch.uint32
    assert unsigned(found["a.weight"]) == [[0xF7654321, 0x90080000]]
    assert found["a.scales"].tolist() == [[0.5, -2.0]]
    assert found["a.biases"].tolist() == [[-4.0, 6.0]]
    assert {found[part].dtype for part in ("a.scales", "a.biases")} == {torch.float16}


def test_three_bits_are_eight_codes_in_three_bytes() -> None:
    codes = [1, 2, 3, 4, 5, 6, 7, 0] * 4
    # mlx packs 3 bits a code from the lowest on: 0b000_111_110_101_100_011_010_001 is the 24 bits of eight codes
    eight = 0b000_111_110_101_100_011_010_001
    stream = sum(eight << 24 * i for i in range(4))
    want = [stream & 0xFFFFFFFF, stream >> 32 & 0xFFFFFFFF, stream >> 64]
    found = dict(mlx.parts("a.weight", matrix(codes, [1.0], [4], 3), torch.float32))
    assert unsigned(found["a.weight"]) == [want]
    assert found["a.biases"].tolist() == [[-4.0]]


@pytest.mark.parametrize(
    ("kind", "bits", "group", "grid", "types"),
    [
        ("llama", 4, 32, {}, {"F16": 34, "U32": 14}),
        ("qwen2", 3, 64, {}, {"F16": 41, "U32": 14}),
        ("qwen3", 8, 32, {"zero": 100, "scale_bits": 4}, {"F16": 38, "U32": 14}),
        ("llama", 4, 32, {"zero": 5}, {"F16": 6, "F32": 28, "U32": 14}),  # 11 bits times 5 are 13
    ],
)
def test_codes_scales_and_biases_are_the_masters(
    tmp_path: Path, kind: str, bits: int, group: int, grid: dict[str, int], types: dict[str, int]
) -> None:
    model = tiny(kind)
    quantised = compressed(model, tmp_path / "m", bits, group, **grid)
    report = export(tmp_path / "m", "mlx", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, q in quantised.items():
        layer = name.removesuffix(".weight")
        codes = hf.unwords(stored[name].view(torch.int32), bits, q.codes.shape[1])
        assert torch.equal(codes, q.codes)
        scales, biases = stored[f"{layer}.scales"], stored[f"{layer}.biases"]
        assert torch.equal(scales.float(), q.scale.float())
        assert torch.equal(biases.double(), -q.scale.double() * q.zero.double())
    assert report.types == types
    assert any("in which MLX computes then" in note for note in report.notes) == ("F32" in types)
    assert report.tensors - report.exact == len(models.named_tensors(model.net)) - 14
    assert torch.equal(stored["model.norm.weight"], model.net.model.norm.weight.half())


# ---------------------------------------------------------------- config.json


def test_what_the_configuration_says(tmp_path: Path) -> None:
    compressed(
        tiny(rope_parameters=LLAMA3, num_key_value_heads=4, tie_word_embeddings=False), tmp_path / "m", 4, 64
    )
    path = tmp_path / "m" / "config.json"
    raw = json.loads(path.read_text())
    for key in ("num_key_value_heads", "tie_word_embeddings", "attention_bias", "mlp_bias"):
        del raw[key]  # left to transformers' defaults, as on the hub
    path.write_text(json.dumps(raw))
    (tmp_path / "m" / "SHA256SUMS").unlink()  # it states the file as it was
    export(tmp_path / "m", "mlx", tmp_path / "a")
    found = config(tmp_path / "a")
    assert found["quantization"] == found["quantization_config"] == {"group_size": 64, "bits": 4}
    want = {
        "rope_theta": 50000.0,
        "head_dim": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float16",
        "model_type": "llama",
    }
    assert {key: found[key] for key in want} == want
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert {k: found["rope_scaling"][k] for k in scaling} == scaling
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        f.name for f in (tmp_path / "a").iterdir()
    }


def test_layers_on_other_grids_are_named(tmp_path: Path) -> None:
    model = tiny()
    grids = {n: on_grid(t, 4, 32) for n, t in models.named_tensors(model.net) if n.endswith("proj.weight")}
    name = "model.layers.1.mlp.down_proj"
    grids[f"{name}.weight"] = on_grid(model.net.model.layers[1].mlp.down_proj.weight, 8, 128)
    export(write(model, tmp_path / "m", grids), "mlx", tmp_path / "a")
    found = config(tmp_path / "a")
    assert found["rope_scaling"] is None
    assert found["quantization"] == {"group_size": 32, "bits": 4, name: {"group_size": 128, "bits": 8}}


def test_our_own_loader_refuses_it(tmp_path: Path) -> None:
    compressed(tiny(), tmp_path / "m")
    with pytest.raises(FleetuneError, match="is quantised"):
        models.load(str(export(tmp_path / "m", "mlx", tmp_path / "a").path))


# ---------------------------------------------------------------- refusals and damage


@pytest.mark.parametrize(
    ("sizes", "bits", "group", "why"),
    [
        ({}, 4, 16, r"q_proj.weight has groups of 16, MLX has 32, 64, 128"),
        ({}, 7, 32, r"q_proj.weight has 7 bits, MLX has 2, 3, 4, 5, 6, 8"),
        ({"hidden_act": "gelu"}, 4, 32, "hidden_act='gelu' in a llama"),
        (
            {"kind": "qwen2", "head_dim": 32},
            4,
            32,
            "a qwen2 whose heads are 128 wide together where the model is 64",
        ),
        ({"kind": "qwen3", "attention_bias": True}, 4, 32, "attention_bias=True in a qwen3"),
        (
            {"kind": "qwen2", "use_sliding_window": True, "sliding_window": 8},
            4,
            32,
            "use_sliding_window=True in a qwen2",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 4, 32, "'dynamic'"),
    ],
)
def test_what_mlx_has_no_place_for(
    tmp_path: Path, sizes: dict[str, Any], bits: int, group: int, why: str
) -> None:
    compressed(tiny(**sizes), tmp_path / "m", bits, group)
    with pytest.raises(UsageError, match=why) as caught:
        export(tmp_path / "m", "mlx", tmp_path / "out" / "x")
    hint = caught.value.hint or ""
    assert hint.startswith("use --to ")
    named = re.findall(r"--to ([^ ,]+)", hint)
    assert "hf" in named
    assert list((tmp_path / "out").iterdir()) == []
    for to in named:  # what is named takes it
        export(tmp_path / "m", to, tmp_path / ("x.gguf" if to.startswith("gguf") else to))


def test_plain_weights_and_quantised_embeddings(tmp_path: Path) -> None:
    model = tiny()
    models.save(model.net, model.tokenizer, tmp_path / "plain")
    with pytest.raises(UsageError, match="holds plain weights"):
        export(tmp_path / "plain", "mlx", tmp_path / "x")
    write(model, tmp_path / "m", {"lm_head.weight": on_grid(model.net.model.embed_tokens.weight, 4, 32)})
    with pytest.raises(UsageError, match=r"embed_tokens.weight is none"):
        export(tmp_path / "m", "mlx", tmp_path / "x")


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_a_wrong_value_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    compressed(tiny(), tmp_path / "m")
    right = mlx.parts

    def wrong(name: str, q: Quantised, dtype: torch.dtype) -> Any:
        for key, tensor in right(name, q, dtype):
            if not key.endswith(part):
                yield key, tensor
            elif part == "weight":
                yield key, dict(right(name, changed(q, codes=q.codes.flip(1)), dtype))[key]
            else:
                yield key, tensor + torch.eye(*tensor.shape, dtype=dtype)

    monkeypatch.setattr(mlx, "parts", wrong)
    with pytest.raises(FleetuneError, match=r"layers.0.self_attn.q_proj does not decode to its weights"):
        export(tmp_path / "m", "mlx", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_biases_are_exact_in_fp32_whatever_the_grid(tmp_path: Path) -> None:
    model = tiny()
    compressed(model, tmp_path / "m", 8, 32, zero=201)
    report = export(tmp_path / "m", "mlx", tmp_path / "x")
    assert report.types["F32"] == 28
    opened = open_checkpoint(tmp_path / "m")
    assert not mlx._exact(opened, "model.layers.0.self_attn.q_proj.weight")


# ---------------------------------------------------------------- mlx itself


@pytest.mark.parametrize(
    ("kind", "bits", "group", "grid", "sizes"),
    [
        ("llama", 4, 32, {}, {}),
        ("llama", 3, 32, {}, {"rope_parameters": LLAMA3}),
        ("llama", 2, 64, {}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", 8, 32, {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 77777.0}}),
        ("qwen3", 4, 64, {"zero": 5}, {"head_dim": 32}),
        ("llama", 6, 64, {}, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
        ("qwen3", 5, 32, {}, {}),
    ],
)
def test_mlx_reads_the_same_weights_and_gives_the_same_logits(
    tmp_path: Path, kind: str, bits: int, group: int, grid: dict[str, int], sizes: dict[str, Any]
) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    mx.set_default_device(mx.cpu)
    model = tiny(kind, **sizes)
    quantised = compressed(model, tmp_path / "m", bits, group, **grid)
    export(tmp_path / "m", "mlx", tmp_path / "x")
    net, _ = utils.load_model(tmp_path / "x")
    layers = dict(net.named_modules())
    for name, q in quantised.items():
        layer = layers[name.removesuffix(".weight")]
        scales, biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
        read = mx.dequantize(layer.weight, scales, biases, group_size=layer.group_size, bits=layer.bits)
        assert np.array_equal(np.array(read), q.dense().numpy()), name
    for name, tensor in models.named_tensors(model.net):
        if name not in quantised:  # fp16 in the file
            tensor.copy_(tensor.half().float())
    net.set_dtype(mx.float32)
    with torch.no_grad():
        own = model.net(torch.tensor([IDS])).logits[0]
    np.testing.assert_allclose(np.array(net(mx.array([IDS])))[0], own.numpy(), atol=2e-5)


def test_mlx_lm_gives_the_source_s_perplexity(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    compressed(tiny(), tmp_path / "m")
    (tmp_path / "text.txt").write_text("hello again, " * 30)
    found = fleetune.export(tmp_path / "m", to="mlx", path=tmp_path / "x", text=tmp_path / "text.txt").check
    assert found is not None
    assert found.runtime == "mlx-lm"
    assert found.ratio == pytest.approx(1, abs=2e-3)  # fp16


def test_the_engine_scores_and_generates(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    model = tiny()
    compressed(model, tmp_path / "m")
    engine = engines.MlxLm(export(tmp_path / "m", "mlx", tmp_path / "x").path)
    with torch.no_grad():
        own = model.net(torch.tensor([IDS])).logits[0].log_softmax(-1)
    (loss, count), (late, few) = engine.losses([(IDS, 0), (IDS, 6)])
    by_token = -own[range(len(IDS) - 1), IDS[1:]]
    assert (count, few) == (8, 3)
    assert (loss, late) == pytest.approx((float(by_token.sum()), float(by_token[5:].sum())), abs=2e-2)
    engine.prefill(IDS[:-1])
    engine.step()
    assert int(np.array(engine._logits).shape[0]) == engine.vocab


def test_without_mlx_lm_the_export_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets.Target, "missing", ["mlx_lm"])
    compressed(tiny(), tmp_path / "m")
    (tmp_path / "text.txt").write_text("hello again")
    given = ["--to", "mlx", "--path", str(tmp_path / "x"), "--text", str(tmp_path / "text.txt")]
    assert main(["export", str(tmp_path / "m"), *given]) == 0
    assert "not run: mlx-lm for mlx: pip install mlx mlx-lm" in capsys.readouterr().err


def test_a_folder_that_mlx_lm_does_not_take(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    (tmp_path / "config.json").write_text('{"model_type": "opt", "vocab_size": 9}')
    with pytest.raises(FleetuneError, match="mlx-lm does not load"):
        engines.MlxLm(tmp_path)
