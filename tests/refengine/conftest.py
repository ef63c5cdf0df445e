"""The models that the properties of the forward pass and of the cache are tried on."""

import pytest

from refengine.weights import Weights
from tests.refengine.strategies import MODELS, opened, written


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return opened(written(tmp_path_factory.mktemp(request.param), **MODELS[request.param]))
