"""A cache of some layers or heads gives the logits of a whole one, and holds the chosen share of it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.errors import CacheError, InputError, TokensError
from refengine.generate import new_cache
from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.ops import Ops, rms_norm
from refengine.partial_cache import PartialCache, forward_partly_cached, whole_layers
from refengine.scheme import stored_as
from refengine.weights import Weights
from tests.refengine.rewrites import Run, chooses_as_without_a_cache, is_noise, runs, trained_run, weights_of
from tests.refengine.strategies import BOUND, relative_error


@st.composite
def partial_caches(draw: st.DrawFn, run: Run) -> PartialCache:
    """Any heads of any layers."""
    config = run.weights.config
    heads = st.sets(st.integers(0, config.num_key_value_heads - 1))
    whole = st.just(range(config.num_key_value_heads))
    kept = [draw(heads | whole) for _ in range(config.num_hidden_layers)]
    return PartialCache(config, len(run.rows), kept, run.weights.dtype)


@pytest.fixture(scope="module")
def model() -> Weights:
    return weights_of(num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3, attention_bias=True)


def pieces(columns: int) -> list[slice]:
    """A prompt of four columns, then one at a time."""
    return [slice(0, 4), *(slice(start, start + 1) for start in range(4, columns))]


@given(run=runs(), data=st.data())
def test_any_heads_of_any_layers_may_be_left_out(run: Run, data: st.DataObject) -> None:
    cache = data.draw(partial_caches(run))
    logits_BTV = run.fed(lambda ids, positions: forward_partly_cached(run.weights, ids, positions, cache))
    assert run.error(logits_BTV) <= BOUND


@settings(max_examples=20)
@given(run=runs(), data=st.data())
def test_whatever_is_left_out_the_chosen_tokens_are_the_same(run: Run, data: st.DataObject) -> None:
    cache = data.draw(partial_caches(run))
    assert chooses_as_without_a_cache(
        run.weights,
        run.rows,
        lambda ids, positions: forward_partly_cached(run.weights, ids, positions, cache, last=True),
    )


@given(run=runs(), data=st.data())
def test_the_last_logits_are_the_last_column_of_all(run: Run, data: st.DataObject) -> None:
    kept = data.draw(partial_caches(run)).kept_heads
    given_to_all, given_to_last = (PartialCache(run.weights.config, len(run.rows), kept, np.float64) for _ in range(2))
    for new in run.chunks:
        fed = run.token_ids_BT[:, new], run.positions_BT[:, new]
        all_BTV = forward_partly_cached(run.weights, *fed, given_to_all)
        last_B1V = forward_partly_cached(run.weights, *fed, given_to_last, last=True)
        assert relative_error(last_B1V, all_BTV[:, -1:]) <= BOUND


@given(run=runs(), data=st.data())
def test_its_bytes_are_the_chosen_share_of_a_whole_caches(run: Run, data: st.DataObject) -> None:
    cache, config = data.draw(partial_caches(run)), run.weights.config
    K = config.num_key_value_heads
    # Layers that are fed the whole sequence need all of it; those above may drop what their window hides.
    everything = KVCache(config, len(run.rows), stored_as(np.float64))
    windowed = new_cache(run.weights, len(run.rows))
    heads_below = sum(len(heads) for heads in cache.kept_heads[: cache.layers_fed_again])
    layers_above = config.num_hidden_layers - cache.layers_fed_again
    for new in run.chunks:
        fed = run.token_ids_BT[:, new], run.positions_BT[:, new]
        forward(run.weights, *fed, everything)
        forward(run.weights, *fed, windowed)
        forward_partly_cached(run.weights, *fed, cache)
        expected = heads_below * everything.nbytes + layers_above * K * windowed.nbytes
        assert cache.nbytes * config.num_hidden_layers * K == expected


@pytest.mark.parametrize("layers", [(), (3,), (1, 2, 3), (0, 1, 3), (0, 1, 2, 3)], ids=str)
def test_a_cache_of_whole_layers_holds_so_many_layers(model: Weights, layers: tuple[int, ...]) -> None:
    cache = PartialCache(model.config, 2, whole_layers(model.config, layers), np.float64)
    fed = np.arange(10).reshape(2, 5), np.arange(5)[None].repeat(2, axis=0)
    forward_partly_cached(model, *fed, cache)
    assert cache.nbytes == len(layers) * 2 * 2 * 5 * 3 * 10 * 8


def columns_of_each_layer(weights: Weights, layers: tuple[int, ...]) -> list[int]:
    """How many tokens each layer is fed at the last of four passes, which brings the seventh token."""
    fed: list[int] = []

    def counted(x_BTD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
        fed.append(x_BTD.shape[1])
        return rms_norm(x_BTD, weight_D, eps)

    cache = PartialCache(weights.config, 1, whole_layers(weights.config, layers), np.float64)
    for new in pieces(7):
        fed.clear()
        positions_BT = np.arange(7)[None, new]
        forward_partly_cached(weights, positions_BT, positions_BT, cache, ops=Ops(rms_norm=counted))
    return fed[:-1:2]  # two norms a layer, and the last one


@pytest.mark.parametrize(
    ("layers", "columns"),
    [
        ((0, 1, 2, 3), [1, 1, 1, 1]),
        ((1, 2, 3), [7, 1, 1, 1]),
        ((2, 3), [7, 7, 1, 1]),
        ((0, 1, 3), [7, 7, 7, 1]),
        ((0, 1, 2), [7, 7, 7, 7]),
        ((), [7, 7, 7, 7]),
    ],
    ids=str,
)
def test_only_layers_up_to_the_last_incomplete_one_are_fed_the_whole_sequence(model, layers, columns) -> None:
    assert columns_of_each_layer(model, layers) == columns


def test_one_head_left_out_feeds_its_layer_the_whole_sequence(model: Weights) -> None:
    kept = whole_layers(model.config, range(4))
    assert PartialCache(model.config, 1, kept).layers_fed_again == 0
    kept[2] = range(2)
    assert PartialCache(model.config, 1, kept).layers_fed_again == 3


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("head", range(3))
def test_what_is_kept_is_what_is_read(model: Weights, layer: int, head: int) -> None:
    kept: list[set[int]] = [set() for _ in range(4)]
    kept[layer] = {head}
    tokens_1T = np.arange(3, 10)[None]
    positions_1T = np.arange(7)[None]
    found = []
    for model_of_the_prompt in (model, weights_of(seed=1, num_hidden_layers=4, num_key_value_heads=3)):
        cache = PartialCache(model.config, 1, kept, np.float64)
        forward_partly_cached(model_of_the_prompt, tokens_1T[:, :4], positions_1T[:, :4], cache)
        found.append(forward_partly_cached(model, tokens_1T[:, 4:], positions_1T[:, 4:], cache))
    expected = forward(model, tokens_1T, positions_1T)[:, 4:]
    assert relative_error(found[0], expected) <= BOUND
    assert relative_error(found[1], expected) > 1e-4  # keys and values of another model were kept


def test_past_tokens_of_the_kept_heads_come_from_the_cache_and_all_others_from_this_pass(model: Weights) -> None:
    cache = PartialCache(model.config, 1, [{1}, {1}, {1}, {1}], np.float64)
    for passed, new in enumerate((2, 1)):
        _, positions_BS = cache.begin(np.zeros((1, new), int), np.arange(2 * passed, 2 * passed + new)[None])
        k_BKSH = np.full((1, 3, positions_BS.shape[1], 10), 5.0 + passed)
        for layer in range(4):
            found = cache.update(layer, k_BKSH, -k_BKSH, positions_BS)
    assert found[0][0, :, :, 0].tolist() == [[6, 6, 6], [5, 5, 6], [6, 6, 6]]
    assert found[1][0, :, :, 0].tolist() == [[-6, -6, -6], [-5, -5, -6], [-6, -6, -6]]
    assert found[2].tolist() == [[0, 1, 2]]


def test_with_everything_kept_only_new_tokens_are_embedded(model: Weights) -> None:
    embedded: list[int] = []
    noting = replace(model, embed=lambda ids: embedded.append(ids.shape[1]) or model.embed(ids))
    cache = PartialCache(model.config, 1, whole_layers(model.config, range(4)), np.float64)
    for new in pieces(6):
        forward_partly_cached(noting, np.arange(6)[None, new], np.arange(6)[None, new], cache)
    assert embedded == [4, 1, 1]


def test_tokens_that_the_model_does_not_have_are_refused_and_leave_the_cache_as_it_was(model: Weights) -> None:
    tokens_1T = np.arange(5)[None]
    cache = PartialCache(model.config, 1, whole_layers(model.config, [2, 3]), np.float64)
    forward_partly_cached(model, tokens_1T[:, :3], tokens_1T[:, :3], cache)
    with pytest.raises(TokensError, match="token ids: expected 0 to 66, found 67"):
        forward_partly_cached(model, np.array([[67]]), np.array([[3]]), cache)
    found = forward_partly_cached(model, tokens_1T[:, 3:], tokens_1T[:, 3:], cache)
    assert relative_error(found, forward(model, tokens_1T, tokens_1T)[:, 3:]) <= BOUND


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kept", ["upper half", "every other layer", "one head of each"])
def test_the_trained_model_in_float32_differs_by_no_more_than_noise(kept: str, seed: int) -> None:
    run = trained_run(seed)
    config = run.weights.config
    heads = {
        "upper half": whole_layers(config, range(6, 12)),
        "every other layer": whole_layers(config, range(1, 12, 2)),
        "one head of each": [range(layer % 2, layer % 2 + 1) for layer in range(12)],
    }[kept]
    cache = PartialCache(config, len(run.rows), heads, run.weights.dtype)
    logits_BTV = run.fed(lambda ids, positions: forward_partly_cached(run.weights, ids, positions, cache))
    assert is_noise(run, logits_BTV)
    assert not is_noise(run, logits_BTV + np.float32(1e-4) * logits_BTV[..., ::-1])


@pytest.mark.parametrize(
    "kept", [[[0]] * 3, [[0]] * 5, [[0], [0], [0], [3]], [[0], [0], [-1], [0]]], ids=["few", "many", "beyond", "below"]
)
def test_heads_that_the_model_does_not_have_are_refused(model: Weights, kept: list[list[int]]) -> None:
    with pytest.raises(
        InputError, match="kept_heads: expected key-value heads from 0 to 2 for each of 4 layers, found"
    ):
        PartialCache(model.config, 1, kept)


@pytest.mark.parametrize("layer", [-1, 4])
def test_layers_that_the_model_does_not_have_are_refused(model: Weights, layer: int) -> None:
    with pytest.raises(InputError, match=rf"layers: expected 0 to 3, found \[{layer}\]"):
        whole_layers(model.config, [layer])


@pytest.mark.parametrize("layers", [(), (2, 3), (0, 1, 2, 3)], ids=str)
def test_another_number_of_rows_is_refused(model: Weights, layers: tuple[int, ...]) -> None:
    cache = PartialCache(model.config, 2, whole_layers(model.config, layers), np.float64)
    with pytest.raises(CacheError, match="cache: expected 2 rows, found 3"):
        forward_partly_cached(model, np.ones((3, 2), int), np.arange(2)[None].repeat(3, axis=0), cache)


def test_a_cache_left_in_the_middle_of_a_pass_is_refused(model: Weights) -> None:
    cache = PartialCache(model.config, 1, whole_layers(model.config, [2, 3]), np.float64)
    fed = np.array([[1, 2]]), np.array([[0, 1]])
    done: list[int] = []

    def broken(x_BTD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
        done.append(1)
        if len(done) == 6:  # the second norm of layer 2
            raise KeyboardInterrupt
        return rms_norm(x_BTD, weight_D, eps)

    with pytest.raises(KeyboardInterrupt):
        forward_partly_cached(model, *fed, cache, ops=Ops(rms_norm=broken))
    with pytest.raises(CacheError, match="a pass was broken off before layer 3"):
        forward_partly_cached(model, *fed, cache)


def test_a_layer_out_of_order_is_refused(model: Weights) -> None:
    cache = PartialCache(model.config, 1, whole_layers(model.config, [0, 1, 2, 3]), np.float64)
    with pytest.raises(CacheError, match="expected layer 0 of this pass, found layer 1"):
        cache.update(1, np.zeros((1, 3, 1, 10)), np.zeros((1, 3, 1, 10)), np.zeros((1, 1), int))
