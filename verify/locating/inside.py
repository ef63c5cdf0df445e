"""What every tensor inside one part of a model may be, computed from what the candidate itself had before it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from refengine.kvcache import KVCache
from refengine.model import mlp
from refengine.ops import Ops, attention_mask
from refengine.trace import Recorder
from refengine.weights import Layer, Weights
from verify.candidates.traced import Pass
from verify.locating.introduced import CACHED, Arithmetics, as_stream, attended
from verify.locating.known import (
    SIDE_BY_SIDE,
    Known,
    Value,
    values_of_attention,
    values_of_gate,
    values_of_norm,
    values_of_rotation,
    values_of_table,
    where_there,
)

HIDDEN = "?"  # ends the axes of a value that counts only where a query may see


@dataclass(frozen=True)
class Inside:
    """The values of a part in one pass.

    Attributes:
        known: in the order in which they are computed.
        positions_BT, positions_BS: of the pass's tokens, and of all slots.
    """

    known: Sequence[Known]
    positions_BT: np.ndarray
    positions_BS: np.ndarray

    def point(self, name: str) -> Known | None:
        """A trace point."""
        return next((each for each in self.known if each.value.is_point and each.value.point == name), None)


Values = Callable[[Weights, Ops], list[Value]]


def inside(arithmetics: Arithmetics, values: Values, positions_BT: np.ndarray, positions_BS: np.ndarray) -> Inside:
    """From a function that computes the values with some weights and operators."""
    weights, ops = arithmetics.truth
    noisy, orders = arithmetics.noisy
    right = values(weights, ops)
    others = [values(noisy, order) for order in orders.values()]
    window = weights.config.sliding_window
    allowed_B1TS = attention_mask(positions_BT, positions_BS, window)[:, None]
    known = []
    for place, value in enumerate(right):
        axes = value.axes.removesuffix(HIDDEN)
        there = where_there(axes, value.array.shape, positions_BT, positions_BS)
        if axes != value.axes:
            there &= allowed_B1TS
        known.append(Known.of(replace(value, axes=axes), [other[place].array for other in others], there))
    return Inside(known, positions_BT, positions_BS)


def inside_attention(
    arithmetics: Arithmetics, layer: int, name: str, passes: Sequence[Pass], use_cache: bool
) -> Inside:
    """Of a layer's attention in the last of these passes, from the residual stream before it.

    Args:
        layer: its number.
        name: of the tensor that the stream is.
        passes: from the first on.
        use_cache: each goes on from those before it.
    """
    read = passes if use_cache else passes[-1:]
    positions_BT = read[-1].positions_BT
    positions_BS = np.concatenate([one.positions_BT for one in read], axis=1)

    def values(weights: Weights, ops: Ops) -> list[Value]:
        config = replace(weights.config, num_hidden_layers=1)
        cache = arithmetics.cache(config, len(positions_BT), weights.dtype)
        here = _layer(weights, layer)
        for one in read:
            trace = Recorder()
            x_BTD = as_stream(weights, one.arrays[name], one.positions_BT >= 0)
            y_BTD = attended(config, here, x_BTD, one.positions_BT, cache, ops, weights.dtype, trace)
        points = {point.removeprefix("layers.0."): array for point, array in trace.arrays.items()}
        table = ops.rope_table(
            config.rope_parameters, config.head_dim, config.max_position_embeddings, positions_BT, weights.dtype
        )
        norm_BTD = points["input_layernorm"]
        found = [Value("input", True, "BTD", x_BTD)]
        found += values_of_norm("input_layernorm", x_BTD, here.input_layernorm_D, config.rms_norm_eps, norm_BTD)
        found += values_of_table(config, positions_BT, *table)
        return [
            *found,
            *_values_of_heads(points, table, here, ops, norm_BTD),
            *_values_before(points, len(positions_BS[0]) - len(positions_BT[0])),
            *(_values_kept(cache, weights.dtype) if arithmetics.engine.scheme else []),
            *_values_to(points, positions_BS, positions_BT, config.sliding_window),
            Value("self_attn.residual", True, "BTD", y_BTD),
        ]

    return inside(arithmetics, values, positions_BT, positions_BS)


def _values_of_heads(
    points: Mapping[str, np.ndarray],
    table: tuple[np.ndarray, np.ndarray],
    layer: Layer,
    ops: Ops,
    norm_BTD: np.ndarray,
) -> list[Value]:
    """Projections, alone and side by side, and what is rotated."""
    q, k, v = (points[f"self_attn.{name}_proj"] for name in "qkv")
    found = [Value(f"self_attn.{name}_proj", True, "BTMH", array) for name, array in zip("qkv", (q, k, v), strict=True)]
    found.append(Value("self_attn.v_proj", False, "BTMH", np.concatenate([q, k, v], axis=2), SIDE_BY_SIDE))
    found.append(Value("self_attn.k_proj", False, "BTMH", np.concatenate([q, k], axis=2)))
    if layer.qkv_proj.bias_O is not None:
        plain = ops.linear(norm_BTD, replace(layer.qkv_proj, bias_O=None)).reshape(*q.shape[:2], -1, q.shape[-1])
        ends = np.cumsum([q.shape[2], k.shape[2]])
        found += [
            Value(f"self_attn.{name}_proj", False, "BTMH", array)
            for name, array in zip("qkv", np.split(plain, ends, axis=2), strict=True)
        ]
    for name, array in (("q", q), ("k", k)):
        found += values_of_rotation(f"self_attn.{name}_rope", array, *table, points[f"self_attn.{name}_rope"])
    return found


def _values_before(points: Mapping[str, np.ndarray], past: int) -> list[Value]:
    """What the cache held before the pass."""
    kept = [points[f"self_attn.{name}_cache"][:, :, :past] for name in "kv"]
    return [Value("past", False, "BKSH", array) for array in kept if past]


def _values_kept(cache: KVCache, dtype: np.dtype) -> list[Value]:
    """What the cache holds after the pass, which may be coarser than what attention read in it."""
    return [Value(point, False, "BKSH", array) for point, array in zip(CACHED, cache.read(0, dtype), strict=True)]


def _values_to(
    points: Mapping[str, np.ndarray], positions_BS: np.ndarray, positions_BT: np.ndarray, window: int | None
) -> list[Value]:
    """From the cache to what is added to the stream."""
    keys, values = (points[f"self_attn.{name}_cache"] for name in "kv")
    return [
        Value("self_attn.k_cache", True, "BKSH", keys),
        Value("self_attn.v_cache", True, "BKSH", values),
        *values_of_attention(
            points["self_attn.q_rope"],
            keys,
            values,
            points["self_attn.attend"],
            attention_mask(positions_BT, positions_BS, window),
        ),
        Value("self_attn.o_proj", True, "BTD", points["self_attn.o_proj"]),
    ]


def inside_mlp(arithmetics: Arithmetics, layer: int, name: str, one: Pass) -> Inside:
    """Of a layer's MLP in a pass, from the residual stream before it."""

    def values(weights: Weights, ops: Ops) -> list[Value]:
        here, eps = _layer(weights, layer), weights.config.rms_norm_eps
        x_BTD = as_stream(weights, one.arrays[name], one.positions_BT >= 0)
        h_BTD = ops.rms_norm(x_BTD, here.post_attention_layernorm_D, eps)
        trace = Recorder()
        y_BTD = x_BTD + mlp(weights.config, here, "", h_BTD, ops, trace)
        gate, up = (trace.arrays[f"mlp.{name}_proj"] for name in ("gate", "up"))
        return [
            Value("input", True, "BTD", x_BTD),
            *values_of_norm("post_attention_layernorm", x_BTD, here.post_attention_layernorm_D, eps, h_BTD),
            Value("mlp.gate_proj", True, "BTF", gate),
            Value("mlp.up_proj", True, "BTF", up),
            Value("mlp.up_proj", False, "BTF", np.concatenate([gate, up], axis=-1)),
            *values_of_gate(gate, up, trace.arrays["mlp.activation"]),
            Value("mlp.down_proj", True, "BTD", trace.arrays["mlp.down_proj"]),
            Value("mlp.residual", True, "BTD", y_BTD),
        ]

    return inside(arithmetics, values, one.positions_BT, one.positions_BT)


def inside_head(arithmetics: Arithmetics, name: str, one: Pass, only_last: bool) -> Inside:
    """Of the last norm and the head in a pass, from the residual stream before them."""

    def values(weights: Weights, ops: Ops) -> list[Value]:
        eps = weights.config.rms_norm_eps
        x_BTD = as_stream(weights, one.arrays[name], one.positions_BT >= 0)[:, -1 if only_last else 0 :]
        h_BTD = ops.rms_norm(x_BTD, weights.norm_D, eps)
        logits_BTV = np.concatenate([ops.linear(h_BTD, piece) for piece in weights.head()], axis=-1)
        return [
            Value("input", True, "BTD", x_BTD),
            *values_of_norm("norm", x_BTD, weights.norm_D, eps, h_BTD),
            Value("lm_head", True, "BTD", logits_BTV),
        ]

    positions_BT = one.positions_BT[:, -1 if only_last else 0 :]
    return inside(arithmetics, values, positions_BT, positions_BT)


def _layer(weights: Weights, number: int) -> Layer:
    return next(islice(weights.layers(), number, None))
