"""A place with a tiny model, the rows of clients that have unlike numbers of them, and a recipe."""

import json
from pathlib import Path

import pytest

from fleetune import models


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, rows and a recipe in the present folder."""
    monkeypatch.chdir(tmp_path)
    from flower_app import RECIPE

    from fleetune.fleet.flower import server_app

    for name in ("POLL", "SIMULATED_POLL"):
        monkeypatch.setattr(server_app, name, 0.0)
    for name in ("task_id", "run_id", "node_id"):  # of this process, as Flower's programs set it
        monkeypatch.setattr(f"flwr.supercore.task_identity.TaskIdentity._{name}", 1)
    models.tiny_llama().save(tmp_path / "model")
    counts = {i: " ".join(map(str, range(1 + i % 8))) for i in range(1, 31)}
    rows = [{"instruction": f"count to {i}", "response": c, "kind": "abc"[i % 3]} for i, c in counts.items()]
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("recipe.toml").write_text(RECIPE)
    return tmp_path
