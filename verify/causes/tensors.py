"""Tensors of a checkpoint, by name, put into or taken out of weights as the forward pass has them."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from refengine.config import Config
from refengine.weights import EMBEDDING, HEAD, Layer, Linear, Weights

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NAME = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.(weight|bias)")
Read = Callable[[str, np.dtype], np.ndarray]


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor is in; None: in none."""
    found = NAME.fullmatch(name)
    return int(found[1]) if found else None


def modules_of(names: Sequence[str]) -> list[str]:
    """The modules of these tensors, each once, in the order of a layer."""
    found = {match[2] for match in map(NAME.fullmatch, names) if match}
    return [module for module in (*ATTENTION, *MLP) if module in found]


def with_tensors(right: Weights, names: Collection[str], read: Read, is_tied: bool) -> Weights:
    """Weights with other tensors of these names.

    Args:
        read: a tensor in a dtype.
        is_tied: an embedding is the head too.
    """
    made = right
    if EMBEDDING in names:
        made = replace(made, embed=read(EMBEDDING, right.dtype).__getitem__)
    head = HEAD if HEAD in names else EMBEDDING if is_tied and EMBEDDING in names else None
    if head is not None:
        pieces = [Linear(read(head, right.dtype))]
        made = replace(made, head=lambda: pieces)
    if "model.norm.weight" in names:
        made = replace(made, norm_D=read("model.norm.weight", right.dtype))
    by_layer: dict[int, list[str]] = {}
    for name in names:
        if (layer := layer_of(name)) is not None:
            by_layer.setdefault(layer, []).append(name)

    @cache
    def layers() -> list[Layer]:
        return [
            layer_with(right.config, layer, {name: read(name, right.dtype) for name in by_layer.get(index, ())})
            for index, layer in enumerate(right.layers())
        ]

    return replace(made, layers=layers) if by_layer else made


def layer_with(config: Config, layer: Layer, tensors: dict[str, np.ndarray]) -> Layer:
    """A layer with other tensors, by their names in the checkpoint."""
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name}: no tensor of a layer")
        module, kind = match[2], match[3]
        if module.endswith("layernorm"):
            layer = _replaced(layer, f"{module}_D", tensor)
            continue
        stack, rows = _place(config, module)
        proj: Linear = getattr(layer, stack)
        if kind == "weight":
            proj = replace(proj, weight_OI=_with_rows(proj.weight_OI, rows, tensor))
        elif proj.bias_O is not None:
            proj = replace(proj, bias_O=_with_rows(proj.bias_O, rows, tensor))
        layer = _replaced(layer, stack, proj)
    return layer


def without_biases(modules: Collection[str], config: Config, layer: Layer) -> Layer:
    """A layer in which these modules add nothing."""
    for module in modules:
        stack, rows = _place(config, module)
        proj: Linear = getattr(layer, stack)
        if proj.bias_O is not None:
            nothing = np.zeros_like(proj.bias_O[rows])
            layer = _replaced(layer, stack, replace(proj, bias_O=_with_rows(proj.bias_O, rows, nothing)))
    return layer


def _replaced(layer: Layer, part: str, value: Any) -> Layer:
    return replace(layer, **{part: value})


def _place(config: Config, module: str) -> tuple[str, slice]:
    """The stack that a module is in, and its rows there."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    places = {
        "q_proj": ("qkv_proj", slice(0, queries)),
        "k_proj": ("qkv_proj", slice(queries, queries + keys)),
        "v_proj": ("qkv_proj", slice(queries + keys, None)),
        "gate_proj": ("gate_up_proj", slice(0, config.intermediate_size)),
        "up_proj": ("gate_up_proj", slice(config.intermediate_size, None)),
    }
    return places.get(module, (module, slice(None)))


def _with_rows(array: np.ndarray, rows: slice, others: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[rows] = others
    return array
