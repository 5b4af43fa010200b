# SPDX-License-Identifier: Apache-2.0
"""Folders for ONNX Runtime GenAI: golden bytes, the graph computed in torch, refusals, damage, and the runtime itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_harness
import pytest
import torch
from deploy_harness import BLOCKS, LLAMA3, changed, compressed, tiny
from family_harness import save
from torch import Tensor

from fleetune import models
from fleetune.common.extras import pip_install
from fleetune.compression.layerwise.grids import Grid
from fleetune.compression.layerwise.groups import rounded
from fleetune.deploy.export import export
from fleetune.deploy.formats import onnx
from fleetune.deploy.measure import exported_perplexity, onnx_runtime
from fleetune.errors import FleetuneError, UsageError
from fleetune.models import Model, artefact
from fleetune.models.artefact import ArtefactHead, Quantised

IDS = [(7 * i) % 259 for i in range(40)]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
# kind, bits, group, the grid, the sizes: of models that the format holds
HELD: list[tuple[str, int, int, dict[str, int], dict[str, Any]]] = [
    ("llama", 4, 32, {}, {}),
    ("qwen2", 4, 32, {}, {}),
    ("qwen3", 4, 64, {"zero": 5}, {"head_dim": 32}),
    ("llama", 2, 32, {"zero": 1}, {}),
    ("llama", 3, 32, {"zero": 3}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("llama", 8, 16, {"zero": 201}, {"rope_parameters": LLAMA3}),
    ("qwen3", 5, 64, {}, {"rope_parameters": YARN}),
    ("llama", 4, 96, {"zero": 9}, {"hidden_size": 192, "head_dim": 48, "intermediate_size": 384}),
    ("qwen2", 4, 32, {}, WINDOW),
]


def write(model: Model, folder: Path, quantised: dict[str, Quantised]) -> Path:
    artefact.write(folder, model, quantised, ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest))
    return folder


def with_half_matrices(model: Model, quantised: dict[str, Quantised]) -> torch.nn.Module:
    """The net with the values that the file holds: fp16 in dense matrices."""
    for name, tensor in models.named_tensors(model.net):
        if name not in quantised and tensor.dim() == 2:
            tensor.copy_(tensor.half().float())
    return model.net


def own_logits(net: Any) -> np.ndarray:
    with torch.no_grad():
        return net(torch.tensor([IDS])).logits[0].numpy()


def no_past(config: Any) -> dict[str, Tensor]:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        f"past_key_values.{i}.{part}": torch.zeros(1, config.num_key_value_heads, 0, width)
        for i in range(config.num_hidden_layers)
        for part in ("key", "value")
    }


def asked(ids: list[int], total: int) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, total, dtype=torch.int64)}


# ---------------------------------------------------------------- what is written


def test_the_bytes_of_a_layer() -> None:
    codes = torch.arange(64, dtype=torch.uint8).reshape(2, 32) % 16
    scale, zero = (
        torch.tensor([[0.5, 2.0], [1.0, -3.0]]).half(),
        torch.tensor([[1, 2], [8, 15]], dtype=torch.uint8),
    )
    found = dict(onnx.parts("a.weight", Quantised(codes, scale, zero, 4, 16)))
    low_first = bytes(range(0x10, 0x100, 0x22))  # 10 32 54 76 98 ba dc fe
    assert found["a.codes"].shape == (2, 2, 8)
    assert found["a.codes"].numpy().tobytes() == low_first * 4
    assert found["a.scales"].tolist() == [[0.5, 2.0], [1.0, -3.0]]
    assert found["a.zeros"].tolist() == [[0x21], [0xF8]]


@pytest.mark.parametrize(("bits", "width"), [(2, 2), (3, 4), (4, 4), (5, 8), (6, 8), (7, 8), (8, 8)])
def test_codes_have_the_room_of_2_4_or_8_bits(bits: int, width: int) -> None:
    codes, ones = torch.full((3, 64), (1 << bits) - 1, dtype=torch.uint8), torch.ones(3, 1).half()
    found = dict(onnx.parts("a.weight", Quantised(codes, ones, ones.byte(), bits, 64)))
    assert found["a.codes"].shape == (3, 1, 64 * width // 8)


@pytest.mark.parametrize(("group", "block"), [(16, 16), (96, 32), (128, 128), (576, 64), (1024, 128)])
def test_groups_are_cut_into_blocks_of_the_same_scale(group: int, block: int) -> None:
    codes, scale = torch.zeros(1, group, dtype=torch.uint8), torch.tensor([[0.25]]).half()
    found = dict(onnx.parts("a.weight", Quantised(codes, scale, scale.byte() + 3, 8, group)))
    assert found["a.codes"].shape == (1, group // block, block)
    assert found["a.scales"].tolist() == [[0.25] * (group // block)]
    assert found["a.zeros"].tolist() == [[3] * (group // block)]


@pytest.mark.parametrize(("kind", "bits", "group", "grid", "sizes"), HELD)
def test_the_graph_gives_the_model_s_logits(
    tmp_path: Path, kind: str, bits: int, group: int, grid: dict[str, int], sizes: dict[str, Any]
) -> None:
    model = tiny(kind, **sizes)
    quantised = compressed(model, tmp_path / "m", bits, group, **grid)
    report = export(tmp_path / "m", "onnx", tmp_path / "x")
    file = onnx_harness.read(tmp_path / "x" / "model.onnx")
    got = onnx_harness.run(file, asked(IDS, len(IDS)) | no_past(model.net.config))
    want = own_logits(with_half_matrices(model, quantised))
    np.testing.assert_allclose(got["logits"][0].numpy(), want, atol=2e-5)
    dense = 1 + (not model.net.config.tie_word_embeddings)
    held = Counter(str(t.dtype) for name, t in file.tensors.items() if not name.startswith("constant"))
    assert report.types == {"F16": dense, "F32": held["torch.float32"], "U8": 2 * len(quantised)}
    assert held["torch.float16"] == dense
    assert report.tensors - report.exact == dense


def test_a_text_goes_on_from_keys_and_values(tmp_path: Path) -> None:
    model = tiny("qwen3")
    quantised = compressed(model, tmp_path / "m")
    file = onnx_harness.read(export(tmp_path / "m", "onnx", tmp_path / "x").path / "model.onnx")
    first = onnx_harness.run(file, asked(IDS[:30], 30) | no_past(model.net.config))
    past = {name.replace("present", "past_key_values"): t for name, t in first.items() if name != "logits"}
    then = onnx_harness.run(file, asked(IDS[30:], 40) | past)
    want = own_logits(with_half_matrices(model, quantised))
    np.testing.assert_allclose(torch.cat([first["logits"], then["logits"]], 1)[0].numpy(), want, atol=2e-5)


@pytest.mark.parametrize("case", ["mistral", "mistral, no window", "llama, biases"])
def test_other_families_and_windows(tmp_path: Path, case: str) -> None:
    net = save(case, tmp_path / "plain", **({"sliding_window": 8} if case == "mistral" else {}))
    model = models.load(str(tmp_path / "plain"), device="cpu")
    quantised = compressed(model, tmp_path / "m")
    file = onnx_harness.read(export(tmp_path / "m", "onnx", tmp_path / "x").path / "model.onnx")
    got = onnx_harness.run(file, asked(IDS, len(IDS)) | no_past(net.config))
    want = own_logits(with_half_matrices(model, quantised))
    np.testing.assert_allclose(got["logits"][0].numpy(), want, atol=2e-5)


def test_the_file_says_where_the_model_comes_from(tmp_path: Path) -> None:
    compressed(tiny(), tmp_path / "m")
    export(tmp_path / "m", "onnx", tmp_path / "x")
    facts = onnx_harness.read(tmp_path / "x" / "model.onnx").facts
    assert facts["fleetune.method"] == "rtn"
    assert facts["fleetune.artefact_digest"] == artefact.Master(tmp_path / "m").digest()


def test_what_genai_reads(tmp_path: Path) -> None:
    compressed(tiny(max_position_embeddings=8192), tmp_path / "m")
    folder = export(tmp_path / "m", "onnx", tmp_path / "x").path
    found = json.loads((folder / "genai_config.json").read_text())
    model, decoder = found["model"], found["model"]["decoder"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("llama", 264, 8192)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (260, [261], 261)
    assert found["search"] == {"max_length": 4096, "past_present_share_buffer": True}
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    assert [decoder[size] for size in sizes] == [16, 64, 4, 2, 2]
    file = onnx_harness.read(folder / decoder["filename"])
    names = [*decoder["inputs"].values(), *decoder["outputs"].values()]
    bound = {name % i if "%d" in name else name for name in names for i in range(2)}
    assert bound == {*file.inputs, *file.outputs}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        f.name for f in folder.iterdir()
    }


# ---------------------------------------------------------------- refusals and damage


@pytest.mark.parametrize(
    ("sizes", "group", "why"),
    [
        ({}, 8, r"q_proj.weight has groups of 8, which are not made of blocks of 16"),
        ({"hidden_act": "gelu"}, 32, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 32, "'dynamic'"),
    ],
)
def test_what_the_graph_has_no_place_for(tmp_path: Path, sizes: dict[str, Any], group: int, why: str) -> None:
    compressed(tiny(**sizes), tmp_path / "m", 4, group)
    with pytest.raises(UsageError, match=why) as caught:
        export(tmp_path / "m", "onnx", tmp_path / "out" / "x")
    hint = caught.value.hint or ""
    assert hint.startswith("use --to ")
    assert list((tmp_path / "out").iterdir()) == []
    for to in re.findall(r"--to ([^ ,]+)", hint):  # what is named takes it
        export(tmp_path / "m", to, tmp_path / ("x.gguf" if to.startswith("gguf") else to))


@pytest.mark.parametrize("case", ["gemma", "phi3", "olmo2"])
def test_other_families_are_refused_by_name(tmp_path: Path, case: str) -> None:
    save(case, tmp_path / "plain")
    compressed(models.load(str(tmp_path / "plain"), device="cpu"), tmp_path / "m")
    with pytest.raises(UsageError, match=f"'{case}': it is written for llama, mistral, qwen2, qwen3"):
        export(tmp_path / "m", "onnx", tmp_path / "x")


def test_codes_without_a_place_are_refused_by_name(tmp_path: Path) -> None:
    compressed(tiny(), tmp_path / "nl", **BLOCKS["IQ4_NL"])
    with pytest.raises(UsageError, match="are of the grid iq4_nl"):
        export(tmp_path / "nl", "onnx", tmp_path / "x")
    model = tiny(hidden_size=256, intermediate_size=256, head_dim=64)
    matrices = [(n, t) for n, t in models.named_tensors(model.net) if n.endswith("proj.weight")]
    write(model, tmp_path / "k", {n: rounded(t, Grid("q4_k", 4), 32) for n, t in matrices})
    with pytest.raises(UsageError, match="are of q4_k's super-blocks"):
        export(tmp_path / "k", "onnx", tmp_path / "x")
    models.save(model.net, model.tokenizer, tmp_path / "plain")
    with pytest.raises(UsageError, match="holds plain weights"):
        export(tmp_path / "plain", "onnx", tmp_path / "x")


@pytest.mark.parametrize("part", ["codes", "scales", "zeros"])
def test_a_wrong_value_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    compressed(tiny(), tmp_path / "m")
    right = onnx.parts

    def wrong(name: str, q: Quantised) -> Any:
        for key, tensor in right(name, q):
            yield key, tensor if not key.endswith(part) else dict(right(name, other(q)))[key]

    def other(q: Quantised) -> Quantised:
        return changed(q, codes=q.codes.flip(1), scale=q.scale * 2, zero=q.zero - 1)

    monkeypatch.setattr(onnx, "parts", wrong)
    with pytest.raises(FleetuneError, match=r"layers.0.self_attn.q_proj does not decode to its weights"):
        export(tmp_path / "m", "onnx", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- the engine of --text


def rows_of(ids: list[int]) -> list[tuple[list[int], int]]:
    return [
        (ids, 1),
        (ids[:5], 3),
        (ids * 4, 70),
    ]  # one that is read in several pieces, scored from within one


def losses(net: Any, rows: list[tuple[list[int], int]]) -> list[tuple[float, int]]:
    found = []
    for ids, n_prompt in rows:
        with torch.no_grad():
            logits = net(torch.tensor([ids])).logits[0].double()
        loss = torch.nn.functional.cross_entropy(
            logits[n_prompt - 1 : -1], torch.tensor(ids[n_prompt:]), reduction="sum"
        )
        found.append((float(loss), len(ids) - n_prompt))
    return found


def test_the_engine_measures_what_torch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "MODULE", onnx_harness.__name__)
    model = tiny()
    quantised = compressed(model, tmp_path / "m")
    engine = onnx_runtime.OnnxRuntime(export(tmp_path / "m", "onnx", tmp_path / "x").path, threads=1)
    net, rows = with_half_matrices(model, quantised), rows_of(IDS)
    assert engine.vocab == 264
    for (got, count), (want, scored) in zip(engine.losses(rows), losses(net, rows), strict=True):
        assert count == scored
        assert got == pytest.approx(want, rel=1e-5)
    engine.open(30)
    engine.prefill(IDS[:20])
    for _ in range(10):
        engine.step()
    with torch.no_grad():
        want = net.generate(torch.tensor([IDS[:20]]), do_sample=False, max_new_tokens=10, eos_token_id=None)
        last = net(want).logits[0, -1]
    np.testing.assert_allclose(engine._logits[-1], last.numpy(), atol=2e-5)


def test_without_the_runtime_the_command_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = exported_perplexity.ENGINES["ONNX Runtime"]._replace(modules=("no_such_engine",))
    monkeypatch.setattr(exported_perplexity, "ENGINES", {"ONNX Runtime": lacking})
    monkeypatch.setattr(onnx_runtime, "MODULE", "no_such_engine")
    want = f"ONNX Runtime for onnx: {pip_install('onnx')}"
    assert exported_perplexity.obstacle("onnx", tmp_path) == want
    with pytest.raises(UsageError, match="ONNX Runtime is not installed") as told:
        onnx_runtime.OnnxRuntime(tmp_path, threads=1)
    assert told.value.hint == pip_install("onnx")


# ---------------------------------------------------------------- the runtime itself


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bits", "group", "grid", "sizes"), HELD)
def test_onnx_runtime_gives_the_same_logits(
    tmp_path: Path, kind: str, bits: int, group: int, grid: dict[str, int], sizes: dict[str, Any]
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = tiny(kind, **sizes)
    quantised = compressed(model, tmp_path / "m", bits, group, **grid)
    export(tmp_path / "m", "onnx", tmp_path / "x")
    session = runtime.InferenceSession(str(tmp_path / "x" / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {
        name: tensor.numpy() for name, tensor in (asked(IDS, len(IDS)) | no_past(model.net.config)).items()
    }
    want = own_logits(with_half_matrices(model, quantised))
    np.testing.assert_allclose(session.run(["logits"], feed)[0][0], want, atol=2e-5)


@pytest.mark.slow
def test_an_export_is_run_in_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    compressed(tiny(), tmp_path / "m")
    (tmp_path / "text.txt").write_text("hello well he will tell all " * 30)
    rows = exported_perplexity.windows_of(str(tmp_path / "text.txt"), tmp_path / "m")
    out = export(tmp_path / "m", "onnx", tmp_path / "x").path
    runtime = exported_perplexity.runtime_of("onnx")
    assert runtime is not None
    assert exported_perplexity.obstacle("onnx", out) == ""
    found = exported_perplexity.compare(tmp_path / "m", out, runtime, rows)
    assert found.runtime == "ONNX Runtime"
    assert found.ratio == pytest.approx(1, abs=1e-3)  # the embedding is fp16 in the file
    (out / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(FleetuneError, match="ONNX Runtime does not load"):
        exported_perplexity.compare(tmp_path / "m", out, runtime, rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_genai_generates_the_same_tokens(tmp_path: Path, kind: str) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = tiny(kind)
    quantised = compressed(model, tmp_path / "m")
    loaded = genai.Model(str(export(tmp_path / "m", "onnx", tmp_path / "x").path))
    text = "hello 12 worlds"
    ids = model.tokenizer(text)["input_ids"]
    assert genai.Tokenizer(loaded).encode(text).tolist() == ids
    settings = genai.GeneratorParams(loaded)
    settings.set_search_options(max_length=len(ids) + 24, do_sample=False)
    generator = genai.Generator(loaded, settings)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    with torch.no_grad():
        want = with_half_matrices(model, quantised).generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=24
        )
    assert generator.get_sequence(0).tolist() == want[0].tolist()
