"""Every family of the table as .gguf: llama.cpp's next tokens are transformers', and what it does not hold is refused."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from deploy_harness import compressed, tiny
from family_harness import CASES, TEXT, YARN, build, config_of, divergence, save
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import fleetune
from fleetune import adapters, models
from fleetune.deploy import llamacpp
from fleetune.deploy.export import write as export
from fleetune.deploy.export import write_adapter as export_adapter
from fleetune.errors import ModelError, UsageError
from fleetune.models import Model
from fleetune.models.families import table, widths
from fleetune.models.families.widths import KeptUnits

needs_engine = pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp is not installed")
# of transformers, about made-up sizes
pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.filterwarnings("ignore")]
SAME = 1e-5  # nats: llama.cpp's cache of keys and values is fp16
SEEN = 30 * SAME  # what one tensor in another order must be off by at least


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in package.GGUFReader(path).fields.items()}


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in CASES.values()} == set(table.FAMILIES)


@pytest.mark.parametrize("family", table.FAMILIES)
def test_transformers_own_sizes_have_a_place(family: str) -> None:
    """They are those of a published model; of EXAONE 4, LFM2 and Qwen3-MoE they are of none."""
    usual = {
        "qwen3_moe": {"norm_topk_prob": True},
        "lfm2": {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_hidden_layers": 16},
    }
    assert table.misfit(AutoConfig.for_model(family, **usual.get(family, {}))) is None


@needs_engine
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_does(case: str, tmp_path: Path) -> None:
    net = save(case, tmp_path / "m")
    report = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf")
    assert report.exact == report.tensors
    assert divergence(net, report.path) <= SAME


@needs_engine
def test_longrope_s_long_factors_are_used_in_a_long_context(tmp_path: Path) -> None:
    net = save("phi3, longrope", tmp_path / "m")
    report = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf")
    assert divergence(net, report.path, TEXT * 6) <= SAME  # beyond the original length of 256
    assert divergence(net, report.path, TEXT) <= SAME
    assert report.notes == (
        "llama.cpp takes the long factors of the rotary embedding when its context is longer than 256, transformers when "
        "the text is",
    )


LINEAR = ("llama", "phi3", "qwen2_moe", "granitemoeshared", "gpt_oss")  # each has another layout
ROUNDED = 2e-2  # nats: llama.cpp rounds what goes into a quantised matrix to 8 bits


@needs_engine
@pytest.mark.parametrize("case", LINEAR)
def test_codes_are_kept(case: str, tmp_path: Path) -> None:
    save(case, tmp_path / "m")
    folder = fleetune.compress(tmp_path / "m", method="rtn", out=tmp_path / "runs").folder / "model"
    net = AutoModelForCausalLM.from_pretrained(export(folder, "hf", tmp_path / "hf").path)
    report = export(folder, "gguf", tmp_path / "q.gguf")
    linears = {name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    vectors = {name for name in linears if name.endswith("shared_expert_gate")}
    halves = {name for name in linears if name.endswith("shared_mlp.input_linear")}
    stacked = {name for name, _ in net.named_parameters() if name.endswith("experts.gate_up_proj")}
    assert report.types["Q4_0"] == len(linears - {"lm_head"} - vectors) + len(halves) + 3 * len(stacked)
    whole = export(folder, "gguf:f32", tmp_path / "x.gguf")
    assert whole.exact == whole.tensors
    assert divergence(net, whole.path) <= SAME
    assert divergence(net, report.path) <= ROUNDED


@needs_engine
@pytest.mark.parametrize("case", ["llama", "phi3", "granitemoeshared"])
def test_an_adapter_beside_its_base(case: str, tmp_path: Path) -> None:
    save(case, tmp_path / "m")
    model = models.load(str(tmp_path / "m"), device="cpu")
    base = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf").path
    adapters.attach(model, adapters.Lora(r=4, alpha=6), seed=1)
    rng = np.random.default_rng(1)
    found = sorted(adapters.export(model).items())
    adapters.load_(model, {n: rng.normal(0, 0.1, a.shape).astype(np.float32) for n, a in found})
    adapters.save(model, tmp_path / "adapter")
    lora = export_adapter(tmp_path / "adapter", tmp_path / "m", "gguf:lora", tmp_path / "l.gguf").path
    assert divergence(model.net, base, lora=lora) <= SAME
    assert divergence(model.net, base) > SEEN


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_context_ends_where_a_window_would_matter(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "m")
    report = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf")
    architecture = table.FAMILIES[family].architecture
    assert fields(report.path)[f"{architecture}.context_length"] == 64
    assert report.notes == (
        f"llama.cpp has no window in a {family}: the file states a context of 64 tokens instead of 128, up to which it "
        "is the same",
    )
    save(family, tmp_path / "n", sliding_window=200)  # longer than the context
    report = export(tmp_path / "n", "gguf:f32", tmp_path / "y.gguf")
    assert fields(report.path)[f"{architecture}.context_length"] == 128
    assert report.notes == ()


SCALED: dict[str, Any] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
PARTLY: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
OTHERWISE: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True in a qwen3"),
    ("smollm3", {"no_rope_layer_interval": 3}, "no_rope_layers other than each 4th"),
    ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings=True in a olmo2"),
    ("granite", {"rope_parameters": SCALED}, "rotary scaling 'linear'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True in a gpt2"),
    ("lfm2", {"layer_types": ["full_attention"] * 4}, "layer_types without conv in a lfm2"),
    ("mistral", {"rope_parameters": PARTLY}, "partly rotated"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=\\[1\\] in a qwen3_moe"),
    ("ernie4_5_moe", {"moe_layer_end_index": 2}, "moe_layer_end_index=2 of 4 blocks"),
    ("gpt_oss, yarn", {"rope_parameters": YARN["rope_parameters"] | {"beta_fast": 20.0}}, "beta_fast=20.0"),
    ("phi3", {"head_dim": 32}, "heads are 192 wide together where the model is 96"),
]


@pytest.mark.parametrize(("case", "changes", "why"), OTHERWISE)
def test_what_llama_cpp_does_not_hold_is_named(case: str, changes: dict[str, Any], why: str) -> None:
    assert re.search(why, str(table.misfit(build(case, **changes).config)))


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 500.0},
    PARTLY,
    SCALED,
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64},
]
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def variants(config: Any) -> Iterator[dict[str, Any]]:
    """One field of a configuration changed at a time: every switch and number, activations, rotary settings, windows."""
    fields = config.to_dict()
    for name, value in fields.items():
        if isinstance(value, bool) and name not in ("is_encoder_decoder", "return_dict"):
            yield {name: not value}
        elif isinstance(value, float):
            yield {name: 1.5 * value or 0.1}
        elif name in ACTIVATIONS:
            yield from ({name: other} for other in ("relu", "gelu", "silu") if other != value)
    if "full_attention" not in (fields.get("rope_parameters") or {"full_attention": {}}):
        yield from ({"rope_parameters": rope} for rope in ROPES)
    if "sliding_window" in fields:
        yield from ({"sliding_window": window} for window in (16, None))
    if "layer_types" in fields:
        count = config.num_hidden_layers
        yield {"layer_types": ["full_attention"] * count}
        yield {"layer_types": ["sliding_attention"] * count, "sliding_window": 16}
    yield from ({"num_key_value_heads": 6}, {"head_dim": 24})


@needs_engine
@pytest.mark.parametrize("case", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_an_option_is_written_or_refused(case: str, tmp_path: Path) -> None:
    """Whatever a configuration says, there is no file with which llama.cpp computes something else."""
    refused, same = 0, 0
    for i, change in enumerate(variants(config_of(case))):
        folder = tmp_path / str(i)
        try:
            if refused and table.misfit(config_of(case, **change)):  # what an export does then is seen once
                continue
            net = save(case, folder / "m", **change)
            net(torch.tensor([TEXT]))
        except Exception:  # no model in transformers either
            continue
        try:
            report = export(folder / "m", "gguf:f32", folder / "x.gguf")
        except UsageError:
            refused += 1
            continue
        length = fields(report.path)[f"{table.FAMILIES[case].architecture}.context_length"]
        assert divergence(net, report.path, TEXT[:length]) <= SAME, change
        same += 1
    assert refused > 0
    assert same > 0


def test_a_body_s_names_without_their_front(tmp_path: Path) -> None:
    """As the Hub has GPT-2, with buffers that old versions wrote."""
    save("gpt2", tmp_path / "m")
    want = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf").path.read_bytes()
    file = tmp_path / "m" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    assert all(not name.startswith("transformer") for name in bare)
    bare["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    save_file(bare, file, {"format": "pt"})
    assert export(tmp_path / "m", "gguf:f32", tmp_path / "x2" / "x.gguf").path.read_bytes() == want
    save_file(bare | {"h.0.attn.other": np.ones(3, np.float32)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"holds h.0.attn.other, which the configuration does not have"):
        export(tmp_path / "m", "gguf:f32", tmp_path / "y.gguf")


def narrowed() -> Model:
    """A llama whose second block has a key head and 32 MLP channels less, taken from all over."""
    model, rng = tiny(), np.random.default_rng(2)

    def some(all_of: int, count: int) -> list[int]:
        return sorted(rng.choice(all_of, count, replace=False).tolist())

    kept = [KeptUnits(some(2, heads), some(128, count)) for heads, count in ((2, 128), (1, 96))]
    widths.cut(model.net, kept)
    return model


@pytest.mark.parametrize("quantised", [False, True])
def test_a_llama_of_different_widths_is_a_deci(quantised: bool, tmp_path: Path) -> None:
    model = narrowed()
    if quantised:
        compressed(model, tmp_path / "m")
    else:
        models.save(model.net, model.tokenizer, tmp_path / "m")
    report = export(tmp_path / "m", "gguf" if quantised else "gguf:f32", tmp_path / "m.gguf")
    assert report.exact == report.tensors or quantised
    with pytest.raises(ModelError, match="architecture 'deci'"):
        models.load_config(str(tmp_path / "m.gguf"))
    reader = package.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [4, 2]
    assert fields["deci.attention.head_count_kv"] == [2, 1]
    assert fields["deci.feed_forward_length"] == [128, 96]
    assert fields["deci.attention.key_length"] == fields["deci.attention.value_length"] == 16
    assert fields["deci.rope.dimension_count"] == 16
    assert fields["deci.block_count"] == 2
    found = {t.name: t for t in reader.tensors}
    want = {"0.attn_q": (64, 64), "1.attn_q": (64, 32), "1.attn_k": (64, 16), "1.attn_output": (32, 64)}
    want["1.ffn_down"] = (96, 64)
    assert {name: tuple(map(int, found[f"blk.{name}.weight"].shape)) for name in want} == want
