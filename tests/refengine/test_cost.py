"""Costs on paper against what the engine does: operations counted, arrays weighed, shapes traced."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.config import Config
from refengine.cost import (
    Bytes,
    Flops,
    PassCost,
    cache_nbytes,
    generation_cost,
    kept_slots,
    pass_cost,
    scored_pairs,
    visible_pairs,
    weights_nbytes,
)
from refengine.errors import InputError
from refengine.kvcache import NO_CACHE, Cache, KVCache
from refengine.machine import Machine
from refengine.model import forward
from refengine.ops import QUERY_BLOCK, attention_mask
from refengine.quant import SCHEMES
from refengine.scheme import FLOAT32, Scheme, both
from refengine.trace import Recorder
from refengine.weights import Weights
from tests.checkpoints import TINY
from tests.refengine.counted import Weighed, counted_model
from tests.refengine.strategies import configs, opened, written

LONG = {"max_position_embeddings": 1024}
CONFIG = Config.from_dict(TINY | LONG)
WINDOWED = Config.from_dict(TINY | LONG | {"model_type": "mistral", "sliding_window": 5})
TOKENS = st.sampled_from([1, 2, 5, 33, QUERY_BLOCK, QUERY_BLOCK + 2, 2 * QUERY_BLOCK + 7])
PAST = st.sampled_from([0, 0, 1, 4, 7, QUERY_BLOCK + 1])


@contextmanager
def model_of(given: dict[str, Any]) -> Iterator[Weights]:
    """Its weights, in float32."""
    with tempfile.TemporaryDirectory() as directory:
        yield opened(written(Path(directory), **given | LONG), np.float32)


def run(weights: Weights, rows: int, start: int, tokens: int, cache: Cache = NO_CACHE, **options: Any) -> None:
    """One pass of rows alike, as generation makes it."""
    token_ids_BT = np.random.default_rng(tokens).integers(0, weights.config.vocab_size, (rows, tokens))
    forward(weights, token_ids_BT, np.tile(np.arange(start, start + tokens), (rows, 1)), cache, last=True, **options)


def cache_after(weights: Weights, rows: int, past: int, scheme: Scheme = FLOAT32) -> KVCache:
    """What generation has cached after `past` tokens."""
    cache = KVCache(weights.config, rows, scheme, weights.config.sliding_window)
    if past:
        run(weights, rows, 0, past, cache)
    return cache


BY_TOKEN = st.sampled_from(
    [SCHEMES[name] for name in ("float32", "float16", "bfloat16", "int8", "int8-symmetric", "ov-u8")]
)


def by_operator(flops: Flops) -> dict[str, int]:
    """The parts as the engine runs them: q, k, v in one product, gate and up in another."""
    parts = asdict(flops)
    stacked = {
        "qkv_proj": parts.pop("q_proj") + parts.pop("k_proj") + parts.pop("v_proj"),
        "gate_up_proj": parts.pop("gate_proj") + parts.pop("up_proj"),
        "rotate": parts.pop("rope"),
        "rms_norm": parts.pop("norms"),
        "silu_gate": parts.pop("activation"),
    }
    return parts | stacked


@given(model=configs(), rows=st.integers(1, 3), tokens=TOKENS, past=PAST)
@example(model={"attention_bias": True, "mlp_bias": True}, rows=2, tokens=3, past=4)
@example(model={"tie_word_embeddings": True}, rows=3, tokens=1, past=0)
@example(model={"model_type": "mistral", "sliding_window": 5}, rows=2, tokens=2 * QUERY_BLOCK + 7, past=QUERY_BLOCK)
def test_every_part_has_the_flops_that_the_engine_does_with_a_cache(
    model: dict[str, Any], rows: int, tokens: int, past: int
) -> None:
    with model_of(model) as weights:
        counted, ops, tally = counted_model(weights)
        run(counted, rows, past, tokens, cache_after(weights, rows, past), ops=ops)
        cost = pass_cost(weights.config, rows, tokens, past, FLOAT32)
    assert by_operator(cost.flops) == tally.flops
    assert cost.flops.total == tally.flops.total()


@given(model=configs(), rows=st.integers(1, 3), tokens=TOKENS)
def test_every_part_has_the_flops_that_the_engine_does_without_a_cache(
    model: dict[str, Any], rows: int, tokens: int
) -> None:
    with model_of(model) as weights:
        counted, ops, tally = counted_model(weights)
        run(counted, rows, 0, tokens, ops=ops)
        assert by_operator(pass_cost(weights.config, rows, tokens).flops) == tally.flops


def test_projections_that_run_as_one_product_share_its_flops_by_their_outputs() -> None:
    flops = pass_cost(CONFIG, 2, 7).flops
    assert flops.q_proj == 3 * flops.k_proj == 3 * flops.v_proj  # 6 query heads, 2 of keys and of values
    assert flops.q_proj == 3 * 2 * 7 * 2 * 40 * 60
    assert flops.gate_proj == flops.up_proj == flops.down_proj == 3 * 2 * 7 * 2 * 40 * 56


@given(tokens=TOKENS, past=PAST, window=st.none() | st.integers(1, 200))
def test_visible_pairs_are_those_that_the_mask_allows_and_never_more_than_are_scored(
    tokens: int, past: int, window: int | None
) -> None:
    positions_1T, positions_1S = np.arange(past, past + tokens)[None], np.arange(past + tokens)[None]
    allowed = int(attention_mask(positions_1T, positions_1S, window).sum())
    assert visible_pairs(tokens, past, window) == allowed <= scored_pairs(tokens, past, window)


@given(tokens=st.integers(1, 900), past=st.integers(0, 400), window=st.none() | st.integers(1, 500))
def test_scored_pairs_are_the_sum_over_blocks_of_queries_and_the_keys_that_any_of_them_sees(
    tokens: int, past: int, window: int | None
) -> None:
    allowed_TS = attention_mask(np.arange(past, past + tokens)[None], np.arange(past + tokens)[None], window)[0]
    blocks = [allowed_TS[start : start + QUERY_BLOCK] for start in range(0, tokens, QUERY_BLOCK)]
    assert scored_pairs(tokens, past, window) == sum(len(block) * block.any(axis=0).sum() for block in blocks)


def test_of_a_long_prompt_later_keys_are_scored_within_the_diagonal_blocks_alone() -> None:
    blocks = 4
    scored, visible = (pairs(blocks * QUERY_BLOCK, 0, None) for pairs in (scored_pairs, visible_pairs))
    assert scored - visible == blocks * QUERY_BLOCK * (QUERY_BLOCK - 1) // 2


@given(model=configs(), rows=st.integers(1, 4), tokens=st.integers(1, 40), scheme=BY_TOKEN)
def test_cache_bytes_are_those_of_the_real_cache(model: dict[str, Any], rows: int, tokens: int, scheme: Scheme) -> None:
    with model_of(model) as weights:
        held = cache_after(weights, rows, tokens, scheme)
        assert kept_slots(weights.config, tokens) == held.length
        assert cache_nbytes(weights.config, rows, held.length, scheme) == held.nbytes
        assert generation_cost(weights.config, rows, tokens, scheme).cache_nbytes == held.nbytes


@given(model=configs(), rows=st.integers(1, 3), tokens=st.integers(1, 9), past=st.integers(0, 9), of=BY_TOKEN)
def test_cache_bytes_moved_are_what_the_scheme_is_asked_to_read_and_write(
    model: dict[str, Any], rows: int, tokens: int, past: int, of: Scheme
) -> None:
    with model_of(model) as weights:
        weighed = Weighed(of.keys.codec)  # of values too: these schemes treat both alike
        cache = cache_after(weights, rows, past, both(weighed))
        weighed.moved.clear()
        run(weights, rows, past, tokens, cache)
        nbytes = pass_cost(weights.config, rows, tokens, past, of).nbytes
    assert (nbytes.cache_read, nbytes.cache_written) == (weighed.moved["read"], weighed.moved["written"])


@given(model=configs(), dtype=st.sampled_from([np.float32, np.float64]))
def test_weight_bytes_are_those_of_the_real_arrays(model: dict[str, Any], dtype: np.typing.DTypeLike) -> None:
    with tempfile.TemporaryDirectory() as directory:
        weights = opened(written(Path(directory), **model | LONG), dtype)
        config, token_ids_BT = weights.config, np.ones((2, 3), np.int64)
        linears = [(each, vars(layer)[each]) for layer in weights.layers() for each in vars(layer)]
        arrays = [weights.norm_D, *(piece.weight_OI for piece in weights.head())]
        for name, value in linears:
            arrays += [value] if name.endswith("norm_D") else [value.weight_OI, value.bias_O]
        read = sum(array.nbytes for array in arrays if array is not None)
        table = weights.embed(np.arange(config.vocab_size)).nbytes
        assert weights_nbytes(config, dtype) == read + (0 if config.tie_word_embeddings else table)
        assert pass_cost(config, 2, 3, dtype=dtype).nbytes.weights == read + weights.embed(token_ids_BT).nbytes


@given(model=configs(), rows=st.integers(1, 3), tokens=st.integers(1, 9), past=st.integers(0, 5))
def test_bytes_between_blocks_are_those_of_the_traced_hidden_states(
    model: dict[str, Any], rows: int, tokens: int, past: int
) -> None:
    with model_of(model) as weights:
        recorder = Recorder()
        run(weights, rows, past, tokens, cache_after(weights, rows, past), trace=recorder)
    handed_on = [v for name, v in recorder.arrays.items() if name == "embed_tokens" or name.endswith("mlp.residual")]
    assert len(handed_on) == weights.config.num_hidden_layers + 1
    cost = pass_cost(weights.config, rows, tokens, past, FLOAT32)
    assert cost.nbytes.activations == sum(array.nbytes for array in handed_on)


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["full", "window"])
def test_generation_is_a_prefill_and_a_step_whose_token_is_the_last_of_the_sequence(config: Config) -> None:
    cost = generation_cost(config, 3, 300, SCHEMES["int8"])
    assert cost.prefill_cached == pass_cost(config, 3, 300, 0, SCHEMES["int8"])
    assert cost.decode_cached == pass_cost(config, 3, 1, 299, SCHEMES["int8"])
    assert cost.prefill_uncached == cost.decode_uncached == pass_cost(config, 3, 300)
    assert cost.decode_cached.scored == cost.decode_cached.visible == (config.sliding_window or 300)


def test_a_cache_saves_all_work_on_past_tokens_and_reads_all_weights_and_itself() -> None:
    cost = generation_cost(CONFIG, 2, 100)
    cached, uncached = asdict(cost.decode_cached.flops), asdict(cost.decode_uncached.flops)
    per_token = cached.keys() - {"norms", "lm_head"}  # of those, a part is done once for the row
    assert all(uncached[part] == 100 * cached[part] for part in per_token)
    assert uncached["lm_head"] == cached["lm_head"]
    before, after = cost.decode_uncached.nbytes, cost.decode_cached.nbytes
    assert before.activations == 100 * after.activations
    assert before.weights - after.weights == 99 * 2 * 40 * 4  # rows of the embedding; all else is read again
    assert after.cache_read == cost.cache_nbytes == 2 * 3 * 2 * 2 * 100 * 10 * 4


def test_a_window_bounds_the_scores_and_the_cache() -> None:
    short, long = (generation_cost(WINDOWED, 2, length) for length in (6, 600))
    assert short.decode_cached == long.decode_cached
    assert short.cache_nbytes == long.cache_nbytes == 2 * 3 * 2 * 2 * 4 * 10 * 4


def test_time_is_that_of_the_slower_of_computing_and_reading() -> None:
    none = dict.fromkeys(asdict(pass_cost(CONFIG, 1, 1).flops), 0)
    cost = PassCost(Flops(**none | {"scores": 50, "lm_head": 10}), Bytes(15, 3, 2, 10), scored=1, visible=1)
    for machine, seconds, memory in ((Machine(10, 30), 3, True), (Machine(30, 10), 6, False)):
        assert (cost.seconds(machine), cost.is_memory_bound(machine)) == (seconds, memory)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((0, 1), "batch size: expected at least 1 row, found 0"),
        ((1, 0), "sequence length: expected at least 1 token, found 0"),
        ((1, 1025), "sequence length: expected at most max_position_embeddings 1024, found 1025"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_in_a_line(arguments: tuple[int, int], line: str) -> None:
    with pytest.raises(InputError) as refused:
        generation_cost(CONFIG, *arguments)
    assert str(refused.value) == line


@pytest.mark.parametrize(("past", "scheme"), [(1, None), (-1, FLOAT32)])
def test_a_past_without_a_cache_or_before_the_start_is_refused(past: int, scheme: Scheme | None) -> None:
    with pytest.raises(InputError, match="past tokens"):
        pass_cost(CONFIG, 1, 1, past, scheme)
