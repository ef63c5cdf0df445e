"""ggml's cache types: bytes as the package gguf writes them, its rotation, and its attention with a quantised query."""

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refengine.codecs.ggml import TYPES, ggml, ggml_ops, hadamard, halves, interleaved
from refengine.codecs.packing import pack_blocks, unpack_blocks
from refengine.config import Config
from refengine.errors import CacheError, InputError
from refengine.generate import new_cache
from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.quant import SCHEMES
from refengine.scheme import Scheme
from tests.checkpoints import TINY
from tests.refengine.strategies import opened, written

every_type = pytest.mark.parametrize("name", TYPES)
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24}


def gguf_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def block_bytes(name: str, x_XG: np.ndarray) -> np.ndarray:
    """Our arrays for blocks of 32, in the order of ggml's structs: scale, lowest value, codes."""
    codes, *params = TYPES[name].encode(x_XG.reshape(1, 1, -1, 32))
    return np.concatenate([array.reshape(len(x_XG), -1).view(np.uint8) for array in (*params, codes)], axis=1)


def assert_equal_to_gguf(name: str, x_XG: np.ndarray) -> None:
    expected = gguf.quants.quantize(x_XG, gguf_type(name))
    ours = block_bytes(name, x_XG)
    assert ours.shape[1] == BLOCK_BYTES[name]
    np.testing.assert_array_equal(ours, expected)
    decoded = TYPES[name].decode(TYPES[name].encode(x_XG.reshape(1, 1, -1, 32)), np.dtype(np.float32))
    np.testing.assert_array_equal(decoded.reshape(-1, 32), gguf.quants.dequantize(expected, gguf_type(name)))


@every_type
@given(
    x_XG=arrays(np.float32, (3, 32), elements=st.floats(-1000, 1000, width=32)),
    size=st.sampled_from([1e-20, 1e-6, 1.0, 50.0]),
)
def test_blocks_have_the_bytes_that_gguf_writes_and_come_back_as_it_reads_them(
    name: str, x_XG: np.ndarray, size: float
) -> None:
    x_XG = x_XG * np.float32(size)
    x_XG[np.abs(x_XG) < 1e-30] = 0  # below, 1 / step is no float32, and a conversion to integers undefined in C
    assert_equal_to_gguf(name, x_XG)


@every_type
def test_blocks_that_are_constant_or_lopsided_have_the_bytes_that_gguf_writes(name: str) -> None:
    x_XG = np.random.default_rng(0).standard_normal((9, 32)).astype(np.float32)
    x_XG[0], x_XG[1], x_XG[2], x_XG[3] = 0, 3.25, -1e4, 1e-20
    x_XG[4, 7], x_XG[5, 30] = 1e4, -1e4
    x_XG[6] = np.arange(32) - 15.5  # halves between two codes
    x_XG[7] = -x_XG[7, ::-1]
    x_XG[8, ::2] = x_XG[8, 1]
    assert_equal_to_gguf(name, x_XG)


@given(st.sampled_from([4, 5]), st.integers(1, 3), st.integers(0, 1000))
def test_packed_blocks_come_back_and_take_no_more_bits_than_their_codes(bits: int, blocks: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, 32 * blocks))
    packed = pack_blocks(codes, bits)
    assert packed.nbytes == codes.size * bits // 8
    np.testing.assert_array_equal(unpack_blocks(packed, bits), codes)


@pytest.mark.parametrize("size", [1, 64, 128])
def test_the_rotation_is_by_sylvesters_matrix_and_is_its_own_inverse(size: int) -> None:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x_XH = np.random.default_rng(1).standard_normal((5, 128))
    expected = x_XH.reshape(5, -1, size) @ matrix / np.sqrt(size)
    np.testing.assert_allclose(hadamard(x_XH, size), expected.reshape(5, 128), atol=1e-14)
    np.testing.assert_allclose(hadamard(hadamard(x_XH, size), size), x_XH, atol=1e-14)


def test_keys_are_reordered_and_rotated_as_widely_as_their_head_allows_and_values_rotated_by_64() -> None:
    x_BKTH = np.random.default_rng(2).standard_normal((1, 2, 3, 128)).astype(np.float32)
    scheme = ggml("q4_0", "q5_1", rotated=True)
    there = hadamard(interleaved(x_BKTH), 128), hadamard(x_BKTH, 64)
    for storage, name, turned in zip((scheme.keys, scheme.values), ("q4_0", "q5_1"), there, strict=True):
        for ours, plain in zip(storage.codec.encode(x_BKTH), TYPES[name].encode(turned), strict=True):
            np.testing.assert_array_equal(ours, plain)
    float32 = np.dtype(np.float32)
    back = halves(hadamard(TYPES["q4_0"].decode(TYPES["q4_0"].encode(there[0]), float32), 128))
    np.testing.assert_array_equal(scheme.keys.codec.decode(scheme.keys.codec.encode(x_BKTH), float32), back)


def test_dimensions_that_turn_together_become_neighbours_and_halves_undoes_it() -> None:
    x_XH = np.arange(16).reshape(2, 8)
    assert interleaved(x_XH)[0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    np.testing.assert_array_equal(halves(interleaved(x_XH)), x_XH)


def test_an_outlier_spoils_its_neighbours_less_when_rotated() -> None:
    x_BKTH = np.random.default_rng(3).standard_normal((1, 2, 50, 64)).astype(np.float32)
    x_BKTH[..., 5] *= 30
    codecs = [ggml("q4_0", "q4_0", rotated).values.codec for rotated in (False, True)]
    spoilt = [np.square(codec.decode(codec.encode(x_BKTH), x_BKTH.dtype) - x_BKTH).mean() for codec in codecs]
    assert spoilt[1] < spoilt[0] / 3


def dot(name: str, key_bytes: np.ndarray, q_H: np.ndarray) -> float:
    """One score before scaling, from the bytes of ggml's blocks: integers, then the scales, as its C code has it."""
    score = 0.0
    for block, q_G in zip(key_bytes.reshape(-1, BLOCK_BYTES[name]), q_H.reshape(-1, 32), strict=True):
        query = gguf.quants.quantize(q_G[None], gguf.GGMLQuantizationType.Q8_0)[0]
        step, codes = float(query[:2].view(np.float16)[0]), query[2:].view(np.int8).astype(int)
        key_step = float(block[:2].view(np.float16)[0])
        plain = gguf.quants.dequantize(block[None], gguf_type(name))[0].astype(np.float64)
        lowest = float(block[2:4].view(np.float16)[0]) if name.endswith("_1") else 0.0
        key_codes = np.rint((plain - lowest) / (key_step or 1)).astype(int)
        stored_sum = float(np.float16(np.abs(q_G).max() / np.float32(127) * np.float32(codes.sum())))
        score += key_step * step * int(key_codes @ codes) + lowest * stored_sum
    return score


@pytest.mark.parametrize("rotated", [False, True])
@every_type
def test_attention_has_the_scores_of_a_query_in_blocks(name: str, rotated: bool) -> None:
    random, heads, tokens, head_dim = np.random.default_rng(4), 2, 5, 64
    config = Config.from_dict(TINY | {"head_dim": head_dim, "num_key_value_heads": heads, "num_hidden_layers": 1})
    k_BKTH = (random.standard_normal((1, heads, tokens, head_dim)) + 2).astype(np.float32)
    q_BTNH = (random.standard_normal((1, 3, 2 * heads, head_dim)) + 1).astype(np.float32)
    scheme = ggml(name, "q8_0", rotated)
    cache = KVCache(config, 1, scheme)
    k_BKSH, v_BKSH, positions_BS = cache.update(0, k_BKTH, k_BKTH, np.arange(tokens)[None])
    y_BTNH = ggml_ops(scheme).attend(q_BTNH, k_BKSH, v_BKSH, np.full((1, 3), tokens), positions_BS, None)

    width = head_dim if rotated else 1
    key_bytes = gguf.quants.quantize(hadamard(interleaved(k_BKTH[0]), width), gguf_type(name))
    values = np.asarray(v_BKSH, np.float64)[0]
    for t, n in np.ndindex(3, 2 * heads):
        q_H = hadamard(interleaved(q_BTNH[0, t, n]), width)
        scores_S = np.array([dot(name, key_bytes[n // 2, s], q_H) for s in range(tokens)]) * head_dim**-0.5
        weights_S = np.exp(scores_S - scores_S.max())
        expected = weights_S / weights_S.sum() @ values[n // 2]
        np.testing.assert_allclose(y_BTNH[0, t, n], expected, atol=2e-5)


def test_the_quantised_query_is_an_operator_of_the_forward_pass(tmp_path) -> None:
    weights = opened(written(tmp_path, head_dim=64))
    token_ids_BT = np.random.default_rng(5).integers(0, weights.config.vocab_size, (2, 12))
    positions_BT = np.tile(np.arange(12), (2, 1))

    def logits(scheme: Scheme, **settings) -> np.ndarray:
        return forward(weights, token_ids_BT, positions_BT, new_cache(weights, 2, scheme), **settings)

    exact = logits(SCHEMES["float32"])
    for name in ("ggml-q8_0", "ggml-q5_1-rotated"):
        scheme = SCHEMES[name]
        keys_only, both = logits(scheme), logits(scheme, ops=ggml_ops(scheme))
        assert 0 < np.abs(both - keys_only).max() < np.abs(exact).max() / 10
        assert np.abs(both - exact).max() < np.abs(exact).max() / 3


@every_type
@pytest.mark.parametrize(("head_dim", "rotated"), [(48, False), (80, False), (32, True), (96, True)])
def test_a_head_that_does_not_fill_its_blocks_is_refused(name: str, head_dim: int, rotated: bool) -> None:
    with pytest.raises(InputError, match=f"head_dim.* {head_dim}"):
        ggml(name, name, rotated).keys.store(layer=0, rows=1, heads=2, head_dim=head_dim)


def test_other_types_and_other_schemes_are_refused() -> None:
    with pytest.raises(InputError, match="q8_0, q4_0, q4_1, q5_0, q5_1, found 'q6_0'"):
        ggml("q8_0", "q6_0")
    with pytest.raises(InputError, match="queries are quantised"):
        ggml_ops(SCHEMES["int8"])


@every_type
def test_a_scale_beyond_float16_is_refused(name: str) -> None:
    x_BKTH = np.ones((1, 1, 1, 32), np.float32)
    x_BKTH[..., 3:5] = 3e8, -3e8
    with pytest.raises(CacheError, match="float16"):
        TYPES[name].encode(x_BKTH)
