"""Floats that were rounded to codes are told from damaged ones."""

import numpy as np
import pytest

from verify.weights.on_grid import rounded_to_codes
from verify.weights.relation import compare_values
from verify.weights.stored import Values

EXACT_OI = np.random.default_rng(3).normal(size=(24, 96)).astype(np.float32)


def rounded(exact: np.ndarray, bits: int, axis: int | None) -> np.ndarray:
    """Symmetric codes whose largest stands for the largest number of a group."""
    step = np.abs(exact).max(axis=axis, keepdims=True) / (2 ** (bits - 1) - 1)
    return (np.round(exact / step) * step).astype(np.float32)


def by_32_inputs(exact: np.ndarray) -> np.ndarray:
    return np.concatenate([rounded(exact[:, start : start + 32], 4, 1) for start in range(0, 96, 32)], axis=1)


ROUNDED = {
    "int8 by output": rounded(EXACT_OI, 8, 1),
    "int4 by output": rounded(EXACT_OI, 4, 1),
    "int8 by input": rounded(EXACT_OI, 8, 0),
    "int8 by one scale": rounded(EXACT_OI, 8, None),
    "int4 by 32 inputs": by_32_inputs(EXACT_OI),
}


def damaged() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(4).normal(size=EXACT_OI.shape).astype(np.float32)
    one, row = (ROUNDED["int8 by output"].copy() for _ in range(2))
    one[3, 5] += np.float32(0.1)
    row[7] = 0
    return {
        "noise": EXACT_OI + 1e-3 * noise,
        "one number": one,
        "a row of zeros": row,
        "zeros": np.zeros_like(EXACT_OI),
        "scaled": ROUNDED["int8 by output"] * np.float32(1.1),
        "another one's": rounded(noise, 8, 1),
    }


def relation(values: np.ndarray) -> tuple[str, str | None]:
    found = compare_values(EXACT_OI, Values(values), np.arange(len(values)))
    return found.relation, found.rounded_to


@pytest.mark.parametrize("name", ROUNDED)
def test_floats_on_a_grid_within_half_a_step_are_rounded(name):
    assert relation(ROUNDED[name]) == ("rounded", f"{name}, kept as floats")


@pytest.mark.parametrize("name", damaged())
def test_floats_that_are_not_the_nearest_on_a_grid_are_changed(name):
    assert relation(damaged()[name]) == ("changed", None)


def test_a_matrix_may_come_in_pieces():
    exact, values = EXACT_OI.astype(np.float64), ROUNDED["int4 by output"].astype(np.float64)
    assert rounded_to_codes([(exact[:8], values[:8]), (exact[8:], values[8:])]) == "int4 by output, kept as floats"
    assert rounded_to_codes([(exact[:8], values[:8]), (exact[8:], exact[8:])]) is None


def test_what_was_on_a_grid_before_is_not_rounded_by_being_scaled():
    codes_RC = np.random.default_rng(7).integers(-8, 8, (64, 64))
    exact_RC = codes_RC * 0.013
    assert rounded_to_codes([(exact_RC, (exact_RC * np.float32(1.01)).astype(np.float32).astype(np.float64))]) is None
