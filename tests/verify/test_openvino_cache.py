"""OpenVINO's attention with each of its caches, against the reference with the scheme that models it."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.codecs.openvino import openvino, openvino_turbo
from refengine.codecs.packing import pack_threes, unpack_nibbles, unpack_threes
from refengine.errors import CacheError, InputError
from refengine.quant import SCHEMES
from refengine.scheme import FLOAT32, Scheme
from tests.verify.openvino_attention import B, K, N, OpenVINOLayer, ReferenceLayer

HEAD_DIM = 64
TOLERANCE = 1e-5  # of outputs of size one: sums in another order, and the exponential of the plugin's own
BY_CHANNEL = {"KEY_CACHE_QUANT_MODE": "BY_CHANNEL"}
TURBO = {"KEY_CACHE_QUANT_ALG": "TURBO", "VALUE_CACHE_QUANT_ALG": "TURBO"}
Case = tuple[Mapping[str, str], Scheme]


def stored(keys: str, values: str, key_group: int = 0, value_group: int = 0) -> dict[str, str]:
    """The plugin's settings for precisions and sizes of groups; 0 is its default."""
    return {
        "KEY_CACHE_PRECISION": keys,
        "VALUE_CACHE_PRECISION": values,
        "KEY_CACHE_GROUP_SIZE": str(key_group),
        "VALUE_CACHE_GROUP_SIZE": str(value_group),
    }


SIZES = (1, 2, 4, 8, 16, 32, 64)
READABLE: Mapping[str, Case] = {
    "by default": ({}, SCHEMES["ov-u8"]),
    "f16": (stored("f16", "f16"), SCHEMES["ov-f16"]),
    "u8 in 32": (stored("u8", "u8", 32, 32), SCHEMES["ov-u8-g32"]),
    "u8 by channel": (stored("u8", "u8") | BY_CHANNEL, SCHEMES["ov-u8-channel"]),
    **{f"u8 in {n} and {64 // n}": (stored("u8", "u8", n, 64 // n), openvino(8, 8, n, 64 // n)) for n in SIZES},
    **{f"u8 by channel of {n}": (stored("u8", "u8", n) | BY_CHANNEL, openvino(8, 8, by_channel=n)) for n in SIZES[1:]},
}
NIBBLES: Mapping[str, Case] = {
    "u4": (stored("u4", "u4"), SCHEMES["ov-u4"]),
    "u4 in 32": (stored("u4", "u4", 32, 32), SCHEMES["ov-u4-g32"]),
    "u4 in 8 and 16": (stored("u4", "u4", 8, 16), openvino(4, 4, 8, 16)),
}
OTHERS: Mapping[str, Case] = {
    "u8 and u4": (stored("u8", "u4", 0, 32), SCHEMES["ov-u8-u4"]),
    "u4 and u8": (stored("u4", "u8", 16), openvino(4, 8, 16)),
    "u8 by channel and u4": (stored("u8", "u4", 32, 64) | BY_CHANNEL, openvino(8, 4, by_channel=32)),
    "TurboQuant u4": (stored("u4", "u4") | TURBO, SCHEMES["ov-turbo-u4"]),
    "TurboQuant u3": (stored("u3", "u3") | TURBO, SCHEMES["ov-turbo-u3"]),
}
CASES = READABLE | NIBBLES | OTHERS
WIDE = pytest.mark.skipif(
    not {"X86_V4", "AVX512_SKX"} & set(np.show_config(mode="dicts")["SIMD Extensions"]["found"]),
    reason="modelled as the plugin rounds with 16 lanes",
)
chunkings = st.lists(st.integers(1, 40), min_size=2, max_size=5)
seeds = st.integers(0, 2**32 - 1)


def every(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    """A test of each."""
    narrower = {"u8 in 8 and 8", "TurboQuant u4", "TurboQuant u3"}  # rounded otherwise with eight lanes
    return pytest.mark.parametrize("name", [pytest.param(name, marks=[WIDE] * (name in narrower)) for name in cases])


@cache
def compiled(name: str, head_dim: int = HEAD_DIM) -> OpenVINOLayer:
    """One layer for all examples: compiling costs more than running."""
    return OpenVINOLayer(head_dim, CASES[name][0])


def vectors(random: np.random.Generator, tokens: int, head_dim: int, odd: bool) -> np.ndarray:
    """`x_BKTH`: normally distributed, or `odd`: with tokens and channels that make bad scales."""
    x_BKTH = random.standard_normal((B, K, tokens, head_dim), dtype=np.float32)
    if odd:
        x_BKTH[..., :4] = [0, 0.3, 1e-20, 1000] + x_BKTH[..., :4] * [0, 0, 0, 1e-4]
        kind_BKT = random.integers(0, 9, (B, K, tokens))
        x_BKTH[kind_BKT == 1] = random.standard_normal()
        x_BKTH[kind_BKT == 2] = 0
        x_BKTH[kind_BKT == 3, 5] = 1e4
        x_BKTH[kind_BKT == 4] *= np.float32(1e-20)
        x_BKTH[kind_BKT == 5] *= np.float32(1e-37)  # whose scale has no finite inverse
        x_BKTH[kind_BKT == 6] = 1000 + x_BKTH[kind_BKT == 6] * np.float32(1e-4)  # a few different numbers
        x_BKTH[kind_BKT == 7] = np.arange(head_dim) // 2 == 5  # two equal ones: half of the sums of all vanish
    return x_BKTH


def both(
    name: str,
    chunks: Sequence[int],
    seed: int,
    odd_keys: bool = False,
    odd_values: bool = False,
    head_dim: int = HEAD_DIM,
) -> tuple[OpenVINOLayer, ReferenceLayer, float]:
    """Both layers after the same passes, and the largest difference between what they gave."""
    theirs, ours = compiled(name, head_dim), ReferenceLayer(head_dim, CASES[name][1])
    theirs.reset()
    random, worst = np.random.default_rng(seed), 0.0
    for tokens in chunks:
        q_BTNH = random.standard_normal((B, tokens, N, head_dim), dtype=np.float32)
        q_BTNH *= np.float32(1e-4 if odd_keys else 1)  # so that scores are of size one: beyond, float32 says nothing
        k_BKTH = vectors(random, tokens, head_dim, odd_keys)
        v_BKTH = vectors(random, tokens, head_dim, odd_values)
        difference = theirs.step(q_BTNH, k_BKTH, v_BKTH) - ours.step(q_BTNH, k_BKTH, v_BKTH)
        worst = max(worst, float(np.abs(difference).max()))
    return theirs, ours, worst


@every(READABLE)
@given(chunks=chunkings, seed=seeds, odd=st.booleans())
@settings(max_examples=8)
def test_the_state_holds_the_same_numbers(name: str, chunks: list[int], seed: int, odd: bool) -> None:
    theirs, ours, _ = both(name, chunks, seed, odd, odd)
    for found, expected in zip(theirs.held(), ours.held(), strict=True):
        np.testing.assert_array_equal(found, expected)


@every(NIBBLES)
@given(chunks=chunkings, seed=seeds, odd=st.booleans())
@settings(max_examples=8)
def test_the_state_holds_the_same_nibbles(name: str, chunks: list[int], seed: int, odd: bool) -> None:
    theirs, ours, _ = both(name, chunks, seed, odd, odd)
    scheme = CASES[name][1]
    for found, x, decoded, side in zip(
        theirs.held(), ours.fed(), ours.held(), (scheme.keys, scheme.values), strict=True
    ):
        # 2026.4 gives the codes for the values, and the low half of a byte first, which holds the second of two codes.
        codes = unpack_nibbles(side.codec.encode(x)[0])
        assert np.array_equal(found, codes) or np.array_equal(found, decoded)


@every({"by default": CASES["by default"], **NIBBLES, **OTHERS})
@given(chunks=chunkings, seed=seeds, odd=st.booleans())
@settings(max_examples=8)
def test_attention_reads_the_same_values(name: str, chunks: list[int], seed: int, odd: bool) -> None:
    theirs, ours, _ = both(name, chunks, seed, odd_values=odd)
    np.testing.assert_array_equal(theirs.values_attended(), ours.held()[1])


@every(CASES)
@given(chunks=chunkings, seed=seeds, odd=st.booleans())
@settings(max_examples=8)
def test_attention_gives_the_same(name: str, chunks: list[int], seed: int, odd: bool) -> None:
    assert both(name, chunks, seed, odd_keys=odd)[2] < TOLERANCE


@every({name: CASES[name] for name in ("by default", "TurboQuant u4", "TurboQuant u3")})
@pytest.mark.parametrize("head_dim", [128, 256, 512])
def test_larger_heads_have_the_same_values(name: str, head_dim: int) -> None:
    theirs, ours, worst = both(name, [9, 1, 6], seed=0, head_dim=head_dim)
    np.testing.assert_array_equal(theirs.values_attended(), ours.held()[1])
    assert worst < TOLERANCE


@pytest.mark.parametrize("name", ["by default", "u4", "u8 by channel of 4"])
@pytest.mark.parametrize("head_dim", [20, 80, 100])
def test_heads_that_fill_no_whole_registers_have_the_same_values(name: str, head_dim: int) -> None:
    theirs, ours, worst = both(name, [300, 1, 7], seed=0, head_dim=head_dim)
    np.testing.assert_array_equal(theirs.values_attended(), ours.held()[1])
    assert worst < TOLERANCE


@every({name: CASES[name] for name in ("by default", "u4", "u8 by channel", "TurboQuant u3")})
def test_only_the_first_pass_reads_what_came(name: str) -> None:
    theirs, scheme, random = compiled(name), CASES[name][1], np.random.default_rng(1)
    theirs.reset()
    others = [replace(scheme, first_pass_raw=False), FLOAT32]
    right, coded, raw = (ReferenceLayer(HEAD_DIM, each) for each in (scheme, *others))
    for layer_that_differs in (coded, raw):
        q_BTNH = random.standard_normal((B, 9, N, HEAD_DIM), dtype=np.float32)
        k_BKTH, v_BKTH = (vectors(random, 9, HEAD_DIM, odd=False) for _ in "kv")
        y_BTNH = theirs.step(q_BTNH, k_BKTH, v_BKTH)
        outputs = {layer: layer.step(q_BTNH, k_BKTH, v_BKTH) for layer in (right, coded, raw)}
        differences = {layer: np.abs(found - y_BTNH).max() for layer, found in outputs.items()}
        assert differences[right] < TOLERANCE
        assert differences[layer_that_differs] > 100 * TOLERANCE


KEYS_BY_CHANNEL_IN_U4 = """
import tests.verify.test_openvino_cache as tested
tested.compiled = lambda name, head_dim: tested.OpenVINOLayer(64, tested.stored("u4", "u4") | tested.BY_CHANNEL)
tested.CASES = {"keys by channel in u4": (None, tested.openvino(4, 4, by_channel=64))}
assert tested.both("keys by channel in u4", [9, 1, 6, 70], seed=0)[2] < tested.TOLERANCE
"""


def test_keys_by_channel_in_u4_kill_the_process_or_give_the_same() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KEYS_BY_CHANNEL_IN_U4], cwd=root, capture_output=True, text=True)
    assert done.returncode <= 0, done.stderr  # below zero: a signal, as in 2026.4


@pytest.mark.parametrize(
    ("head_dim", "theirs", "ours", "fitting"),
    [
        (64, stored("u8", "u8", 24), openvino(8, 8, 24), "divides head_dim 64, found 24"),
        (64, stored("u8", "u4", 0, 48), openvino(8, 4, value_group=48), "divides head_dim 64, found 48"),
        (40, stored("u8", "u8", 64) | BY_CHANNEL, openvino(8, 8, by_channel=64), "divides head_dim 40, found 64"),
        (96, stored("u4", "u4") | TURBO, openvino_turbo(4), "head_dim among 64, 128, 256, 512, found 96"),
    ],
)
def test_both_refuse_groups_that_do_not_fit(
    head_dim: int, theirs: Mapping[str, str], ours: Scheme, fitting: str
) -> None:
    with pytest.raises(RuntimeError, match=r"divided|divisible|group"):
        OpenVINOLayer(head_dim, theirs)
    with pytest.raises(InputError, match=fitting):
        ReferenceLayer(head_dim, ours)


def test_what_the_plugin_has_no_codes_for_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2 tokens"):
        ReferenceLayer(HEAD_DIM, openvino(8, 8, by_channel=1))
    with pytest.raises(InputError, match="4 or 8 bits, found 2 and 8"):
        openvino(2, 8)
    with pytest.raises(InputError, match="even group size, found 1"):  # two groups would share a byte
        openvino(8, 4, value_group=1)
    with pytest.raises(InputError, match="3 or 4 bits, found 8"):
        openvino_turbo(8)
    with pytest.raises(InputError, match="found 192"):  # which the plugin takes, and overruns its buffers
        ReferenceLayer(192, openvino_turbo(4))


@pytest.mark.parametrize("name", ["ov-f16", "ov-u8", "ov-u8-channel", "ov-u4", "ov-turbo-u4", "ov-turbo-u3"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_value_without_a_code_is_refused(name: str, value: float) -> None:
    layer, q_BTNH = ReferenceLayer(HEAD_DIM, SCHEMES[name]), np.zeros((B, 2, N, HEAD_DIM), np.float32)
    x_BKTH = np.zeros((B, K, 2, HEAD_DIM), np.float32)
    x_BKTH[0, 0, :, 3], x_BKTH[0, 0, 0, 4], x_BKTH[0, 0, 1, 3:5] = value, -value, -value
    with pytest.raises(CacheError):
        layer.step(q_BTNH, x_BKTH, x_BKTH)


@given(codes=st.lists(st.integers(0, 7), min_size=8, max_size=8), repeats=st.integers(0, 3))
def test_eight_codes_of_three_bits_are_three_bytes(codes: list[int], repeats: int) -> None:
    codes_RH = np.tile(np.array(codes, np.uint8), (repeats, 2))
    packed = pack_threes(codes_RH)
    assert packed.shape == (repeats, 6)
    np.testing.assert_array_equal(unpack_threes(packed), codes_RH)
    expected = sum(code << 3 * place for place, code in enumerate(codes))
    assert all(int.from_bytes(row[:3].tobytes(), "little") == expected for row in packed)
