"""Rows of q_proj and k_proj for either rotary pairing: halves (p, p + head_dim / 2), or pairs (2p, 2p + 1)."""

from dataclasses import replace

import numpy as np

from refengine.config import Config
from refengine.weights import Layer, Linear
from verify.naming.counterfactual import Layers
from verify.weights.exported import ExportedCheckpoint
from verify.weights.match import Matched

TO_PAIRS = "halves to pairs"
DIRECTIONS = (TO_PAIRS, "pairs to halves")


def permuted(config: Config, own: ExportedCheckpoint) -> list[tuple[tuple[str, ...], str, Layers]]:
    """Which of q and k the export has in the order of the other pairing, which way, and in which layers."""
    layers_of: dict[tuple[tuple[str, ...], str], set[int]] = {}
    orders = {each.relation.name: direction_of(each, config.head_dim) for each in own.matched}
    for layer in range(config.num_hidden_layers):
        for direction in DIRECTIONS:
            which = tuple(
                part
                for part in ("q", "k")
                if orders.get(f"model.layers.{layer}.self_attn.{part}_proj.weight") == direction
            )
            if which:
                layers_of.setdefault((which, direction), set()).add(layer)
    return [
        (which, direction, None if len(layers) == config.num_hidden_layers else frozenset(layers))
        for (which, direction), layers in layers_of.items()
    ]


def direction_of(matched: Matched, head_dim: int) -> str | None:
    """How the rows of q or k were dealt out anew, if they were."""
    if matched.found is None or matched.relation.relation != "permuted":
        return None
    rows = np.argsort(matched.found.rows)
    return next((way for way in DIRECTIONS if np.array_equal(rows, dealt(np.arange(len(rows)), way, head_dim))), None)


def dealt(rows: np.ndarray, direction: str, head_dim: int) -> np.ndarray:
    """Rows of heads, dealt out for the other pairing."""
    shape = (2, head_dim // 2) if direction == TO_PAIRS else (head_dim // 2, 2)
    return rows.reshape(-1, *shape).swapaxes(1, 2).reshape(-1)


def with_permuted(which: tuple[str, ...], direction: str, config: Config, layer: Layer) -> Layer:
    """Rows of these projections dealt out for the other pairing, head by head."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows = np.arange(len(layer.qkv_proj.weight_OI))
    parts = {"q": slice(0, queries), "k": slice(queries, queries + keys)}
    for part in which:
        rows[parts[part]] = dealt(rows[parts[part]], direction, config.head_dim)
    bias_O = layer.qkv_proj.bias_O
    permuted = Linear(layer.qkv_proj.weight_OI[rows], None if bias_O is None else bias_O[rows])
    return replace(layer, qkv_proj=permuted)
