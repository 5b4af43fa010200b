# SPDX-License-Identifier: Apache-2.0
"""Codes of every family that is compressed, in the formats that docs/models.md says: written, read back and compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import fleetune
from fleetune.deploy.checkpoint import open_checkpoint
from fleetune.deploy.export import export
from fleetune.errors import UsageError
from fleetune.models.families import table
from fleetune.models.stored import weight_files
from tiny_families import DECODERS, save

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
MIXTURES = (
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "ernie4_5_moe",
    "gpt_oss",
)


def test_the_page_has_every_family_with_a_place_in_gguf() -> None:
    assert set(table.FAMILIES) <= set(DECODERS)


@pytest.mark.parametrize("family", DECODERS)
def test_codes_of_a_family(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path)
    if family == "gpt2":
        with pytest.raises(UsageError, match="no matrices of torch's linear layers"):
            fleetune.compress(model, method="rtn", settings={"group": 8}, out=tmp_path / "runs")
        return
    folder = (
        fleetune.compress(model, method="rtn", settings={"group": 8}, out=tmp_path / "runs").folder / "model"
    )
    master = open_checkpoint(folder)
    found = {name: q for name in master.names if (q := master.quantised(name)) is not None}
    codes = [name for name, q in found.items() if not q.experts]
    experts = [name for name, q in found.items() if q.experts]
    assert codes
    assert bool(experts) == (family in MIXTURES)
    for to in ("gptq", "compressed-tensors"):
        report = export(folder, to, tmp_path / to)
        stored = {name for file in weight_files(report.path) for name in load_file(file)}
        packed = ".qweight" if to == "gptq" else ".weight_packed"
        assert {name.removesuffix(packed) for name in stored if name.endswith(packed)} == {
            name.removesuffix(".weight") for name in codes
        }
        assert set(experts) <= stored  # in 16 bits
        assert report.exact >= len(codes)
