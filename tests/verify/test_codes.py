"""A cache that keeps to what another held: its codes where noise may decide between two, and nowhere else."""

import numpy as np
import pytest

from refengine.ops import OPS
from refengine.quant import SCHEMES
from refengine.scheme import Scheme
from verify.truth.codes import Given, GivenCache, can_be_given, plainest_of_codes
from verify.truth.noise import PLAINEST

POINTS = [f"layers.0.self_attn.{name}_cache" for name in "kv"]
K, H, P = 2, 16, 6
SCHEME = SCHEMES["ov-u8"]
NOISE = 1e-5


def vectors(seed: int) -> np.ndarray:
    """`x_1KPH`, of which one value lies a millionth below the border between two codes."""
    x_1KPH = np.random.default_rng(seed).uniform(-1, 1, (1, K, P, H))
    x_1KPH[0, :, :, 0], x_1KPH[0, :, :, 1] = -1, 1
    x_1KPH[0, 1, 3, 7] = -1 + 100.5 * 2 / 255 - 1e-6
    return x_1KPH


def coded(x_1KPH: np.ndarray) -> np.ndarray:
    codec = SCHEME.keys.codec
    return codec.decode(codec.encode(x_1KPH), np.dtype(np.float64))


def flat(x_1KPH: np.ndarray) -> np.ndarray:
    return x_1KPH[0].swapaxes(0, 1).reshape(P, K * H)


def read(x_1KPH: np.ndarray, held_1KPH: np.ndarray, noise: float | None, scheme: Scheme = SCHEME) -> np.ndarray:
    """What attention reads after the first four tokens came in one pass, and two in passes of their own."""
    held = dict.fromkeys(POINTS, flat(held_1KPH))
    moved = None if noise is None else dict.fromkeys(POINTS, np.full(P, noise))
    cache = GivenCache(scheme, Given(held, np.zeros(1, np.int64), moved), np.empty((1, 0), np.int64))
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        part = x_1KPH[:, :, start:stop]
        k_BKSH, v_BKSH, positions_BS = cache.update(0, part, part, np.arange(start, stop)[None])
        if start == 0:
            assert np.array_equal(k_BKSH, part)  # a first pass reads what came
    np.testing.assert_array_equal(positions_BS, np.arange(P)[None])
    np.testing.assert_array_equal(k_BKSH, v_BKSH)
    np.testing.assert_array_equal(flat(cache.brought[POINTS[0]].swapaxes(0, 1)[None]), flat(x_1KPH))
    return np.asarray(k_BKSH)


def test_on_a_border_the_code_that_is_held_is_taken() -> None:
    x_1KPH = vectors(0)
    held_1KPH = coded(x_1KPH)
    held_1KPH[0, 1, 3, 7] += 2 / 255
    np.testing.assert_allclose(read(x_1KPH, held_1KPH, NOISE), held_1KPH, atol=NOISE)


@pytest.mark.parametrize("steps", [-1, 1, 2])
def test_away_from_a_border_no_other_code_is_taken(steps: int) -> None:
    x_1KPH = vectors(1)
    x_1KPH[0, 0, 4, 5] = -1 + 30.1 * 2 / 255
    held_1KPH = coded(x_1KPH)
    held_1KPH[0, 0, 4, 5] += steps * 2 / 255
    np.testing.assert_allclose(read(x_1KPH, held_1KPH, NOISE), coded(x_1KPH), atol=NOISE)


def test_other_scales_are_not_taken() -> None:
    x_1KPH = vectors(2)
    np.testing.assert_allclose(read(x_1KPH, coded(x_1KPH) * 1.01, 1e-8), coded(x_1KPH), atol=1e-7)


def test_where_noise_is_measured_all_read_what_is_held() -> None:
    x_1KPH, held_1KPH = vectors(3), np.random.default_rng(4).standard_normal((1, K, P, H))
    np.testing.assert_array_equal(read(x_1KPH, held_1KPH, None), held_1KPH)


def test_what_later_tokens_change_cannot_be_given() -> None:
    held = dict.fromkeys(POINTS, np.zeros((P, K * H)))
    codes = dict.fromkeys(POINTS, np.zeros((P, K * H), np.uint8))
    assert can_be_given(SCHEME, held)
    assert can_be_given(SCHEMES["ov-u4"], codes)
    assert not can_be_given(SCHEME, codes)
    assert not can_be_given(SCHEMES["ov-u8-channel"], held)
    assert not can_be_given(SCHEMES["kivi-4"], held)
    assert not can_be_given(SCHEME, {})


def test_of_the_same_codes_what_is_held_is_read_though_a_scale_is_off_by_noise() -> None:
    x_1KPH = vectors(5)
    held_1KPH = coded(x_1KPH * (1 + 1e-6))
    np.testing.assert_allclose(read(x_1KPH, held_1KPH, NOISE), held_1KPH, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("name", "is_another"), [("ov-u8", True), ("int4-g32", True), ("int8-symmetric", False)])
def test_products_with_codes_are_products_with_what_they_stand_for(name: str, is_another: bool) -> None:
    rng = np.random.default_rng(6)
    q_BTNH, k_BKSH = rng.standard_normal((2, 3, 4, H)), rng.standard_normal((2, K, P, H))
    positions_BT, positions_BS = np.tile(np.arange(3, P), (2, 1)), np.tile(np.arange(P), (2, 1))
    ops = plainest_of_codes(SCHEMES[name], PLAINEST)
    assert (ops != PLAINEST) == is_another
    given = q_BTNH, k_BKSH, k_BKSH, positions_BT, positions_BS, None
    np.testing.assert_allclose(ops.attend(*given), OPS.attend(*given), rtol=1e-12, atol=1e-12)
