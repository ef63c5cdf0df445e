"""Rotary frequencies against values worked out by hand from transformers' definitions, and their table.

With rope_theta 10000 and head_dim 8 the plain inverse frequencies are 1, 0.1, 0.01 and 0.001, so that what a
rope type does to each is seen at once.
"""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.config import RopeParameters
from refengine.rope import rope_inverse_frequencies, rope_table

PLAIN = [1.0, 0.1, 0.01, 0.001]
LN4 = math.log(4)


def rope(rope_type: str, **settings: Any) -> RopeParameters:
    return RopeParameters(rope_type=rope_type, rope_theta=10000.0, **settings)


def yarn(original: int, **settings: Any) -> RopeParameters:
    return rope("yarn", **{"factor": 4.0, "original_max_position_embeddings": original, **settings})


def ramp(divided: list[float], factor: float) -> list[float]:
    """The plain frequencies, each with a share that is divided by the factor."""
    return [plain * (share / factor + 1 - share) for plain, share in zip(PLAIN, divided, strict=True)]


# llama3: wavelengths 6.28, 62.8, 628.3, 6283. With an original length of 1000, low_freq_factor 1 and
# high_freq_factor 4 those above 1000 are divided, those below 250 kept, and 628.3 turns 1000 / 628.3185 =
# 1.591549 times: its share is (1.591549 - 1) / 3.
LLAMA3_BETWEEN = (1000 / (200 * math.pi) - 1) / 3

# yarn: the dimension that turns r times within L is 8 ln(L / 2 pi r) / (2 ln 10000), here log10(L / 2 pi r).
FREQUENCIES: list[tuple[str, RopeParameters, list[float]]] = [
    ("default", rope("default"), PLAIN),
    ("linear", rope("linear", factor=4.0), [0.25, 0.025, 0.0025, 0.00025]),
    (
        "llama3",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=1000,
        ),
        [1.0, 0.1, 0.01 * ((1 - LLAMA3_BETWEEN) / 8 + LLAMA3_BETWEEN), 0.001 / 8],
    ),
    # 32 turns at dimension 1.309, 1 turn at 2.814: the ramp goes from 1 to 3.
    ("yarn", yarn(4096), [1.0, 0.1, 0.00625, 0.00025]),
    # 300 turns at 0.337, half a turn at 3.115: the ramp goes from 0 to 4.
    ("yarn, other betas", yarn(4096, beta_fast=300.0, beta_slow=0.5), ramp([0, 0.25, 0.5, 0.75], 4)),
    (
        "yarn, not truncated",
        yarn(4096, truncate=False),
        ramp([0, 0, (2 - 1.3090301012897532) / (2.814180079609659 - 1.3090301012897532), 1], 4),
    ),
    # 32 turns at 2.513, 1 turn at 4.018: the ramp goes from 2 to 5, beyond the last frequency.
    ("yarn, ramp beyond the frequencies", yarn(65536), ramp([0, 0, 0, 1 / 3], 4)),
    # 32 turns at 6.698, 1 turn at 8.203: clamped at head_dim - 1 = 7.
    ("yarn, ramp out of reach", yarn(10**9), PLAIN),
    # Both ends at 0: the ramp is 0.001 wide.
    ("yarn, no ramp", yarn(6), [1.0, 0.025, 0.0025, 0.00025]),
]


@pytest.mark.parametrize(("parameters", "expected"), [pytest.param(*values, id=name) for name, *values in FREQUENCIES])
def test_inverse_frequencies_are_those_worked_out_by_hand(parameters: RopeParameters, expected: list[float]) -> None:
    inv_freq_P, _ = rope_inverse_frequencies(parameters, 8, 128, 1)
    assert inv_freq_P.dtype == np.float64
    np.testing.assert_allclose(inv_freq_P, expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("length", "stretched"), [(1, 1.0), (100, 1.0), (150, 2.0), (200, 3.0)], ids=lambda value: str(value)
)
def test_dynamic_frequencies_stretch_theta_beyond_the_trained_length_alone(length: int, stretched: float) -> None:
    inv_freq_P, factor = rope_inverse_frequencies(rope("dynamic", factor=2.0), 8, 100, length)
    theta = 10000 * stretched ** (8 / 6)
    np.testing.assert_allclose(inv_freq_P, [1, theta**-0.25, theta**-0.5, theta**-0.75], rtol=1e-13)
    assert factor == 1.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.1 * LN4 + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"attention_factor": 1.25, "mscale": 2.0, "mscale_all_dim": 3.0}, 1.25),
        ({"mscale": 2.0, "mscale_all_dim": 3.0}, (0.2 * LN4 + 1) / (0.3 * LN4 + 1)),
        ({"mscale": 2.0}, 0.1 * LN4 + 1),
        ({"mscale_all_dim": 3.0}, 0.1 * LN4 + 1),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
    ],
    ids=str,
)
def test_the_attention_factor_of_yarn_is_given_or_follows_from_the_factor(
    settings: dict[str, float], expected: float
) -> None:
    assert rope_inverse_frequencies(yarn(4096, **settings), 8, 128, 1)[1] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    "parameters", [FREQUENCIES[0][1], FREQUENCIES[1][1], FREQUENCIES[2][1]], ids=lambda p: p.rope_type
)
def test_only_yarn_scales_attention(parameters: RopeParameters) -> None:
    assert rope_inverse_frequencies(parameters, 8, 128, 1)[1] == 1.0


@pytest.mark.parametrize("parameters", [values[1] for values in FREQUENCIES], ids=[values[0] for values in FREQUENCIES])
def test_only_dynamic_depends_on_the_length(parameters: RopeParameters) -> None:
    short, long = (rope_inverse_frequencies(parameters, 8, 128, length)[0] for length in (1, 1000))
    np.testing.assert_array_equal(short, long)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_table_is_computed_in_float64_and_then_rounded(dtype: type) -> None:
    positions_BT = np.array([[100003, 7]])
    cos_BTP, sin_BTP = rope_table(yarn(4096), 8, 128, positions_BT, np.dtype(dtype))
    factor = 0.1 * LN4 + 1
    for t, position in enumerate((100003, 7)):
        for p, frequency in enumerate(FREQUENCIES[3][2]):
            bound = 1e-10 if dtype is np.float64 else 2 * float(np.finfo(dtype).eps)
            assert cos_BTP[0, t, p] == pytest.approx(math.cos(position * frequency) * factor, abs=bound)
            assert sin_BTP[0, t, p] == pytest.approx(math.sin(position * frequency) * factor, abs=bound)
    assert (cos_BTP.dtype, sin_BTP.dtype) == (dtype, dtype)


@given(
    positions=st.lists(st.lists(st.integers(-1, 300), min_size=4, max_size=4), min_size=1, max_size=4),
    parameters=st.sampled_from([FREQUENCIES[3][1], rope("dynamic", factor=2.0)]),
)
def test_the_table_of_a_row_does_not_depend_on_its_neighbours(
    positions: list[list[int]], parameters: RopeParameters
) -> None:
    positions_BT = np.array(positions)
    together = rope_table(parameters, 8, 100, positions_BT, np.dtype(np.float64))
    for b in range(len(positions)):
        alone = rope_table(parameters, 8, 100, positions_BT[b : b + 1], np.dtype(np.float64))
        for all_BTP, one_1TP in zip(together, alone, strict=True):
            np.testing.assert_array_equal(all_BTP[b : b + 1], one_1TP)
