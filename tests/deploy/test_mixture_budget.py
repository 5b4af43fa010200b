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
from fleetune.deploy.export import export
from fleetune.deploy.measure import llamacpp
from fleetune.errors import Interrupted, UsageError
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


def test_a_budget_changes_a_mixture_less_than_one_grid_of_the_same_size(tmp_path: Path) -> None:
    """Of a mixture whose later layers matter less."""
    net = save("qwen3_moe", tmp_path / "m", **SUPER)
    with torch.no_grad():
        for block in net.model.layers[2:]:
            block.mlp.experts.down_proj *= 0.1
    models.save(net, tokenizer(), tmp_path / "m")
    (tmp_path / "held.txt").write_text("she said that the train was late again, and so was he. " * 12)
    how: dict[str, Any] = {"eval_text": str(tmp_path / "held.txt")}
    one = compressed(tmp_path, Heard(), settings={"grid": "q4_k"}, **how)
    size = export(one.folder / "model", "gguf", tmp_path / "one.gguf").bytes
    heard = Heard()
    other = compressed(tmp_path, heard, bytes=size, **how)
    assert 0.97 * size < heard.spent[0].bytes <= size
    assert other.done.after["kl_divergence"] < 0.8 * one.done.after["kl_divergence"]


def refusal(folder: Path, **how: Any) -> UsageError:
    with pytest.raises(UsageError) as refused:
        compressed(folder, Heard(), **how)
    return refused.value


def test_a_budget_that_cannot_be_met_names_the_least_that_can(tmp_path: Path) -> None:
    """Experts are in the least: nearly all of the file."""
    save("qwen3_moe", tmp_path / "m")
    refused = refusal(tmp_path, bytes=100_000)
    assert "no file of 100 kB can hold this model" in refused.message
    least = int(str(refused.hint).split("--bytes ")[1].split("kB")[0]) * 1000
    heard = Heard()
    compressed(tmp_path, heard, bytes=least)
    assert least - 1000 < heard.spent[0].bytes <= least
    assert set(heard.spent[0].kinds) <= {"Q4_0", "IQ4_NL"}
    refused = refusal(tmp_path, bpw=4.49)
    assert (
        "4.49 bits a weight are too few: the smallest types that fit this model take 4.500" in refused.message
    )
    compressed(tmp_path, heard, bpw=float(str(refused.hint).split("--bpw ")[1]))


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


def test_a_mapped_mixture_gets_the_same_grids(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "split")
    export(tmp_path / "split", "hf", tmp_path / "m")  # joined, as in memory
    made = [compressed(tmp_path, Heard(), bpw=5.2, low_memory=low).folder for low in (False, True)]
    one, other = ((folder / "model" / "master.safetensors").read_bytes() for folder in made)
    assert one == other


def test_other_formats_say_what_they_do_not_hold(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "m")
    model = compressed(tmp_path, Heard(), bpw=5.2).folder / "model"
    for to in ("gptq", "compressed-tensors", "mlx"):
        with pytest.raises(UsageError, match="holds quantised linear layers"):
            export(model, to, tmp_path / to)


def test_trained_scales_leave_experts(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "m", **SUPER)
    solved, trained = (
        Master(compressed(tmp_path, Heard(), "optq", bpw=4.4, train_scales=n).folder / "model")
        for n in (0, 2)
    )
    assert solved.head.grids == trained.head.grids
    names = [name for name in solved.names if ".experts." in name]
    assert len(names) == 8
    assert all(torch.equal(solved.weight(name), trained.weight(name)) for name in names)
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(solved.weight(layer), trained.weight(layer))
