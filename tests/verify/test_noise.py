"""The unit of comparison: equivalent orders are the same mathematics, and the bounds that they give are fair."""

import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.ops import OPS, Ops, rms_norm
from refengine.weights import Linear, Weights
from tests.refengine.strategies import BOUND, configs, opened, padded_positions, relative_error, written
from verify.truth.noise import EQUIVALENT_ORDERS, HALF_ULP, ONE_BIT, Noise, rms

OTHERS = {name: ops for name, ops in EQUIVALENT_ORDERS.items() if ops is not OPS}
ORDERS = pytest.mark.parametrize("ops", OTHERS.values(), ids=OTHERS.keys())
ZEROS = np.zeros((2, 5))  # a reference whose own rounding adds nothing

positive = st.floats(1e-7, 1e-3)
errors_of_orders = st.integers(1, 6).flatmap(
    lambda positions: st.lists(arrays(np.float64, positions, elements=positive), min_size=2, max_size=5)
)


def test_the_noise_is_the_root_mean_square_of_the_orders_errors():
    noise = Noise.of([np.array([1.0, 2.0]), np.array([7.0, 2.0])], ZEROS)
    np.testing.assert_allclose(noise.rms_P, [5.0, 2.0])


def test_each_order_is_held_against_the_others_without_itself():
    # The third is 3 times the others at its worst position, and sqrt(5) times over both.
    noise = Noise.of([np.ones(2), np.ones(2), np.array([3.0, 1.0])], ZEROS)
    assert noise.position_bound == pytest.approx(ONE_BIT * 3)
    assert noise.overall_bound == pytest.approx(ONE_BIT * np.sqrt(5))


def test_orders_that_agree_bound_a_candidate_by_one_bit():
    noise = Noise.of([np.ones(2), np.ones(2), np.ones(2)], ZEROS)
    assert (noise.overall_bound, noise.position_bound) == pytest.approx((ONE_BIT, ONE_BIT))


def test_the_noise_is_never_below_the_rounding_of_a_float32_result():
    reference64_PX = np.array([[3.0, 4.0], [30.0, 40.0]])
    noise = Noise.of([np.zeros(2), np.zeros(2)], reference64_PX)
    np.testing.assert_allclose(noise.rms_P, HALF_ULP * np.sqrt([12.5, 1250.0]))


def test_a_result_may_be_off_by_its_own_rounding_where_no_order_was():
    noise = Noise.of([np.zeros(2), np.zeros(2)], np.ones((2, 5)))
    assert (noise.overall_bound, noise.position_bound) == (ONE_BIT, ONE_BIT)


def test_a_reference_of_zeros_without_noise_gives_finite_ratios():
    noise = Noise.of([np.zeros(2), np.zeros(2)], ZEROS)
    assert (noise.rms_P > 0).all()
    assert np.isfinite([noise.overall_bound, noise.position_bound]).all()


@given(errors_of_orders)
def test_no_order_that_measured_the_noise_is_beyond_its_bounds(errors):
    noise = Noise.of(errors, np.zeros((len(errors[0]), 1)))
    for error_P in errors:
        assert rms(error_P) / rms(noise.rms_P) <= noise.overall_bound
        assert (error_P / noise.rms_P).max() <= noise.position_bound


@given(errors_of_orders, st.floats(1e-3, 1e3))
def test_the_bounds_do_not_depend_on_how_large_the_noise_is(errors, factor):
    zeros = np.zeros((len(errors[0]), 1))
    one, other = Noise.of(errors, zeros), Noise.of([factor * error_P for error_P in errors], zeros)
    assert other.overall_bound == pytest.approx(one.overall_bound)
    assert other.position_bound == pytest.approx(one.position_bound)
    np.testing.assert_allclose(other.rms_P, factor * one.rms_P)


def test_rms_squares_in_float64_what_would_overflow_in_float32():
    assert rms(np.full(3, 1e30, np.float32)) == pytest.approx(1e30)


@settings(max_examples=60)
@given(config=configs(), positions_BT=padded_positions(rows=2), seed=st.integers(0, 9))
def test_every_order_gives_the_references_logits_in_float64(config: dict[str, Any], positions_BT, seed: int):
    with tempfile.TemporaryDirectory() as directory:
        weights = opened(written(Path(directory), seed=seed, **config))
        token_ids_BT = np.random.default_rng(seed).integers(0, weights.config.vocab_size, positions_BT.shape)
        there_BT = positions_BT >= 0
        expected = in_two_chunks(weights, token_ids_BT, positions_BT, OPS)[there_BT]
        for name, ops in OTHERS.items():
            found = in_two_chunks(weights, token_ids_BT, positions_BT, ops)[there_BT]
            assert relative_error(found, expected) <= BOUND, name


def in_two_chunks(weights, token_ids_BT, positions_BT, ops: Ops) -> np.ndarray:
    """Logits by way of a cache."""
    cache, halves = KVCache(weights.config, len(token_ids_BT)), (slice(0, 4), slice(4, None))
    return np.concatenate(
        [forward(weights, token_ids_BT[:, half], positions_BT[:, half], cache, ops=ops) for half in halves], axis=1
    )


@ORDERS
def test_every_order_rounds_otherwise_than_the_reference_in_float32(compared, ops):
    weights = Weights.open(compared.checkpoint, np.float32)
    token_ids_BT = np.array(compared.prompts[:1])
    positions_BT = np.arange(token_ids_BT.shape[1])[None]
    own, other = (forward(weights, token_ids_BT, positions_BT, ops=each) for each in (OPS, ops))
    assert other.dtype == np.float32
    assert not np.array_equal(own, other)
    assert relative_error(other, own) < 1e-4


@pytest.mark.parametrize("operator", [field.name for field in fields(Ops) if field.name != "rotate"])
def test_each_operator_that_sums_or_rounds_has_another_order(operator):
    assert any(getattr(ops, operator) is not getattr(OPS, operator) for ops in OTHERS.values())


@pytest.mark.parametrize("name", ["linear", "rms_norm", "silu_gate"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("inputs", [1, 2, 255, 256, 257, 600])
def test_an_operator_keeps_dtype_and_shape_at_any_width(name, dtype, inputs):
    rng = np.random.default_rng(inputs)
    x_BTI = rng.standard_normal((2, 3, inputs)).astype(dtype)
    proj = Linear(rng.standard_normal((5, inputs)).astype(dtype), rng.standard_normal(5).astype(dtype))
    others = {"linear": (proj,), "rms_norm": (x_BTI[0, 0], 1e-5), "silu_gate": (x_BTI[::-1],)}[name]
    expected = getattr(OPS, name)(x_BTI, *others)
    for ops in OTHERS.values():
        found = getattr(ops, name)(x_BTI, *others)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=100 * inputs * np.finfo(dtype).eps)


@ORDERS
def test_an_order_of_large_gates_and_hidden_queries_stays_finite_and_quiet(ops):
    gates = np.array([[[-1e4, -200, 0, 200, 1e4]]], np.float32)
    assert np.isfinite(ops.silu_gate(gates, gates)).all()
    q_BTNH, kv_BKSH = np.ones((1, 2, 2, 4), np.float32), np.ones((1, 1, 2, 4), np.float32)
    padding = np.full((1, 2), -1)
    np.testing.assert_array_equal(ops.attend(q_BTNH, kv_BKSH, kv_BKSH, padding, padding, None), 0)


def test_a_fault_is_no_equivalent_order():
    faulty = replace(OPS, rms_norm=lambda x_BTD, weight_D, eps: rms_norm(x_BTD, weight_D, eps / 10))
    with tempfile.TemporaryDirectory() as directory:
        weights = opened(written(Path(directory)))
        token_ids_BT, positions_BT = np.array([[3, 1, 4, 1, 5, 9]]), np.arange(6)[None]
        expected = in_two_chunks(weights, token_ids_BT, positions_BT, OPS)
        assert relative_error(in_two_chunks(weights, token_ids_BT, positions_BT, faulty), expected) > 1e4 * BOUND
