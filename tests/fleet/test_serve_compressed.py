# SPDX-License-Identifier: Apache-2.0
"""A real fleet tunes the scales of a compressed model: the server writes its file, and the devices have that file."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from deploy_harness import compressed, tiny
from devices_harness import devices, free_port
from test_loopback import CLIENTS, COMMON, device, folder, place, split

import fleetune
from fleetune.cli.main import main
from fleetune.tuning.recipe import recipe as recipes

__all__ = ["folder", "place"]  # fixtures
pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_real_fleet_ends_in_the_digest_of_the_simulated_one(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compressed(tiny(), Path("codes"))
    recipe = {**COMMON, "model": "codes", "method": "mezo", "train": "scales", "set": {"tau": 2, "lr": 0.05}}
    recipe["aggregation"] = "mean:1"  # what a mean is where rows are what devices say
    split(recipe)
    port = free_port()
    joined = [device(port, number) for number in range(CLIENTS)]
    for one in joined:
        one.brings = dataclasses.replace(one.brings, model=f"copy-{one.number}.gguf")
    simulated = fleetune.tune(recipes.make(recipe), out="simulated")
    for one in joined:
        shutil.copy("codes/codes.gguf", one.brings.model)
    Path("codes/codes.gguf").unlink()
    capsys.readouterr()
    words = f"fleet serve -c recipe.toml --port {port} --keys keys --certificate certs --grace 20 --out real"
    with devices(*joined):
        assert main(words.split()) == 0
    assert "codes/codes.gguf, now written" in capsys.readouterr().err
    (run,) = fleetune.list_runs("real")
    assert run.done.digest == simulated.done.digest
    assert recipes.read(run.folder / "run.toml")["model"] == "codes/codes.gguf"


def test_a_compressed_model_without_train_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compressed(tiny(), Path("codes"))
    Path("recipe.toml").write_text(
        recipes.to_toml(recipes.make({**COMMON, "model": "codes", "method": "mezo"}))
    )
    assert main(["fleet", "serve", "-c", "recipe.toml", "--port", "0"]) == 2
    assert "codes is a compressed model: codes, not plain weights" in capsys.readouterr().err
