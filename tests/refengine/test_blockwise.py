"""Attention in blocks is attention, computes no block that nobody sees, and needs no more memory for more tokens."""

import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine import blockwise
from refengine.blockwise import BLOCKWISE, attend_blockwise
from refengine.generate import generate, new_cache
from refengine.model import forward
from refengine.ops import OPS, Ops, attend
from refengine.tokens import left_padded
from tests.refengine.rewrites import is_noise, trained_run
from tests.refengine.strategies import (
    BOUND,
    Prompts,
    one_shot,
    opened,
    padded_positions,
    prompts,
    relative_error,
    written,
)


@given(
    positions_BS=padded_positions(rows=2, most=11),
    new=st.integers(1, 11),
    window=st.none() | st.integers(1, 8),
    blocks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 9),
)
def test_attention_in_blocks_of_any_size_is_attention(positions_BS, new, window, blocks, heads, seed):
    (B, S), (K, G), H = positions_BS.shape, heads, 5
    rng = np.random.default_rng(seed)
    # Large enough that an exponential without its maximum taken off would overflow.
    q_BTNH = 100 * rng.standard_normal((B, new, K * G, H))
    k_BKSH, v_BKSH = 10 * rng.standard_normal((2, B, K, S, H))
    given = (q_BTNH, k_BKSH, v_BKSH, positions_BS[:, -new:], positions_BS, window)
    found = attend_blockwise(*given, query_block=blocks[0], key_block=blocks[1])
    assert relative_error(found, attend(*given)) <= BOUND


@given(rows=prompts, blocks=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_a_model_that_attends_in_blocks_gives_the_logits_of_each_row_alone(model, rows: Prompts, blocks):
    ops = Ops(attend=partial(attend_blockwise, query_block=blocks[0], key_block=blocks[1]))
    token_ids_BT, positions_BT = left_padded(rows)
    cache, half = new_cache(model, len(rows)), token_ids_BT.shape[1] // 2 or 1
    passes = [slice(0, half), slice(half, None)] if half < token_ids_BT.shape[1] else [slice(None)]
    logits_BTV = np.concatenate(
        [forward(model, token_ids_BT[:, new], positions_BT[:, new], cache, ops=ops) for new in passes], axis=1
    )
    for row, logits_TV, positions_T in zip(rows, logits_BTV, positions_BT, strict=True):
        assert relative_error(logits_TV[positions_T >= 0], one_shot(model, row)) <= BOUND


@given(rows=prompts)
def test_it_generates_the_same_tokens(model, rows: Prompts):
    assert generate(model, rows, 6, ops=BLOCKWISE) == generate(model, rows, 6, cache=False)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("blocks", [(7, 5), (128, 256)])
def test_the_trained_model_in_float32_differs_by_no_more_than_noise(seed: int, blocks: tuple[int, int]) -> None:
    run, ops = trained_run(seed), Ops(attend=partial(attend_blockwise, query_block=blocks[0], key_block=blocks[1]))
    cache = new_cache(run.weights, len(run.rows))
    logits_BTV = run.fed(lambda ids, positions: forward(run.weights, ids, positions, cache, ops=ops))
    assert is_noise(run, logits_BTV)
    assert not is_noise(run, forward(run.weights, run.token_ids_BT, run.positions_BT, ops=Ops(attend=_too_wide)))


def _too_wide(*given: np.ndarray | None) -> np.ndarray:
    """Attention that forgets what is more than five tokens ago."""
    return attend_blockwise(*given[:-1], window=5)


def blocks_computed(monkeypatch: pytest.MonkeyPatch, window: int | None) -> int:
    computed = []
    scores = blockwise.scores
    monkeypatch.setattr(blockwise, "scores", lambda *given: computed.append(1) or scores(*given))
    x_BTNH, positions_BT = np.ones((1, 40, 1, 4)), np.arange(40)[None]
    kv_BKSH = x_BTNH.swapaxes(1, 2)
    attend_blockwise(x_BTNH, kv_BKSH, kv_BKSH, positions_BT, positions_BT, window, query_block=10, key_block=10)
    return len(computed)


@pytest.mark.parametrize(("window", "blocks"), [(None, 1 + 2 + 3 + 4), (10, 1 + 2 + 2 + 2), (1, 4)])
def test_blocks_that_no_query_sees_are_not_computed(monkeypatch, window, blocks):
    assert blocks_computed(monkeypatch, window) == blocks


def peak_of(work: Callable[[], object]) -> int:
    """The most memory that was allocated at once, beyond what was held before."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - before


def test_memory_of_a_prefill_is_far_below_that_of_all_scores():
    T, N, H = 1024, 4, 8
    x_BTNH, positions_BT = np.ones((1, T, N, H), np.float32), np.arange(T)[None]
    kv_BKSH = x_BTNH.swapaxes(1, 2)
    peak = peak_of(lambda: attend_blockwise(x_BTNH, kv_BKSH, kv_BKSH, positions_BT, positions_BT, None))
    assert peak < 4 * N * T * T / 10


def decode_peak(weights, length: int, ops: Ops) -> int:
    """Of one decode step after so many tokens, with room left in the cache."""
    cache = new_cache(weights, 1)
    positions_1T = np.arange(length)[None]
    forward(weights, positions_1T % weights.config.vocab_size, positions_1T, cache, last=True)
    step = np.array([[1]]), np.array([[length]])
    forward(weights, *step, cache, ops=ops)  # the first makes room
    step = np.array([[1]]), np.array([[length + 1]])
    return peak_of(lambda: forward(weights, *step, cache, ops=ops))


def test_a_decode_step_allocates_nothing_that_grows_with_the_sequence(tmp_path):
    weights = opened(written(tmp_path, max_position_embeddings=5000))
    short, long = (decode_peak(weights, length, BLOCKWISE) for length in (300, 4200))
    assert long < 1.2 * short
    # The measure sees what grows: with attention as it is, a step after more tokens needs more.
    assert decode_peak(weights, 4200, OPS) > 1.5 * decode_peak(weights, 300, OPS)
