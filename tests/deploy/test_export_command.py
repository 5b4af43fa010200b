# SPDX-License-Identifier: Apache-2.0
"""tune -> compress -> export -> eval as a user types it; the last link reads the GGUF file back as a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_harness import QUICK, tiny

from fleetune import models
from fleetune.cli.main import main
from fleetune.models.artefact import Master


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "little"
    model = tiny("llama")
    models.save(model.net, model.tokenizer, path)
    return str(path)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, list[dict[str, Any]], str]:
    code = main([*args, "--json"])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines() if line.startswith("{")], err


METHODS = {
    "fedkseed": ["--method", "fedkseed", "--set", "tau=4", "--set", "K=16", "--set", "lr=1e-2"],
    "fedit": ["--method", "fedit", "--set", "r=2", "--set", "lr=1e-2"],
}


@pytest.mark.parametrize("method", METHODS)
def test_from_a_tuned_run_to_a_file_that_reads_back(
    method: str, llama: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, tuned, err = call(capsys, "tune", llama, "demo", *METHODS[method], *QUICK)
    assert code == 0, err
    code, done, err = call(capsys, "compress", "latest", "--windows", "4", "--length", "32")
    assert code == 0, err
    folder = Path(done[-1]["folder"])
    code, exported, err = call(capsys, "export", "latest")  # the newer of the two: the compressed one
    assert code == 0, err
    assert exported[-1]["to"] == "gguf"
    file = folder / f"{folder.name}.gguf"
    assert exported[-1]["path"] == str(file)
    assert exported[-1]["types"]["Q4_0"] == 14
    master, back = Master(folder / "model"), models.load(str(file))
    weights = dict(models.named_tensors(back.net))
    for name in master.head.grids:
        assert torch.equal(weights[name], master.weight(name))
    # on the held-out rows that it was not calibrated on, by the artefact and by the file
    code, seen, err = call(capsys, "eval", "2", "--tasks", "loss")
    assert code == 0, err
    assert seen[-1]["loss"] == pytest.approx(done[-1]["after"]["loss"], rel=1e-5)
    code, through, err = call(capsys, "eval", str(file), "demo", "--limit", "8", "--tasks", "loss")
    assert code == 0, err
    code, direct, err = call(capsys, "eval", str(folder / "model"), "demo", "--limit", "8", "--tasks", "loss")
    assert code == 0, err
    assert through[-1]["loss"] == pytest.approx(
        direct[-1]["loss"], rel=0.01
    )  # the embedding is Q8_0 in the file
    assert tuned[-1]["digest"]


def test_a_run_and_a_model_are_exported_as_they_are(
    llama: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "tune", llama, "demo", *METHODS["fedkseed"], *QUICK)[0] == 0
    code, exported, err = call(capsys, "export", "latest", "--to", "gguf:f32")
    assert code == 0, err
    assert exported[-1]["exact"] == exported[-1]["tensors"]
    code, plain, _ = call(capsys, "export", "latest")
    assert code == 0
    assert (plain[-1]["event"], plain[-1]["to"]) == ("export", "hf")
    assert plain[-1]["bytes"] == sum(file.stat().st_size for file in Path(plain[-1]["path"]).iterdir())
    assert exported[-1]["to"] == "gguf:f32"
    back = models.load(exported[-1]["path"])
    assert back.digest == plain[-1]["digest"]  # the tuned weights, byte for byte
    assert not list(at.glob("runs/*/.export-*"))
    code, model, err = call(capsys, "export", llama, "--to", "gguf:f32", "--path", "little.gguf")
    assert code == 0, err
    assert models.load("./little.gguf").digest == models.load(llama).digest
    assert model[-1]["types"] == {"F32": 20}
    code, refused, _ = call(capsys, "export", llama)  # its place when none is given is taken
    assert code == 2
    assert "little.gguf exists already" in refused[-1]["message"]
    Path("little.gguf").unlink()
    code, half, _ = call(capsys, "export", llama)  # fp16 unless the model is in bf16; norms stay fp32
    assert (code, half[-1]["path"], half[-1]["types"]) == (0, "little.gguf", {"F16": 15, "F32": 5})


def test_a_slip_in_the_target_or_the_place_loads_nothing(at: Path) -> None:
    """Before torch: the whole command takes less time than its import."""
    script = "import sys; from fleetune.cli.main import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    Path("there.gguf").touch()
    for args, said in (
        (["3", "--to", "nonsense"], "no target named 'nonsense'"),
        (["3", "--to", "gguf", "--path", "there.gguf"], "exists already"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, "export", *args], capture_output=True, text=True, check=True
        )
        assert done.stdout == "2 False\n"
        assert said in done.stderr
        assert "mlx" in done.stderr or "nonsense" not in args


BAD = {
    "an unknown target": (["export", "{model}", "--to", "gguf:q8"], "Did you mean"),
    "codes from a plain model": (["export", "{model}", "--to", "mlx"], "compress"),
    "an adapter of no run": (["export", "{model}", "--to", "gguf:lora"], "only a run has an adapter"),
    "no run": (["export", "latest"], "no run 'latest'"),
    "a folder named as a file": (["export", "{model}", "--to", "hf", "--path", "a.gguf"], "not named .gguf"),
    "a file named as a folder": (["export", "{model}", "--path", "folder"], "named .gguf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_error(
    case: str, llama: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, text = BAD[case]
    code = main([a.format(model=llama) for a in args])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert text in err
    assert err.startswith("error: ")
    assert out == ""
    assert list(at.iterdir()) == []
