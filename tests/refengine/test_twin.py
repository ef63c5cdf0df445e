"""The forward pass against its loop-by-loop twin."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.checkpoint import open_checkpoint
from refengine.config import RopeParameters
from refengine.model import forward
from tests.refengine.strategies import (
    BOUND,
    ROPES,
    configs,
    opened,
    padded_positions,
    relative_error,
    written,
)
from tests.refengine.twin import twin_frequencies, twin_logits


@settings(max_examples=60)
@given(config=configs(), seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), data=st.data())
def test_float64_logits_are_those_of_the_twin(
    config: dict[str, Any],
    seed: int,
    rows: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    assert twins_differ_by(config, seed, data.draw(padded_positions(rows)), tmp_path_factory) <= BOUND


@pytest.mark.parametrize("rope", sorted(ROPES))
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_twin_agrees_at_full_size_for_every_rope_type(
    family: str, rope: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config: dict[str, Any] = {
        "rope_parameters": ROPES[rope],
        "max_position_embeddings": 9,
        "model_type": family,
    }
    config |= {"sliding_window": 7} if family == "mistral" else {"attention_bias": True, "mlp_bias": True}
    positions_BT = np.array([[-1, -1, *range(12)], [*range(10, 24)]])
    assert twins_differ_by(config, 1, positions_BT, tmp_path_factory) <= BOUND


def test_the_twin_is_no_echo_of_its_inputs(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = written(tmp_path_factory.mktemp("checkpoint"), model_type="mistral", sliding_window=4)
    checkpoint = open_checkpoint(directory)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    token_ids_BT = np.arange(8)[None]
    expected = twin_logits(checkpoint.config, tensors, token_ids_BT, token_ids_BT)
    for name in tensors:
        changed = tensors | {name: tensors[name] * 1.01}
        assert relative_error(twin_logits(checkpoint.config, changed, token_ids_BT, token_ids_BT), expected) > 1e-6, (
            name
        )


def test_twin_frequencies_of_the_plain_rope_are_powers_of_theta() -> None:
    assert twin_frequencies(RopeParameters("default", 10000.0), 4, 128, 1) == ([1.0, 0.01], 1.0)


def twins_differ_by(
    config: dict[str, Any], seed: int, positions_BT: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> float:
    """Relative error of the engine's logits of one drawn case, padding left out."""
    directory = written(tmp_path_factory.mktemp("checkpoint"), seed=seed, **config)
    checkpoint, weights = open_checkpoint(directory), opened(directory)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    token_ids_BT = np.random.default_rng(seed).integers(0, weights.config.vocab_size, positions_BT.shape)
    real_BT = positions_BT >= 0
    expected = twin_logits(weights.config, tensors, token_ids_BT, positions_BT)
    return relative_error(forward(weights, token_ids_BT, positions_BT)[real_BT], expected[real_BT])
