"""However a prompt is cut, padded, batched and cached, its logits are those of its row alone in one pass."""

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from refengine import weights as weights_module
from refengine.generate import generate, new_cache, teacher_forced
from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.ops import OPS, Ops
from refengine.scheme import stored_as
from refengine.tokens import left_padded
from refengine.trace import Recorder, trace_points
from refengine.weights import Weights
from tests.checkpoints import write_checkpoint
from tests.refengine.strategies import (
    BOUND,
    KINDS_OF_CACHE,
    VOCABULARY,
    WINDOW,
    Prompts,
    one_shot,
    opened,
    prompts,
    relative_error,
    written,
)


@st.composite
def placed(draw: st.DrawFn, rows: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """`token_ids_BT`, `positions_BT` of rows whose tokens stand in order, with padding anywhere between."""
    columns = max(map(len, rows)) + draw(st.integers(0, 4))
    token_ids_BT = np.full((len(rows), columns), draw(st.integers(0, VOCABULARY - 1)))
    positions_BT = np.full((len(rows), columns), -1)
    for b, row in enumerate(rows):
        taken = sorted(draw(st.permutations(range(columns)))[: len(row)])
        token_ids_BT[b, taken], positions_BT[b, taken] = row, np.arange(len(row))
    return token_ids_BT, positions_BT


@st.composite
def chunks(draw: st.DrawFn, columns: int) -> list[slice]:
    """Consecutive slices that cover so many columns."""
    inner = draw(st.sets(st.integers(1, columns - 1))) if columns > 1 else set()
    return [slice(*ends) for ends in pairwise([0, *sorted(inner), columns])]


def differs_from_one_shot(weights: Weights, rows: Prompts, logits_BTV: np.ndarray, positions_BT: np.ndarray) -> float:
    return max(
        relative_error(logits_TV[positions_T >= 0], one_shot(weights, row))
        for row, logits_TV, positions_T in zip(rows, logits_BTV, positions_BT, strict=True)
    )


@given(rows=prompts, data=st.data())
def test_any_batch_and_any_padding_gives_the_logits_of_each_row_alone(
    model: Weights, rows: Prompts, data: st.DataObject
) -> None:
    token_ids_BT, positions_BT = data.draw(placed(rows))
    logits_BTV = forward(model, token_ids_BT, positions_BT)
    assert differs_from_one_shot(model, rows, logits_BTV, positions_BT) <= BOUND


@pytest.mark.parametrize(("model", "window"), KINDS_OF_CACHE, indirect=["model"])
@given(rows=prompts, data=st.data())
def test_any_chunks_through_a_cache_give_the_logits_of_each_row_alone(
    model: Weights, window: int | None, rows: Prompts, data: st.DataObject
) -> None:
    token_ids_BT, positions_BT = data.draw(placed(rows))
    kept = KVCache(model.config, len(rows), stored_as(np.float64), window)
    pieces = [
        forward(model, token_ids_BT[:, columns], positions_BT[:, columns], kept)
        for columns in data.draw(chunks(positions_BT.shape[1]))
    ]
    assert differs_from_one_shot(model, rows, np.concatenate(pieces, axis=1), positions_BT) <= BOUND


@pytest.mark.parametrize("chunk", [1, 100, 170])
def test_a_prompt_longer_than_every_block_gives_the_same_logits_in_chunks(model: Weights, chunk: int) -> None:
    tokens_BT = np.random.default_rng(2).integers(0, VOCABULARY, (1, 300))
    pieces = teacher_forced(model, tokens_BT, np.arange(300)[None], new_cache(model, 1), chunk=chunk)
    found = np.concatenate([logits_BTV[0] for _, logits_BTV in pieces])
    assert relative_error(found, one_shot(model, tokens_BT[0].tolist())) <= BOUND


@given(rows=prompts, chunk=st.integers(1, 20))
def test_teacher_forced_logits_are_those_of_one_pass_in_consecutive_columns(
    model: Weights, rows: Prompts, chunk: int
) -> None:
    token_ids_BT, positions_BT = left_padded(rows)
    pieces = list(teacher_forced(model, token_ids_BT, positions_BT, new_cache(model, len(rows)), chunk=chunk))
    columns = [column for part, _ in pieces for column in range(part.start, part.stop)]
    assert columns == list(range(token_ids_BT.shape[1]))
    assert all(logits_BTV.shape[1] <= chunk for _, logits_BTV in pieces)
    found = np.concatenate([logits_BTV for _, logits_BTV in pieces], axis=1)
    assert differs_from_one_shot(model, rows, found, positions_BT) <= BOUND


@given(rows=prompts)
def test_the_last_logits_are_the_last_column_of_all_logits(model: Weights, rows: Prompts) -> None:
    token_ids_BT, positions_BT = left_padded(rows)
    last_B1V = forward(model, token_ids_BT, positions_BT, last=True)
    assert relative_error(last_B1V, forward(model, token_ids_BT, positions_BT)[:, -1:]) <= BOUND


@settings(max_examples=15)
@given(rows=prompts, head_bytes=st.sampled_from([1, 3000, 2**20]))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_streamed_weights_give_the_logits_of_resident_ones(
    tied: bool, rows: Prompts, head_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = written(tmp_path_factory.mktemp("checkpoint"), tie_word_embeddings=tied, mlp_bias=True)
    token_ids_BT, positions_BT = left_padded(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "HEAD_BYTES", head_bytes)
        found = forward(opened(directory, resident=False), token_ids_BT, positions_BT)
    assert relative_error(found, forward(opened(directory), token_ids_BT, positions_BT)) <= BOUND


@given(rows=prompts, steps=st.integers(0, 14))
def test_generation_with_a_cache_and_in_a_batch_gives_each_prompts_own_tokens(
    model: Weights, rows: Prompts, steps: int
) -> None:
    expected = [greedy(model, row, steps) for row in rows]
    assert generate(model, rows, steps) == expected
    assert generate(model, rows, steps, cache=False) == expected


@given(rows=prompts, steps=st.integers(1, 10))
def test_the_callback_gets_every_token_of_every_row_in_order(model: Weights, rows: Prompts, steps: int) -> None:
    called: Prompts = [[] for _ in rows]
    assert generate(model, rows, steps, on_token=lambda row, token: called[row].append(token)) == called


def test_a_row_that_has_ended_does_not_make_a_windowed_cache_keep_what_the_others_no_longer_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = written(tmp_path, model_type="mistral", sliding_window=WINDOW)
    endless = opened(directory)
    first = greedy(endless, [1, 2, 3], 1)[0]
    starts = ([token] for token in range(VOCABULARY))
    other = next(prompt for prompt in starts if first not in greedy(endless, prompt, 60))
    weights = replace(endless, config=replace(endless.config, eos_token_id=(first,)))
    lengths: list[int] = []
    update = KVCache.update

    def watched(cache: KVCache, *arguments: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths.append(cache.length)
        return update(cache, *arguments)

    monkeypatch.setattr(KVCache, "update", watched)
    ended, went_on = generate(weights, [[1, 2, 3], other], 60)
    assert (len(ended), len(went_on)) == (1, 60)
    assert max(lengths) <= 2 * WINDOW


def greedy(weights: Weights, prompt: list[int], steps: int) -> list[int]:
    """What greedy decoding is, without a cache or a batch."""
    new: list[int] = []
    while len(new) < steps and not (new and new[-1] in weights.config.eos_token_id):
        new.append(int(one_shot(weights, prompt + new)[-1].argmax()))
    return new


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_operator_is_given_or_gives_floats_of_another_dtype_than_the_weights(dtype: type, tmp_path: Path) -> None:
    weights = opened(written(tmp_path, attention_bias=True, mlp_bias=True), dtype=dtype)
    seen: dict[str, set[np.dtype]] = {}

    def watched(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = operator(*arguments)
            given_or_got = [*arguments, *(result if isinstance(result, tuple) else [result])]
            floats = {x.dtype for x in given_or_got if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
            seen.setdefault(name, set()).update(floats)
            return result

        return call

    ops = Ops(**{field.name: watched(field.name, getattr(OPS, field.name)) for field in fields(OPS)})
    kept = new_cache(weights, 2)
    for columns in (slice(0, 3), slice(3, 4)):
        token_ids_BT, positions_BT = left_padded([[1, 2, 3, 4], [5, 6]])
        forward(weights, token_ids_BT[:, columns], positions_BT[:, columns], kept, ops=ops)
    assert seen == {field.name: {np.dtype(dtype)} for field in fields(OPS)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, bfloat16])
def test_every_trace_point_has_the_dtype_of_the_weights_and_its_axes(dtype: type, stored: type, tmp_path: Path) -> None:
    weights = opened(write_checkpoint(tmp_path, dtype=stored, attention_bias=True), dtype=dtype)
    config, kept = weights.config, new_cache(weights, 4)
    forward(weights, *left_padded([[1, 2, 3, 4, 5], [6, 7], [8], [9, 10, 11]]), kept)
    recorder = Recorder()
    positions_BT = np.array([[5, 6, 7], [2, 3, -1], [-1, -1, 1], [-1, -1, -1]])
    logits_BTV = forward(weights, np.full((4, 3), 12), positions_BT, kept, trace=recorder)
    expected = trace_points(config.num_hidden_layers)
    assert list(recorder.arrays) == list(expected)
    sizes = {
        "B": 4,
        "T": 3,
        "S": 8,
        "D": config.hidden_size,
        "V": config.vocab_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "F": config.intermediate_size,
    }
    assert len(set(sizes.values())) == len(sizes)
    found = {name: (array.dtype, array.shape) for name, array in recorder.arrays.items()}
    assert found == {name: (dtype, tuple(sizes[axis] for axis in axes)) for name, axes in expected.items()}
    assert np.array_equal(recorder.arrays["lm_head"], logits_BTV)
