"""A file that is not as it was written is refused by name where a result, an artefact or a cached model is used."""

import io
import json
import os
import shutil
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fleetune
from command_line import FEW
from fleetune import errors, models
from fleetune.cli.main import main
from fleetune.common import sums
from fleetune.compression.jobs import solve
from fleetune.deploy import serve
from fleetune.deploy.export import size_beside
from fleetune.models import loading
from fleetune.models.cache import cache
from fleetune.runs.listener import Silent
from fleetune.seeds import ledger as ledgers

ROWS = [{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(24)]
METHODS: dict[str, dict[str, Any]] = {
    "fedkseed": {"K": 16, "tau": 2, "lr": 1e-2, "batch_size": 2},
    "fedit": {"r": 2, "steps": 1, "batch_size": 2},
    "fedpetuning": {"module": "bitfit", "steps": 1, "batch_size": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a run of each kind, a compression of codes and one of plain weights."""
    folder = tmp_path_factory.mktemp("digests")
    with chdir(folder):
        models.tiny_llama().save(folder / "tiny")
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        for method, settings in METHODS.items():
            fleetune.tune("tiny", "rows.jsonl", method=method, settings=settings, **FEW)
        fleetune.compress("2", method="rtn", settings={"group": 8})
        half = {"recover": "none", "ratio": 0.5, "first": 0, "last": 0}
        fleetune.compress("tiny", method="llm-pruner", settings=half, data="rows.jsonl", length=64)
    return folder


@pytest.fixture
def at(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that, to be damaged, and an empty cache."""
    shutil.copytree(place, tmp_path / "at", symlinks=True)
    monkeypatch.chdir(tmp_path / "at")
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "at"


def flip(file: Path, place: float = 0.5, bit: int = 1) -> None:
    """Flip a bit in the byte that lies at so much of a file; its times stay what they were."""
    times, data = file.stat(), bytearray(file.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= bit
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def refused(use: Callable[[], object], *names: str) -> errors.FleetuneError:
    with pytest.raises(errors.FleetuneError) as caught:
        use()
    said = caught.value
    assert any(name in said.message for name in names), said.message
    assert said.hint
    return said


USES: dict[str, Callable[[str], object]] = {
    "eval": lambda name: fleetune.evaluate(name, "rows.jsonl", tasks=["loss"], limit=1, offline=True),
    "export": lambda name: fleetune.export(name, to="hf", path="out", offline=True),
    "load": lambda name: fleetune.open(name).load(offline=True),
    "serve": lambda name: serve._model_for(fleetune.open(name), Path("served"), Silent(), offline=True),
    "replay": lambda name: command("ledger", "replay", name),
}


def found(number: str) -> Path:
    return next(Path("runs").glob(f"{number.zfill(4)}-*"))


def command(*words: str) -> str:
    """What a command line writes; when it fails, what it says as the error that it was."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main([*words, "--offline"])
    if code:
        message, _, hint = err.getvalue().partition("\n  try:")
        error = errors.FleetuneError(message, hint=hint)
        error.exit_code = code
        raise error
    return out.getvalue() + err.getvalue()


FILES = [  # the number of a run or a compression, a file of it, a use that reads it, and what befell it
    ("1", "ledger.safetensors", "eval", "gone"),
    ("1", "ledger.safetensors", "replay", "flipped"),
    ("2", "adapter/adapter_model.safetensors", "export", "gone"),
    ("2", "adapter/adapter_config.json", "load", "flipped"),
    ("3", "adapter/module.safetensors", "eval", "flipped"),
    ("3", "adapter/SHA256SUMS", "serve", "gone"),
    ("4", "model/master.safetensors", "export", "flipped"),
    ("5", "model/model.safetensors", "load", "gone"),
    ("5", "model/tokenizer.json", "serve", "flipped"),
]


@pytest.mark.parametrize(("number", "file", "use", "damage"), FILES)
def test_a_damaged_file_of_a_result(number, file, use, damage, at):
    place = found(number) / file
    flip(place, 0.99 if file.endswith("safetensors") else 0.3) if damage == "flipped" else place.unlink()
    if damage == "gone" and place.name in ("ledger.safetensors", "model.safetensors"):
        refused(lambda: USES[use](number), found(number).name)  # there is no result then
    else:
        said = refused(lambda: USES[use](number), place.name, sums.FILE)
        assert "fleetune tune --resume" in said.hint or "fleetune compress" in said.hint
    assert not Path("out").exists()
    refused(lambda: command("verify", number), place.name, sums.FILE)


def test_a_ledger_that_was_changed_and_saved_again(at):
    """Its own fingerprint is right, so only the run's list tells."""
    file = found("1") / "ledger.safetensors"
    ledger = ledgers.load(file)
    replace(ledger, coefficients=ledger.coefficients * np.int32(1000)).save(file)
    assert "SHA256SUMS states" in refused(lambda: USES["replay"]("1"), "ledger.safetensors").message


@pytest.mark.parametrize("file", ["run.toml", "env.json", "metrics.jsonl", "eval.json"])
def test_verify_names_a_changed_file_of_a_run(file, at):
    assert "all as they were written" in command("verify", "2")
    flip(found("2") / file)
    assert f"{file} is not what was written" in refused(lambda: command("verify", "2"), file).message


def test_a_ledger_alone_is_compared_with_its_own_digest(at):
    """`replay` and `export` rebuild the weights anyway, so they compare what `verify` compares."""
    ledger = ledgers.load(found("1") / "ledger.safetensors")
    ledger.save(Path("good.safetensors"))
    stated = ledger.final_check()
    assert stated
    assert stated in command("ledger", "replay", "good.safetensors", "--model", "./tiny")
    assert "1 of 1 stated digests" in command("verify", "good.safetensors", "--from", "./tiny")
    replace(ledger, coefficients=-ledger.coefficients).save(Path("bad.safetensors"))
    ledger = partial(command, "ledger")
    for use in (
        partial(command, "verify", "bad.safetensors", "--from", "./tiny"),
        partial(ledger, "replay", "bad.safetensors", "--model", "./tiny"),
        partial(ledger, "export", "bad.safetensors", "--model", "./tiny", "--to", "new"),
    ):
        assert "states" in refused(use, "the ledger", "bad.safetensors").message
    assert not Path("new").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_model_in_the_cache_is_compared_by_pull_and_export(file, at):
    target = cache.index_target(cache.SMOLLM2_135M)
    shutil.copytree("tiny", target)
    cache._write_source(target, "index", sha256={})
    assert loading.pull("smollm2-135m", offline=True) == target
    flip(target / file)
    for use in (
        lambda: loading.pull("smollm2-135m", offline=True),
        lambda: USES["export"]("smollm2-135m"),
        lambda: command("verify", "smollm2-135m"),
    ):
        refused(use, file)
    assert f"rm -r {target}" in refused(lambda: USES["export"]("smollm2-135m"), file).hint


def test_another_model_in_the_place_of_the_compressed_base(at):
    base = solve.compressed_base(Silent(), found("4"), size_beside, offline=True)
    assert solve.compressed_base(Silent(), found("4"), size_beside, offline=True) == base
    shutil.rmtree(base)
    shutil.copytree(found("4") / "model", base)
    refused(lambda: solve.compressed_base(Silent(), found("4"), size_beside, offline=True), str(base))
