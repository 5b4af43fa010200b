"""Patches of a GGUF file's scales: what they make, what they refuse, and what a kill leaves."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_harness import BLOCKS, gguf_of
from safetensors import safe_open
from safetensors.numpy import save_file

import fleetune
from command_line import Patch, ok
from fleetune import models
from fleetune.common.ggml import BYTES, HALVES
from fleetune.common.sums import sha256
from fleetune.deploy import patch, patch_make
from fleetune.errors import Interrupted, LedgerError, ModelError, UsageError, VersionError
from fleetune.models.net.model import Model
from fleetune.seeds import noise
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.view import View
from fleetune.tuning.methods import _zeroth, mezo
from fleetune.tuning.result import finished
from heard import Heard, counting

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_of(tmp_path_factory.mktemp("gguf"), "Q4_1")


@pytest.fixture
def file(base: Path, tmp_path: Path) -> Path:
    """A copy of a model on the device."""
    copy = tmp_path / "device" / "m.gguf"
    copy.parent.mkdir()
    copy.write_bytes(base.read_bytes())
    return copy


@pytest.fixture(scope="module")
def ledger(base: Path) -> Iterator[Ledger]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FLEETUNE_HOME", str(base.with_name("home")))
        yield ledger_on(base)[0]


@pytest.fixture(scope="module")
def made(base: Path, ledger: Ledger) -> patch.Patch:
    return patch_make.of_ledger(base, ledger)


def visible(folder: Path) -> list[str]:
    """The files of a folder, hidden ones as well."""
    return sorted(p.name for p in folder.iterdir())


def load(file: Path) -> Model:
    model = models.load(str(file), device="cpu", base="mapped")
    model.trains = "scales"
    return model


def ledger_on(file: Path) -> tuple[Ledger, str]:
    """A ledger of 40 steps, and the digest of the weights that it leads to."""
    model = load(file)
    made = mezo.Method(K=64, lr=0.02, eps=0.01).empty(model, 5)
    rng = np.random.default_rng(1)
    made = made.append(np.arange(40, dtype=np.uint64), rng.integers(-90, 90, 40), 1)
    view = _zeroth.place_at(model, made)
    assert isinstance(view, View)
    digest = models.digest(view.pieces())
    return made.with_check(1, digest), digest


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_patched_file_is_the_tuned_model(kind: str, tmp_path: Path) -> None:
    file = gguf_of(tmp_path, kind)
    ledger, digest = ledger_on(file)
    made = patch_make.of_ledger(file, ledger)
    (tmp_path / "p").write_bytes(made.file)
    before, own = file.read_bytes(), load(file).digest
    patch.apply(file, patch.load(tmp_path / "p"), tmp_path / "new.gguf")
    assert file.read_bytes() == before
    assert models.load(str(tmp_path / "new.gguf"), device="cpu").digest == digest != own
    assert sha256(tmp_path / "new.gguf") == made.result
    changed = np.frombuffer(before, np.uint8) != np.frombuffer((tmp_path / "new.gguf").read_bytes(), np.uint8)
    inside = np.zeros(len(before), bool)
    for place in made.places:  # nothing but scales has changed
        blocks = inside[place.offset : place.offset + place.size].reshape(-1, BYTES[place.kind])
        blocks[:, : 2 * HALVES[place.kind]] = True
    assert changed.any()
    assert not (changed & ~inside).any()


def test_a_file_is_patched_once(file: Path, made: patch.Patch) -> None:
    patch.apply(file, made)
    with pytest.raises(ModelError, match="has this patch already"):
        patch.apply(file, made)
    assert sha256(file) == made.result
    assert visible(file.parent) == ["m.gguf"]


def test_rows_in_pieces_make_the_same_file(file: Path, made: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    for piece in (1, 700, 5000):
        monkeypatch.setattr(patch, "PIECE", piece)
        patch.apply(file, made, tmp_path / f"{piece}.gguf")  # its SHA-256 is the stated one


def test_a_patch_that_would_make_another_model_is_not_made(file, ledger, monkeypatch):
    summed = noise.summed
    monkeypatch.setattr(noise, "summed", lambda *given: summed(*given) + 300)
    with pytest.raises(ModelError, match="would not make the scales of the run"):
        patch_make.of_ledger(file, ledger)


def test_the_command_prints_json_for_a_script(file, ledger, tmp_path, capsys):
    ledger.save(tmp_path / "ledger.safetensors")
    first = ok(capsys, "patch", "make", file, tmp_path / "ledger.safetensors", "--to", tmp_path / "p")
    lines = [first[-1], ok(capsys, "patch", "apply", file, tmp_path / "p")[-1]]
    assert [line["event"] for line in lines] == ["patch", "patched"]
    assert lines[0]["result"] == lines[1]["result"] == sha256(file)


def test_a_patch_for_another_file_is_refused(file: Path, made: patch.Patch, tmp_path: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    for out in (None, tmp_path / "new.gguf"):
        with pytest.raises(ModelError, match="the patch is for a file with SHA-256"):
            patch.apply(file, made, out)
    with pytest.raises(ModelError, match="there is no file"):
        patch.apply(tmp_path / "none" / "m.gguf", made)
    assert file.read_bytes() == bytes(raw)
    assert visible(file.parent) == ["m.gguf"]
    assert not (tmp_path / "new.gguf").exists()
    assert not (tmp_path / "none").exists()


def test_only_a_ledger_of_scales_makes_a_patch(file: Path, ledger: Ledger, monkeypatch: Patch) -> None:
    model = models.load(str(file), device="cpu", base="mapped")
    weights = mezo.Method(K=64, lr=0.02, eps=0.01).empty(model, 5)
    with pytest.raises(UsageError, match="moves all weights"):
        patch_make.of_ledger(file, weights)
    monkeypatch.setattr(patch, "PASSES", 0)
    with pytest.raises(UsageError, match="more than a device computes"):
        patch_make.of_ledger(file, ledger)
    monkeypatch.undo()
    with pytest.raises(LedgerError, match="rebuilds other weights"):
        patch_make.of_ledger(file, ledger.with_check(1, "0" * 64))


def test_a_stop_or_a_result_that_is_not_the_stated_one_changes_nothing(
    file: Path, made: patch.Patch, tmp_path: Path
) -> None:
    before = file.read_bytes()
    for out in (None, tmp_path / "new.gguf"):
        with pytest.raises(Interrupted, match="nothing was changed"):
            patch.apply(file, made, out, Heard(counting("bytes written")))
        with pytest.raises(ModelError, match="the patched file would have"):
            patch.apply(file, dataclasses.replace(made, result="0" * 64), out)
    assert file.read_bytes() == before
    assert visible(file.parent) == ["m.gguf"]
    assert not (tmp_path / "new.gguf").exists()


def test_applying_needs_no_torch(file: Path, made: patch.Patch, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(made.file)
    code = (
        "import sys; from fleetune.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'torch was loaded'"
    )
    words = ["patch", "apply", str(file), str(tmp_path / "p")]
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_a_kill_at_any_instant_leaves_the_old_file_or_the_new(file: Path, made: Any, tmp_path: Path) -> None:
    old = file.read_bytes()
    (tmp_path / "p").write_bytes(made.file)
    patch.apply(file, made, tmp_path / "new.gguf")
    new = (tmp_path / "new.gguf").read_bytes()
    code = (
        "import sys; from pathlib import Path; from fleetune.deploy import patch\n"
        "file, own = Path(sys.argv[1]), patch.load(Path(sys.argv[2])); old = file.read_bytes()\n"
        "print('ready', flush=True)\n"
        "while True: patch.apply(file, own); file.with_name('.x').write_bytes(old); file.with_name('.x').replace(file)"
    )
    drawn, command = random.Random(4), [sys.executable, "-c", code, str(file)]
    for _ in range(4):
        child = subprocess.Popen([*command, str(tmp_path / "p")], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(drawn.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert file.read_bytes() in (old, new)
        file.write_bytes(old)
        file.with_name(".x").unlink(missing_ok=True)
    patch.apply(file, made)
    assert visible(file.parent) == ["m.gguf"], "what killed ones left is gone"


@pytest.mark.parametrize("method", ["fedkseed", "onebyte"])
def test_a_run_tunes_the_file_that_ships(method: str, file: Path, tmp_path: Path) -> None:
    """From the rows to the patched file: export, patch and replay give one file, which lost nothing."""
    settings = {
        "fedkseed": {"tau": 4, "K": 64, "backprop": 0.5, "backprop_lr": 0.05, "backprop_steps": 3},
        "onebyte": {"directions": 6, "batch_size": 4},
    }[method]
    rows = [{"prompt": f"say {w}", "response": f"{w} it is"} for w in "abcdefghijklmnopqrstuvwxyz"]
    few: Any = {"clients": 2, "rounds": 2, "samples": 0, "client_rows": 0, "held_out": 4}
    few |= {"train": "scales", "settings": {"lr": 0.05, "eps": 0.01, **settings}}
    run = fleetune.tune(str(file), rows, method=method, out=tmp_path / "runs", **few)
    assert run.done.digest != models.load(str(file), device="cpu").digest
    exported = fleetune.export(run, path=tmp_path / "new" / "tuned.gguf")
    out = exported.path
    assert exported.done.bytes == out.stat().st_size
    assert models.load(str(out), device="cpu").digest == run.done.digest
    made = patch_make.of_ledger(file, finished.ledger_of(Path(run.done.run)))
    assert made.result == sha256(out)
    assert len(made.file) < 20_000


def test_a_damaged_or_another_patch_is_named_as_such(file: Path, made: patch.Patch, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(made.file)
    rewritten(tmp_path / "p", format=2)
    with pytest.raises(VersionError, match="p was written by another version of Fleetune"):
        patch.load(tmp_path / "p")
    raw = bytearray(made.file)
    raw[-40] ^= 4
    (tmp_path / "q").write_bytes(raw)
    with pytest.raises(ModelError, match=r"is damaged|would have SHA-256"):
        patch.apply(file, patch.load(tmp_path / "q"))
    with pytest.raises(ModelError, match="there is no patch"):
        patch.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("not a patch")
    save_file({"x": np.ones(2)}, tmp_path / "other", {"patch": "{"})
    for name in ("text", "other"):
        with pytest.raises(ModelError, match=f"{name} is no patch, or is damaged"):
            patch.load(tmp_path / name)


def rewritten(path: Path, **changed: object) -> Path:
    """A patch with other metadata, or with an array replaced."""
    with safe_open(str(path), framework="numpy") as opened:
        head = json.loads(opened.metadata()["patch"])
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    arrays |= {name: value for name, value in changed.items() if isinstance(value, np.ndarray)}
    head |= {name: value for name, value in changed.items() if not isinstance(value, np.ndarray)}
    save_file(arrays, path, {"patch": json.dumps(head)})
    return path


@pytest.mark.parametrize(
    "what",
    [
        {"K": 1 << 40},
        {"places": [[64, "Q9", 1, 1, 0, 0]]},
        {"places": [[64, "Q4_0", 5, 1, 2, 0]]},
        {"places": [[64, "Q4_0", 64, 2, 0, 0], [65, "Q4_0", 64, 2, 0, 0]]},
        {"id": np.arange(3, dtype=np.uint64)},
        {"coefficient": np.ones(40)},
        {"run_key": "f" * 40},
        {"grid": float("nan")},
        {"K": "64"},
        {"result": "x" * 64},
        {"places": [[64, "Q4_0", 1 << 40, 1 << 40, 0, 0]]},
        {"law": "gaussian"},
        {"places": [[64, "Q4_0", 1, 1, 0, 1 << 80]]},
        {"places": [[64, "Q4_0", 1, 1, 0, -4096]]},
    ],
)
def test_a_patch_that_states_what_cannot_be_is_refused(what: dict, made: patch.Patch, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(made.file)
    with pytest.raises(ModelError):
        patch.load(rewritten(tmp_path / "p", **what))


@pytest.mark.parametrize(
    ("law", "K", "passes", "most", "said"),
    [
        ("rademacher", 1, 1, 1 << 14, "16,385 passes with K = 1; at most 16,384 passes and 4,194,304"),
        ("hashed", 1 << 20, 1 << 32, 4, "5 passes with K = 1,048,576; at most"),
    ],
)
def test_a_patch_that_asks_for_more_than_a_run_makes_is_refused_before_any_work(
    law, K, passes, most, said, made, tmp_path
):
    (tmp_path / "p").write_bytes(made.file)

    def asking(count: int) -> Path:
        ids = np.arange(count, dtype=np.uint64) * np.uint64(passes)
        return rewritten(tmp_path / "p", law=law, K=K, id=ids, coefficient=np.ones(count, np.int64))

    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=said):
            patch.load(asking(most + 1))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000, "the tables were made"
    finally:
        tracemalloc.stop()
    assert patch.load(asking(most)).entries.passes == most
