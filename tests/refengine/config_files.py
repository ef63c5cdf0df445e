"""Configurations that the tests start from, and how they see one refused."""

from typing import Any

import pytest

from refengine.config import Config
from refengine.errors import ConfigError
from tests.checkpoints import TINY

MISTRAL = TINY | {"model_type": "mistral", "sliding_window": 7}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    LLAMA3,
    YARN,
]


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def refused(config: dict[str, Any]) -> str:
    """The one line that says why."""
    with pytest.raises(ConfigError) as error:
        Config.from_dict(config)
    text = str(error.value)
    assert "\n" not in text
    return text
