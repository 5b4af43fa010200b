"""The GGUF file in which a compressed model is tuned: it is the exported one, written once, and nothing else is taken for it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deploy_harness import BLOCKS, WIDE, compressed, matrices, on_grid, tiny, write_codes
from family_harness import save

import fleetune
from fleetune import models, subject
from fleetune.common import ggml
from fleetune.compression.layerwise.grids import Grid, rounded
from fleetune.deploy import export
from fleetune.errors import UsageError
from fleetune.runs.listener import Silent
from fleetune.seeds.scale_view import moved_tensors

pytestmark = pytest.mark.usefixtures("own_cache")


def codes(folder: Path, **grid: Any) -> subject.Compressed:
    """A tiny artefact of codes in `folder`."""
    compressed(tiny(), folder, **grid)
    found = subject.open(folder)
    assert isinstance(found, subject.Compressed)
    return found


def exported(found: subject.Compressed, folder: Path) -> Path:
    """The same model's export, of the same name, in another folder."""
    return fleetune.export(found, to="gguf", path=folder / "elsewhere" / f"{found.home.name}.gguf").path


@pytest.mark.parametrize("kind", BLOCKS)
def test_it_is_what_export_writes_where_export_puts_it_and_is_written_once(kind: str, tmp_path: Path) -> None:
    found, told = codes(tmp_path / "codes", **BLOCKS[kind]), list[str]()
    place = export.tunable_file(found, told.append)
    assert place == tmp_path / "codes" / "codes.gguf"
    assert place.read_bytes() == exported(found, tmp_path).read_bytes()
    before = place.stat()
    assert export.tunable_file(found, told.append) == place
    assert place.stat().st_mtime_ns == before.st_mtime_ns
    assert place.stat().st_ino == before.st_ino
    assert f"{place}, now written (" in told[0]
    assert f"{place}, which is there already" in told[1]
    assert "rounded to Q8_0" in told[0]
    assert len(told) == 2
    place.unlink()
    assert fleetune.export(found, to="gguf").path.read_bytes() == exported(found, tmp_path / "2").read_bytes()
    assert export.tunable_file(found, told.append) == place, "what export wrote before is taken"
    assert "there already" in told[2]


def _changed(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "other",
    [
        lambda raw: _changed(raw, len(raw) - 40),  # a code or a scale, as a patch leaves it
        lambda raw: _changed(raw, raw.index(b"fleetune.settings") + 40),
        lambda raw: raw + bytes(32),
    ],
    ids=["a scale", "the header", "longer"],
)
def test_another_file_in_its_place_is_refused_and_stays(other: Any, tmp_path: Path) -> None:
    found = codes(tmp_path / "my codes")
    place = export.tunable_file(found, lambda _: None)
    changed = other(place.read_bytes())
    place.write_bytes(changed)
    with pytest.raises(UsageError, match=r"is not what .*gguf.* writes of") as refused:
        export.tunable_file(found, lambda _: None)
    assert f"move '{place}' away" in str(refused.value.hint)
    assert place.read_bytes() == changed


def compression(folder: Path, model: Path, method: str = "rtn", **settings: Any) -> subject.Compressed:
    text = folder / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 40)
    given: Any = {"settings": settings, "text": str(text), "windows": 2, "length": 32, "out": folder / "runs"}
    done = fleetune.compress(str(model), method=method, listener=Silent(), **given)
    found = subject.open(done)
    assert isinstance(found, subject.Compressed)
    return found


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A tiny model as a directory."""
    return tiny(**WIDE).save(tmp_path / "plain")


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("rtn", {"bits": 8, "grid": "asymmetric"}, "does not go into GGUF blocks without loss"),
        ("rtn", {"grid": "q3_k"}, "are Q3_K in a GGUF file"),
        ("sparsegpt", {"sparsity": 0.5}, "are F16 in a GGUF file"),
    ],
)
def test_codes_whose_file_could_not_be_tuned_are_refused_before_it_is_written(
    method, settings, words, plain, tmp_path
):
    found = compression(tmp_path, plain, method, **settings)
    with pytest.raises(UsageError, match=words) as refused:
        export.tunable_file(found, lambda _: None)
    assert "--train scales is for blocks of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL" in refused.value.message
    assert sorted(p.name for p in found.home.iterdir() if p.suffix == ".gguf" or p.name.startswith(".")) == []
    assert str(refused.value.hint).startswith("compress again: fleetune compress ")


@pytest.mark.parametrize(("family", "words"), [("phi", "architecture phi2"), ("qwen3_moe", "of experts")])
@pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
def test_families_whose_files_are_not_read_are_refused_first(family: str, words: str, tmp_path: Path) -> None:
    save(family, tmp_path / "m")
    found = compression(tmp_path, tmp_path / "m")
    with pytest.raises(UsageError, match=words) as refused:
        export.tunable_file(found, lambda _: None)
    assert not list(found.home.glob("*.gguf"))
    assert str(refused.value.hint).endswith("--to hf")


def test_of_a_file_of_several_types_those_that_can_be_are_tuned(tmp_path: Path) -> None:
    model, quantised = tiny(**WIDE), {}
    for name, tensor in matrices(model).items():
        wide = ".mlp." in name
        quantised[name] = rounded(tensor, Grid("q4_k", 4), 32) if wide else on_grid(tensor, 4, 32)
    found = subject.open(write_codes(model, tmp_path / "codes", quantised))
    assert isinstance(found, subject.Compressed)
    scales = ggml.scales_in(export.kinds_of(found))
    assert scales == {name.removesuffix(".weight"): 1 for name in quantised if ".mlp." not in name}
    mapped = models.load(str(export.tunable_file(found, lambda _: None)), device="cpu", base="mapped")
    mapped.trains = "scales"
    moved = [name.removesuffix(".weight.scales") for name, _, _ in moved_tensors(mapped)]
    assert [name for name in moved if ".layers." in name] == sorted(scales)


def test_only_layers_count() -> None:
    """An embedding or a head of another type says nothing of the layers."""
    layers = {"model.layers.0.mlp.up_proj": "Q8_0", "model.layers.1.mlp.up_proj": "IQ4_NL"}
    assert ggml.share(layers | {"model.embed_tokens": "Q6_K", "lm_head": "F16"}) == ""
    others = enumerate(("Q6_K", "F16", "Q2_K", "F16"), 2)
    mixed = layers | {f"model.layers.{n}.mlp.up_proj": kind for n, kind in others}
    assert ggml.share(mixed) == "the scales of 2 of the layers' 6 matrices; those in F16, Q2_K and Q6_K stay"


KILLED = """
import os, signal, sys, time
from fleetune import subject
from fleetune.deploy.export import tunable_file
found = subject.open(sys.argv[1])
place = tunable_file(found, lambda _: None)
whole = place.read_bytes()
for delay in (0.02, 0.05, 0.1, 0.2, 0.35):
    child = os.fork()
    while not child:
        place.unlink(missing_ok=True)
        tunable_file(found, lambda _: None)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not place.exists() or place.read_bytes() == whole, delay
place.unlink(missing_ok=True)
tunable_file(found, lambda _: None)
assert place.read_bytes() == whole
"""


def test_a_killed_process_leaves_the_whole_file_or_none(tmp_path: Path) -> None:
    found = codes(tmp_path / "codes")
    subprocess.run([sys.executable, "-c", KILLED, str(found.home)], check=True, timeout=120)
    assert not list(found.home.glob(".*")), "what killed ones left is gone"
