# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress --bytes` and `--bpw` on mixtures: the file has the size that was said, experts included, and llama.cpp runs it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from deploy_harness import tokenizer
from family_harness import divergence, save
from transformers import AutoModelForCausalLM

import fleetune
from fleetune import models
from fleetune.common.events import BudgetSpent
from fleetune.compression.jobs import budget
from fleetune.deploy import llamacpp
from fleetune.deploy.export import write as export
from fleetune.errors import Interrupted
from fleetune.models.artefact import Master
from fleetune.models.families.experts import STACKED
from fleetune.runs.listener import Silent

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
needs_engine = pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp is not installed")
SAME, ROUNDED = 1e-5, 2e-2  # nats: as in test_gguf_families
SUPER = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 256, "moe_intermediate_size": 256}
MIXTURES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "ernie4_5_moe",
    "gpt_oss",
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))


class Heard(Silent):
    """Keeps what a budget was spent on; stops after so many looks."""

    def __init__(self, looks: int = 10**9) -> None:
        self.spent: list[BudgetSpent] = []
        self.left = looks

    def event(self, event: Any) -> None:
        if isinstance(event, BudgetSpent):
            self.spent.append(event)

    @property
    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def compressed(folder: Path, heard: Silent, method: str = "optq", **how: Any) -> Any:
    (folder / "t.txt").write_text("the quick brown fox jumps over the lazy dog, and a few more words. " * 60)
    return fleetune.compress(
        folder / "m",
        method=method,
        text=str(folder / "t.txt"),
        windows=4,
        length=32,
        out=folder / "runs",
        listener=heard,
        **how,
    )


def named_by_export(folder: Path, run: Path) -> Path:
    """The file with the name that `export` gives it, which its header holds."""
    return folder / f"0000-{run.name.partition('-')[2]}.gguf"


def kinds_in(file: Path) -> dict[str, int]:
    """How many tensors with a grid there are of each type: not the router, which is in fp32."""
    found = [t.tensor_type.name for t in gguf.GGUFReader(file).tensors if len(t.shape) > 1]
    return {kind: found.count(kind) for kind in sorted(set(found) - {"F32", "F16"})}


@needs_engine
@pytest.mark.parametrize("family", MIXTURES)
def test_the_file_has_the_size_that_was_said_and_runs(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "m")
    heard = Heard()
    done = compressed(tmp_path, heard, bpw=5.2)
    model = done.folder / "model"
    report = export(model, "gguf", named_by_export(tmp_path, done.folder))
    (spent,) = heard.spent
    assert report.path.stat().st_size == report.bytes == spent.bytes
    # a gate and an up are one parameter, and two tensors; those of granitemoeshared's shared experts too
    mixed = sum(name.endswith("gate_up_proj") for name in Master(model).names)
    halves = mixed + (4 if family == "granitemoeshared" else 0)
    kinds = kinds_in(report.path)
    assert sum(spent.kinds.values()) + halves == sum(kinds.values())
    assert all(count <= kinds[kind] for kind, count in spent.kinds.items())
    weights = Counter[str]()
    for tensor in gguf.GGUFReader(report.path).tensors:
        if tensor.tensor_type.name in kinds_in(report.path):
            weights.update({"bits": 8 * tensor.n_bytes, "weights": tensor.n_elements})
    assert 5.0 < weights["bits"] / weights["weights"] <= 5.2
    net = AutoModelForCausalLM.from_pretrained(export(model, "hf", tmp_path / "hf").path)
    whole = export(model, "gguf:f32", tmp_path / "x.gguf")
    assert whole.exact == whole.tensors
    assert divergence(net, whole.path) <= SAME
    assert divergence(net, report.path) <= ROUNDED


@needs_engine
@pytest.mark.parametrize("method", ["optq", "qronos"])
def test_experts_have_types_of_their_own(method: str, tmp_path: Path) -> None:
    """Super-blocks too: the file holds the codes as they are."""
    net = save("qwen3_moe", tmp_path / "m", **SUPER)
    with torch.no_grad():  # the downs of two layers decide little
        for block in net.model.layers[:2]:
            block.mlp.experts.down_proj *= 0.05
    models.save(net, tokenizer(), tmp_path / "m")
    heard = Heard()
    done = compressed(tmp_path, heard, method, bpw=4.4)
    master = Master(done.folder / "model")
    report = export(done.folder / "model", "gguf", named_by_export(tmp_path, done.folder))
    assert report.bytes == heard.spent[0].bytes
    tensors = {t.name: t for t in gguf.GGUFReader(report.path).tensors}
    kinds = set()
    for block in range(4):
        name = f"model.layers.{block}.mlp.experts"
        of_block = [tensors[f"blk.{block}.{stacked}.weight"] for stacked in STACKED]
        values = [torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type)) for t in of_block]
        assert torch.equal(torch.cat(values[:2], 1), master.weight(f"{name}.gate_up_proj"))
        assert torch.equal(values[2], master.weight(f"{name}.down_proj"))
        assert of_block[0].tensor_type == of_block[1].tensor_type
        kinds.add((of_block[0].tensor_type, of_block[2].tensor_type))
    assert len(kinds) > 1
    assert any(one != other for one, other in kinds)
    back = AutoModelForCausalLM.from_pretrained(export(done.folder / "model", "hf", tmp_path / "hf").path)
    assert divergence(back, report.path) <= ROUNDED


@pytest.mark.parametrize("method", ["optq", "qronos"])
def test_a_stopped_one_resumes_with_the_grids_that_were_chosen(method: str, tmp_path: Path) -> None:
    save("qwen2_moe", tmp_path / "m")
    heard = Heard()
    whole = compressed(tmp_path, heard, method, bpw=5.2)
    with pytest.raises(Interrupted):
        compressed(tmp_path, stopped := Heard(looks=65), method, bpw=5.2)
    folder = max((tmp_path / "runs").iterdir())
    assert stopped.spent == heard.spent
    assert list((folder / "parts").glob("block-*"))
    assert (folder / "parts" / budget.FILE).is_file()
    again = fleetune.resume_compression(folder, out=tmp_path / "runs", listener=(resumed := Heard()))
    assert resumed.spent == heard.spent
    one, other = ((at / "model" / "master.safetensors").read_bytes() for at in (whole.folder, again.folder))
    assert one == other
