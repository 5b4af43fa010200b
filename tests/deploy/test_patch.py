# SPDX-License-Identifier: Apache-2.0
"""Patches of a GGUF file's scales: what they make, what they refuse, and what a kill leaves."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from patch_harness import ledger_on, load, visible

import fleetune
from fleetune import models
from fleetune.common.ggml import BYTES, HALVES
from fleetune.common.sums import sha256
from fleetune.deploy import patch, patch_make
from fleetune.errors import Interrupted, LedgerError, ModelError, UsageError
from fleetune.tuning.methods import _zeroth
from fleetune.tuning.result import finished
from heard import Heard

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("passes", [patch.PASSES, 0])
def test_the_patched_file_is_the_tuned_model(
    passes: int, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, digest = ledger_on(file)
    monkeypatch.setattr(patch, "PASSES", passes)  # more are carried as changes
    made = patch_make.of_ledger(file, ledger)
    assert (made.changes is None) == (passes > 0)
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


def test_the_inverse_patch_leads_back_to_the_byte(file: Path, tmp_path: Path) -> None:
    ledger, before = ledger_on(file)[0], file.read_bytes()
    made, back = patch_make.of_ledger(file, ledger), patch_make.of_ledger(file, ledger, inverse=True)
    assert (back.base, back.result) == (made.result, made.base)
    (tmp_path / "p").write_bytes(made.file)
    (tmp_path / "back").write_bytes(back.file)
    with pytest.raises(ModelError, match="has this patch already"):
        patch.apply(file, patch.load(tmp_path / "back"))
    patch.apply(file, patch.load(tmp_path / "p"))
    assert file.read_bytes() != before
    with pytest.raises(ModelError, match="has this patch already"):
        patch.apply(file, patch.load(tmp_path / "p"))
    patch.apply(file, patch.load(tmp_path / "back"))
    assert file.read_bytes() == before
    assert visible(file.parent) == ["m.gguf"]


def test_rows_in_pieces_make_the_same_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for passes in (patch.PASSES, 0):
        monkeypatch.setattr(patch, "PASSES", passes)
        made = patch_make.of_ledger(file, ledger_on(file)[0])
        for piece in (1, 700, 5000):
            monkeypatch.setattr(patch, "PIECE", piece)
            patch.apply(file, made, tmp_path / f"{passes}-{piece}.gguf")  # its SHA-256 is the stated one


def test_a_patch_that_would_make_another_model_is_not_made(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fleetune.seeds import noise

    ledger, summed = ledger_on(file)[0], noise.summed
    monkeypatch.setattr(noise, "summed", lambda *given: summed(*given) + 300)
    with pytest.raises(ModelError, match="would not make the scales of the run"):
        patch_make.of_ledger(file, ledger)


def test_a_link_stays_one(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(file)
    made = patch_make.of_ledger(file, ledger_on(file)[0])
    patch.apply(link, made)
    assert link.is_symlink()
    assert sha256(file) == made.result
    dangling = tmp_path / "dangling.gguf"
    dangling.symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match="exists already"):
        patch.apply(file, made, dangling)


def test_a_copy_in_a_folder_that_is_not_there_is_refused_before_any_work(file: Path, tmp_path: Path) -> None:
    made = patch_make.of_ledger(file, ledger_on(file)[0])
    file.write_bytes(b"GGUF")  # is not looked at
    for out in (tmp_path / "no such" / "deep" / "x.gguf", file / "x.gguf"):
        before = visible(tmp_path)
        with pytest.raises(UsageError, match="there is no folder") as refused:
            patch.apply(file, made, out)
        assert refused.value.hint == f"make it first: mkdir -p {shlex.quote(str(out.parent))}"
        assert visible(tmp_path) == before


def test_a_patch_before_its_model_is_said_to_be_swapped(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fleetune.cli.main import main

    (tmp_path / "a patch").write_bytes(patch_make.of_ledger(file, ledger_on(file)[0]).file)
    before = file.read_bytes()
    given = [str(tmp_path / "a patch"), str(file), "--to", str(tmp_path / "new.gguf")]
    assert main(["patch", "apply", *given]) == 2
    said = capsys.readouterr().err
    assert "the model comes first, then the patch" in said
    right = re.search("try: fleetune (.*)", said)
    assert right is not None
    assert file.read_bytes() == before
    assert main(shlex.split(right[1])) == 0
    assert (tmp_path / "new.gguf").is_file()


def test_a_run_before_its_model_is_said_to_be_swapped(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fleetune.cli.main import main

    ledger = tmp_path / "a ledger.safetensors"
    ledger_on(file)[0].save(ledger)
    assert main(["patch", "make", str(ledger), str(file), "--to", str(tmp_path / "p")]) == 2
    right = re.search("try: fleetune (.*)", capsys.readouterr().err)
    assert right is not None
    assert main(shlex.split(right[1])) == 0
    assert (tmp_path / "p").is_file()


def test_the_command_prints_json_for_a_devices_script(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fleetune.cli.main import main

    ledger_on(file)[0].save(tmp_path / "ledger.safetensors")
    lines = []
    for words in (
        ["make", str(file), str(tmp_path / "ledger.safetensors"), "--to", str(tmp_path / "p")],
        ["apply", str(file), str(tmp_path / "p")],
    ):
        assert main(["patch", *words, "--json"]) == 0
        lines.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [line["event"] for line in lines] == ["patch", "patched"]
    assert lines[0]["result"] == lines[1]["result"] == sha256(file)


def test_a_patch_for_another_file_is_refused(file: Path, tmp_path: Path) -> None:
    made = patch_make.of_ledger(file, ledger_on(file)[0])
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


def test_a_result_that_is_not_the_stated_one_is_not_kept(file: Path) -> None:
    made = dataclasses.replace(patch_make.of_ledger(file, ledger_on(file)[0]), result="0" * 64)
    before = file.read_bytes()
    with pytest.raises(ModelError, match="the patched file would have"):
        patch.apply(file, made)
    assert file.read_bytes() == before
    assert visible(file.parent) == ["m.gguf"]


def test_only_a_ledger_of_scales_makes_a_patch(file: Path) -> None:
    model = models.load(str(file), device="cpu", base="mapped")
    weights = _zeroth.new_ledger(
        model, 5, law="hashed", K=64, lr=0.02, eps=0.01, rule="", method="mezo", hyper={}, aggregation=""
    )
    with pytest.raises(UsageError, match="moves all weights"):
        patch_make.of_ledger(file, weights)
    ledger, _ = ledger_on(file)
    with pytest.raises(LedgerError, match="rebuilds other weights"):
        patch_make.of_ledger(file, ledger.with_check(1, "0" * 64))


def test_a_listener_is_told_the_work_ahead_and_every_piece(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, size = ledger_on(file)[0], file.stat().st_size
    scales = sum(math.prod(shape) for _, shape, _ in ledger.head.tensors)
    work = f"1 pass over {scales:,} scales"
    making, applying, undoing = Heard(), Heard(), Heard()
    back = patch_make.of_ledger(file, ledger, inverse=True)
    monkeypatch.setattr(patch, "PIECE", 5000)
    made = patch_make.of_ledger(file, ledger, listener=making)
    patch.apply(file, made, listener=applying)
    patch.apply(file, back, listener=undoing)
    assert applying.notes == [f"{work} to compute"]
    assert {count[0] for count in making.counts} == {"weights", "bytes patched"}
    assert making.counts[-1] == ("bytes patched", size, size, work)
    for heard, text in ((applying, work), (undoing, "")):
        compared = [count for count in heard.counts if count[0] == "bytes compared"]
        written = [count for count in heard.counts if count[0] == "bytes written"]
        assert heard.counts == compared + written
        assert (compared[-1], written[-1]) == (
            ("bytes compared", size, size, ""),
            ("bytes written", size, size, text),
        )
        assert len(written) > size / 5000 / 2
        assert [done for _, done, *_ in written] == sorted(done for _, done, *_ in written)
    assert not undoing.notes


def test_the_command_shows_how_far_it_is_on_a_terminal_and_only_events_in_json(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fleetune.cli.main import main

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ledger = ledger_on(file)[0]
    ledger.save(tmp_path / "l")
    (tmp_path / "back").write_bytes(patch_make.of_ledger(file, ledger, inverse=True).file)
    for words, shown in (
        (["make", str(file), str(tmp_path / "l"), "--to", str(tmp_path / "p")], ["weights", "bytes patched"]),
        (["apply", str(file), str(tmp_path / "p")], ["to compute", "bytes compared", "bytes written"]),
        (["apply", str(file), str(tmp_path / "back")], ["bytes compared", "bytes written"]),
    ):
        with monkeypatch.context() as seated:
            seated.setattr(sys, "stderr", seen := Terminal())
            assert main(["patch", *words]) == 0
        assert [what for what in shown if what not in seen.getvalue()] == []
    capsys.readouterr()
    assert main(["patch", "apply", str(file), str(tmp_path / "p"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["patched"]
    assert re.fullmatch(r"1 pass over [\d,]+ scales to compute\n", err)


@pytest.mark.parametrize("stop_at", ["bytes compared", "bytes written"])
def test_a_stop_changes_nothing(stop_at: str, file: Path, tmp_path: Path) -> None:
    made, before = patch_make.of_ledger(file, ledger_on(file)[0]), file.read_bytes()
    for out in (None, tmp_path / "new.gguf"):
        with pytest.raises(Interrupted, match="nothing was changed"):
            patch.apply(file, made, out, Heard(stop_at=stop_at))
    assert file.read_bytes() == before
    assert visible(file.parent) == ["m.gguf"]
    assert not (tmp_path / "new.gguf").exists()


def test_applying_needs_no_torch(file: Path, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(patch_make.of_ledger(file, ledger_on(file)[0]).file)
    code = (
        "import sys; from fleetune.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'torch was loaded'"
    )
    words = ["patch", "apply", str(file), str(tmp_path / "p")]
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_a_kill_at_any_instant_leaves_the_old_file_or_the_new(file: Path, tmp_path: Path) -> None:
    ledger, old = ledger_on(file)[0], file.read_bytes()
    made, back = patch_make.of_ledger(file, ledger), patch_make.of_ledger(file, ledger, inverse=True)
    (tmp_path / "p").write_bytes(made.file)
    (tmp_path / "back").write_bytes(back.file)
    patch.apply(file, made, tmp_path / "new.gguf")
    new = (tmp_path / "new.gguf").read_bytes()
    code = (
        "import sys; from pathlib import Path; from fleetune.deploy import patch\n"
        "both = [patch.load(Path(p)) for p in sys.argv[2:]]; print('ready', flush=True)\n"
        "for _ in range(10 ** 6): [patch.apply(Path(sys.argv[1]), p) for p in both]"
    )
    drawn, command = random.Random(4), [sys.executable, "-c", code, str(file)]
    for _ in range(8):
        child = subprocess.Popen(
            [*command, str(tmp_path / "p"), str(tmp_path / "back")], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(drawn.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        content = file.read_bytes()
        assert content in (old, new)
        if content == new:
            patch.apply(file, back)
        assert file.read_bytes() == old
    patch.apply(file, made)
    assert visible(file.parent) == ["m.gguf"], "what killed ones left is gone"


# A run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mezo", "fedkseed", "onebyte"])
def test_a_run_tunes_the_file_that_ships(method: str, file: Path, tmp_path: Path) -> None:
    """From the rows to the patched file: export, patch and replay give one file, which lost nothing."""
    settings = {
        "mezo": {"tau": 6, "batch_size": 4},
        "fedkseed": {"tau": 4, "K": 64, "backprop": 0.5, "backprop_steps": 3},
        "onebyte": {"directions": 6, "batch_size": 4},
    }[method]
    rows = [{"prompt": f"say {w}", "response": f"{w} it is"} for w in "abcdefghijklmnopqrstuvwxyz"]
    run = fleetune.tune(
        str(file),
        rows,
        method=method,
        train="scales",
        clients=1 if method == "mezo" else 2,
        rounds=2,
        settings={"lr": 0.05, "eps": 0.01, **settings},
        out=tmp_path / "runs",
        samples=0,
        client_rows=0,
        held_out=4,
    )
    assert run.done.digest != models.load(str(file), device="cpu").digest
    out = fleetune.export(run, path=tmp_path / "new" / "tuned.gguf").path
    tuned = models.load(str(out), device="cpu")
    assert tuned.digest == run.done.digest
    made = patch_make.of_ledger(file, finished.ledger_of(Path(run.done.run)))
    assert made.result == sha256(out)
    assert len(made.file) < 20_000


def test_what_a_killed_patch_left_is_removed_and_nothing_of_other_files(file: Path) -> None:
    odd = file.with_name("m[1].gguf")
    odd.write_bytes(file.read_bytes())
    left = [
        odd.with_name(name) for name in (".m[1].gguf.abc.tmp", ".m1.gguf.abc.tmp", ".m[1].gguf.x.abc.tmp")
    ]
    for each in left:
        each.touch()
    ledger, _ = ledger_on(file)
    patch.apply(odd, patch_make.of_ledger(file, ledger))
    assert [each.exists() for each in left] == [False, True, True]
