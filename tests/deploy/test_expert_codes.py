# SPDX-License-Identifier: Apache-2.0
"""The codes of experts: in the artefact, in every export as they are, and in what is loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from family_harness import TEXT, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fleetune
from fleetune.deploy.export import export
from fleetune.errors import ModelError
from fleetune.models.artefact import Master
from fleetune.models.loading import load_artefact
from fleetune.runs.listener import Silent

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"])
@pytest.mark.parametrize("grid", ["symmetric", "iq4_nl", "asymmetric", "q4_k"])
def test_codes_of_experts_reach_every_export(family: str, grid: str, tmp_path: Path) -> None:
    save(family, tmp_path / "m")
    model = tmp_path / "m"
    settings: dict[str, Any] = {"group": 32, "grid": grid}
    if grid == "q4_k":
        model = tmp_path / "wide"
        save(
            family,
            model,
            hidden_size=256,
            num_attention_heads=8,
            intermediate_size=256,
            moe_intermediate_size=256,
        )
    folder = fleetune.compress(model, method="rtn", settings=settings, out=tmp_path / "runs").folder / "model"
    master = Master(folder)
    transposed = family == "gpt_oss"  # the model holds them as [in, out]
    assert set(master.head.transposed) == (set(master.head.experts) if transposed else set())
    assert set(master.head.experts.values()) == {5}
    assert len(master.head.experts) == 8
    net = load_artefact(folder).net
    for name in master.head.experts:
        q, values = master.quantised(name), net.get_parameter(name)
        assert q is not None
        assert torch.equal(values, q.dense())
        assert values.shape == q.shape
    report = export(folder, "gguf", tmp_path / "x.gguf")
    kind = {"symmetric": "Q4_0", "iq4_nl": "IQ4_NL", "asymmetric": "Q5_0", "q4_k": "Q4_K"}[grid]
    found = {t.name: t for t in package.GGUFReader(report.path).tensors}
    gate_up = next(n for n in master.head.experts if "layers.1." in n and n.endswith("gate_up_proj"))
    weights = net.get_parameter(gate_up).numpy()
    F = weights.shape[1] // 2
    gates, ups = weights[:, :F], weights[:, F:]
    if transposed:
        gates, ups = (weights[:, :, first::2].swapaxes(1, 2) for first in (0, 1))
    for name, own in (("gate", gates), ("up", ups)):
        tensor = found[f"blk.1.ffn_{name}_exps.weight"]
        assert tensor.tensor_type.name == kind
        assert np.array_equal(package.quants.dequantize(tensor.data, tensor.tensor_type), own)
    back = AutoModelForCausalLM.from_pretrained(export(folder, "hf", tmp_path / "hf").path)
    ids = torch.tensor([TEXT])
    assert torch.equal(back(ids).logits, net(ids).logits)


def test_formats_of_linear_layers_hold_experts_in_16_bits(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "m")
    model = tmp_path / "m"
    folder = (
        fleetune.compress(model, method="rtn", settings={"group": 32}, out=tmp_path / "runs").folder / "model"
    )
    for to in ("gptq", "compressed-tensors"):
        report = export(folder, to, tmp_path / to)
        assert (
            f"experts are in 16 bits: the codes of {to} are of linear layers; GGUF and MLX hold theirs"
            in report.notes
        )
        stored = load_file(report.path / "model.safetensors")
        name = "model.layers.0.mlp.experts.down_proj"
        assert torch.equal(stored[name], Master(folder).weight(name).half())


def test_a_head_that_lies_about_experts_is_refused(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "m")
    model = tmp_path / "m"
    folder = (
        fleetune.compress(model, method="rtn", settings={"group": 32}, out=tmp_path / "runs").folder / "model"
    )
    folder = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = folder / "master.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        head = json.loads(opened.metadata()["master"])
    (folder / "SHA256SUMS").unlink()
    name = "model.layers.0.mlp.experts.down_proj"
    lied = head | {"transposed": [name.replace("down_proj", "gate")]}
    save_file(tensors, file, {"format": "pt", "master": json.dumps(lied)})
    with pytest.raises(ModelError, match=r"experts.gate is transposed and not of experts"):
        Master(folder)
    for lie, why in ((7, "rows of 7 experts"), (0, "numbers of experts"), ("4", "numbers of experts")):
        text = json.dumps(head | {"experts": head["experts"] | {name: lie}})
        save_file(tensors, file, {"format": "pt", "master": text})
        with pytest.raises(ModelError, match=why):
            Master(folder).quantised(name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("method", ["rtn", "optq"])
def test_a_mapped_mixture_is_compressed_the_same(family: str, method: str, tmp_path: Path) -> None:
    save(family, tmp_path / "m")
    (tmp_path / "t.txt").write_text("a text about nothing much, of some length. " * 20)
    given: dict[str, Any] = (
        {"text": str(tmp_path / "t.txt"), "windows": 4, "length": 32} if method == "optq" else {}
    )
    model = export(tmp_path / "m", "hf", tmp_path / "hf").path  # joined, as in memory
    made = [
        fleetune.compress(
            model,
            method=method,
            settings={"group": 32},
            out=tmp_path / at,
            low_memory=at == "mapped",
            **given,
        ).folder
        for at in ("whole", "mapped")
    ]
    one, other = ((folder / "model" / "master.safetensors").read_bytes() for folder in made)
    assert one == other


class Heard(Silent):
    """Keeps the remarks."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_experts_that_stay_are_said(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "m")
    heard = Heard()
    rows = [{"instruction": f"say {i}", "output": "yes and no, as it is said"} for i in range(12)]
    tuned = fleetune.tune(
        tmp_path / "m",
        rows,
        method="fedpetuning",
        settings={"module": "full", "epochs": 1, "batch_size": 4},
        clients=2,
        rounds=1,
        samples=0,
        max_length=64,
        held_out=4,
        out=tmp_path / "tuned",
    )
    made = fleetune.compress(
        tuned.folder,
        method="optq",
        out=tmp_path / "runs",
        length=16,
        windows=4,
        listener=heard,
        calibrate="clients",
    )
    assert Master(made.folder / "model").head.experts == {}
    assert "the experts of 4 layers stay as they are: the devices send no sums of theirs" in heard.notes
