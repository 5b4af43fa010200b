"""A model that the tests of a module share."""

import pytest

from fleetune.models import Model, tiny_llama


@pytest.fixture(scope="module")
def tiny() -> Model:
    return tiny_llama(seed=3)
