"""The caches of transformers, as they were recorded, and KIVI's rules."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.manifest import sha256
from refengine.codecs.fits import hqq_groups, kivi_groups
from refengine.codecs.huggingface import kivi, quantized_cache
from refengine.codecs.packing import pack_quarters, unpack_quarters
from refengine.config import Config
from refengine.errors import CacheError, InputError
from refengine.kvcache import KVCache
from refengine.scheme import Scheme
from tests.checkpoints import TINY

RECORDED = Path(__file__).parents[2] / "fixtures" / "quantized_cache"
MANIFEST = json.loads((RECORDED / "manifest.json").read_text())
VERSIONS = {"transformers-4.57.6": 1, "transformers-5.23.0": None}  # how many tokens each counts a pass for


def vectors(tokens: int) -> np.ndarray:
    """Without equal values, so that what is coded differs from what came."""
    return np.random.default_rng(tokens).standard_normal((1, 2, tokens, 64)).astype(np.float32)


def reads(scheme: Scheme, x_BKSH: np.ndarray, passes: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values that attention reads in each pass; both are fed the same vectors."""
    _, heads, _, head_dim = x_BKSH.shape
    model = {"head_dim": head_dim, "num_hidden_layers": 1, "num_key_value_heads": heads}
    cache, start, found = KVCache(Config.from_dict(TINY | model), 1, scheme), 0, []
    for tokens in passes:
        new = x_BKSH[:, :, start : start + tokens]
        k_BKSH, v_BKSH, _ = cache.update(0, new, new, np.arange(start, start + tokens)[None])
        found.append((np.array(k_BKSH), np.array(v_BKSH)))
        start += tokens
    return found


def unchanged(read_BKSH: np.ndarray, x_BKSH: np.ndarray) -> list[int]:
    """The tokens that are read as they came."""
    same_BKSH = read_BKSH == x_BKSH[:, :, : read_BKSH.shape[2]]
    return np.flatnonzero(same_BKSH.all(axis=(0, 1, 3))).tolist()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", ["quanto-4", "quanto-2", "hqq-4", "hqq-2", "hqq-8"])
def test_attention_reads_what_transformers_gave_it(version: str, case: str) -> None:
    backend, bits = case.split("-")
    axes = MANIFEST["axes"][backend]
    settings = MANIFEST["group_size"], MANIFEST["residual_length"], VERSIONS[version]
    scheme = quantized_cache(backend, int(bits), axes["key"], axes["value"], *settings)
    with np.load(RECORDED / f"{version}.npz") as recorded:
        found = reads(scheme, recorded["x_BKSH"], MANIFEST["passes"])
        for index in MANIFEST["kept_passes"]:
            for name, x_BKSH in zip("kv", found[index], strict=True):
                expected = recorded[f"{case}.{index}.{name}_BKSH"]
                if backend == "quanto":
                    np.testing.assert_array_equal(x_BKSH, expected)
                else:  # torch sums in another order; with another code a value would be 1e-3 off at least
                    off_BKSH = np.abs(x_BKSH - expected)
                    assert off_BKSH.max() <= 4 * np.spacing(x_BKSH.max())
                    assert (off_BKSH > 5e-5).mean() < 0.01  # the group of the outlier of 1e4


def test_what_was_recorded_is_what_the_manifest_says() -> None:
    assert {name: entry["sha256"] for name, entry in MANIFEST["files"].items()} == {
        path.name: sha256(path) for path in RECORDED.glob("*.npz")
    }
    assert {f"{version}.npz" for version in VERSIONS} == set(MANIFEST["files"])


def test_the_prompt_is_coded_at_once_and_all_is_coded_again_when_enough_wait() -> None:
    x_BKSH = vectors(30)
    prompt, *steps = reads(quantized_cache("quanto", 4, residual_length=8), x_BKSH, [10, *[1] * 20])
    assert unchanged(prompt[0], x_BKSH) == list(range(10))
    for tokens, (k_BKSH, _) in enumerate(steps, start=11):
        coded = 10 + (tokens - 11) // 8 * 8  # the newest token waits until attention has read it
        assert unchanged(k_BKSH, x_BKSH) == list(range(coded, tokens))


def test_groups_by_channel_that_do_not_come_out_even_are_refused() -> None:
    scheme = quantized_cache("quanto", 4, axis_key=-1)
    reads(scheme, vectors(32), [32])  # 2 heads make it 64
    with pytest.raises(CacheError, match=r"multiple of the group size 64.* found 66"):
        reads(scheme, vectors(33), [33])


@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.sampled_from([2, 4, 8]))
def test_the_zero_point_of_hqq_makes_errors_no_larger_on_average(seed: int, size: float, bits: int) -> None:
    levels = 2**bits - 1
    x_XG = (np.random.default_rng(seed).standard_t(2, (40, 64)) * size).astype(np.float32)
    lowest_X1 = x_XG.min(axis=1, keepdims=True)
    step_X1 = np.maximum((x_XG.max(axis=1, keepdims=True) - lowest_X1) / levels, np.float32(5e-5))
    plain_XG = np.rint((x_XG - lowest_X1) / step_X1) * step_X1 + lowest_X1
    codes_XG, scale_X, zero_X = hqq_groups(x_XG, levels)
    tuned_XG = (codes_XG - zero_X[:, None]) * scale_X[:, None]
    assert np.abs(tuned_XG - x_XG).mean() <= np.abs(plain_XG - x_XG).mean() * 1.01


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_keeps_the_tail_of_keys_and_the_newest_values_as_they_came(bits: int) -> None:
    x_BKSH = vectors(150)
    prompt, *steps = reads(kivi(bits, residual=64), x_BKSH, [70, *[1] * 80])
    np.testing.assert_array_equal(prompt, (x_BKSH[:, :, :70],) * 2)
    for before, (k_BKSH, v_BKSH) in enumerate(steps, start=70):
        assert unchanged(k_BKSH, x_BKSH) == list(range(before - before % 64, before + 1))
        assert unchanged(v_BKSH, x_BKSH) == list(range(before - 64, before + 1))


@given(st.integers(0, 1000), st.sampled_from([3, 15]), st.floats(0, 100))
def test_kivi_rounds_every_step_of_a_group_to_float16(seed: int, levels: int, centre: float) -> None:
    x_G = (np.random.default_rng(seed).standard_normal(32) + centre).astype(np.float32)
    codes_1G, scale_1, zero_1 = kivi_groups(x_G[None], levels)
    rounded_G = [np.float16(x) for x in x_G]
    lowest, highest = min(rounded_G), max(rounded_G)
    step = np.float16(np.float16(highest - lowest) / np.float16(levels))
    expected = [min(round(float(np.float16(np.float16(x - lowest) / step))), levels) for x in rounded_G]
    assert (scale_1[0], zero_1[0], codes_1G[0].tolist()) == (step, lowest, expected)


def test_kivi_shares_scales_among_tokens_of_a_key_channel_and_among_channels_of_a_value() -> None:
    scheme, x_BKTH = kivi(2), vectors(64)
    codes, scale, zero = scheme.keys.codec.encode(x_BKTH)
    assert (codes.shape, scale.shape, zero.shape) == ((1, 2, 2, 32, 16), (1, 2, 2, 64), (1, 2, 2, 64))
    assert zero[0, 1, 1, 5] == x_BKTH[0, 1, 32:, 5].min().astype(np.float16)
    codes, scale, zero = scheme.values.codec.encode(x_BKTH)
    assert (codes.shape, scale.shape, zero.shape) == ((1, 2, 64, 16), (1, 2, 64, 2), (1, 2, 64, 2))
    assert zero[0, 1, 40, 1] == x_BKTH[0, 1, 40, 32:].min().astype(np.float16)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=10))
def test_four_codes_of_two_bits_are_packed_into_a_byte_lowest_first(quarters: list[int]) -> None:
    codes = np.array(quarters * 4)
    packed = pack_quarters(codes)
    assert packed.tolist() == [sum(int(code) << 2 * i for i, code in enumerate(four)) for four in codes.reshape(-1, 4)]
    np.testing.assert_array_equal(unpack_quarters(packed), codes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: quantized_cache("gptq", 4),
        lambda: quantized_cache("quanto", 8),
        lambda: quantized_cache("hqq", 3),
        lambda: quantized_cache("quanto", 4, axis_key=1),
        lambda: quantized_cache("hqq", 4, axis_value=-1),
        lambda: quantized_cache("quanto", 4, residual_length=1),
        lambda: kivi(4, residual=100),
        lambda: kivi(3),
        lambda: kivi(4, group_size=24, residual=48),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Callable[[], Scheme]) -> None:
    with pytest.raises(InputError, match=r"KV cache: expected .*, found"):
        make()


@pytest.mark.parametrize("scheme", [quantized_cache("quanto", 4), quantized_cache("hqq", 4), kivi(2)])
def test_a_head_that_groups_do_not_divide_is_refused(scheme: Scheme) -> None:
    with pytest.raises(InputError, match="head_dim 72"):
        scheme.values.store(layer=0, rows=1, heads=2, head_dim=72)
