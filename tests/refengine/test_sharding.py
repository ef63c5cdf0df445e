"""A model in shards and stages gives the logits of the whole, holds the whole's cache and weights once, and says what
it moves.
"""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine import weights as weights_module
from refengine.errors import CacheError, InputError, TokensError
from refengine.generate import new_cache
from refengine.model import forward
from refengine.ops import Ops, linear
from refengine.sharding import Partition, Shard, Traffic, forward_in_shards
from refengine.weights import Layer, Linear, Weights
from tests.refengine.rewrites import Run, chooses_as_without_a_cache, is_noise, runs, trained_run, weights_of
from tests.refengine.strategies import BOUND, opened, relative_error, written

# Three key-value heads, so that two shards are uneven, and every bias.
UNEVEN = {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 4,
    "attention_bias": True,
    "mlp_bias": True,
}
TOKEN_IDS, POSITIONS = np.array([[5, 9, 2, 8], [7, 1, 3, 4]]), np.array([[0, 1, 2, 3], [-1, -1, 0, 1]])


@pytest.fixture(scope="module")
def uneven() -> Weights:
    return weights_of(**UNEVEN)


@st.composite
def partitions(draw: st.DrawFn, weights: Weights) -> Partition:
    """Any number of stages and shards that the model has layers and heads for."""
    config = weights.config
    most = min(config.num_key_value_heads, config.intermediate_size)
    stages, shards = draw(st.integers(1, config.num_hidden_layers)), draw(st.integers(1, most))
    return Partition.of(config, stages=stages, shards=shards)


def differs(weights: Weights, partition: Partition) -> float:
    """How far two rows, one of them left padded, are from the whole's logits."""
    logits_BTV, _ = forward_in_shards(weights, TOKEN_IDS, POSITIONS, partition)
    real_BT = POSITIONS >= 0
    return relative_error(logits_BTV[real_BT], forward(weights, TOKEN_IDS, POSITIONS)[real_BT])


@given(run=runs(), data=st.data())
def test_any_partition_gives_the_logits_of_each_row_alone(run: Run, data: st.DataObject) -> None:
    partition = data.draw(partitions(run.weights))
    logits_BTV, _ = forward_in_shards(run.weights, run.token_ids_BT, run.positions_BT, partition)
    assert run.error(logits_BTV) <= BOUND


@given(run=runs(), data=st.data())
def test_any_partition_with_caches_of_its_own_gives_the_logits_of_each_row_alone(run: Run, data: st.DataObject) -> None:
    partition = data.draw(partitions(run.weights))
    caches = partition.new_caches(run.weights, len(run.rows))
    logits_BTV = run.fed(lambda ids, positions: forward_in_shards(run.weights, ids, positions, partition, caches)[0])
    assert run.error(logits_BTV) <= BOUND


@settings(max_examples=20)
@given(run=runs(), data=st.data())
def test_any_partition_chooses_the_tokens_of_the_whole(run: Run, data: st.DataObject) -> None:
    partition = data.draw(partitions(run.weights))
    caches = partition.new_caches(run.weights, len(run.rows))
    assert chooses_as_without_a_cache(
        run.weights,
        run.rows,
        lambda ids, positions: forward_in_shards(run.weights, ids, positions, partition, caches, last=True)[0],
    )


@given(run=runs(), data=st.data())
def test_the_caches_of_all_shards_hold_together_what_the_wholes_holds(run: Run, data: st.DataObject) -> None:
    partition = data.draw(partitions(run.weights))
    caches, whole = partition.new_caches(run.weights, len(run.rows)), new_cache(run.weights, len(run.rows))
    for new in run.chunks:
        fed = run.token_ids_BT[:, new], run.positions_BT[:, new]
        forward_in_shards(run.weights, *fed, partition, caches)
        forward(run.weights, *fed, whole)
        assert sum(cache.nbytes for stage in caches for cache in stage) == whole.nbytes
    config = run.weights.config
    for stage, of_shards in zip(partition.stages, caches, strict=True):
        for shard, cache in zip(partition.shards, of_shards, strict=True):
            share = len(stage) * len(shard.kv_heads)
            assert cache.nbytes * config.num_hidden_layers * config.num_key_value_heads == whole.nbytes * share


def arrays(layer: Layer) -> list[np.ndarray]:
    """Weights and biases of a layer's projections."""
    projections = [getattr(layer, field.name) for field in fields(layer) if field.name.endswith("_proj")]
    return [x for proj in projections for x in (proj.weight_OI, proj.bias_O) if x is not None]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_every_weight_and_bias_is_in_one_shard_and_in_no_other(uneven: Weights, shards: int) -> None:
    partition = Partition.of(uneven.config, shards=shards)
    layer = next(iter(uneven.layers()))
    parts = [x.ravel() for shard in partition.shards for x in arrays(shard.part_of(layer, uneven.config))]
    whole = np.concatenate([x.ravel() for x in arrays(layer)])
    assert len(np.unique(whole)) == len(whole)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.sort(whole))


@pytest.mark.parametrize(("total", "name"), [(3, "kv_heads"), (56, "features"), (67, "vocabulary")])
def test_what_does_not_divide_leaves_shards_that_differ_by_one(uneven: Weights, total: int, name: str) -> None:
    ranges = [getattr(shard, name) for shard in Partition.of(uneven.config, shards=2).shards]
    assert [item for some in ranges for item in some] == list(range(total))
    assert max(map(len, ranges)) - min(map(len, ranges)) == total % 2


@given(run=runs(), last=st.booleans(), data=st.data())
def test_what_moved_is_what_the_formula_says(run: Run, last: bool, data: st.DataObject) -> None:
    partition, config = data.draw(partitions(run.weights)), run.weights.config
    B, T = run.token_ids_BT.shape
    _, moved = forward_in_shards(run.weights, run.token_ids_BT, run.positions_BT, partition, last=last)
    several, stages, number, position = len(partition.shards) > 1, len(partition.stages), 8, 8
    reduced = several * config.num_hidden_layers * B * T * config.hidden_size * number
    assert moved == Traffic(
        after_o_proj=reduced,
        after_down_proj=reduced,
        between_stages=(stages - 1) * B * T * (config.hidden_size * number + position),
        logits=several * B * (1 if last else T) * config.vocab_size * number,
    )
    assert moved.total == 2 * reduced + moved.between_stages + moved.logits


def test_float32_moves_half_as_much_and_a_decode_step_the_same_after_any_past(uneven: Weights) -> None:
    single = replace(
        uneven,
        dtype=np.dtype(np.float32),
        embed=lambda ids: uneven.embed(ids).astype(np.float32),
        layers=lambda: [as_float32(layer) for layer in uneven.layers()],
        norm_D=uneven.norm_D.astype(np.float32),
        head=lambda: [linear_as_float32(piece) for piece in uneven.head()],
    )
    partition = Partition.of(uneven.config, stages=2, shards=2)
    caches = partition.new_caches(single, 1)
    moved = [
        forward_in_shards(single, np.array([[token]]), np.array([[token]]), partition, caches)[1] for token in range(4)
    ]
    expected = Traffic(4 * 40 * 4, 4 * 40 * 4, 40 * 4 + 8, 67 * 4)
    assert moved == [expected] * 4
    assert moved[0] + moved[1] == Traffic(8 * 40 * 4, 8 * 40 * 4, 2 * (40 * 4 + 8), 2 * 67 * 4)


def linear_as_float32(proj: Linear) -> Linear:
    return Linear(proj.weight_OI.astype(np.float32), None if proj.bias_O is None else proj.bias_O.astype(np.float32))


def as_float32(layer: Layer) -> Layer:
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return Layer(
        **{
            name: linear_as_float32(value) if isinstance(value, Linear) else value.astype(np.float32)
            for name, value in values.items()
        }
    )


@pytest.mark.parametrize("head_bytes", [1, 3000])
def test_streamed_weights_are_cut_like_resident_ones(tmp_path, monkeypatch, head_bytes: int) -> None:
    directory = written(tmp_path, **UNEVEN)
    monkeypatch.setattr(weights_module, "HEAD_BYTES", head_bytes)
    streamed = opened(directory, resident=False)
    assert differs(streamed, Partition.of(streamed.config, stages=3, shards=3)) <= BOUND


def test_a_streamed_head_is_cut_where_its_pieces_end_and_where_the_shards_do(tmp_path, monkeypatch) -> None:
    directory = written(tmp_path, **UNEVEN)
    monkeypatch.setattr(weights_module, "HEAD_BYTES", 20 * 40 * 8)  # twenty rows
    streamed = opened(directory, resident=False)
    outputs: list[int] = []

    def noted(x_BTI: np.ndarray, proj: Linear) -> np.ndarray:
        outputs.append(len(proj.weight_OI))
        return linear(x_BTI, proj)

    partition = Partition.of(streamed.config, shards=2)
    assert [shard.vocabulary for shard in partition.shards] == [range(0, 33), range(33, 67)]
    forward_in_shards(streamed, TOKEN_IDS, POSITIONS, partition, ops=Ops(linear=noted))
    assert outputs[-5:] == [20, 13, 7, 20, 7]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("stages", "shards"), [(1, 2), (5, 1), (3, 2)])
def test_the_trained_model_in_float32_differs_by_no_more_than_noise(stages: int, shards: int, seed: int) -> None:
    run = trained_run(seed)
    partition = Partition.of(run.weights.config, stages=stages, shards=shards)
    caches = partition.new_caches(run.weights, len(run.rows))
    logits_BTV = run.fed(lambda ids, positions: forward_in_shards(run.weights, ids, positions, partition, caches)[0])
    assert is_noise(run, logits_BTV)
    swapped = wrong(partition, 0, kv_heads=partition.shards[-1].kv_heads[-1:])
    if shards > 1:
        assert not is_noise(run, forward_in_shards(run.weights, run.token_ids_BT, run.positions_BT, swapped)[0])


def wrong(partition: Partition, index: int, **changed: object) -> Partition:
    """A partition with a mistake in one shard."""
    shards = list(partition.shards)
    shards[index] = replace(shards[index], **changed)
    return replace(partition, shards=tuple(shards))


@pytest.mark.parametrize(
    ("index", "mistake"),
    [
        (1, {"adds_biases": True}),
        (0, {"adds_biases": False}),
        (1, {"kv_heads": range(0, 2)}),
        (0, {"kv_heads": range(1, 2)}),
        (1, {"kv_heads": range(2, 3)}),
        (0, {"features": range(0, 27)}),
        (1, {"features": range(27, 55)}),
    ],
    ids=str,
)
def test_the_comparison_sees_a_bias_added_twice_or_never_and_a_wrong_slice(uneven, index: int, mistake: dict) -> None:
    partition = Partition.of(uneven.config, shards=2)
    assert [(shard.kv_heads, shard.features) for shard in partition.shards] == [
        (range(0, 1), range(0, 28)),
        (range(1, 3), range(28, 56)),
    ]
    assert differs(uneven, partition) <= BOUND
    assert differs(uneven, wrong(partition, index, **mistake)) > 1e-4


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"stages": 5}, "stages: expected 1 to 4, the number of layers, found 5"),
        ({"stages": 0}, "stages: expected 1 to 4, the number of layers, found 0"),
        ({"shards": 4}, "shards: expected 1 to 3, the number of key-value heads, found 4"),
        ({"shards": 0}, "shards: expected 1 to 3, the number of key-value heads, found 0"),
    ],
)
def test_more_parts_than_there_are_layers_or_heads_are_refused(uneven: Weights, cut: dict, message: str) -> None:
    with pytest.raises(InputError) as refused:
        Partition.of(uneven.config, **cut)
    assert str(refused.value) == message


def test_more_shards_than_features_or_tokens_are_refused(uneven: Weights) -> None:
    for few in ({"intermediate_size": 2}, {"vocab_size": 2}):
        with pytest.raises(InputError, match=r"shards: expected 1 to 2, the number of intermediate .*, found 3"):
            Partition.of(replace(uneven.config, **few), shards=3)


def test_tokens_that_the_model_does_not_have_are_refused(uneven: Weights) -> None:
    with pytest.raises(TokensError, match="token ids: expected 0 to 66, found 67"):
        forward_in_shards(uneven, np.array([[67]]), np.array([[0]]), Partition.of(uneven.config))


def test_a_partition_of_another_model_is_refused(uneven: Weights) -> None:
    with pytest.raises(InputError, match="partition: expected one of the model that is run"):
        forward_in_shards(uneven, TOKEN_IDS, POSITIONS, Partition.of(replace(uneven.config, head_dim=4)))


def test_caches_of_another_partition_are_refused(uneven: Weights) -> None:
    two, three = (Partition.of(uneven.config, stages=stages, shards=2) for stages in (2, 3))
    with pytest.raises(CacheError, match=r"caches: .*: \[2, 2, 2\], found \[2, 2\]"):
        forward_in_shards(uneven, TOKEN_IDS, POSITIONS, three, two.new_caches(uneven, 2))


def test_a_shards_config_is_the_model_with_its_heads_and_features_only(uneven: Weights) -> None:
    shard = Shard(range(1, 3), range(5, 12), range(0, 1), adds_biases=False)
    expected = replace(uneven.config, num_attention_heads=4, num_key_value_heads=2, intermediate_size=7)
    assert shard.config(uneven.config) == expected
