"""A small and a large model as directories, saved once."""

import pytest

from fleetune import models


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 30 M parameters, in fp32, at a path with a blank."""
    model = models.tiny_llama(vocab=8192, hidden=512, layers=8, heads=8)
    path = tmp_path_factory.mktemp("planned") / "a model"
    models.save(model.net, model.tokenizer, path)
    return str(path)
