"""The forward pass cut into shards and stages and run in one process: what a distributed engine must give, and move.

Two cuts, alone or together. *Tensor parallel*: a shard holds some key-value heads of each layer with their query heads
(rows of q, k, v; columns of o_proj), some intermediate features (rows of gate and up; columns of down_proj) and some
rows of the head. What o_proj and down_proj give is then a partial sum, and the shards' are added. *Pipeline*: a stage
holds a range of consecutive layers, and hands its output and the positions to the next one.
Every shard of every stage has a cache of its own heads and layers, and of nothing else.

What devices would all hold is computed once here: norms, the embedding, and what follows from positions.
Source: arXiv 1909.08053, section 3, for the cut of a layer; arXiv 1811.06965 for stages.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import reduce

import numpy as np

from refengine.config import Config
from refengine.errors import CacheError, InputError
from refengine.generate import new_cache
from refengine.kvcache import NO_CACHE, Cache, KVCache
from refengine.model import attention, mlp
from refengine.ops import OPS, Ops
from refengine.tokens import check_tokens
from refengine.trace import no_trace
from refengine.weights import Layer, Linear, Weights


@dataclass(frozen=True)
class Shard:
    """The part of every layer, and of the head, that one device holds.

    Attributes:
        kv_heads: key-value heads; the query heads of their groups go with them.
        features: intermediate features of the MLP.
        vocabulary: rows of the head.
        adds_biases: whether this shard's partial sums contain the biases of o_proj and down_proj; one shard's must.
    """

    kv_heads: range
    features: range
    vocabulary: range
    adds_biases: bool

    def config(self, whole: Config) -> Config:
        """The model as this shard's `attention`, `mlp` and cache see it: with fewer heads and features."""
        group = whole.num_attention_heads // whole.num_key_value_heads
        return replace(
            whole,
            num_attention_heads=group * len(self.kv_heads),
            num_key_value_heads=len(self.kv_heads),
            intermediate_size=len(self.features),
        )

    def part_of(self, layer: Layer, whole: Config) -> Layer:
        """This shard's slice of a layer. The norms are not cut."""
        N, K, H = whole.num_attention_heads, whole.num_key_value_heads, whole.head_dim
        q_rows = _times(self.kv_heads, N // K * H)
        kv_rows = _times(self.kv_heads, H)
        return replace(
            layer,
            qkv_proj=_rows(layer.qkv_proj, q_rows, _after(N * H, kv_rows), _after((N + K) * H, kv_rows)),
            o_proj=self._columns(layer.o_proj, q_rows),
            gate_up_proj=_rows(layer.gate_up_proj, self.features, _after(whole.intermediate_size, self.features)),
            down_proj=self._columns(layer.down_proj, self.features),
        )

    def _columns(self, proj: Linear, columns: range) -> Linear:
        return Linear(proj.weight_OI[:, columns.start : columns.stop], proj.bias_O if self.adds_biases else None)


@dataclass(frozen=True)
class Partition:
    """A model cut into `stages` (ranges of layers), each of which is cut into the same `shards`."""

    config: Config
    stages: tuple[range, ...]
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, config: Config, *, stages: int = 1, shards: int = 1) -> "Partition":
        """As even as can be: what does not divide leaves parts that differ by one head, feature or layer.

        Raises:
            InputError: there are more stages than layers, or more shards than key-value heads (or, in a very small
                model, than features or tokens).
        """
        K, F, V = config.num_key_value_heads, config.intermediate_size, config.vocab_size
        _check_parts("stages", stages, config.num_hidden_layers, "layers")
        _check_parts("shards", shards, K, "key-value heads")
        _check_parts("shards", shards, min(F, V), "intermediate features and tokens of the vocabulary")
        cuts = zip(_ranges(K, shards), _ranges(F, shards), _ranges(V, shards), strict=True)
        return cls(
            config,
            _ranges(config.num_hidden_layers, stages),
            tuple(Shard(*ranges, adds_biases=index == 0) for index, ranges in enumerate(cuts)),
        )

    def new_caches(self, weights: Weights, batch_size: int) -> list[list[KVCache]]:
        """An empty cache of each shard of each stage, `caches[stage][shard]`: together what one of the whole holds."""
        return [
            [
                new_cache(
                    replace(weights, config=replace(shard.config(self.config), num_hidden_layers=len(stage))),
                    batch_size,
                )
                for shard in self.shards
            ]
            for stage in self.stages
        ]


@dataclass(frozen=True)
class Traffic:
    """Bytes that pass between devices, padding included; `+` adds those of several passes.

    Of a pass over B rows of T columns, L layers, with `b` bytes a number and `p` a position:

        after_o_proj = after_down_proj = L * B * T * D * b      nothing with one shard
        between_stages = (stages - 1) * B * T * (D * b + p)
        logits = B * T * V * b                                  nothing with one shard; T = 1 when `last`

    Decoding moves these for T = 1 at each step, however long the past is: keys and values never move.

    Attributes:
        after_o_proj: the all-reduced arrays after attention: the size of the sum, once for each layer. How much of it
            a device sends depends on the algorithm: a ring of n sends 2 * (n - 1) / n of it from each.
        after_down_proj: the same after the MLP.
        between_stages: activations and positions handed on. With several shards all of a stage have both, so this is
            what one of them hands on.
        logits: the gathered logits, each shard's piece of the vocabulary beside the others'.
    """

    after_o_proj: int = 0
    after_down_proj: int = 0
    between_stages: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(astuple(self))

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


def forward_in_shards(
    weights: Weights,
    token_ids_BT: np.ndarray,
    positions_BT: np.ndarray,
    partition: Partition,
    caches: Sequence[Sequence[Cache]] | None = None,
    *,
    last: bool = False,
    ops: Ops = OPS,
) -> tuple[np.ndarray, Traffic]:
    """`logits_BTV` as `refengine.model.forward` gives them, and what moved to get them.

    Args:
        weights: of the whole model; each layer is sliced when its turn comes, so streamed weights stay streamed.
        token_ids_BT: as for `forward`.
        positions_BT: as for `forward`.
        partition: `Partition.of(weights.config, ...)`.
        caches: `partition.new_caches(...)`, or None for none.
        last: compute the logits of the last column alone.
        ops: the operators of every shard.

    Raises:
        TokensError: ids or positions of the wrong shape, type or range.
        InputError: the partition is of another model.
        CacheError: the caches are not of this partition.
    """
    config = weights.config
    if partition.config != config:
        raise InputError("partition: expected one of the model that is run, found one of another configuration")
    caches = caches or [[NO_CACHE] * len(partition.shards)] * len(partition.stages)
    _check_caches(caches, partition)
    check_tokens(token_ids_BT, positions_BT, config.vocab_size)
    rope = ops.rope_table(
        config.rope_parameters, config.head_dim, config.max_position_embeddings, positions_BT, weights.dtype
    )
    x_BTD = weights.embed(token_ids_BT)
    moved = Traffic()
    layers = iter(weights.layers())
    for stage, of_shards in zip(partition.stages, caches, strict=True):
        if stage.start:
            moved += Traffic(between_stages=x_BTD.nbytes + positions_BT.nbytes)
        # The range comes first: at its end `zip` has not yet taken the next stage's first layer.
        for index, layer in zip(range(len(stage)), layers, strict=False):
            x_BTD, reduced = _block(partition, layer, index, x_BTD, positions_BT, rope, of_shards, ops)
            moved += reduced
    x_BTD = ops.rms_norm(x_BTD[:, -1:] if last else x_BTD, weights.norm_D, config.rms_norm_eps)
    logits_BTV = np.concatenate([ops.linear(x_BTD, piece) for piece in _head_pieces(weights, partition)], axis=-1)
    return logits_BTV, moved + Traffic(logits=logits_BTV.nbytes if len(partition.shards) > 1 else 0)


def _block(
    partition: Partition,
    layer: Layer,
    index: int,
    x_BTD: np.ndarray,
    positions_BT: np.ndarray,
    rope: tuple[np.ndarray, np.ndarray],
    caches: Sequence[Cache],
    ops: Ops,
) -> tuple[np.ndarray, Traffic]:
    """`refengine.model.block` with attention and MLP in shards. `index` is counted from the stage's first layer."""
    eps = partition.config.rms_norm_eps
    parts = [
        (shard.config(partition.config), shard.part_of(layer, partition.config), cache)
        for shard, cache in zip(partition.shards, caches, strict=True)
    ]
    h_BTD = ops.rms_norm(x_BTD, layer.input_layernorm_D, eps)
    y_BTD, after_o_proj = _all_reduced(
        [
            attention(config, part, index, h_BTD, positions_BT, rope, cache, ops, no_trace)
            for config, part, cache in parts
        ]
    )
    x_BTD = x_BTD + y_BTD
    h_BTD = ops.rms_norm(x_BTD, layer.post_attention_layernorm_D, eps)
    y_BTD, after_down_proj = _all_reduced([mlp(config, part, "", h_BTD, ops, no_trace) for config, part, _ in parts])
    return x_BTD + y_BTD, Traffic(after_o_proj=after_o_proj, after_down_proj=after_down_proj)


def _all_reduced(partial_sums: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """The sum, and its bytes if it took more than one device."""
    total = reduce(np.add, partial_sums)
    return total, total.nbytes if len(partial_sums) > 1 else 0


def _head_pieces(weights: Weights, partition: Partition) -> list[Linear]:
    """The head cut at the ends of the shards, and where streamed weights cut it anyway, in vocabulary order."""
    pieces, start = [], 0
    for piece in weights.head():
        stop = start + len(piece.weight_OI)
        for shard in partition.shards:
            rows = range(max(shard.vocabulary.start, start), min(shard.vocabulary.stop, stop))
            if rows:
                pieces.append(_rows(piece, _after(-start, rows)))
        start = stop
    return pieces


def _check_caches(caches: Sequence[Sequence[Cache]], partition: Partition) -> None:
    found, expected = [len(of_shards) for of_shards in caches], [len(partition.shards)] * len(partition.stages)
    if found != expected:
        raise CacheError(f"caches: expected so many shards' caches for each stage: {expected}, found {found}")


def _check_parts(name: str, parts: int, most: int, of: str) -> None:
    if not 1 <= parts <= most:
        raise InputError(f"{name}: expected 1 to {most}, the number of {of}, found {parts}")


def _ranges(total: int, parts: int) -> tuple[range, ...]:
    """`total` cut into consecutive ranges whose lengths differ by one at most."""
    return tuple(range(total * part // parts, total * (part + 1) // parts) for part in range(parts))


def _times(some: range, size: int) -> range:
    """What items of `size` each fill."""
    return range(some.start * size, some.stop * size)


def _after(offset: int, some: range) -> range:
    return range(offset + some.start, offset + some.stop)


def _rows(proj: Linear, *ranges: range) -> Linear:
    """These output rows, one range after the other, of the weight and of the bias."""
    bias_O = proj.bias_O
    return Linear(
        np.concatenate([proj.weight_OI[rows.start : rows.stop] for rows in ranges]),
        None if bias_O is None else np.concatenate([bias_O[rows.start : rows.stop] for rows in ranges]),
    )
