"""ONNX's grouped-query attention over a cache of codes holds the reference's codes, and attends to them as it does."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from refengine.codecs.static import LARGEST, given
from refengine.kvcache import KVCache
from refengine.ops import attend
from tests.verify.quantised_gqa import CONFIG, HERE, MODES, RUNTIMES, H, K, Mode, N, quantised_attention

PASSES = (0, 5, 6, 7, 11, 12)  # a prefill, steps, a chunk, a step
TOKENS = PASSES[-1]


def vectors(random: np.random.Generator, mode: Mode, scale: np.ndarray) -> np.ndarray:
    """Keys or values up to the ends of the range and beyond; half of them lie between two codes, equally near.

    Of the first tokens one is zero, one is constant, one has an outlier, and one is tiny.
    """
    far = LARGEST[mode.numbers] + 5
    x_BKTH = (random.integers(-far, far, (1, K, TOKENS, H)) + 0.5) * scale
    x_BKTH[..., ::2] *= random.uniform(0, 1, (1, K, TOKENS, H // 2))
    x_BKTH[:, :, 0], x_BKTH[:, :, 1], x_BKTH[:, :, 2, 3], x_BKTH[:, :, 3] = 0, 1.25, 1e4, -1e-20
    if mode.numbers == "float8_e4m3fn":
        x_BKTH = x_BKTH.astype(np.float16)  # OpenVINO rounds to this first, so that others may round twice
    return x_BKTH.astype(np.float32)


def scales(random: np.random.Generator, mode: Mode) -> np.ndarray:
    """Under which keys and values up to some 4 have codes; those of floats are powers of two."""
    if mode.numbers == "float8_e4m3fn":
        return np.full(mode.scale_shape, 2.0 ** random.integers(-8, -6), np.float32)
    return (random.uniform(1, 4, mode.scale_shape) / LARGEST[mode.numbers]).astype(np.float32)


@pytest.mark.parametrize("mode", MODES[HERE], ids=lambda mode: f"{HERE}-{mode}")
def test_codes_are_the_reference_s_and_so_is_what_attention_makes_of_them(mode: Mode, tmp_path: Path) -> None:
    run, random = RUNTIMES[HERE](quantised_attention(tmp_path / "attention.onnx", mode)), np.random.default_rng(0)
    k_scale, v_scale = scales(random, mode), scales(random, mode)
    q_BTNH = random.standard_normal((1, TOKENS, N, H)).astype(np.float32)
    k_BKTH, v_BKTH = vectors(random, mode, k_scale), vectors(random, mode, v_scale)
    scheme = given(CONFIG, mode.numbers, [k_scale], [v_scale])
    cache, past_key, past_value = KVCache(CONFIG, 1, scheme), mode.empty(), mode.empty()
    for start, stop in pairwise(PASSES):
        new, positions_BT = slice(start, stop), np.arange(start, stop)[None]
        found = run(
            {
                "query": q_BTNH[:, new].reshape(1, -1, N * H),
                "key": k_BKTH[:, :, new].swapaxes(1, 2).reshape(1, -1, K * H),
                "value": v_BKTH[:, :, new].swapaxes(1, 2).reshape(1, -1, K * H),
                "past_key": past_key,
                "past_value": past_value,
                "seqlens_k": np.array([stop - 1], np.int32),
                "total_sequence_length": np.array(stop, np.int32),
                "k_scale": k_scale,
                "v_scale": v_scale,
            }
        )
        past_key, past_value = found["present_key"], found["present_value"]
        np.testing.assert_array_equal(past_key, scheme.keys.codec.encode(k_BKTH[:, :, :stop])[0])
        np.testing.assert_array_equal(past_value, scheme.values.codec.encode(v_BKTH[:, :, :stop])[0])
        k_BKSH, v_BKSH, positions_BS = cache.update(0, k_BKTH[:, :, new], v_BKTH[:, :, new], positions_BT)
        y_BTNH = attend(q_BTNH[:, new], k_BKSH, v_BKSH, positions_BT, positions_BS, None)
        np.testing.assert_allclose(found["output"], y_BTNH.reshape(1, -1, N * H), rtol=0, atol=1e-5)
