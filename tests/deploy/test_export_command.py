"""tune -> compress -> export -> eval as a user types it; the last link reads the GGUF file back as a model."""

import os
import threading
from pathlib import Path

import pytest
import torch
from deploy_harness import QUICK, compressed, tiny

from command_line import Capture, ok
from command_line import call_json as call
from fleetune import models
from fleetune.cli.main import main
from fleetune.deploy.export import write as export
from fleetune.deploy.formats import gguf, hf
from fleetune.errors import ModelError, StorageError, UsageError
from fleetune.models.artefact import Master


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny("llama").save(tmp_path_factory.mktemp("models") / "little"))


METHODS = {
    "fedkseed": ["--method", "fedkseed", "--set", "tau=4", "--set", "K=16", "--set", "lr=1e-2"],
    "fedit": ["--method", "fedit", "--set", "r=2", "--set", "steps=2", "--set", "lr=1e-2"],
}


@pytest.mark.parametrize("method", METHODS)
def test_from_a_tuned_run_to_a_file_that_is_read(method: str, llama: str, at: Path, capsys: Capture) -> None:
    tuned = ok(capsys, "tune", llama, "demo", *METHODS[method], *QUICK)
    done = ok(capsys, "compress", "latest", "--windows", "4", "--length", "32", "--set", "grid=ggml")
    folder = Path(done[-1]["folder"])
    exported = ok(capsys, "export", "latest")  # the newer of the two: the compressed one
    assert exported[-1]["to"] == "gguf"
    file = folder / f"{folder.name}.gguf"
    assert exported[-1]["path"] == str(file)
    assert exported[-1]["types"]["Q4_0"] == 14
    master, back = Master(folder / "model"), models.load(str(file))
    weights = dict(models.named_tensors(back.net))
    for name in master.head.grids:
        assert torch.equal(weights[name], master.weight(name))
    # on the held-out rows that it was not calibrated on, by the artefact and by the file
    seen = ok(capsys, "eval", "2", "--tasks", "loss")
    assert seen[-1]["loss"] == pytest.approx(done[-1]["after"]["loss"], rel=1e-5)
    through = ok(capsys, "eval", str(file), "demo", "--limit", "8", "--tasks", "loss")
    direct = ok(capsys, "eval", str(folder / "model"), "demo", "--limit", "8", "--tasks", "loss")
    # the embedding is Q8_0 in the file
    assert through[-1]["loss"] == pytest.approx(direct[-1]["loss"], rel=0.01)
    assert tuned[-1]["digest"]


def test_a_run_and_a_model_are_exported_as_they_are(llama: str, at: Path, capsys: Capture) -> None:
    assert call(capsys, "tune", llama, "demo", *METHODS["fedkseed"], *QUICK)[0] == 0
    exported = ok(capsys, "export", "latest", "--to", "gguf:f32")
    assert exported[-1]["exact"] == exported[-1]["tensors"]
    plain = ok(capsys, "export", "latest")
    assert (plain[-1]["event"], plain[-1]["to"]) == ("export", "hf")
    assert plain[-1]["bytes"] == sum(file.stat().st_size for file in Path(plain[-1]["path"]).iterdir())
    assert exported[-1]["to"] == "gguf:f32"
    back = models.load(exported[-1]["path"])
    assert back.digest == plain[-1]["digest"]  # the tuned weights, byte for byte
    assert not list(at.glob("runs/*/.export-*"))
    model = ok(capsys, "export", llama, "--to", "gguf:f32", "--path", "little.gguf")
    assert models.load("./little.gguf").digest == models.load(llama).digest
    assert model[-1]["types"] == {"F32": 20}
    code, refused, _ = call(capsys, "export", llama)  # its place when none is given is taken
    assert code == 2
    assert "little.gguf exists already" in refused[-1]["message"]
    Path("little.gguf").unlink()
    code, half, _ = call(capsys, "export", llama)  # fp16 unless the model is in bf16; norms stay fp32
    assert (code, half[-1]["path"], half[-1]["types"]) == (0, "little.gguf", {"F16": 15, "F32": 5})


def test_a_file_that_answers_is_followed_by_chat(llama: str, at: Path, capsys: Capture) -> None:
    assert call(capsys, "tune", llama, "demo", *METHODS["fedit"], *QUICK)[0] == 0
    for to, path, then in (
        ("gguf", "a b.gguf", " next      fleetune chat 'a b.gguf'\n"),
        ("gguf:lora", "lora.gguf", ""),
        ("hf", "plain", ""),
    ):
        assert main(["export", "1", "--to", to, "--path", path]) == 0
        assert "".join(capsys.readouterr().out.partition(" next ")[1:]) == then, to


BAD = {
    "an unknown target": (["export", "{model}", "--to", "gguf:q8"], "Did you mean"),
    "codes from a plain model": (["export", "{model}", "--to", "mlx"], "compress"),
    "an adapter of no run": (["export", "{model}", "--to", "gguf:lora"], "only a run has an adapter"),
    "no run": (["export", "latest"], "no run 'latest'"),
    "a folder named as a file": (["export", "{model}", "--to", "hf", "--path", "a.gguf"], "not named .gguf"),
    "a file named as a folder": (["export", "{model}", "--path", "folder"], "named .gguf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_error(case: str, llama: str, at: Path, capsys: Capture) -> None:
    args, text = BAD[case]
    code = main([a.format(model=llama) for a in args])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert text in err
    assert err.startswith("error: ")
    assert out == ""
    assert list(at.iterdir()) == []


def test_encoders_are_refused(tmp_path: Path) -> None:
    models.tiny_bert().save(tmp_path / "m")
    with pytest.raises(UsageError, match="holds an encoder"):
        export(tmp_path / "m", "gguf", tmp_path / "x.gguf")


def test_damaged_weights_are_said(tmp_path: Path) -> None:
    tiny().save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match="is damaged"):
        export(tmp_path / "m", "gguf", tmp_path / "x.gguf")


@pytest.mark.parametrize(("to", "links"), [("gguf", True), ("gguf", False), ("hf", True)])
def test_of_two_exports_into_one_place_one_is_refused(to, links, tmp_path, monkeypatch):
    out, both = tmp_path / ("x" if to == "hf" else "x.gguf"), threading.Barrier(2, timeout=60)
    module = hf if to == "hf" else gguf
    write, done = module.write, dict[str, object]()

    def together(*args: object, **named: object) -> object:
        report = write(*args, **named)
        both.wait()
        return report

    def run(name: str) -> None:
        try:
            done[name] = export(tmp_path / name, to, out)
        except StorageError as error:
            done[name] = error

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for seed in range(2):
        compressed(tiny(seed=seed), tmp_path / f"m{seed}")
        export(tmp_path / f"m{seed}", to, tmp_path / f"alone{seed}" / out.name)
    monkeypatch.setattr(module, "write", together)
    threads = [threading.Thread(target=run, args=(f"m{seed}",)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lost,) = [name for name, found in done.items() if isinstance(found, StorageError)]
    assert str(out) in str(done[lost])
    won = tmp_path / f"alone{1 - int(lost[1])}" / out.name
    file = "model.safetensors" if to == "hf" else ""
    assert (out / file).read_bytes() == (won / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["alone0", "alone1", "m0", "m1", out.name])


def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed(tiny(), tmp_path / "m")
    write = gguf.write

    def slow(*args: object, **named: object) -> object:
        (tmp_path / "x.gguf").write_text("faster")
        return write(*args, **named)

    monkeypatch.setattr(gguf, "write", slow)
    with pytest.raises(StorageError, match="has appeared meanwhile"):
        export(tmp_path / "m", "gguf", tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_text() == "faster"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "x.gguf"]
