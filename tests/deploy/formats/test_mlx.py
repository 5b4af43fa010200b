"""Directories for MLX: golden words, what config.json says, layers of experts, refusals, damage; mlx-lm itself where it is installed."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_harness import changed, matrices, matrix, on_codebook, on_grid, tiny, tokenizer, write_codes
from deploy_harness import compressed as coded
from family_harness import CASES, LLAMA3, TEXT, build, save
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import fleetune
from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.deploy.formats import hf, mlx
from fleetune.errors import UsageError
from fleetune.models import Model
from fleetune.models.artefact import Quantised

# of transformers, about made-up sizes
pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.filterwarnings("ignore")]
SAME, NEAR = 1e-10, 1e-5  # nats; the second where mlx-lm computes something otherwise, as docs/export.md says
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 3.0}}
# it has no window, and only whole heads
MLX = {"gemma2": {"sliding_window": 100}, "mixtral": {"head_dim": 16}}
OFF = {"gemma3_text"}
RUN = [case for case, (family, _) in CASES.items() if family in mlx.ARCHITECTURES and "longrope" not in case]
BLOCK = "model.layers.2"


def config(case: str, **changes: Any) -> Any:
    """The configuration of a case, with changes."""
    family, sizes = CASES.get(case, (case, {}))
    # it writes into what it is given
    return AutoConfig.for_model(family, **copy.deepcopy(sizes | MLX.get(case, {}) | changes))


def compressed(case: str, folder: Path, grid: str = "asymmetric", **changes: Any) -> tuple[Path, Path]:
    """Compress a case's model; return the folder for MLX, and that of the same weights in fp32 for transformers."""
    net = build(case, **MLX.get(case, {}) | changes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.half())
    models.save(net, tokenizer(), folder / "m")
    settings = {"grid": grid, "group": 32}
    run = fleetune.compress(folder / "m", method="rtn", settings=settings, out=folder / "runs")
    return tuple(fleetune.export(run, to=to, path=folder / to).path for to in ("mlx", "hf"))  # type: ignore[return-value]


def stored(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_four_bits_golden() -> None:
    q = matrix([[1, 2, 3, 4, 5, 6, 7, 15, 0, 0, 0, 0, 8, 0, 0, 9]], [[0.5, -2.0]], [[8, 3]], 4)
    found = dict(mlx.parts("a.weight", q, torch.float16))
    assert list(found) == ["a.weight", "a.scales", "a.biases"]
    assert found["a.weight"].numpy().tolist() == [[0xF7654321, 0x90080000]]
    assert found["a.scales"].tolist() == [[0.5, -2.0]]
    assert found["a.biases"].tolist() == [[-4.0, 6.0]]
    assert {found[part].dtype for part in ("a.scales", "a.biases")} == {torch.float16}


def test_three_bits_are_eight_codes_in_three_bytes() -> None:
    codes = [1, 2, 3, 4, 5, 6, 7, 0] * 4
    # mlx packs 3 bits a code from the lowest on: 0b000_111_110_101_100_011_010_001 is the 24 bits of eight codes
    eight = 0b000_111_110_101_100_011_010_001
    stream = sum(eight << 24 * i for i in range(4))
    want = [stream & 0xFFFFFFFF, stream >> 32 & 0xFFFFFFFF, stream >> 64]
    found = dict(mlx.parts("a.weight", matrix([codes], [[1.0]], [[4]], 3), torch.float32))
    assert found["a.weight"].numpy().tolist() == [want]
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
def test_codes_scales_and_biases_are_the_masters(tmp_path, kind, bits, group, grid, types):
    model = tiny(kind)
    quantised = coded(model, tmp_path / "m", bits, group, **grid)
    report = export(tmp_path / "m", "mlx", tmp_path / "out")
    tensors = {name: torch.from_numpy(values) for name, values in stored(tmp_path / "out").items()}
    for name, q in quantised.items():
        layer = name.removesuffix(".weight")
        codes = hf.unwords(tensors[name].view(torch.int32), bits, q.codes.shape[1])
        assert torch.equal(codes, q.codes)
        scales, biases = tensors[f"{layer}.scales"], tensors[f"{layer}.biases"]
        assert torch.equal(scales.float(), q.scale.float())
        assert torch.equal(biases.double(), -q.scale.double() * q.zero.double())
    assert report.types == types
    assert any("in which MLX computes then" in note for note in report.notes) == ("F32" in types)
    assert report.tensors - report.exact == len(models.named_tensors(model.net)) - 14
    assert torch.equal(tensors["model.norm.weight"], model.net.model.norm.weight.half())


def test_what_the_configuration_says(tmp_path: Path) -> None:
    model = tiny(rope_parameters=LLAMA3, num_key_value_heads=4, tie_word_embeddings=False)
    coded(model, tmp_path / "m", 4, 64)
    path = tmp_path / "m" / "config.json"
    raw = json.loads(path.read_text())
    for key in ("num_key_value_heads", "tie_word_embeddings", "attention_bias", "mlp_bias"):
        del raw[key]  # left to transformers' defaults, as on the hub
    path.write_text(json.dumps(raw))
    (tmp_path / "m" / "SHA256SUMS").unlink()  # it states the file as it was
    export(tmp_path / "m", "mlx", tmp_path / "a")
    found = said(tmp_path / "a")
    assert found["quantization"] == found["quantization_config"] == {"group_size": 64, "bits": 4}
    want = {"rope_theta": 10000.0, "head_dim": 16, "num_key_value_heads": 4, "tie_word_embeddings": False}
    want |= {"attention_bias": False, "mlp_bias": False, "dtype": "float16", "model_type": "llama"}
    assert {key: found[key] for key in want} == want
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert {k: found["rope_scaling"][k] for k in scaling} == scaling
    names = {f.name for f in (tmp_path / "a").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_layers_on_other_grids_are_named(tmp_path: Path) -> None:
    model, name = tiny(), "model.layers.1.mlp.down_proj"
    own = {n: on_grid(t, 4, 32) for n, t in matrices(model).items()}
    own[f"{name}.weight"] = on_grid(model.net.model.layers[1].mlp.down_proj.weight, 8, 128)
    write_codes(model, tmp_path / "m", own)
    found = said(export(tmp_path / "m", "mlx", tmp_path / "a").path)
    assert found["rope_scaling"] is None
    assert found["quantization"] == {"group_size": 32, "bits": 4, name: {"group_size": 128, "bits": 8}}


@pytest.mark.parametrize(
    ("case", "changes", "want"),
    [
        ("mistral", {}, {"rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 64, "head_dim": 32}),
        ("granite", {}, {"attention_multiplier": 0.2, "logits_scaling": 0.7, "tie_word_embeddings": False}),
        ("gemma3_text", {}, {"sliding_window_pattern": 6, "rope_local_base_freq": 10000.0}),
        ("qwen3_moe", {"head_dim": None}, {"head_dim": 16, "num_experts": 5, "moe_intermediate_size": 64}),
    ],
)
def test_what_config_json_states(case: str, changes: dict[str, Any], want: dict[str, Any]) -> None:
    found = mlx.fields(config(case, **changes))
    assert {name: found[name] for name in want} == want


@pytest.mark.parametrize(
    ("case", "changes", "why"),
    [
        ("opt", {}, "'opt': it is written for llama, mistral,"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' in a llama"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window=True in a qwen2"),
        ("qwen2", {"num_attention_heads": 4, "head_dim": 16}, "64 wide together where the model is 96"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping=None in a gemma2"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "sliding_attention"] + ["full_attention"] * 5},
            "layer_types without a regular place for full_attention in a gemma3_text",
        ),
        ("mixtral", LINEAR, "rotary scaling 'linear' in a mixtral"),
    ],
)
def test_what_a_family_has_no_place_for(case: str, changes: dict[str, Any], why: str) -> None:
    assert why in str(mlx.misfit(config(case, **changes)))


def decoded(tensors: Mapping[str, np.ndarray], layer: str) -> np.ndarray:
    """The weights of 4-bit codes in groups of 32, by what mlx.core.quantize documents: the first code in the lowest bits."""
    codes = tensors[f"{layer}.weight"][..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)
    scales, biases = (np.repeat(tensors[f"{layer}.{of}"].astype("f4"), 32, -1) for of in ("scales", "biases"))
    return scales * codes.reshape(*codes.shape[:-2], -1).astype(np.float32) + biases


@pytest.mark.parametrize(("case", "theirs"), [("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp")])
def test_codes_of_experts_are_stacked_as_mlx_lm_has_them(case: str, theirs: str, tmp_path: Path) -> None:
    path, plain = compressed(case, tmp_path)
    tensors, own = stored(path), stored(plain)
    gate_up, down = (own[f"{BLOCK}.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    half = gate_up.shape[1] // 2
    for name, weight in {"gate": gate_up[:, :half], "up": gate_up[:, half:], "down": down}.items():
        layer = f"{BLOCK}.{theirs}.switch_mlp.{name}_proj"
        E, rows, width = weight.shape
        assert tensors[f"{layer}.weight"].shape == (E, rows, width // 8)
        assert tensors[f"{layer}.scales"].shape == tensors[f"{layer}.biases"].shape == (E, rows, width // 32)
        assert np.array_equal(decoded(tensors, layer), weight), name
    router = own[f"{BLOCK}.mlp.gate.weight"].astype(np.float16)
    assert np.array_equal(tensors[f"{BLOCK}.{theirs}.gate.weight"], router)
    assert said(path)["quantization"] == {"group_size": 32, "bits": 4}


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
    write_codes(model, folder / "m", found)
    for name, q in found.items():
        model.net.get_parameter(name).data.copy_(q.dense())
    return model, found


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


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        *((case, {}) for case in RUN),
        ("llama", LINEAR),
        ("qwen2", {"rope_parameters": LLAMA3}),
        ("smollm3", LINEAR | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ],
)
def test_mlx_lm_gives_transformers_next_tokens(case: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The whole text at once, and as in generation: a first part, then token by token with mlx-lm's cache."""
    mx = pytest.importorskip("mlx.core")
    caches, utils = pytest.importorskip("mlx_lm.models.cache"), pytest.importorskip("mlx_lm.utils")
    mx.set_default_device(mx.cpu)
    path, plain = compressed(case, tmp_path, **changes)
    reference = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager").eval()
    with torch.inference_mode():
        own = reference(input_ids=torch.tensor([TEXT])).logits[0].double().log_softmax(-1)
    net, _ = utils.load_model(path)
    net.set_dtype(mx.float32)
    cache, parts = caches.make_prompt_cache(net), [TEXT[:30], *([token] for token in TEXT[30:])]
    in_turn = mx.concatenate([net(mx.array([part]), cache=cache) for part in parts], axis=1)
    for logits in (net(mx.array([TEXT])), in_turn):
        theirs = torch.from_numpy(np.array(logits)[0]).double().log_softmax(-1)
        assert float((own.exp() * (own - theirs)).sum(-1).mean()) <= (NEAR if case in OFF else SAME)
