# SPDX-License-Identifier: Apache-2.0
"""The GGUF file in which a compressed model is tuned: it is the exported one, written once, and nothing else is taken for it."""

from __future__ import annotations

import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
from deploy_harness import BLOCKS, LAYER, LLAMA3, compressed, gguf_of, on_grid, tiny, tokenizer
from family_harness import save
from test_super_blocks import in_super_blocks
from transformers import AutoConfig, AutoModelForCausalLM

import fleetune
from fleetune import models, subject
from fleetune.cli.main import main
from fleetune.common import ggml
from fleetune.compression.layerwise.grids import Grid
from fleetune.compression.layerwise.groups import rounded
from fleetune.deploy import tunable_file
from fleetune.errors import StorageError, UsageError
from fleetune.models import artefact
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
    place = tunable_file.of(found, told.append)
    assert place == tmp_path / "codes" / "codes.gguf"
    assert place.read_bytes() == exported(found, tmp_path).read_bytes()
    before = place.stat()
    assert tunable_file.of(found, told.append) == place
    assert place.stat().st_mtime_ns == before.st_mtime_ns
    assert place.stat().st_ino == before.st_ino
    assert [f"{place}, now written (" in told[0], f"{place}, which is there already" in told[1]] == [
        True,
        True,
    ]
    assert "rounded to Q8_0" in told[0]
    assert len(told) == 2
    place.unlink()
    assert fleetune.export(found, to="gguf").path.read_bytes() == exported(found, tmp_path / "2").read_bytes()
    assert tunable_file.of(found, told.append) == place, "what export wrote before is taken"
    assert "there already" in told[2]


def test_a_family_with_tensors_that_are_no_parameters_of_the_model(tmp_path: Path) -> None:
    """Rescaled frequencies of Llama 3 are a tensor of the file, which comes before all others."""
    compressed(tiny(rope_parameters=LLAMA3), tmp_path / "codes")
    found, told = subject.open(tmp_path / "codes"), list[str]()
    assert isinstance(found, subject.Compressed)
    place = tunable_file.of(found, told.append)
    assert tunable_file.of(found, told.append) == place
    assert "there already" in told[1]


def test_codes_of_3_bits_are_tuned_in_blocks_of_4(tmp_path: Path) -> None:
    found = codes(tmp_path / "codes", bits=3)
    place = tunable_file.of(found, lambda _: None)
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(place).tensors if t.name.startswith("blk.")}
    assert kinds == {"F32", "Q4_0"}


def _changed(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "other",
    [
        lambda raw: _changed(raw, len(raw) - 40),  # a code or a scale, as a patch leaves it
        lambda raw: _changed(raw, raw.index(b"fleetune.settings") + 40),
        lambda raw: raw[:-32],
        lambda raw: raw + bytes(32),
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
    ],
    ids=["a scale", "the header", "shorter", "longer", "half", "empty"],
)
def test_another_file_in_its_place_is_refused_and_stays(other: Any, tmp_path: Path) -> None:
    found = codes(tmp_path / "my codes")
    place = tunable_file.of(found, lambda _: None)
    changed = other(place.read_bytes())
    place.write_bytes(changed)
    with pytest.raises(UsageError, match="is not what fleetune export --to gguf writes of") as refused:
        tunable_file.of(found, lambda _: None)
    assert f"move '{place}' away" in str(refused.value.hint)
    assert place.read_bytes() == changed


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    found = codes(tmp_path / "codes")
    (tmp_path / "codes" / "codes.gguf").mkdir()
    with pytest.raises(UsageError, match="is not what fleetune export"):
        tunable_file.of(found, lambda _: None)


def test_the_file_of_another_model_is_refused(tmp_path: Path) -> None:
    found = codes(tmp_path / "codes")
    other = gguf_of(tmp_path, "Q4_0", tiny(seed=4))
    other.rename(tmp_path / "codes" / "codes.gguf")
    with pytest.raises(UsageError, match="is not what fleetune export"):
        tunable_file.of(found, lambda _: None)


# What cannot be tuned -------------------------------------------------------------------------------


def compression(folder: Path, model: Path, method: str = "rtn", **settings: Any) -> subject.Compressed:
    done = fleetune.compress(
        str(model),
        method=method,
        settings=settings,
        text=_text(folder),
        windows=2,
        length=32,
        out=folder / "runs",
        listener=Silent(),
    )
    found = subject.open(done)
    assert isinstance(found, subject.Compressed)
    return found


def _text(folder: Path) -> str:
    file = folder / "text.txt"
    file.write_text("to be or not to be, that is the question. " * 40)
    return str(file)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A tiny model as a directory."""
    model = tiny(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    models.save(model.net, model.tokenizer, tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("rtn", {"bits": 8, "grid": "asymmetric"}, "does not go into GGUF blocks without loss"),
        ("rtn", {"grid": "q3_k"}, "are Q3_K in a GGUF file"),
        ("rtn", {"grid": "q4_k"}, "are Q4_K in a GGUF file"),
        ("rtn", {"group": 8}, "groups of 8"),
        ("sparsegpt", {"sparsity": 0.5}, "are F16 in a GGUF file"),
    ],
)
def test_codes_whose_file_could_not_be_tuned_are_refused_before_it_is_written(
    method: str, settings: dict[str, Any], words: str, plain: Path, tmp_path: Path
) -> None:
    found = compression(tmp_path, plain, method, **settings)
    with pytest.raises(UsageError, match=words) as refused:
        tunable_file.of(found, lambda _: None)
    assert "--train scales is for blocks of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL" in refused.value.message
    assert sorted(p.name for p in found.home.iterdir() if p.suffix == ".gguf" or p.name.startswith(".")) == []
    _, _, command = str(refused.value.hint).partition("compress again: ")
    text = (
        "--text",
        _text(tmp_path),
        "--windows",
        "2",
        "--length",
        "32",
        "--out",
        str(tmp_path / "new"),
        "-qq",
    )
    assert main([*shlex.split(command)[1:], *text]) == 0
    again = subject.open("latest", tmp_path / "new")
    assert isinstance(again, subject.Compressed)
    assert tunable_file.of(again, lambda _: None).is_file(), "what the hint says is good"


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("phi", "models of architecture phi2"),
        ("mixtral", "mixtures of experts"),
        ("qwen3_moe", "mixtures of experts"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
def test_families_whose_files_are_not_read_are_refused_before_one_is_written(
    family: str, words: str, tmp_path: Path
) -> None:
    save(family, tmp_path / "m")
    found = compression(tmp_path, tmp_path / "m")
    with pytest.raises(UsageError, match=words) as refused:
        tunable_file.of(found, lambda _: None)
    assert not list(found.home.glob("*.gguf"))
    _, _, command = str(refused.value.hint).partition("weights: ")
    assert main([*shlex.split(command)[1:], "-qq"]) == 0
    assert (found.home / "hf" / "config.json").is_file()


@pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
def test_a_family_that_has_no_place_in_gguf_is_not_told_to_compress_again(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gptj", vocab_size=264, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64
    )
    models.save(AutoModelForCausalLM.from_config(config), tokenizer(), tmp_path / "m")
    found = compression(tmp_path, tmp_path / "m")
    with pytest.raises(UsageError, match="not written for a 'gptj'") as refused:
        tunable_file.of(found, lambda _: None)
    assert refused.value.hint == f"export it and tune all weights: fleetune export {found.argument} --to hf"


def test_of_a_file_of_several_types_those_that_can_be_are_tuned(tmp_path: Path) -> None:
    model, quantised = tiny(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64), {}
    for name, tensor in models.named_tensors(model.net):
        if name.split(".")[-2] in LAYER:
            wide = ".mlp." in name
            quantised[name] = rounded(tensor, Grid("q4_k", 4), 32) if wide else on_grid(tensor, 4, 32)
    head = artefact.ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest)
    artefact.write(tmp_path / "codes", model, quantised, head)
    found = subject.open(tmp_path / "codes")
    assert isinstance(found, subject.Compressed)
    scales = ggml.scales_in(tunable_file.kinds_of(found))
    assert scales == {name.removesuffix(".weight"): 1 for name in quantised if ".mlp." not in name}
    mapped = models.load(str(tunable_file.of(found, lambda _: None)), device="cpu", base="mapped")
    mapped.trains = "scales"
    moved = [name.removesuffix(".weight.scales") for name, _, _ in moved_tensors(mapped)]
    assert [name for name in moved if ".layers." in name] == sorted(scales)


def test_it_is_said_how_many_matrices_are_trained_and_which_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the header of a run, in a dry run and in a plan; of the file, and of the artefact that it is written of."""
    model, quantised = tiny(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64), {}
    for name, tensor in models.named_tensors(model.net):
        if (layer := name.split(".")[-2]) in LAYER:
            kind = {"down_proj": "q6_k", "up_proj": "q4_k"}.get(layer)
            bits = 6 if kind == "q6_k" else 4
            quantised[name] = (
                rounded(tensor, Grid(kind, bits), 16 if bits == 6 else 32) if kind else on_grid(tensor, 4, 32)
            )
    head = artefact.ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest)
    artefact.write(tmp_path / "codes", model, quantised, head)
    monkeypatch.chdir(tmp_path)
    share = "the scales of 10 of the layers' 14 matrices; those in Q4_K and Q6_K stay"
    few = [
        "--method=mezo",
        "--set=lr=0.01",
        "--set=tau=1",
        "--rounds=1",
        "--clients=1",
        "--limit=8",
        "--held-out=2",
        "--samples=0",
    ]
    assert main(["plan", "codes", "--train", "scales"]) == 0
    assert share in _one_line("".join(capsys.readouterr()))
    assert main(["tune", "codes", "demo", "--train=scales", *few, "--dry-run"]) == 0
    assert f"trains {share}" in _one_line("".join(capsys.readouterr()))
    (file,) = tmp_path.glob("codes/*.gguf")
    assert main(["plan", str(file), "--train", "scales"]) == 0
    assert share in _one_line("".join(capsys.readouterr()))
    assert main(["tune", str(file), "demo", "--train=scales", *few]) == 0
    told = _one_line("".join(capsys.readouterr()))
    assert f"trains {share}" in told
    assert "trains its scales" not in told


def test_only_layers_count() -> None:
    """An embedding or a head of another type says nothing of the layers."""
    layers = {"model.layers.0.mlp.up_proj": "Q8_0", "model.layers.1.mlp.up_proj": "IQ4_NL"}
    assert ggml.share(layers | {"model.embed_tokens": "Q6_K", "lm_head": "F16"}) == ""
    several = layers | {
        f"model.layers.{n}.mlp.up_proj": kind for n, kind in enumerate(("Q6_K", "F16", "Q2_K", "F16"), 2)
    }
    assert (
        ggml.share(several) == "the scales of 2 of the layers' 6 matrices; those in F16, Q2_K and Q6_K stay"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def test_an_artefact_of_other_blocks_names_the_command_without_a_model(tmp_path: Path) -> None:
    in_super_blocks(tmp_path / "codes", "q4_k")
    found = subject.open(tmp_path / "codes")
    assert isinstance(found, subject.Compressed)
    with pytest.raises(UsageError, match="Q4_K") as refused:
        tunable_file.of(found, lambda _: None)
    assert "fleetune compress MODEL --set grid=ggml" in str(refused.value.hint)


# Writing it -----------------------------------------------------------------------------------------


def test_a_killed_process_leaves_the_whole_file_or_none(tmp_path: Path) -> None:
    found = codes(tmp_path / "codes")
    whole = exported(found, tmp_path).read_bytes()
    place = found.home / "codes.gguf"
    code = (
        "import sys; from fleetune import subject; from fleetune.deploy import tunable_file\n"
        "found = subject.open(sys.argv[1]); place = tunable_file.of(found, lambda _: None); print(flush=True)\n"
        "while True: place.unlink(); tunable_file.of(found, lambda _: None)"
    )
    drawn, seen = random.Random(3), set[bool]()
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", code, str(found.home)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(drawn.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        seen.add(place.exists())
        if place.exists():
            assert place.read_bytes() == whole
    assert tunable_file.of(found, lambda _: None).read_bytes() == whole
    place.unlink()
    tunable_file.of(found, lambda _: None)
    assert [p.name for p in found.home.iterdir() if p.name.startswith(".")] == [], (
        "what killed ones left is gone"
    )


def test_a_file_that_another_process_writes_meanwhile_is_taken(tmp_path: Path) -> None:
    found, told, real = codes(tmp_path / "codes"), list[str](), tunable_file.gguf.write

    def slower(model: Any, path: Path, kind: str | None, made: Any) -> Any:
        report = real(model, path, kind, made)
        shutil.copy(path, found.home / path.name)
        return report

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(tunable_file.gguf, "write", slower)
        place = tunable_file.of(found, told.append)
    assert place.read_bytes() == exported(found, tmp_path).read_bytes()
    assert len(told) == 1
    assert "there already" in told[0]


def test_a_disk_that_takes_no_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = codes(tmp_path / "codes")

    def full(*_: Any) -> Any:
        raise StorageError("the disk is full")

    monkeypatch.setattr(tunable_file, "export", full)
    with pytest.raises(StorageError, match="the disk is full"):
        tunable_file.of(found, lambda _: None)
