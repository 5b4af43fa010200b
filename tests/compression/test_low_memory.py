"""One block in memory at a time: the same bytes, a peak that blocks do not add to, and what the plan says of it."""

import shutil
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from command_line import Capture, Patch, ok
from command_line import call_json as call
from fleetune import compression, models
from fleetune.common import memory
from fleetune.compression.jobs import solve
from fleetune.compression.jobs.inputs import Inputs
from fleetune.compression.layerwise import driver
from fleetune.evaluation.losses import text_rows
from fleetune.models import artefact
from fleetune.models.lazy import LazyWeight
from fleetune.models.net.saving import write_in_turn
from fleetune.models.shapes import shape_of
from fleetune.planning import compression_cost
from fleetune.runs.listener import Silent
from tiny_families import sizes

TYPES = [torch.int8, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64]


def saved(folder: Path, dtype: Any = torch.float32, *, layers: int = 3, shard: str = "5GB") -> str:
    tiny = models.tiny_llama(layers=layers)
    tiny.net.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", ["qronos", "sparsegpt"])
def test_low_memory_gives_the_same_bytes(method: str, at: Path, capsys: Capture) -> None:
    name = saved(at / "m", torch.bfloat16, shard="20KB")
    text = ["--text", "text.txt", "--windows", "4", "--length", "16", "--eval-text", "text.txt"]
    group = [] if method == "sparsegpt" else ["--set", "group=8"]
    done = []
    for more in ([], ["--low-memory"]):
        events = ok(capsys, "compress", name, "--method", method, *group, *text, *more)
        done.append(events[-1])
    same = ("before", "after", "error", "digest", "bytes")
    assert [done[0][k] for k in same] == [done[1][k] for k in same]
    folders = [Path(d["folder"]) / "model" for d in done]
    for file in folders[0].iterdir():
        assert file.read_bytes() == (folders[1] / file.name).read_bytes(), file.name


def most_alive(folder: Path, layers: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """(the most bytes of weights that were read and not yet dropped, bytes of all) while a model is compressed."""
    model = models.load(saved(folder / "m", torch.bfloat16, layers=layers), device="cpu", base="mapped")
    alive: dict[int, int] = {}
    seen, read = [0], LazyWeight.values

    def values(self: LazyWeight) -> Tensor:
        tensor = read(self)
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor), None)
        seen[0] = max(seen[0], sum(alive.values()))
        return tensor

    solver: Any = compression.make("optq", {"group": 8})
    with monkeypatch.context() as patch:
        patch.setattr(LazyWeight, "values", values)
        driver.check(model, solver)
        windows = torch.zeros(3, 12, dtype=torch.int64) + torch.arange(12)
        inputs = Inputs(model, [], [], text_rows(model, ["a text to measure on"]), "a text")
        with inputs.reference(model, folder, Silent()) as reference:
            parts = driver.run(model, solver, windows, folder / "parts")
            assert "kl_divergence" in solve._after(Silent(), inputs, folder, parts, reference)
        head = artefact.ArtefactHead("optq", {}, model.digest, model.tokenizer_digest)
        artefact.write(folder / "model", model, parts, head)
    return seen[0], sum(4 * p.numel() for p in model.net.parameters())


def test_no_more_than_a_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, _ = most_alive(tmp_path / "few", 2, monkeypatch)
    many, whole = most_alive(tmp_path / "many", 6, monkeypatch)
    assert few == many
    assert many < whole / 3


@given(
    kinds=st.lists(st.sampled_from(TYPES), min_size=1, max_size=8),
    names=st.lists(st.text('abxyz.é"\\ ', min_size=1, max_size=6), min_size=8, max_size=8, unique=True),
    note=st.text(max_size=20),
)
def test_the_file_is_what_safetensors_writes(kinds: list[torch.dtype], names: list[str], note: str) -> None:

    numbered = enumerate(zip(names, kinds, strict=False), 1)
    tensors = {n: torch.arange(3 * i).reshape(3, -1).to(k) for i, (n, k) in numbered}
    table = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "a", Path(folder) / "b"
        write_in_turn(ours, table, reversed(list(tensors.items())), {"master": note})
        save_file(tensors, theirs, metadata={"master": note})
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_plan_with_low_memory_does_not_depend_on_the_blocks() -> None:
    def peak(layers: int, **work: Any) -> int:
        shape = shape_of(LlamaConfig(**sizes(64, 160, layers, 4, 2, head_dim=16, vocab_size=500)))
        size = compression_cost.CompressionSize(8, 64)._replace(**work)
        return sum(compression_cost.memory(shape, size).values())

    assert peak(2, low_memory=True) == peak(20, low_memory=True)
    block = 4 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 160 + 2 * 64)
    assert peak(20) - peak(2) == 18 * block
    assert peak(2, windows=16) - peak(2) == 8 * 64 * 64 * 4
    assert peak(2, windows=16, clients=2) == peak(2)
    assert peak(2, heads=4) == peak(2)  # of one window they are little
    assert peak(2, windows=0) < peak(2)
    # no second copy of the blocks
    assert peak(20, measured=True) - peak(20) == peak(2, measured=True) - peak(2) > 0


def test_the_disk_is_what_the_files_take(tmp_path: Path) -> None:
    model = models.tiny_llama(layers=4, hidden=128)
    for values in ({"group": 8}, {"bits": 8, "group": 8}, {"bits": 3, "group": 0}):
        solver: Any = compression.make("rtn", values)
        parts = driver.run(model, solver, None, tmp_path / "parts")
        artefact.write(tmp_path / "model", model, parts, artefact.ArtefactHead("rtn", {}, "", ""))
        real = sum(f.stat().st_size for f in tmp_path.glob("*/*.safetensors"))
        planned = compression_cost.disk(shape_of(model.net.config), solve.size_of(solver, 0, 0))
        assert planned == pytest.approx(real, rel=0.15)
        shutil.rmtree(tmp_path / "parts")


def test_what_it_takes_is_said_before_it_begins(at: Path, capsys: Capture, monkeypatch: Patch) -> None:
    name = saved(at / "m")
    args = [name, "--set", "group=8", "--text", "text.txt", "--windows", "4", "--length", "16"]
    code, events, err = call(capsys, "compress", *args, "--dry-run")
    assert code == 0
    assert events[0]["memory"].startswith("about 56")  # MB, tens
    assert "memory: about 56" in err
    code, events, err = call(capsys, "compress", *args)
    assert events[-1]["planned"] == events[0]["planned"] > 4e8
    assert "of memory are free" not in err
    monkeypatch.setattr(compression_cost, "available", lambda: 1000)
    monkeypatch.setattr(memory, "rss", lambda: 0)
    code, _, err = call(capsys, "compress", *args)
    assert code == 0
    assert "1.0 kB of memory are free; with --low-memory it takes less" in err
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    code, events, err = call(capsys, "compress", *args)
    assert code == 1
    assert "has 10 B free" in events[-1]["message"]
    assert not (at / "runs" / "0003-qronos-m" / "parts").exists()
