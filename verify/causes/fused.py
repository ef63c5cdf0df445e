"""A fused weight of q, k and v whose parts stand in another order than the graph reads them in."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from refengine.config import Config
from refengine.weights import Layer, Linear
from verify.causes import Evidence
from verify.naming.counterfactual import Layers
from verify.weights.match import Matched

PARTS = ("q", "k", "v")
USUAL_EXCHANGE = ("q", "v", "k")  # keys and values have one shape, so that nobody notices


def fused_orders(evidence: Evidence) -> Iterator[tuple[Sequence[str], Layers]]:
    """Orders of q, k and v as a fused weight may have them, and in which layers.

    Those that the export has come first; then, wherever a mistake may be, keys and values exchanged: numbers that are
    all there, in their order, may still be read in another one.
    """
    layers_of: dict[tuple[str, ...], set[int]] = {}
    matched = () if evidence.own is None else evidence.own.matched
    for layer in range(evidence.config.num_hidden_layers):
        order = _order_in(matched, layer)
        if order is not None and order != PARTS:
            layers_of.setdefault(order, set()).add(layer)
    found = [
        (order, None if len(layers) == evidence.config.num_hidden_layers else frozenset(layers))
        for order, layers in layers_of.items()
    ]
    yield from dict.fromkeys([*found, *((USUAL_EXCHANGE, layers) for layers in evidence.suspects)])


def _order_in(matched: Sequence[Matched], layer: int) -> tuple[str, ...] | None:
    """The parts of a layer by the rows that they have in one weight; None where each is a weight of its own."""
    names = {f"model.layers.{layer}.self_attn.{part}_proj.weight": part for part in PARTS}
    found = [(each.found, names[each.relation.name]) for each in matched if each.relation.name in names and each.found]
    if len(found) < len(PARTS) or len({one.weight.name for one, _ in found}) > 1:
        return None
    return tuple(part for _, part in sorted((int(one.rows.min()), part) for one, part in found))


def with_parts_in_order(order: Sequence[str], config: Config, layer: Layer) -> Layer:
    """A layer whose q, k and v are the rows of these parts laid one after the other, cut as q, k and v are long."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows = np.split(np.arange(queries + 2 * keys), [queries, queries + keys])
    taken = np.concatenate([rows[PARTS.index(part)] for part in order])
    bias_O = layer.qkv_proj.bias_O
    read = Linear(layer.qkv_proj.weight_OI[taken], None if bias_O is None else bias_O[taken])
    return replace(layer, qkv_proj=read)
