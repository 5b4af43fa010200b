# SPDX-License-Identifier: Apache-2.0
"""The door: what is refused, and files whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import ModuleType

import pytest
from deploy_harness import compressed, tiny

from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.deploy.formats import gguf, hf
from fleetune.errors import ModelError, StorageError, UsageError


def test_encoders_are_refused(tmp_path: Path) -> None:
    models.tiny_bert().save(tmp_path / "m")
    with pytest.raises(UsageError, match="holds an encoder"):
        export(tmp_path / "m", "gguf", tmp_path / "x.gguf")


def test_damaged_weights_are_said(tmp_path: Path) -> None:
    tiny().save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match="is damaged"):
        export(tmp_path / "m", "gguf", tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("to", "module", "links"), [("gguf", gguf, True), ("gguf", gguf, False), ("hf", hf, True)]
)
def test_of_two_exports_into_one_place_one_is_refused(
    to: str, module: ModuleType, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, both = tmp_path / ("x" if to == "hf" else "x.gguf"), threading.Barrier(2, timeout=60)
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
