"""A release is a run in one folder that nobody but its signer can have changed, and that tells nothing of the machine."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from verify_harness import proven

import fleetune
from command_line import FEW
from fleetune import errors
from fleetune.common import sums
from fleetune.deploy import release

WHO, Run = ("Mercy", "Hope"), fleetune.TuneResult
ROWS = [{"instruction": f"say {i}", "response": f"{i} it is", "who": WHO[i % 2]} for i in range(24)]


@pytest.fixture(scope="module")
def run(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    file = tmp_path_factory.mktemp("objectives") / "mine.py"
    file.write_text("from fleetune.evaluation.losses import batch_loss as mine\n")
    settings = {"K": 16, "tau": 2, "lr": 1e-3, "objective": f"{file}:mine"}
    more = {"partition": "column:who", "out": tmp_path_factory.mktemp("runs"), "clients": 0}
    return fleetune.tune(tiny, ROWS, method="fedkseed", settings=settings, **FEW | more)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


def signed(run: Run, place: Path, **given: Any) -> Path:
    return Path(fleetune.release(run, to=place, **given).folder)


def test_a_release_is_a_run_that_another_machine_verifies(run, tiny, tmp_path, config, monkeypatch):
    done = fleetune.release(run, to=tmp_path / "here" / "mine")
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "here" / "mine", tmp_path / "there" / "mine")
    shutil.copytree(tiny, tmp_path / "there" / "base")
    monkeypatch.chdir(tmp_path / "there")
    found = proven("mine", "./base", signer=done.signer)
    assert found["weights"].endswith(run.digest)
    assert found["signature"].startswith(done.signer)
    exported = fleetune.export(fleetune.Run(Path("mine"), "./base"), to="hf", path="out")
    assert exported.done.digest == run.digest
    for file in Path("mine").rglob("*"):
        if file.is_file():
            assert str(tmp_path) not in (text := file.read_text(encoding="latin-1")), file
            assert str(run.folder.parent) not in text, file
            assert str(Path(tiny).parent) not in text, file
            assert "objectives" not in text, file
            assert not any(word in text for word in ("Mercy", "bytes_up", '"per_client"', '"t": '))


def test_the_key_is_made_once_and_ssh_keygen_agrees(run: Run, tmp_path: Path, config: Path) -> None:
    one, two = signed(run, tmp_path / "one"), signed(run, tmp_path / "two")
    assert (one / release.SIGNATURE).read_bytes() == (two / release.SIGNATURE).read_bytes()
    key = config / "fleetune" / "release_ed25519"
    assert key.stat().st_mode & 0o777 == 0o600
    assert (one / release.SIGNER).read_text() == key.with_suffix(".pub").read_text()
    if not (tool := shutil.which("ssh-keygen")):
        pytest.skip("needs ssh-keygen")
    command = [tool, "-Y", "check-novalidate", "-n", "file", "-s", str(one / release.SIGNATURE)]
    text = (one / sums.FILE).read_bytes()
    known = release.check(one)
    assert known in subprocess.run(command, input=text, capture_output=True, check=True).stdout.decode()
    assert subprocess.run(command, input=text + b"\n", capture_output=True, check=False).returncode
    own = tmp_path / "own"
    subprocess.run([tool, "-q", "-t", "ed25519", "-N", "", "-f", str(own)], check=True)
    mine = signed(run, tmp_path / "mine", key=own)
    assert release.check(mine, str(own.with_suffix(".pub"))) != known
    shown = subprocess.run([tool, "-lf", str(own)], capture_output=True, check=True).stdout.decode()
    assert release.check(mine) in shown


def test_another_signer_is_refused(
    run: Run, tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = signed(run, tmp_path / "one")
    known, text = release.check(one), (one / release.SIGNER).read_text()
    for good in (known, text, str(one / release.SIGNER)):
        assert release.check(one, good) == known
    shutil.rmtree(config)
    two = signed(run, tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    Path(known).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(two / release.SIGNER, known)  # a file by the name of a fingerprint is none
    for bad in (known, text, str(one / release.SIGNER), "SHA256:", "nobody"):
        with pytest.raises(errors.ModelError, match="was signed by"):
            release.check(two, bad)
    shutil.copy(two / release.SIGNER, one)
    with pytest.raises(errors.ModelError, match="is not the signature"):
        release.check(one)
    shutil.copy(two / release.SIGNATURE, one)  # of another list
    with pytest.raises(errors.ModelError, match="is not the signature"):
        release.check(one)


def test_files_that_nobody_signed(run: Run, tiny: str, tmp_path: Path, config: Path) -> None:
    place = signed(run, tmp_path / "one")
    (place / ".gitattributes").touch()  # which the hub adds
    (place / "adapter").mkdir()
    (place / "adapter" / "more.py").touch()
    with pytest.raises(errors.ModelError, match=r"adapter/more\.py is not of the release"):
        release.check(place)
    shutil.rmtree(place / "adapter")
    (place / "README.md").rename(place / "readme")
    (place / "README.md").mkdir()
    (place / "README.md" / "more.py").touch()
    with pytest.raises(errors.ModelError, match=r"README\.md"):
        release.check(place)
    shutil.rmtree(place / "README.md")
    (place / "readme").rename(place / "README.md")
    with pytest.MonkeyPatch.context() as patch:  # exports of a release lie beside it
        patch.chdir(tmp_path)
        shutil.copytree(tiny, "tiny")  # its base, as it names it
        fleetune.export("one", to="hf")
        assert (tmp_path / "one-hf").is_dir()
    assert release.check(place)
    (place / "README.md").write_text("better")
    with pytest.raises(errors.ModelError, match=r"README\.md is not what was written"):
        fleetune.verify(place)
    (place / release.SIGNATURE).unlink()
    with pytest.raises(errors.ModelError, match=rf"no {release.SIGNATURE}"):
        fleetune.verify(place, signer="SHA256:x")


def test_what_cannot_be_released(run: Run, tiny: str, tmp_path: Path, config: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "key").write_text("none")
    for given, words in (
        ({"to": tmp_path / "there"}, "exists already"),
        ({"key": tmp_path / "key"}, "is not an OpenSSH key"),
        ({"key": tmp_path / "no"}, "cannot read the key"),
    ):
        with pytest.raises(errors.UsageError, match=words):
            fleetune.release(run, **{"to": tmp_path / "new", **given})
    with pytest.raises(errors.UsageError, match="is not a run"):
        fleetune.release(tiny)
    assert not (tmp_path / "new").exists()


def test_a_private_run_tells_its_epsilon_and_no_digest(tiny: str, tmp_path: Path, config: Path) -> None:
    pytest.importorskip("dp_accounting")
    given = FEW | {"clients": 10, "privacy": "client", "epsilon": 8.0, "clip_norm": 1.0, "out": tmp_path}
    run = fleetune.tune(tiny, ROWS, method="fedkseed", settings={"K": 16, "tau": 1, "lr": 1e-3}, **given)
    place = signed(run, tmp_path / "private")
    declared = {link.what: link.words for link in fleetune.verify(place, tiny) if link.state == "declared"}
    assert "epsilon" in declared["privacy"]
    assert declared["privacy"][:40] in (place / "README.md").read_text()
    (run.folder / "metrics.jsonl").write_text(
        (run.folder / "metrics.jsonl").read_text().replace("epsilon", "delta")
    )
    sums.write(run.folder)
    with pytest.raises(
        errors.ModelError, match="another privacy than its ledger: differential privacy: epsilon"
    ):
        fleetune.verify(run, tiny)
    text = "".join(p.read_text(encoding="latin-1") for p in place.iterdir() if p.is_file())
    assert "rows_sha256" not in text
    assert "training rows, as text" not in text
    assert "uplink" not in text  # how many clients took part
    assert "bytes_up" not in text
