"""Pruned llamas, whose blocks differ in width: written as deci."""

from pathlib import Path

import gguf as package
import numpy as np
import pytest
from deploy_harness import compressed, tiny

from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.errors import ModelError
from fleetune.models import Model
from fleetune.models.families import widths
from fleetune.models.families.widths import KeptUnits


def narrowed() -> Model:
    """A llama whose second block has a key head and 32 MLP channels less, taken from all over."""
    model, rng = tiny(), np.random.default_rng(2)

    def some(all_of: int, count: int) -> list[int]:
        return sorted(rng.choice(all_of, count, replace=False).tolist())

    widths.cut(
        model.net, [KeptUnits(some(2, heads), some(128, count)) for heads, count in ((2, 128), (1, 96))]
    )
    return model


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("quantised", [False, True])
def test_a_llama_of_different_widths_is_a_deci(quantised: bool, tmp_path: Path) -> None:
    model = narrowed()
    if quantised:
        compressed(model, tmp_path / "m")
    else:
        models.save(model.net, model.tokenizer, tmp_path / "m")
    report = export(tmp_path / "m", "gguf" if quantised else "gguf:f32", tmp_path / "m.gguf")
    assert report.exact == report.tensors or quantised
    with pytest.raises(ModelError, match="architecture 'deci'"):
        models.load_config(str(tmp_path / "m.gguf"))
    reader = package.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [4, 2]
    assert fields["deci.attention.head_count_kv"] == [2, 1]
    assert fields["deci.feed_forward_length"] == [128, 96]
    assert fields["deci.attention.key_length"] == fields["deci.attention.value_length"] == 16
    assert fields["deci.rope.dimension_count"] == 16
    assert fields["deci.block_count"] == 2
    found = {t.name: t for t in reader.tensors}
    want = {
        "blk.0.attn_q.weight": (64, 64),
        "blk.1.attn_q.weight": (64, 32),
        "blk.1.attn_k.weight": (64, 16),
        "blk.1.attn_output.weight": (32, 64),
        "blk.1.ffn_down.weight": (96, 64),
    }
    assert {name: tuple(map(int, found[name].shape)) for name in want} == want
