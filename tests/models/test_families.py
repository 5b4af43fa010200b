"""Every method on tiny models of many families: what was trained is what is loaded again, exported and run by others.

The cells that run here are those of what a family is the only one to have; `-m slow` runs them all.
"""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import family_matrix as families
from fleetune import adapters, models
from tiny_families import build, save

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
CAPPED = {"attn_logit_softcapping": 0.5}  # so low that it shows


@pytest.mark.parametrize(("family", "changes"), [("gemma2", CAPPED), ("gpt_oss", {})])
def test_a_prefix_keeps_a_familys_caps_and_sinks(family: str, changes: dict, tmp_path: Path) -> None:
    """Attention without windows, where PEFT's prefix is the same."""
    net = build(family, layer_types=["full_attention"] * 2, **changes)
    models.save(net, models.tiny_tokenizer(), tmp_path / "base")
    model = models.load(str(tmp_path / "base"))
    adapters.attach(model, adapters.Prefix(4), seed=1)
    adapters.load_(model, {n: a * 40 for n, a in adapters.export(model).items()})
    adapters.save(model, tmp_path / "prefix")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "prefix")).eval()
    ids = torch.arange(40).view(2, 20)
    assert torch.allclose(families.logits(model.net, ids), families.logits(theirs, ids), atol=1e-4)


# What was wrong once, or can only be wrong in such a family.
SAMPLE = [
    ("mamba", "fedkseed", "ok"),  # weights that are read and not called
    ("mamba", "fedit", "ok"),  # PEFT refuses out_proj
    ("mamba", "lora", "a MambaForCausalLM has no query and value projections; its linear layers are in_proj"),
    ("mamba", "adapter", "ok"),
    ("mamba", "fedpeptao", "a prefix needs attention in every layer"),
    ("gpt2", "fedit", "ok"),  # one matrix of queries, keys and values, stored the other way round
    ("gpt2", "rtn", "the blocks of a GPT2LMHeadModel have no matrices"),
    ("gpt_oss", "adapter", "ok"),  # experts in one tensor, that return a tuple
    ("gemma2", "prefix", "ok"),  # caps in its attention, and windows
    ("stablelm", "prefix", "the attention of a StableLmForCausalLM is no function"),
    ("albert", "prefix", "ok"),  # one layer that runs twice
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize(("family", "column", "said"), SAMPLE, ids=lambda x: x.split(" ")[0])
def test_what_was_trained_is_used(family: str, column: str, said: str, folder: Path, tmp_path: Path) -> None:
    found = families.cell(save(family, folder), column, tmp_path)
    assert found == said if said == "ok" else found.startswith(said), found


@pytest.mark.slow
@pytest.mark.parametrize("column", families.NAMES)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_cell_is_what_the_page_says(family: str, column: str, folder: Path, tmp_path: Path) -> None:
    found = families.cell(save(family, folder), column, tmp_path)
    assert not found.startswith("FAULT"), found
    assert (found == "ok") == (cells()[family][column] == "ok"), found


def cells() -> dict[str, dict[str, str]]:
    """The table of the page, by family and column; a column may stand for several, with the same cells."""
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| ([\w, -]+?) \| (.*) \|$", text.partition("<!-- matrix -->")[2])
    heads = [head.split("<br>") for head in rows[0][1].split(" | ")]
    found = {}
    for alike, row in rows[1:]:
        parts = zip(heads, row.split(" | "), strict=True)
        by_column = {name: cell for names, cell in parts for name in names}
        found |= dict.fromkeys(alike.split(", "), by_column)
    return found


def test_the_page_has_a_cell_for_each() -> None:
    found = cells()
    assert sorted(found) == sorted(families.FAMILIES)
    assert all(sorted(columns) == sorted(families.NAMES) for columns in found.values())


def test_a_fault_is_seen(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with other weights than the run's is no `ok`."""
    model = save("llama", folder)
    result = families.tune(model, families.COLUMNS["bitfit"], tmp_path)
    with pytest.raises(families.Fault, match="differs from hf"):
        monkeypatch.setattr(families, "peer_of", lambda *args: build("llama"))
        families.check(result, model, "hf")
