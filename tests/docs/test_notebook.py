"""The notebook of the whole pipeline runs from a fresh kernel, and its results show themselves."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fleetune import models
from fleetune.models.cache import cache

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "deploy"))


@pytest.fixture
def ran(tmp_path, monkeypatch):
    from deploy_harness import tiny

    model = tiny()
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "cache"))
    models.save(model.net, model.tokenizer, cache.hub_target(cache.SMOLLM2_135M.hub))
    book = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "it is kept without outputs"
    resources = {"metadata": {"path": str(tmp_path)}}
    return NotebookClient(book, timeout=200, resources=resources).execute()


def outputs(book, source):
    (cell,) = [c for c in book.cells if c.cell_type == "code" and c.source.endswith(source)]
    return [o.data for o in cell.outputs if o.output_type == "execute_result"]


def test_the_pipeline_runs_and_its_results_show_themselves(ran):
    (plan,) = outputs(ran, 'ram="8GB")')
    assert "fits 8" in plan["text/html"]
    (run,) = outputs(ran, "\nrun")
    assert all(word in run["text/html"] for word in ("<iframe sandbox", "Validation loss", "Samples"))
    assert "<script" not in run["text/html"]
    (plot,) = outputs(ran, "run.plot()")
    assert plot["image/svg+xml"].startswith("<svg xmlns=")
    (small,) = outputs(ran, "\nsmall")
    assert "weights" in small["text/html"]
    assert "proven" in outputs(ran, "verify(file)")[0]["text/plain"]
