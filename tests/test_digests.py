# SPDX-License-Identifier: Apache-2.0
"""One flipped bit in any file of a result, an artefact or a cached model is refused by name by whoever uses it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fleetune
from fleetune import adapters, errors, models
from fleetune.cli.main import main
from fleetune.common import sums
from fleetune.compression.jobs import compressed_base
from fleetune.deploy.serving import session
from fleetune.models import cache, loading, stated
from fleetune.runs import rundir, sealed
from fleetune.runs.listener import Silent
from fleetune.seeds import ledger as ledgers
from fleetune.tuning import finished

ROWS = [{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(24)]
FEW: dict[str, Any] = {
    "clients": 2, "rounds": 1, "held_out": 4, "eval_rows": 4, "samples": 0, "threads": 1, "device": "cpu",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "fedkseed": {"K": 16, "tau": 2, "lr": 1e-2, "batch_size": 2},
    "fedit": {"r": 2, "steps": 1, "batch_size": 2},
    "fedpetuning": {"module": "bitfit", "steps": 1, "batch_size": 2},
}
CACHED = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "fleetune_source.json",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model, a run of each kind, a compression of codes and one of plain weights."""
    folder = tmp_path_factory.mktemp("digests")
    before = Path.cwd()
    os.chdir(folder)
    try:
        tiny = models.tiny_llama()
        models.save(tiny.net, tiny.tokenizer, folder / "tiny")
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        for method, settings in METHODS.items():
            fleetune.tune("tiny", "rows.jsonl", method=method, settings=settings, **FEW)
        fleetune.compress("2", method="rtn", settings={"group": 8})
        fleetune.compress(
            "tiny",
            method="llm-pruner",
            settings={"recover": "none", "mode": "depth", "ratio": 0.5, "first": 0, "last": 0},
            data="rows.jsonl",
            length=64,
        )
        yield folder
    finally:
        os.chdir(before)


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


# Runs -------------------------------------------------------------------------------------------------

Use = Callable[[str], object]
OF_ANY_RUN: dict[str, Use] = {
    "eval": lambda run: fleetune.evaluate(run, tasks=["loss"], offline=True),
    "export": lambda run: fleetune.export(run, to="hf", path="out", offline=True),
    "compress": lambda run: fleetune.compress(run, method="rtn", settings={"group": 8}, offline=True),
    "measure": lambda run: fleetune.measure(run, repeats=1, offline=True),
    "teacher": lambda run: fleetune.compress(
        "tiny", method="gkd", settings={"teacher": run}, data="rows.jsonl"
    ),
    "load": lambda run: finished.load(f"runs/{found(run).name}", offline=True),
    "open": lambda run: fleetune.open(run).load(offline=True),
    "serve": lambda run: session._plain(fleetune.open(run), Path("out"), offline=True),
}
OF_ADAPTERS: dict[str, Use] = {
    "adapter": lambda run: fleetune.resume_run(run).adapter(),
    "load alone": lambda run: adapters.load(models.load("tiny", device="cpu"), found(run) / "adapter"),
}
LEDGER_ACTIONS = {
    "show": (), "verify": (), "replay": (), "compact": ("--to", "new"), "scale": ("--to", "new", "--factor", "2"),
    "export": ("--to", "new"),
}  # fmt: skip
OF_LEDGERS: dict[str, Use] = {
    action: partial(lambda action, run: command("ledger", action, run, *LEDGER_ACTIONS[action]), action)
    for action in LEDGER_ACTIONS
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


ADAPTER_FILES = {
    "2": ["adapter_model.safetensors", "adapter_config.json", sums.FILE],
    "3": ["module.safetensors", "module.json", sums.FILE],
}


@pytest.mark.parametrize("number", ADAPTER_FILES)
def test_the_files_of_an_adapter_are_these(number: str, at: Path) -> None:
    files = {p.name for p in (found(number) / "adapter").iterdir()}
    assert files == {*ADAPTER_FILES[number], "README.md"}


@pytest.mark.parametrize("use", [*OF_ANY_RUN, "peft", "load alone"])
@pytest.mark.parametrize(("number", "file"), [(n, f) for n, files in ADAPTER_FILES.items() for f in files])
def test_a_flipped_bit_in_an_adapter(number: str, file: str, use: str, at: Path) -> None:
    uses = OF_ANY_RUN | OF_ADAPTERS | {"peft": lambda run: fleetune.export(run, to="peft", path="out")}
    flip(found(number) / "adapter" / file, 0.99 if file.endswith("safetensors") else 0.3)
    others = ADAPTER_FILES[number] if file == sums.FILE else [file]
    said = refused(lambda: uses[use](number), *others)
    assert "is not what was written: its SHA-256 is" in said.message or sums.FILE in said.message
    assert "fleetune tune --resume" in (said.hint or "")
    assert not Path("out").exists()


@pytest.mark.parametrize("use", [*OF_ANY_RUN, *OF_LEDGERS])
@pytest.mark.parametrize("place_of", [0.4, 0.94])
def test_a_flipped_bit_in_a_ledger(place_of: float, use: str, at: Path) -> None:
    flip(found("1") / "ledger.safetensors", place_of)
    said = refused(lambda: (OF_ANY_RUN | OF_LEDGERS)[use]("1"), "ledger.safetensors")
    assert "fleetune tune --resume" in (said.hint or "")
    assert not Path("out").exists()
    assert not Path("new").exists()


@pytest.mark.parametrize("use", [*OF_ANY_RUN, *OF_LEDGERS])
def test_a_ledger_that_was_changed_and_saved_again(use: str, at: Path) -> None:
    """Its own fingerprint is right, so only the run tells."""
    file = found("1") / "ledger.safetensors"
    ledger = ledgers.load(file)
    replace(ledger, coefficients=ledger.coefficients * np.int32(1000)).save(file)
    said = refused(lambda: (OF_ANY_RUN | OF_LEDGERS)[use]("1"), "ledger.safetensors")
    assert "the run states" in said.message


def test_a_ledger_alone_is_compared_with_its_own_digest(at: Path) -> None:
    """`replay` and `export` rebuild the weights anyway, so they compare what `verify` compares."""
    ledger = ledgers.load(found("1") / "ledger.safetensors")
    ledger.save(Path("good.safetensors"))
    stated = ledger.final_check()
    assert stated
    assert stated in command("ledger", "replay", "good.safetensors", "--model", "./tiny")
    assert "1 of 1 stated digests" in command("ledger", "verify", "good.safetensors", "--model", "./tiny")
    replace(ledger, coefficients=-ledger.coefficients).save(Path("bad.safetensors"))
    for words in (("verify",), ("replay",), ("export", "--to", "new")):
        use = partial(command, "ledger", words[0], "bad.safetensors", "--model", "./tiny", *words[1:])
        assert "states" in refused(use, "the ledger", "bad.safetensors").message
    assert not Path("new").exists()


def test_nothing_is_verified_of_a_ledger_without_a_digest(at: Path) -> None:
    command("ledger", "scale", "1", "--factor", "2", "--to", "twice.safetensors")
    said = refused(
        lambda: command("ledger", "verify", "twice.safetensors", "--model", "./tiny"), "states no digest"
    )
    assert said.exit_code == 1
    assert "fleetune ledger replay twice.safetensors" in (said.hint or "")
    told = command("ledger", "replay", "twice.safetensors", "--model", "./tiny")
    assert "none to compare with" in told
    assert "verified" not in told


def test_rounds_after_the_last_digest_are_named(at: Path) -> None:
    ledger = ledgers.load(found("1") / "ledger.safetensors")
    more = ledger.append(np.array([1]), np.array([5]), 7)
    more.save(Path("more.safetensors"))
    told = command("ledger", "verify", "more.safetensors", "--model", "./tiny")
    assert "the last digest is stated after round 1: the rounds after it are not verified" in told


@pytest.mark.parametrize(
    ("number", "file"), [("1", "ledger.safetensors"), ("2", "adapter/adapter_model.safetensors")]
)
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_resume_writes_a_damaged_result_again(damage: str, number: str, file: str, at: Path) -> None:
    whole = fleetune.resume_run(number)
    before = (found(number) / file).read_bytes()
    if damage == "flipped":
        flip(found(number) / file, 0.99)
    else:
        shutil.rmtree(whole.path) if whole.path.is_dir() else whole.path.unlink()
    again = fleetune.resume_run(number)
    assert (found(number) / file).read_bytes() == before
    assert again.digest == whole.digest
    assert [e["event"] for e in rundir.events(found(number))].count("done") == 1
    fleetune.open(number).load(offline=True)


def test_a_tokenizer_of_another_base_is_refused(at: Path) -> None:
    template = Path("tiny/chat_template.jinja")
    template.write_text(template.read_text() + "!")
    for number in ("1", "2"):
        refused(lambda number=number: fleetune.open(number).load(offline=True), "tokenizer")


# Compressions -----------------------------------------------------------------------------------------

OF_COMPRESSIONS: dict[str, Use] = {
    "eval": lambda name: fleetune.evaluate(name, "rows.jsonl", tasks=["loss"], limit=2),
    "export": lambda name: fleetune.export(name, to="hf", path="out"),
    "measure": lambda name: fleetune.measure(name, data="rows.jsonl", limit=1, repeats=1),
    "load": lambda name: fleetune.open(name).load(offline=True),
    "serve": lambda name: session._plain(fleetune.open(name), Path("out"), offline=True),
    "compress": lambda name: fleetune.compress(name, method="rtn"),
}


def files_of(number: str) -> list[str]:
    return sorted(p.name for p in (found(number) / "model").iterdir() if p.name not in sums.LEFT_OUT)


@pytest.mark.parametrize("use", OF_COMPRESSIONS)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("number", "weights"), [("4", "master.safetensors"), ("5", "model.safetensors")])
def test_a_flipped_bit_in_any_file_of_a_compressed_model(
    number: str, weights: str, alone: bool, use: str, at: Path
) -> None:
    model = found(number) / "model"
    assert {weights, "config.json", "tokenizer.json"} <= set(files_of(number))
    places = {weights: (0.01, 0.3, 0.6, 0.9, 0.999) if use == "load" else (0.9,)}
    for file in [*files_of(number), sums.FILE] if use == "load" else [weights, "config.json"]:
        for share in places.get(file, (0.4,)):
            flip(model / file, share)
            others = [*files_of(number), sums.FILE] if file == sums.FILE else [file]
            said = refused(lambda: OF_COMPRESSIONS[use](str(model if alone else model.parent)), *others)
            assert "states" in said.message or sums.FILE in said.message
            flip(model / file, share)
    assert not Path("out").exists()
    if use in ("eval", "load", "export"):
        OF_COMPRESSIONS[use](str(model if alone else model.parent))


def test_another_artefact_in_the_folder_of_a_compression(at: Path) -> None:
    """It states its own digests, so only the record of the compression tells."""
    fleetune.compress("2", method="rtn", settings={"group": 8, "bits": 3})
    shutil.rmtree(found("4") / "model")
    shutil.copytree(found("6") / "model", found("4") / "model")
    said = refused(lambda: fleetune.open("4").load(), "master.safetensors")
    assert "compress.json states" in said.message
    assert "fleetune compress runs/0002-fedit-tiny --method rtn" in (said.hint or "")


OF_FINISHED = OF_COMPRESSIONS | {"resume": lambda name: fleetune.resume_compression(name)}
CODES, PLAIN = ("4", "master.safetensors"), ("5", "model.safetensors")
ADDED = {
    "special_tokens_map.json": '{"bos_token": "a"}', "chat_template.jinja": "x", "model-2.safetensors": "",
    "added_tokens.json": "{}", "vocab.json": "{}", "additional_chat_templates/tool.jinja": "x",
}  # fmt: skip


def spoil_config(model: Path) -> None:
    """Change how the model computes: only a digest tells."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


def lose_line(model: Path, name: str) -> None:
    lines = (model / sums.FILE).read_text().splitlines(keepends=True)
    (model / sums.FILE).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))


def unseal(number: str) -> None:
    """Make the record one of an earlier version."""
    file = found(number) / "compress.json"
    record = sealed.read(file, "")
    record.pop("base_sha256", None)
    record["result"].pop("result_sha256")
    file.write_text(sealed.to_text(record))


@pytest.mark.parametrize("use", OF_FINISHED)
@pytest.mark.parametrize("number", ["4", "5"])
def test_another_model_in_the_folder_of_a_compression(number: str, use: str, at: Path) -> None:
    """It is valid, and states nothing or only itself."""
    model = found(number) / "model"
    shutil.rmtree(model)
    shutil.copytree("tiny", model)
    for listed in (False, True):
        if listed:
            sums.write(model)
        said = refused(lambda: OF_FINISHED[use](number), sums.FILE)
        assert "compress.json states" in said.message
        assert "fleetune compress" in (said.hint or "")
    assert not Path("out").exists()


@pytest.mark.parametrize("use", OF_FINISHED)
@pytest.mark.parametrize("number", ["4", "5"])
def test_a_list_that_lost_a_line_or_is_gone(number: str, use: str, at: Path) -> None:
    model = found(number) / "model"
    names = [number, str(model)] if use != "resume" else [number]
    lose_line(model, "config.json")
    spoil_config(model)
    for name in names:
        assert (
            "is not named in SHA256SUMS" in refused(lambda n=name: OF_FINISHED[use](n), "config.json").message
        )
    (model / "config.json").unlink()
    for name in names:
        refused(lambda n=name: OF_FINISHED[use](n), sums.FILE, "config.json")
    (model / sums.FILE).unlink()
    shutil.copy("tiny/config.json", model)
    for name in names:
        assert "is missing" in refused(lambda n=name: OF_FINISHED[use](n), sums.FILE).message
    assert not Path("out").exists()


@pytest.mark.parametrize("use", ["eval", "export", "load", "resume"])
@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("number", ["4", "5"])
def test_a_file_that_is_added_to_a_compressed_model(number: str, name: str, use: str, at: Path) -> None:
    file = found(number) / "model" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(ADDED[name])
    refused(lambda: OF_FINISHED[use](number), str(file))
    assert not Path("out").exists()


def test_an_artefact_that_lies_elsewhere_has_a_complete_list(at: Path) -> None:
    shutil.copytree(found("4") / "model", "codes")
    fleetune.open("codes").load()
    lose_line(Path("codes"), "config.json")
    refused(lambda: fleetune.open("codes").load(), "codes/config.json")


def test_files_that_loading_does_not_read_may_lie_there(at: Path) -> None:
    for number in ("4", "5"):
        for name in ("README.md", ".DS_Store", "notes.txt", "results.json", "._config.json"):
            (found(number) / "model" / name).write_text("mine")
        for use in ("load", "resume"):
            OF_FINISHED[use](number)


def test_a_list_of_its_owner_need_not_be_complete(at: Path) -> None:
    """A published model may have one of its weights alone."""
    weights = Path("tiny/model.safetensors")
    Path("tiny", sums.FILE).write_text(f"{sums.sha256(weights)}  {weights.name}\n")
    fleetune.open("tiny").load()


def test_a_record_of_an_earlier_version_states_no_digest_of_the_list(at: Path) -> None:
    for number in ("4", "5"):
        unseal(number)
        model = found(number) / "model"
        (model / "special_tokens_map.json").write_text("{}")
        for use in ("load", "resume"):
            OF_FINISHED[use](number)
        flip(model / "config.json")
        refused(lambda n=number: fleetune.open(n).load(), "config.json")


def test_resume_makes_a_result_that_was_removed_again(at: Path) -> None:
    before = sums.sealed(found("5") / "model", "")
    shutil.rmtree(found("5") / "model")
    again = fleetune.resume_compression("5")
    assert again.done.result_sha256 == sums.sealed(found("5") / "model", "") == before


def kept_gain() -> object:
    return fleetune.measure("4", kept_gain=True, repeats=1, limit=1)


@pytest.mark.parametrize("old", [False, True])
def test_another_model_in_the_place_of_the_compressed_base(old: bool, at: Path) -> None:
    base = compressed_base.base_of(Silent(), found("4"), offline=True)
    assert compressed_base.base_of(Silent(), found("4"), offline=True) == base
    if old:
        unseal("4")
        assert compressed_base.base_of(Silent(), found("4"), offline=True) == base
    shutil.rmtree(base)
    shutil.copytree(found("4") / "model", base)
    said = refused(kept_gain, str(base))
    assert ("it was made of weights with" if old else "compress.json states") in said.message
    assert said.hint == f"rm -r {base.parent}   and then: fleetune measure {found('4')} --kept-gain"
    shutil.rmtree(base.parent)
    assert compressed_base.base_of(Silent(), found("4"), offline=True) == base
    (base / sums.FILE).unlink()
    spoil_config(base)
    if not old:
        refused(kept_gain, str(base / sums.FILE))


# The cache --------------------------------------------------------------------------------------------


@pytest.fixture
def cached(at: Path) -> Path:
    """The folder of a built-in model in the cache, which holds a tiny one."""
    target = cache.index_target(cache.SMOLLM2_135M)
    shutil.copytree("tiny", target)
    cache._write_source(target, "index", sha256={})
    return target


def restate(cached: Path, **more: Any) -> None:
    """Make the record one of an earlier version, which states no digest of the list."""
    source = json.loads((cached / cache.SOURCE_FILE).read_text())
    del source["sums_sha256"]
    (cached / cache.SOURCE_FILE).write_text(json.dumps(source | more))


OF_CACHED: dict[str, Callable[[], object]] = {
    "load": lambda: models.load("smollm2-135m", device="cpu"),
    "eval": lambda: fleetune.evaluate("smollm2-135m", "rows.jsonl", tasks=["loss"], limit=1),
    "export": lambda: fleetune.export("smollm2-135m", to="hf", path="out"),
    "compress": lambda: fleetune.compress("smollm2-135m", method="rtn"),
    "measure": lambda: fleetune.measure("smollm2-135m", data="rows.jsonl", limit=1, repeats=1),
    "serve": lambda: session._plain(fleetune.open("smollm2-135m"), Path("out"), offline=True),
    "tune": lambda: fleetune.tune("smollm2-135m", "rows.jsonl", **FEW),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("use", OF_CACHED)
def test_a_flipped_bit_in_any_file_of_the_cache(use: str, loaded: bool, cached: Path) -> None:
    """Also in one whose times stay what they were, and after earlier loads have found all in order."""
    if loaded:
        models.load("smollm2-135m", device="cpu")
    assert set(CACHED) < {p.name for p in cached.iterdir()}
    files = [p.name for p in cached.iterdir() if p.name != stated.LOADED]
    for file in files if use == "load" else CACHED[:2]:
        flip(cached / file, 0.4)
        others = [*CACHED, sums.FILE, "chat_template", "generation_config"] if file == sums.FILE else [file]
        said = refused(OF_CACHED[use], *others)
        assert f"rm -r {cached}" in (said.hint or "")
        flip(cached / file, 0.4)
    assert not Path("out").exists()
    models.load("smollm2-135m", device="cpu")


def test_the_weights_in_the_cache_are_read_once_more_only_when_something_is_new(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    own = sums._sha256.__wrapped__

    def counted(path: Path, *state: int) -> str:
        read.append(path.name)
        return own(path, *state)

    def load(dtype: str = "fp32") -> int:
        read.clear()
        models.load("smollm2-135m", dtype=dtype, device="cpu")
        return read.count("model.safetensors")

    sums._sha256.cache_clear()
    monkeypatch.setattr(sums, "_sha256", counted)  # as a process of its own would: nothing is remembered
    assert load() == 2  # before and after; in one process the second is remembered
    assert [load(), load()] == [0, 0]
    assert load("bf16") == 1
    assert [load("bf16"), load()] == [0, 0]
    assert len(json.loads((cached / stated.LOADED).read_text())) == 2
    (cached / stated.LOADED).write_text("{")
    assert load() == 2
    assert load() == 0


def test_in_one_process_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    sums._sha256.cache_clear()
    first = [sums.sha256(file), sums.sha256(file)]
    assert sums._sha256.cache_info().misses == 1
    flip(file)
    assert sums.sha256(file) != first[0] == first[1]


def test_an_old_folder_of_the_cache_is_taken_and_its_digests_are_written_down(cached: Path) -> None:
    (cached / sums.FILE).unlink()
    restate(cached)
    models.load("smollm2-135m", device="cpu")
    assert sums.stated(cached, remedy="").keys() >= set(CACHED)
    flip(cached / "model.safetensors", 0.9)
    refused(OF_CACHED["load"], "model.safetensors")


def test_an_old_folder_is_compared_with_what_its_source_states(cached: Path) -> None:
    (cached / sums.FILE).unlink()
    restate(cached, sha256={"model.safetensors": sums.sha256(cached / "model.safetensors")})
    flip(cached / "model.safetensors", 0.9)
    assert cache.SOURCE_FILE in refused(OF_CACHED["load"], "model.safetensors").message
    assert not (cached / sums.FILE).exists()


def test_a_cache_that_cannot_be_written_to_is_compared_each_time(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **more: object) -> None:
        raise errors.StorageError("the disk is full")

    monkeypatch.setattr(stated, "write_atomic", full)
    models.load("smollm2-135m", device="cpu")
    assert not (cached / stated.LOADED).exists()
    flip(cached / "model.safetensors", 0.9)
    refused(OF_CACHED["load"], "model.safetensors")


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("use", OF_CACHED)
def test_the_list_of_a_cached_model_is_complete_and_sealed(use: str, loaded: bool, cached: Path) -> None:
    if loaded:
        models.load("smollm2-135m", device="cpu")
    (cached / ".DS_Store").write_text("")
    whole, added = (cached / sums.FILE).read_text(), cached / "special_tokens_map.json"
    added.write_text(ADDED[added.name])
    assert f"rm -r {cached}" in (refused(OF_CACHED[use], str(added)).hint or "")
    added.unlink()
    spoil_config(cached)
    lose_line(cached, "config.json")
    refused(OF_CACHED[use], "config.json")
    (cached / sums.FILE).unlink()
    refused(OF_CACHED[use], sums.FILE)
    (cached / sums.FILE).write_text(whole)
    refused(OF_CACHED[use], "config.json")
    sums.write(cached)
    assert "fleetune_source.json states" in refused(OF_CACHED[use], sums.FILE).message
    lose_line(cached, "fleetune_source.json")
    refused(OF_CACHED[use], "fleetune_source.json")
    assert not Path("out").exists()


def test_a_cached_model_of_an_earlier_version_has_no_seal(cached: Path) -> None:
    restate(cached)
    sums.write(cached)
    (cached / "added_tokens.json").write_text("{}")
    models.load("smollm2-135m", device="cpu")
    flip(cached / "config.json")
    refused(OF_CACHED["load"], "config.json")


def test_pull_compares_a_copy_that_is_there(cached: Path) -> None:
    assert loading.pull("smollm2-135m", offline=True) == cached
    flip(cached / "config.json", 0.5)
    said = refused(lambda: loading.pull("smollm2-135m", offline=True), "config.json")
    assert said.hint == f"rm -r {cached}   and then: fleetune models pull smollm2-135m"


# SHA256SUMS -------------------------------------------------------------------------------------------


def test_the_list_is_that_of_sha256sum(tmp_path: Path) -> None:
    for name in ("b c", "a", "README.md"):
        (tmp_path / name).write_text(name)
    sums.write(tmp_path)
    assert (tmp_path / sums.FILE).read_text() == (
        "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb  a\n"
        "47d8a4a86c7433e263d0404a445daabd421cffeeb1d4a38315138a26c9453575  b c\n"
    )
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "more").write_text("mine")
    sums.check(tmp_path, remedy="")


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\xff", b"abc  a\n", b"0" * 64 + b"  ../a\n", b"0" * 64 + b"  a  "]
)
def test_a_damaged_list_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / sums.FILE).write_bytes(content)
    said = refused(lambda: sums.check(tmp_path, remedy="do it again"), sums.FILE)
    assert said.hint == "do it again"


def test_a_folder_that_states_nothing_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    sums.check(tmp_path, remedy="")
    assert sums.stated(tmp_path, remedy="") == {}


def test_the_templates_in_their_folder_are_listed(tmp_path: Path) -> None:
    (tmp_path / sums.TEMPLATES).mkdir()
    (tmp_path / sums.TEMPLATES / "tool.jinja").write_text("a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").write_text("a")
    sums.write(tmp_path)
    assert list(sums.stated(tmp_path, remedy="")) == [f"{sums.TEMPLATES}/tool.jinja"]
    sums.check(tmp_path, remedy="", read=["*.jinja"])
    flip(tmp_path / sums.TEMPLATES / "tool.jinja")
    refused(lambda: sums.check(tmp_path, remedy="do it again"), "tool.jinja")


def test_a_seal_leaves_out_the_line_of_its_record(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    sums.write(tmp_path)
    own = sums.sealed(tmp_path, "record.json")
    assert own == sums.sha256(tmp_path / sums.FILE)
    (tmp_path / "record.json").write_text(own)
    sums.write(tmp_path)
    sums.check(tmp_path, remedy="", seal=sums.Seal(own, "record.json"))
    assert sums.sealed(tmp_path, "a") != own
