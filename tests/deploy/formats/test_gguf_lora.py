"""LoRA adapters as .gguf: their numbers bit for bit, in the base's order of rows, and what is refused."""

import json
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from deploy_harness import tiny
from safetensors.numpy import load_file, save_file

from fleetune import adapters, models
from fleetune.deploy.export import write as export
from fleetune.deploy.export import write_adapter as export_adapter
from fleetune.deploy.formats import gguf_lora
from fleetune.errors import FleetuneError, ModelError, UsageError
from fleetune.models import Model

PEFT = "base_model.model.model.layers."


def tuned(folder: Path, kind: str = "llama", sizes: dict[str, Any] | None = None, **options: Any) -> Model:
    """A base in `folder`/base and, in `folder`/adapter, a LoRA on it with numbers in B too; the model has both."""
    model = tiny(kind, **(sizes or {}))
    models.save(model.net, model.tokenizer, folder / "base")
    model = models.load(str(folder / "base"), device="cpu")
    adapters.attach(model, adapters.Lora(**({"r": 4, "alpha": 6} | options)), seed=1)
    rng = np.random.default_rng(1)
    new = {n: rng.normal(0, 0.2, a.shape).astype("f4") for n, a in sorted(adapters.export(model).items())}
    adapters.load_(model, new)
    adapters.save(model, folder / "adapter")
    return model


def write(folder: Path, **made: str) -> Path:
    return export_adapter(folder / "adapter", folder / "base", "gguf:lora", folder / "l.gguf", made=made).path


def stored(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in package.GGUFReader(path).tensors}


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_the_factors_are_peft_s_in_the_base_s_order_of_rows(tmp_path: Path) -> None:
    tuned(tmp_path)
    report = export_adapter(tmp_path / "adapter", tmp_path / "base", "gguf:lora", tmp_path / "l.gguf")
    assert (report.to, report.types, report.tensors, report.exact) == ("gguf:lora", {"F32": 28}, 28, 28)
    found, own = stored(report.path), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    order = [h * 16 + i + half for h in range(4) for i in range(8) for half in (0, 8)]
    q, k, v = (f"{PEFT}1.self_attn.{part}_proj.lora_" for part in "qkv")
    assert np.array_equal(found["blk.1.attn_q.weight.lora_b"], own[f"{q}B.weight"][order])
    assert np.array_equal(found["blk.1.attn_k.weight.lora_b"], own[f"{k}B.weight"][order[:32]])
    assert np.array_equal(found["blk.1.attn_q.weight.lora_a"], own[f"{q}A.weight"])
    assert np.array_equal(found["blk.1.attn_v.weight.lora_b"], own[f"{v}B.weight"])
    down = f"{PEFT}0.mlp.down_proj.lora_"
    assert np.array_equal(found["blk.0.ffn_down.weight.lora_a"], own[f"{down}A.weight"])
    assert np.array_equal(found["blk.0.ffn_down.weight.lora_b"], own[f"{down}B.weight"])
    assert len(found) == len(own) == 28


@pytest.mark.parametrize(
    ("kind", "sizes", "options"),
    [
        ("llama", {}, {}),
        ("llama", {"head_dim": 32, "num_key_value_heads": 1}, {"targets": "q_proj,k_proj", "init": "pissa"}),
        ("qwen3", {"head_dim": 32}, {}),
    ],
)
def test_base_and_adapter_make_the_merged_file(tmp_path: Path, kind: str, sizes: dict, options: dict) -> None:
    model = tuned(tmp_path, kind, sizes, **options)
    adapters.merge(model)
    models.save(model.net, model.tokenizer, tmp_path / "merged")
    files = (export(tmp_path / n, "gguf:f32", tmp_path / f"{n}.gguf").path for n in ("base", "merged"))
    base, merged = map(stored, files)
    path = write(tmp_path)
    factors = stored(path)
    alpha = package.GGUFReader(path).fields["adapter.lora.alpha"].contents()
    for name, weight in base.items():
        want = weight.astype(np.float64)
        if f"{name}.lora_a" in factors:
            A, B = (factors[f"{name}.{part}"].astype(np.float64) for part in ("lora_a", "lora_b"))
            want = want + alpha / B.shape[1] * B @ A  # as llama.cpp adds it
            assert np.abs(want - weight).max() > 0.05
        np.testing.assert_allclose(merged[name], want, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"peft_type": "PREFIX_TUNING"},
        {"rank_pattern": {"q_proj": 2}},
        {"alora_invocation_tokens": [5]},
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    tuned(tmp_path)
    change(tmp_path, **settings)
    with pytest.raises(UsageError, match=f"no place for this adapter: {next(iter(settings))} is") as caught:
        write(tmp_path)
    assert "--to gguf" in (caught.value.hint or "")
    assert not (tmp_path / "l.gguf").exists()


@pytest.mark.parametrize(
    ("name", "change", "error", "why"),
    [
        ("0.mlp.up_proj.lora_A.weight", lambda a: a[:, :-1], ModelError, r"have shapes \(4, 63\)"),
        ("0.mlp.up_proj.lora_B.weight", None, ModelError, "and None"),
        ("0.mlp.odd_proj.lora_B.weight", np.zeros((2, 2), np.float32), UsageError, "is not in the base"),
        ("0.mlp.up_proj.bias", np.zeros(2, np.float32), UsageError, r"no place for .*up_proj.bias"),
    ],
)
def test_factors_that_do_not_fit(tmp_path: Path, name: str, change: Any, error: type, why: str) -> None:
    tuned(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    if change is None:
        del tensors[PEFT + name]
    else:
        new = change(tensors[PEFT + name]) if callable(change) else change
        tensors[PEFT + name] = np.ascontiguousarray(new)
    save_file(tensors, file)
    with pytest.raises(error, match=why):
        write(tmp_path)
    assert not (tmp_path / "l.gguf").exists()


def test_damage_is_noticed(tmp_path: Path) -> None:
    tuned(tmp_path)
    path = write(tmp_path)
    whole, tensors = path.read_bytes(), stored(path)
    gguf_lora._verify(path, tensors, 6.0)
    with pytest.raises(FleetuneError, match="alpha"):
        gguf_lora._verify(path, tensors, 7.0)
    for tensor in package.GGUFReader(path).tensors[:3]:
        at = tensor.data_offset + tensor.n_bytes - 1
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(FleetuneError, match=tensor.name):
            gguf_lora._verify(path, tensors, 6.0)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(ModelError, match="not a usable adapter"):
        export_adapter(tmp_path / "adapter", tmp_path / "base", "gguf:lora", tmp_path / "m.gguf")
