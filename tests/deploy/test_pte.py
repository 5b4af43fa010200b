# SPDX-License-Identifier: Apache-2.0
"""Folders for ExecuTorch: the decoder in torch, what is held and refused, and the program in ExecuTorch's own runtime."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_harness import BLOCKS, LLAMA3, changed, compressed, on_grid, tiny
from family_harness import save
from torch import Tensor

from fleetune import models
from fleetune.common.extras import pip_install
from fleetune.compression.layerwise.grids import Grid
from fleetune.compression.layerwise.groups import rounded
from fleetune.deploy import targets
from fleetune.deploy.checkpoint import open_checkpoint
from fleetune.deploy.export import export
from fleetune.deploy.formats import Misfit, _pte_program, pte
from fleetune.deploy.measure import exported_perplexity
from fleetune.errors import FleetuneError, UsageError
from fleetune.models import Model, artefact
from fleetune.models.artefact import ArtefactHead, Quantised

IDS = [(7 * i) % 259 for i in range(40)]
START = torch.tensor([0])


def write(model: Model, folder: Path, quantised: dict[str, Quantised]) -> Path:
    artefact.write(folder, model, quantised, ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest))
    return folder


def symmetric(model: Model, folder: Path, bits: int = 4, group: int = 32) -> dict[str, Quantised]:
    """Write the artefact on the grid `symmetric`, whose weights `model` takes over."""
    grid = Grid("symmetric", bits)
    matrices = [(n, t) for n, t in models.named_tensors(model.net) if n.endswith("proj.weight")]
    quantised = {name: rounded(tensor, grid, group) for name, tensor in matrices}
    write(model, folder, quantised)
    for name, tensor in matrices:
        tensor.copy_(quantised[name].dense())
    return quantised


def divergence(want: Tensor, found: Tensor) -> float:
    """The mean divergence of next tokens, nats."""
    p, q = want.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# ---------------------------------------------------------------- the decoder in torch


@pytest.mark.parametrize(
    "case", ["llama", "mistral, no window", "qwen2", "qwen3", "llama, biases", "llama, llama3"]
)
def test_the_decoder_gives_the_net_s_logits_also_in_pieces(tmp_path: Path, case: str) -> None:
    net = save(case, tmp_path / "plain")
    ids = torch.tensor([IDS]) % net.config.vocab_size
    decoder = _pte_program.Decoder(copy.deepcopy(net), 64)
    with torch.no_grad():
        want = net(ids).logits
        whole = decoder(ids, START)
        decoder(ids[:, :30].flip(1), START)  # an earlier text leaves nothing
        pieces = [
            decoder(ids[:, :30], START),
            decoder(ids[:, 30:31], START + 30),
            decoder(ids[:, 31:], START + 31),
        ]
    torch.testing.assert_close(whole, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(pieces, 1), want, atol=1e-5, rtol=0)


def test_the_head_is_rounded_to_eight_bits_by_rows() -> None:
    weight = torch.tensor([[0.5, -1.27, 0.004], [0.0, 0.0, 0.0], [254.0, 1.0, -254.0]])
    codes, scale = _pte_program.eight_bits(weight)
    assert codes.tolist() == [[50, -127, 0], [0, 0, 0], [127, 0, -127]]  # 0.5 is rounded to even
    assert scale[:, 0].tolist()[::2] == pytest.approx([0.01, 2.0])
    assert scale.shape == (3, 1)
    assert bool((scale > 0).all())


# ---------------------------------------------------------------- codes


def test_a_group_with_a_negative_scale_is_held_with_both_signs_changed() -> None:
    codes = torch.tensor([[8, 15, 1, 9] * 8 + [0, 8, 15, 10] * 8], dtype=torch.uint8)
    q = Quantised(codes, torch.tensor([[-0.5, 0.25]]).half(), torch.full((1, 2), 8, dtype=torch.uint8), 4, 32)
    found, scale = pte.signed("a.weight", q)
    assert found[0, :4].tolist() == [0, -7, 7, -1]
    assert found[0, 32:36].tolist() == [-8, 0, 7, 2]
    assert scale.tolist() == [[0.5, 0.25]]
    weight = found.float() * scale.repeat_interleave(32, 1)
    assert torch.equal(weight, q.dense())


@pytest.mark.parametrize("bits", [2, 3])
def test_codes_of_fewer_bits_have_the_room_of_four(bits: int) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    q = on_grid(weight, bits, 32)  # scales of either sign
    assert bool((q.scale < 0).any())
    found, scale = pte.signed("a.weight", q)
    assert torch.equal(found.float() * scale.repeat_interleave(32, 1), q.dense())


@pytest.mark.parametrize("case", ["code 0 on a negative scale", "a zero", "a scale of 0", "more bits"])
def test_codes_without_a_place(case: str) -> None:
    q = rounded(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), Grid("symmetric", 4), 32)
    held, _ = pte.signed("a.weight", q)
    assert torch.equal(held + 8, q.codes.to(torch.int8))
    odd = {
        "code 0 on a negative scale": lambda: changed(q, codes=q.codes * 0, scale=-q.scale),
        "a zero": lambda: changed(q, codes=q.codes * 0 + 15, zero=q.zero - 1),
        "a scale of 0": lambda: changed(q, scale=q.scale * 0),
        "more bits": lambda: changed(q, codes=q.codes + 8, bits=5),
    }[case]()
    with pytest.raises(
        Misfit, match=r"codes from -8 to 7 on scales above 0, without zeros; a.weight has others"
    ):
        pte.signed("a.weight", odd)


@pytest.mark.parametrize("of", [{}, BLOCKS["IQ4_NL"], {"group": 16}, {"bits": 8}])
def test_models_without_a_place_are_refused_with_what_to_do(tmp_path: Path, of: dict[str, Any]) -> None:
    compressed(tiny(), tmp_path / "m", **of)
    with pytest.raises(Misfit, match=r"q_proj.weight") as caught:
        pte.check(open_checkpoint(tmp_path / "m"), None)
    assert "grid=symmetric" in caught.value.remedy


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_configurations_without_a_place_are_refused_by_name(
    tmp_path: Path, sizes: dict[str, Any], why: str
) -> None:
    symmetric(tiny(**sizes), tmp_path / "m")
    with pytest.raises(Misfit, match=why):
        pte.check(open_checkpoint(tmp_path / "m"), None)


def test_other_families_and_plain_models_are_refused(tmp_path: Path) -> None:
    save("gemma", tmp_path / "plain")
    compressed(models.load(str(tmp_path / "plain"), device="cpu"), tmp_path / "m")
    with pytest.raises(Misfit, match="'gemma': it is written for llama, mistral, qwen2, qwen3"):
        pte.check(open_checkpoint(tmp_path / "m"), None)
    model = tiny()
    models.save(model.net, model.tokenizer, tmp_path / "llama")
    with pytest.raises(UsageError, match="holds plain weights"):
        pte.check(open_checkpoint(tmp_path / "llama"), None)


def test_without_the_package_the_command_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        targets.importlib.util, "find_spec", lambda name: None if name == "executorch" else found(name)
    )
    assert "executorch" in targets.find("pte").missing
    assert targets.find("onnx").missing == []
    with pytest.raises(UsageError, match="pte cannot be written without executorch") as caught:
        export(tmp_path / "no model is looked for", "pte", tmp_path / "x")
    assert caught.value.hint == pip_install("executorch")


# ---------------------------------------------------------------- what the runner asks for


def test_the_room_is_within_the_window_and_the_context() -> None:
    assert pte.room(tiny(max_position_embeddings=8192).net.config) == 2048
    assert pte.room(tiny(max_position_embeddings=1024).net.config) == 1024
    window = tiny("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert pte.room(window.net.config) == pte.at_once(window.net.config) == 8
    assert pte.at_once(tiny().net.config) == 128


def test_the_methods_of_the_runner() -> None:
    model = tiny()
    found = pte.methods(model.net.config, model.tokenizer, {"fleetune.method": "rtn"})
    assert (found["get_bos_id"], found["get_eos_ids"], found["get_vocab_size"]) == (260, [261], 264)
    assert (found["get_max_seq_len"], found["get_max_context_len"]) == (128, 1024)
    assert found["get_provenance"] == '{"fleetune.method": "rtn"}'


# ---------------------------------------------------------------- the runtime itself


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bits", "group", "sizes"),
    [
        ("llama", 4, 32, {"rope_parameters": LLAMA3}),
        ("qwen2", 4, 64, {}),
        ("qwen3", 3, 32, {"head_dim": 32}),
    ],
)
def test_the_runtime_gives_the_model_s_tokens(
    tmp_path: Path, kind: str, bits: int, group: int, sizes: dict[str, Any]
) -> None:
    pytest.importorskip("executorch")
    model = tiny(kind, **sizes)
    quantised = symmetric(model, tmp_path / "m", bits, group)
    report = export(tmp_path / "m", "pte", tmp_path / "x")
    assert report.types["4-bit"] == len(quantised)
    assert any(re.match(r"the scales of \d+ layers are rounded to bf16", note) for note in report.notes)
    program = _pte_program.Program(tmp_path / "x" / "model.pte")
    assert program.fact("get_eos_ids") == 261
    ids = torch.tensor([IDS])
    with torch.no_grad():
        want = model.net(ids).logits
    whole = program.forward(ids, 0)
    assert divergence(want, whole) < 1e-3
    pieces = [
        program.forward(ids[:, :30], 0),
        *(program.forward(ids[:, i : i + 1], i) for i in range(30, 40)),
    ]
    assert torch.equal(torch.cat(pieces, 1), whole)
    same = want.argmax(-1) == whole.argmax(-1)
    gap = want.topk(2).values.diff().abs()[..., 0]
    assert bool(same[gap > 0.2].all())  # where the first choice is clear
    assert float(same.float().mean()) > 0.9


@pytest.mark.slow
def test_executorch_s_own_runner_generates_the_tokens_of_torch(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    with _pte_program.quiet():
        from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    model = tiny(seed=125, tie_word_embeddings=False)  # its first tokens are letters and control characters
    symmetric(model, tmp_path / "m")
    folder = export(tmp_path / "m", "pte", tmp_path / "x").path
    _pte_program.Program(folder / "model.pte")  # loads the libraries; the runner alone does not (1.5)
    said: list[str] = []
    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    settings = GenerationConfig(echo=False, max_new_tokens=6, temperature=0.0)
    runner.generate("hello 12 worlds", settings, said.append)
    ids = model.tokenizer("hello 12 worlds", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = model.net.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
    assert len(set(want.tolist())) == 5
    assert "".join(said) == model.tokenizer.decode(want)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_a_wrong_value_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    pytest.importorskip("executorch")
    symmetric(tiny(), tmp_path / "m")
    right = _pte_program.on_codes

    def wrong(net: Any, coded: dict[str, Any], table: Tensor) -> None:
        name, (codes, scale) = next(iter(coded.items()))
        right(net, {**coded, name: (codes.flip(1), scale) if part == 0 else (codes, scale * 2)}, table)

    monkeypatch.setattr(_pte_program, "on_codes", wrong)
    with pytest.raises(
        FleetuneError, match=r"layers.0.self_attn.q_proj.weight is not among its codes and scales"
    ):
        export(tmp_path / "m", "pte", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_an_export_is_run_in_it(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    symmetric(tiny(), tmp_path / "m")
    (tmp_path / "text.txt").write_text("hello well he will tell all " * 30)
    rows = exported_perplexity.windows_of(str(tmp_path / "text.txt"), tmp_path / "m")
    out = export(tmp_path / "m", "pte", tmp_path / "x").path
    runtime = exported_perplexity.runtime_of("pte")
    assert runtime is not None
    assert exported_perplexity.obstacle("pte", out) == ""
    found = exported_perplexity.compare(tmp_path / "m", out, runtime, rows)
    assert found.runtime == "ExecuTorch"
    assert found.ratio == pytest.approx(1, abs=0.05)  # inputs of 8 bits
    (out / "model.pte").write_bytes(b"no program")
    with pytest.raises(FleetuneError, match="ExecuTorch does not load"):
        exported_perplexity.compare(tmp_path / "m", out, runtime, rows)
