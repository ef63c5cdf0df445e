"""Attention in float16 as an arithmetic: what it rounds, and in which runs llama.cpp's cache is expected."""

import numpy as np

from refengine.ops import OPS
from verify.expect import EXACT, expected
from verify.truth.arithmetic import ARITHMETICS
from verify.truth.float16_attention import attending_in_float16

POSITIONS = np.arange(5)[None]
RANDOM = np.random.default_rng(0)
Q_BTNH, K_BKSH, V_BKSH = (
    RANDOM.standard_normal(shape).astype(np.float32) for shape in ((1, 5, 4, 8), (1, 2, 5, 8), (1, 2, 5, 8))
)


def test_what_is_multiplied_is_rounded_and_every_other_order_adds_up_in_float16() -> None:
    steps, fused = (
        ops.attend(Q_BTNH, K_BKSH, V_BKSH, POSITIONS, POSITIONS, None)
        for ops in attending_in_float16({"one": OPS, "other": OPS}).values()
    )
    exact = OPS.attend(Q_BTNH, K_BKSH, V_BKSH, POSITIONS, POSITIONS, None)
    for found in (steps, fused):
        error = np.abs(found - exact).max()
        assert 1e-5 < error < 1e-2
    np.testing.assert_array_equal(fused, fused.astype(np.float16))
    assert not np.array_equal(steps, steps.astype(np.float16))


def test_what_is_float16_already_is_only_rounded_where_probabilities_are() -> None:
    narrow = [x.astype(np.float16).astype(np.float32) for x in (Q_BTNH, K_BKSH, V_BKSH)]
    (ops,) = attending_in_float16({"one": OPS}).values()
    rounded = ops.attend(Q_BTNH, K_BKSH, V_BKSH, POSITIONS, POSITIONS, None)
    np.testing.assert_array_equal(rounded, ops.attend(*narrow, POSITIONS, POSITIONS, None))


def test_it_is_joined_with_other_arithmetic_and_with_a_cache() -> None:
    assert expected("float16-attention") != EXACT
    found = expected("float16-attention+int8-activations+ov-u8")
    assert (found.arithmetic.block, found.arithmetic.float16_attention) == (32, True)
    assert len(ARITHMETICS["float16-attention"].orders(100)) > 1


def test_a_cache_of_llama_cpp_is_read_without_a_cache_too() -> None:
    assert expected("ggml-q8_0").without_cache == expected("ggml-q8_0")
    assert expected("ov-u8").without_cache == EXACT
