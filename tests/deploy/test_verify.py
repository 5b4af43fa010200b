"""Whole models are proven from the base on; one flipped bit anywhere is found, and its place is named."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from verify_harness import ADAPTER, CODES, FILES, RUN, flipped, make, proven

import fleetune
from command_line import Capture, ok, refused
from fault_report import Injected
from fleetune import errors, models
from fleetune.common import sums
from fleetune.deploy import verify
from fleetune.deploy.again import difference, tensors_of
from fleetune.models import artefact
from fleetune.models.cache import cache
from fleetune.seeds import ledger as ledgers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder, before = tmp_path_factory.mktemp("verified"), Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        make(folder)
        yield folder
    os.chdir(before)


CODED = {"base", "weights", "compressed from", "other tensors", "codes"}
WHOLE = {
    "1": {"base", "weights", f"files of {RUN}"},
    f"runs/{RUN}/ledger.safetensors": {"base", "weights"},
    f"runs/{RUN}/hf": {"base", "weights", "hf"},
    f"runs/{RUN}/{RUN}-q8_0.gguf": {"base", "weights", f"{RUN}-q8_0.gguf"},
    f"runs/{RUN}/release": {"signature", "base", "weights", "files of release"},
    "2": {"base", f"files of {ADAPTER}", "files of adapter"},
    f"runs/{ADAPTER}/adapter": {"base", "files of adapter"},
    f"runs/{ADAPTER}/{ADAPTER}-lora.gguf": {"base", "weights", f"{ADAPTER}-lora.gguf"},
    f"runs/{ADAPTER}/release": {"signature", "base", "files of adapter"},
    "3": CODED,
    f"runs/{CODES}/model": CODED,
    f"runs/{CODES}/mlx/model.safetensors": CODED | {"mlx"},
    **{f"runs/{CODES}/{name}": CODED | {name} for name in FILES.values()},
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_whole_is_proven_from_the_base_on(name: str, made: Path) -> None:
    found = proven(name)
    assert found.keys() >= WHOLE[name]
    digest = models.load("tiny").digest
    assert found["base"].endswith(digest)
    if "weights" in found and ADAPTER not in name:
        weights = fleetune.open("1").load().merge().digest
        assert found["weights"].endswith(weights)
        assert weights != digest


SLOW = ("gptq", "compressed-tensors", "mlx", "release of an adapter", "gguf of the run")
PARTS = {  # what is flipped -> (name that is verified, files)
    "base": ("1", ["tiny/model.safetensors", "tiny/tokenizer.json"]),
    "ledger": ("1", [f"runs/{RUN}/ledger.safetensors"]),
    "ledger alone": ("alone.safetensors", ["alone.safetensors"]),
    "adapter": ("2", [f"runs/{ADAPTER}/adapter/*"]),
    "artefact": ("3", [f"runs/{CODES}/model/*"]),
    "gguf": (f"runs/{CODES}/{CODES}.gguf", [f"runs/{CODES}/{CODES}.gguf"]),
    "gguf of the run": (f"runs/{RUN}/{RUN}-q8_0.gguf", [f"runs/{RUN}/{RUN}-q8_0.gguf"]),
    "lora": (f"runs/{ADAPTER}/{ADAPTER}-lora.gguf", [f"runs/{ADAPTER}/{ADAPTER}-lora.gguf"]),
    **{to: (f"runs/{CODES}/{to}", [f"runs/{CODES}/{to}/*"]) for to in ("gptq", "compressed-tensors", "mlx")},
    "hf": (f"runs/{RUN}/hf", [f"runs/{RUN}/hf/*"]),
    "release": (f"runs/{RUN}/release", [f"runs/{RUN}/release/*"]),
    "release of an adapter": (f"runs/{ADAPTER}/release", [f"runs/{ADAPTER}/release/**/*"]),
}
RELEASED = "README.md"  # people write in it, unless it is signed
WRITTEN = ("gguf", "gguf of the run", "lora", "gptq", "compressed-tensors", "mlx", "hf")
QUICK = [part for part in PARTS if part not in SLOW]


@pytest.mark.parametrize(
    ("part", "places"),
    [pytest.param(p, 2, marks=pytest.mark.injects) for p in QUICK]
    + [pytest.param(p, 100, marks=pytest.mark.faults) for p in PARTS],
)
def test_one_flipped_bit_is_found_and_named(part: str, places: int, made: Path, injected: Injected) -> None:
    name, patterns = PARTS[part]
    if part == "ledger alone":
        shutil.copy(f"runs/{RUN}/ledger.safetensors", name)
    files = [p for pattern in patterns for p in sorted(Path().glob(pattern)) if p.is_file()]
    files = [p for p in files if p.name != RELEASED or "release" in part]
    rng, ends = np.random.default_rng(places), np.cumsum([p.stat().st_size for p in files])
    sources = ("tiny",) if part == "ledger alone" else ()
    for place in rng.integers(ends[-1], size=places).tolist():
        number = int(np.searchsorted(ends, place, side="right"))
        file, at = files[number], place - int(ends[number] - files[number].stat().st_size)
        with flipped(file, at, int(rng.integers(8))), pytest.raises(errors.FleetuneError) as caught:
            fleetune.verify(name, *sources, offline=True)
        known = {file.name, sums.FILE, "base digest", "tokenizer digest", "tiny"}
        assert any(word in caught.value.message for word in known), (str(file), at, caught.value.message)
        if part in WRITTEN and file.suffix:
            assert f"byte {at:,}, in" in caught.value.message
    injected("one bit of what a model was made from", places)


def test_a_difference_names_the_file_the_byte_and_the_tensor(made: Path, tmp_path: Path) -> None:
    file = Path(f"runs/{CODES}/{CODES}.gguf")
    other = tmp_path / file.name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    found = difference(other, file)
    assert found.equal == len(data) - 1
    assert found.words.startswith(f"{other} differs in byte {len(data) - 1:,}, in output_norm.weight")
    other.write_bytes(data[:-1])
    assert difference(other, file).equal == len(data) - 1
    other.write_bytes(file.read_bytes())
    assert difference(other, file) == (len(data), "")
    folder = tmp_path / "mlx"
    shutil.copytree(f"runs/{CODES}/mlx", folder)
    (folder / "README.md").write_text("mine")
    assert not difference(folder, Path(f"runs/{CODES}/mlx")).words
    for name in (".gitattributes", "more.py"):  # a hub's, and anybody's
        (folder / name).touch()
    assert difference(folder, Path(f"runs/{CODES}/mlx")).words.endswith("more.py is not of it")
    (folder / "more.py").unlink()
    (folder / "config.json").unlink()
    assert difference(folder, Path(f"runs/{CODES}/mlx")).words.endswith("config.json is missing")


def test_what_lies_elsewhere_is_named(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file finds its artefact by digest among the runs; a base that has moved is named."""
    shutil.copy(f"runs/{CODES}/{CODES}.gguf", tmp_path)
    shutil.copy(f"runs/{RUN}/{RUN}-q8_0.gguf", tmp_path / f"{RUN}-q8_0.gguf")
    file = str(tmp_path / f"{CODES}.gguf")
    assert "codes" in proven(file)
    with pytest.raises(errors.UsageError, match="does not say what it was made from"):
        proven(file, out=tmp_path)
    assert f"{RUN}-q8_0.gguf" in proven(str(tmp_path / f"{RUN}-q8_0.gguf"), "1")
    with pytest.raises(errors.ModelError, match=r"differs in byte [\d,]+, in its head"):
        proven(file, "1")  # the run's own file is another one
    shutil.copytree("runs", tmp_path / "runs", symlinks=True)
    shutil.copytree("tiny", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.ModelError):
        proven("1")
    for name in ("1", "2", "3", f"runs/{RUN}/hf", f"runs/{RUN}/release"):
        assert "moved has" in proven(name, "./moved")["base"] or "./moved" in proven(name, "./moved")["base"]


def test_a_file_of_another_name_is_told_by_its_head(made: Path, tmp_path: Path) -> None:
    """It was written under its usual name, as any target that it may be of."""
    plain = fleetune.export("tiny", to="gguf:f32", path=tmp_path / "mine.gguf").path
    assert proven(str(plain), "tiny")["mine.gguf"].startswith("written again as gguf:f32 from tiny")
    file = tmp_path / "renamed.gguf"
    shutil.copy(f"runs/{CODES}/{CODES}.gguf", file)
    assert "renamed.gguf" in proven(str(file), "3")
    usual = tmp_path / f"{CODES}.gguf"  # the usual name of another target
    fleetune.export("3", to="gguf:f32", path=usual)
    assert "as gguf:f32" in proven(str(usual), "3")[usual.name]
    other = tmp_path / "elsewhere"
    shutil.copytree(f"runs/{CODES}/gptq", other)
    assert "as gptq" in proven(str(other), "3")["elsewhere"]


def test_consistent_forgeries_end_at_what_they_stand_on(made, tmp_path, monkeypatch):
    """Lists and fingerprints are written anew, so only what is rebuilt tells."""
    shutil.copytree(made, tmp_path / "forged", symlinks=True)
    monkeypatch.chdir(tmp_path / "forged")
    file = Path(f"runs/{RUN}/ledger.safetensors")
    ledger = ledgers.load(file)
    replace(ledger, coefficients=-ledger.coefficients).save(file)
    (file.parent / sums.FILE).unlink()
    with pytest.raises(errors.ModelError, match=r"states .* of ledger\.safetensors"):
        proven("1")
    metrics = file.with_name("metrics.jsonl")
    metrics.write_text(metrics.read_text().replace("result_sha256", "sha256"))
    for name in ("1", str(file)):
        with pytest.raises(errors.LedgerError, match="states other weights than it rebuilds"):
            proven(name)
    for name in ("3", f"runs/{RUN}/hf", f"runs/{RUN}/{RUN}-q8_0.gguf"):
        with pytest.raises(errors.LedgerError, match="rebuilds other weights than it states"):
            proven(name)
    for to in ("hf", "gguf:f16"):
        with pytest.raises(errors.LedgerError, match="rebuilds other weights than it states"):
            fleetune.export("1", to=to, path=tmp_path / f"made{'.gguf' * (to != 'hf')}")
    ledger.save(file)
    model = Path(f"runs/{CODES}/model")
    with pytest.raises(errors.ModelError, match="was made from weights"):
        proven(str(model), "2")
    shutil.move(model, "alone")
    head = artefact.Master(Path("alone")).head
    (Path("alone") / sums.FILE).unlink()
    raw = (Path("alone") / "master.safetensors").read_bytes()
    other = raw.replace(head.base.encode(), models.load("tiny").digest.encode())
    (Path("alone") / "master.safetensors").write_bytes(other)
    with pytest.raises(errors.ModelError, match=r"lm_head|embed_tokens|norm"):
        proven("alone", "./tiny")  # it says so itself, but its other tensors are those of the run
    Path("runs", ADAPTER, sums.FILE).unlink()
    metrics = Path("runs", ADAPTER, "metrics.jsonl")
    metrics.write_text(re.sub('"digest": "[^"]*"', '"digest": "certified"', metrics.read_text()))
    assert "certified" not in str(proven(f"runs/{ADAPTER}/{ADAPTER}-lora.gguf"))
    metrics.write_text(metrics.read_text().replace('"rows_per_client": [', '"rows_per_client": ["x", '))
    with pytest.raises(errors.ModelError, match=r"metrics\.jsonl is damaged"):
        proven("2")


@pytest.mark.parametrize("part", ["codes", "scale", "zero"])
def test_an_artefact_without_a_list_is_what_its_source_gives(part: str, made: Path, tmp_path: Path) -> None:
    file = shutil.copytree(f"runs/{CODES}/model", tmp_path / "alone") / artefact.MASTER
    file.with_name(sums.FILE).unlink()
    config, name = file.with_name("config.json"), "model.norm.weight"
    config.write_text(config.read_text().replace('"transformers_version": "', '"transformers_version": "9'))
    assert proven(str(file), "1").keys() >= {"configuration", "codes"}
    at = next(start for name, start, _ in tensors_of(file) if name.endswith(f".{part}"))
    with flipped(file, at, 0):
        found = proven(str(file), "1")
    assert "other tensors" in found
    assert "codes" not in found
    whole, base, head = load_file(file), load_file("tiny/model.safetensors"), safe_open(file, "pt").metadata()
    cut = {n: tensor for n, tensor in whole.items() if n != name}
    for tensors, words in (
        (whole | {name: base[name]}, ", which holds no codes, is not that"),
        (cut, " is in"),
    ):
        save_file(tensors, file, head)
        with pytest.raises(errors.ModelError, match=name + words):
            proven(str(file), "1")
    config.write_text(config.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 7'))
    save_file(whole, file, head)
    with pytest.raises(errors.ModelError, match=r"config\.json differs in byte"):
        proven(str(file), "1")


@pytest.mark.parametrize("folder", [f"runs/{CODES}/model", f"runs/{RUN}/hf", f"runs/{ADAPTER}/adapter"])
def test_a_file_that_nobody_wrote_is_named(folder: str, made: Path, tmp_path: Path) -> None:
    subject = folder.removesuffix("/model").removesuffix("/adapter")
    odd, readme = Path(folder, "chat_template.jinja.evil"), Path(folder, "README.md")
    odd.touch()
    with pytest.raises(errors.ModelError, match=odd.name):
        proven(subject)
    odd.unlink()
    kept = readme.rename(tmp_path / "kept") if readme.exists() else None
    (readme / "x").mkdir(parents=True)
    (readme / "x" / "evil.py").touch()
    with pytest.raises(errors.ModelError, match=r"README\.md"):
        proven(subject)
    shutil.rmtree(readme)
    if kept is not None:
        shutil.move(kept, readme)


def test_a_head_whose_length_is_wrong_differs_in_its_bytes(made: Path) -> None:
    file = Path(f"runs/{RUN}/hf/model.safetensors")
    for at, bit in ((4, 3), (6, 6), (7, 7)):
        wrong = pytest.raises(errors.ModelError, match=rf"differs in byte {at}, in its head")
        with flipped(file, at, bit), wrong:
            proven(f"runs/{RUN}/hf")


def test_two_readers_in_one_order_have_a_tensor_made_once() -> None:
    """One that falls far behind, or goes another way, has it made again; nothing is held that both have read."""
    counts: Counter[int] = Counter()

    def make(at: int) -> torch.Tensor:
        counts[at] += 1
        return torch.tensor(at)

    moved = verify.made_once({at: partial(make, at) for at in range(10)})
    for step in range(5):
        assert [int(moved[step]()), int(moved[step]())] == [step, step]
    assert set(counts.values()) == {1}
    assert [int(moved[at]()) for at in (5, 6, 7, 8, 7, 8, 9, 5)] == [5, 6, 7, 8, 7, 8, 9, 5]
    assert counts == {**dict.fromkeys(range(10), 1), 5: 2}


def test_a_ledger_without_a_digest_has_nothing_to_verify(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "double.safetensors"
    ledger = ledgers.load(f"runs/{RUN}/ledger.safetensors")
    ledger.scale(2).save(file)
    with pytest.raises(errors.LedgerError, match="states no digest"):
        proven(str(file), "tiny")
    replace(ledger, head=replace(ledger.head, checks={"0": (base := ledger.head.base)})).save(file)
    assert proven(str(file), "tiny")["weights"].endswith(
        f"0 entries; 1 of 1 stated digests found again: {base}"
    )
    with pytest.raises(errors.UsageError, match="which base model"):
        proven(str(file))


def test_the_commands(made: Path, capsys: Capture) -> None:
    events = ok(capsys, "verify", "3", "--offline")
    assert (events[-1]["event"], events[-1]["declared"]) == ("verified", 2)
    assert events[-1]["proven"] == sum(e.get("state") == "proven" for e in events) == 8
    with flipped(Path("tiny/model.safetensors"), -1, 0):
        assert "base digest" in refused(capsys, "verify", "1", "--offline", code=1)
    assert "--from" in refused(capsys, "verify", "tiny", "--offline")


def test_a_model_in_the_cache_is_compared_with_its_list(made: Path, own_cache: None) -> None:
    target = cache.index_target(cache.SMOLLM2_135M)
    shutil.copytree("tiny", target)
    cache._write_source(target, "index", sha256={})
    (target / "fleetune_loaded.json").touch()  # added later
    found = {link.what: link.words for link in fleetune.verify("smollm2-135m", offline=True)}
    assert f"files of {target.name}" in found
    assert found["other files"].endswith("fleetune_loaded.json first")
    for words, name, at in (
        (["smollm2-135m"], "config.json", 20),
        (["1", "smollm2-135m"], "model.safetensors", -1),
    ):
        wrong = pytest.raises(errors.ModelError, match=rf"{name} is not what")
        with flipped(target / name, at, 0), wrong:
            proven(*words)
