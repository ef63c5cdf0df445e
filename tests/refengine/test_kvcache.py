"""The cache's own promises: shapes, bytes, growth in place, what a window keeps, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from refengine.config import Config
from refengine.errors import CacheError
from refengine.kvcache import NO_CACHE, KVCache
from refengine.scheme import stored_as
from tests.checkpoints import TINY

CONFIG = Config.from_dict(TINY)
LAYERS, KV_HEADS, HEAD_DIM = CONFIG.num_hidden_layers, CONFIG.num_key_value_heads, CONFIG.head_dim
FLOATS = [np.float64, np.float32, np.float16, bfloat16]


def vectors(rows: int, tokens: int, seed: int = 0, dtype: np.typing.DTypeLike = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, KV_HEADS, tokens, HEAD_DIM)).astype(dtype)


def positions(rows: int, start: int, tokens: int) -> np.ndarray:
    return np.tile(np.arange(start, start + tokens), (rows, 1))


def feed(cache: KVCache, positions_BT: np.ndarray, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One pass of random vectors through every layer; what each layer's `update` returned."""
    rows, tokens = positions_BT.shape
    return [
        cache.update(layer, vectors(rows, tokens, 2 * seed), vectors(rows, tokens, 2 * seed + 1), positions_BT)
        for layer in range(LAYERS)
    ]


@given(
    rows=st.integers(1, 4),
    passes=st.lists(st.integers(1, 9), max_size=6),
    dtype=st.sampled_from(FLOATS),
    window=st.none() | st.integers(1, 12),
)
def test_nbytes_is_two_times_layers_rows_kv_heads_length_head_dim_and_itemsize(
    rows: int, passes: list[int], dtype: np.typing.DTypeLike, window: int | None
) -> None:
    cache, fed = KVCache(CONFIG, rows, stored_as(dtype), window), 0
    for tokens in passes:
        feed(cache, positions(rows, fed, tokens))
        fed += tokens
        assert cache.length == (fed if window is None else min(fed, window - 1))
        assert cache.batch_size == rows
        assert cache.nbytes == 2 * LAYERS * rows * KV_HEADS * cache.length * HEAD_DIM * np.dtype(dtype).itemsize


@pytest.mark.parametrize("asked", [np.float32, np.float64])
@pytest.mark.parametrize("stored", FLOATS)
def test_what_is_read_has_the_dtype_of_what_was_written_and_the_values_of_what_is_stored(
    stored: np.typing.DTypeLike, asked: np.typing.DTypeLike
) -> None:
    cache = KVCache(CONFIG, 3, stored_as(stored))
    k, v = vectors(3, 4, 1, asked), vectors(3, 4, 2, asked)
    k_BKSH, v_BKSH, positions_BS = cache.update(0, k, v, positions(3, 0, 4))
    assert (k_BKSH.dtype, v_BKSH.dtype) == (asked, asked)
    np.testing.assert_array_equal(k_BKSH, k.astype(stored).astype(asked))
    np.testing.assert_array_equal(v_BKSH, v.astype(stored).astype(asked))
    np.testing.assert_array_equal(positions_BS, positions(3, 0, 4))


@given(passes=st.lists(st.integers(1, 7), min_size=1, max_size=8), rows=st.integers(1, 3))
def test_every_layer_returns_all_its_tokens_in_the_order_they_came(passes: list[int], rows: int) -> None:
    cache, fed, keys, values = KVCache(CONFIG, rows), 0, [], []
    for seed, tokens in enumerate(passes):
        returned = feed(cache, positions(rows, fed, tokens), seed)
        fed += tokens
        keys.append(vectors(rows, tokens, 2 * seed))
        values.append(vectors(rows, tokens, 2 * seed + 1))
        for k_BKSH, v_BKSH, positions_BS in returned:
            np.testing.assert_array_equal(k_BKSH, np.concatenate(keys, axis=2))
            np.testing.assert_array_equal(v_BKSH, np.concatenate(values, axis=2))
            np.testing.assert_array_equal(positions_BS, positions(rows, 0, fed))


def test_storage_moves_only_when_it_doubles_and_is_written_in_place_between() -> None:
    cache = KVCache(CONFIG, 2)
    places: list[set[int]] = [set() for _ in range(2 * LAYERS)]
    for step in range(70):
        returned = feed(cache, positions(2, step, 1), step)
        arrays = [array for k_BKSH, v_BKSH, _ in returned for array in (k_BKSH, v_BKSH)]
        for seen, array in zip(places, arrays, strict=True):
            here = array.__array_interface__["data"][0]
            doubled = step & (step - 1) == 0  # so many tokens filled it: 0, 1, 2, 4, 8, ...
            assert (here not in seen) == doubled, step
            if doubled:
                seen.clear()  # freed memory may be given out again
            seen.add(here)


def test_layers_may_come_in_any_order_within_a_pass() -> None:
    forwards, backwards = KVCache(CONFIG, 1), KVCache(CONFIG, 1)
    for start in (0, 3):
        for one, other in zip(range(LAYERS), reversed(range(LAYERS)), strict=True):
            for cache, layer in ((forwards, one), (backwards, other)):
                cache.update(layer, vectors(1, 3, layer), vectors(1, 3, 10 + layer), positions(1, start, 3))
    for layer in range(LAYERS):
        np.testing.assert_array_equal(forwards.read(layer, np.float32), backwards.read(layer, np.float32))


def test_no_cache_gives_back_what_came() -> None:
    k, v, where = vectors(2, 3), vectors(2, 3, 1), positions(2, 5, 3)
    assert all(one is other for one, other in zip(NO_CACHE.update(0, k, v, where), (k, v, where), strict=True))


@given(window=st.integers(1, 9), passes=st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_a_windowed_cache_gives_every_token_that_is_seen_and_keeps_no_more_than_will_be(
    window: int, passes: list[int]
) -> None:
    cache, fed = KVCache(CONFIG, 2, window=window), 0
    for tokens in passes:
        held = cache.length
        for _, _, positions_BS in feed(cache, positions(2, fed, tokens)):
            np.testing.assert_array_equal(positions_BS, positions(2, fed - held, held + tokens))
        fed += tokens
        assert cache.length == min(fed, window - 1)
        np.testing.assert_array_equal(cache.positions_BS, positions(2, fed - cache.length, cache.length))


def test_a_windowed_cache_gives_back_the_memory_of_a_long_prompt_and_then_stays_small() -> None:
    window = 6
    cache = KVCache(CONFIG, 1, window=window)
    feed(cache, positions(1, 0, 1000))
    moves, last = 0, 0
    for step in range(200):
        k_BKSH = feed(cache, positions(1, 1000 + step, 1))[0][0]
        assert k_BKSH.base is not None
        assert k_BKSH.base.shape[2] <= 8 * window
        here = k_BKSH.base.__array_interface__["data"][0]
        moves, last = moves + (here != last), here
    assert moves <= 2 * 200 // window  # not at every step


def test_crop_forgets_the_newest_and_what_comes_next_takes_its_place() -> None:
    cache = KVCache(CONFIG, 2)
    feed(cache, positions(2, 0, 5), seed=1)
    cache.crop(3)
    assert cache.length == 3
    k_BKSH, _, positions_BS = feed(cache, positions(2, 3, 1), seed=2)[0]
    np.testing.assert_array_equal(k_BKSH, np.concatenate([vectors(2, 5, 2)[:, :, :3], vectors(2, 1, 4)], axis=2))
    np.testing.assert_array_equal(positions_BS, positions(2, 0, 4))


def test_select_orders_and_repeats_rows_and_leaves_out_slots_that_none_of_them_uses() -> None:
    cache = KVCache(CONFIG, 3)
    feed(cache, np.array([[-1, -1, 0, 1], [0, 1, 2, 3], [-1, 0, -1, 1]]), seed=1)
    selected = cache.select([2, 0, 2])
    np.testing.assert_array_equal(selected.positions_BS, [[0, -1, 1], [-1, 0, 1], [0, -1, 1]])
    for layer in range(LAYERS):
        for mine, others in zip(selected.read(layer, np.float32), cache.read(layer, np.float32), strict=True):
            np.testing.assert_array_equal(mine, others[[2, 0, 2]][:, :, 1:])


def test_select_and_merge_leave_the_caches_they_came_from_alone() -> None:
    cache, other = KVCache(CONFIG, 2), KVCache(CONFIG, 1)
    feed(cache, positions(2, 0, 3), seed=1)
    feed(other, positions(1, 0, 2), seed=2)
    before = [np.copy(array) for layer in range(LAYERS) for array in cache.read(layer, np.float32)]
    feed(cache.select([1, 0]), positions(2, 3, 1), seed=3)
    feed(cache.merge(other), positions(3, 3, 1), seed=4)
    after = [array for layer in range(LAYERS) for array in cache.read(layer, np.float32)]
    for one, same in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, same)


def test_merge_puts_the_shorter_rows_behind_empty_slots_of_finite_numbers() -> None:
    long, short = KVCache(CONFIG, 2), KVCache(CONFIG, 1)
    feed(long, positions(2, 0, 4), seed=1)
    feed(short, positions(1, 0, 2), seed=2)
    merged = short.merge(long)
    np.testing.assert_array_equal(merged.positions_BS, [[-1, -1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3]])
    k_BKSH, v_BKSH = merged.read(LAYERS - 1, np.float32)
    np.testing.assert_array_equal(k_BKSH[0, :, 2:], vectors(1, 2, 4)[0])
    np.testing.assert_array_equal(v_BKSH[1:], vectors(2, 4, 3))
    assert np.isfinite(k_BKSH).all()
    assert np.isfinite(v_BKSH).all()


def refused(call: object, *args: object) -> str:
    assert callable(call)
    with pytest.raises(CacheError) as error:
        call(*args)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_vectors_of_another_shape_are_refused_with_both_shapes() -> None:
    cache = KVCache(CONFIG, 2)
    wrong = np.zeros((2, CONFIG.num_attention_heads, 3, HEAD_DIM), np.float32)
    text = refused(cache.update, 0, wrong, wrong, positions(2, 0, 3))
    assert f"(2, {KV_HEADS}, 3, {HEAD_DIM})" in text
    assert f"(2, {CONFIG.num_attention_heads}, 3, {HEAD_DIM})" in text
    assert "KV heads" in text


def test_vectors_for_another_number_of_rows_are_refused() -> None:
    cache = KVCache(CONFIG, 2)
    assert "found (3, " in refused(cache.update, 0, vectors(3, 1), vectors(3, 1), positions(3, 0, 1))


def test_a_layer_that_comes_twice_in_a_pass_is_refused() -> None:
    cache = KVCache(CONFIG, 1)
    cache.update(1, vectors(1, 2), vectors(1, 2), positions(1, 0, 2))
    text = refused(cache.update, 1, vectors(1, 2), vectors(1, 2), positions(1, 0, 2))
    assert "layer 1 came twice" in text


def test_a_layer_that_the_model_does_not_have_is_refused_and_leaves_no_pass_behind() -> None:
    cache = KVCache(CONFIG, 1)
    assert f"layer {LAYERS}" in refused(cache.update, LAYERS, vectors(1, 2), vectors(1, 2), positions(1, 0, 2))
    assert cache.length == 0
    feed(cache, positions(1, 0, 2))


def test_a_layer_that_brings_other_tokens_than_those_before_it_is_refused() -> None:
    cache = KVCache(CONFIG, 1)
    feed(cache, positions(1, 0, 3))
    cache.update(0, vectors(1, 1), vectors(1, 1), positions(1, 3, 1))
    refused(cache.update, 1, vectors(1, 2), vectors(1, 2), positions(1, 3, 2))


@pytest.mark.parametrize("length", [-1, 4])
def test_a_crop_to_more_or_less_than_there_is_is_refused(length: int) -> None:
    cache = KVCache(CONFIG, 1)
    feed(cache, positions(1, 0, 3))
    text = refused(cache.crop, length)
    assert f"cannot crop to {length}" in text
    assert "it holds 3" in text


def test_a_crop_of_a_window_that_has_dropped_tokens_is_refused_but_not_to_what_it_holds() -> None:
    cache = KVCache(CONFIG, 1, window=4)
    for start in range(9):
        feed(cache, positions(1, start, 1))
    empty = KVCache(CONFIG, 1, window=4)
    for same in (cache, cache.select([0, 0]), cache.merge(empty), empty.merge(cache)):
        assert "dropped" in refused(same.crop, 2)
        same.crop(3)
        np.testing.assert_array_equal(same.positions_BS.max(axis=0), [6, 7, 8])


def test_a_crop_of_a_window_that_has_dropped_nothing_is_allowed() -> None:
    cache = KVCache(CONFIG, 1, window=9)
    feed(cache, positions(1, 0, 5))
    cache.crop(2)
    assert cache.length == 2


@pytest.mark.parametrize("rows", [[2], [-1], [0, 5], [[0]]])
def test_selecting_rows_that_are_not_there_is_refused(rows: list[int]) -> None:
    text = refused(KVCache(CONFIG, 2).select, rows)
    assert "rows from 0 to 1" in text
    assert str(rows) in text


@pytest.mark.parametrize(
    "other",
    [
        KVCache(CONFIG, 1, stored_as(np.float64)),
        KVCache(CONFIG, 1, window=4),
        KVCache(replace(CONFIG, num_hidden_layers=LAYERS + 1), 1),
    ],
    ids=["scheme", "window", "model"],
)
def test_merging_two_kinds_of_cache_is_refused(other: KVCache) -> None:
    assert "two kinds" in refused(KVCache(CONFIG, 1).merge, other)


@pytest.mark.parametrize("verb", ["select", "merge", "crop"])
def test_a_pass_that_was_broken_off_cannot_be_used(verb: str) -> None:
    cache = KVCache(CONFIG, 1)
    cache.update(0, vectors(1, 2), vectors(1, 2), positions(1, 0, 2))
    argument = {"select": [0], "merge": KVCache(CONFIG, 1), "crop": 1}[verb]
    assert "broken off" in refused(getattr(cache, verb), argument)
