"""Exports with other weights than their checkpoint's."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.weights import EMBEDDING, HEAD
from verify.export.faults.writing import Fault, changed_weight, exchanged_layers, write_faulty
from verify.export.files import ReadWeight
from verify.export.graph import TRANSPOSED

MIDDLE = 5


def in_order_of_text(layers: int) -> Callable[[ReadWeight], ReadWeight]:
    """A reader that sorts layers as text: what it takes for layer 2 is layer 10."""
    order = sorted(range(layers), key=str)

    def wrap(read: ReadWeight) -> ReadWeight:
        def moved(name: str) -> np.ndarray:
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(order[int(parts[2])])
            return read(".".join(parts))

        return moved

    return wrap


def permuted(
    modules: Collection[str], head_dim: int, layer: int | None = None, *, to_pairs: bool = True
) -> Callable[[ReadWeight], ReadWeight]:
    """A reader that deals out rows of these projections for adjacent rotary pairs, or back; in all layers or one."""
    where = "." if layer is None else f".layers.{layer}."

    def wrap(read: ReadWeight) -> ReadWeight:
        def dealt(name: str) -> np.ndarray:
            weight_IO = read(name)
            if where not in name or not any(f".{module}." in name for module in modules):
                return weight_IO
            shape = (2, head_dim // 2) if to_pairs else (head_dim // 2, 2)
            return weight_IO.reshape(len(weight_IO), -1, *shape).swapaxes(-1, -2).reshape(weight_IO.shape)

        return dealt

    return wrap


def head_from_embedding(read: ReadWeight) -> ReadWeight:
    """A reader that takes the embedding for the head, though they are not tied."""
    return lambda name: read(EMBEDDING).T if name == HEAD + TRANSPOSED else read(name)


def without_biases(module: str) -> Callable[[ReadWeight], ReadWeight]:
    """A reader in which these are zero."""

    def wrap(read: ReadWeight) -> ReadWeight:
        return lambda name: np.zeros_like(read(name)) if name.endswith(f"{module}.bias") else read(name)

    return wrap


def rounded(read: ReadWeight) -> ReadWeight:
    """A reader that rounds matrices to float16."""
    return lambda name: read(name).astype(np.float16).astype(np.float32) if name.endswith(TRANSPOSED) else read(name)


def _written(reader: Callable[[Checkpoint], Callable[[ReadWeight], ReadWeight]]) -> Callable[[Checkpoint, Path], Path]:
    return lambda checkpoint, out: write_faulty(checkpoint, out, read=reader(checkpoint))


def _permuted(name: str, modules: Sequence[str], layer: int | None = None, *, to_pairs: bool = True) -> Fault:
    where = None if layer is None else frozenset({layer})
    write = _written(lambda checkpoint: permuted(modules, checkpoint.config.head_dim, layer, to_pairs=to_pairs))
    return Fault(name, "qk-permuted", where, write)


def _changed(name: str, tensor: str, change: Callable[[np.ndarray], np.ndarray], layer: int | None = MIDDLE) -> Fault:
    where = frozenset() if layer is None else frozenset({layer})
    return Fault(name, "weights-changed", where, partial(write_faulty, read=changed_weight(tensor, change)))


AT = f"model.layers.{MIDDLE}"
FAULTS: Sequence[Fault] = (
    _changed(f"zeros in v_proj, layer {MIDDLE}", f"{AT}.self_attn.v_proj.weight.T", np.zeros_like),
    _changed(
        f"rows of down_proj rolled, layer {MIDDLE}", f"{AT}.mlp.down_proj.weight.T", partial(np.roll, shift=1, axis=0)
    ),
    _changed(
        f"a norm scaled, layer {MIDDLE}", f"{AT}.post_attention_layernorm.weight", lambda weight_D: weight_D * 1.01
    ),
    _changed("the last norm is ones", "model.norm.weight", np.ones_like, None),
    _permuted("rows of q and k permuted", ("q_proj", "k_proj")),
    _permuted("rows of q and k permuted back", ("q_proj", "k_proj"), to_pairs=False),
    _permuted("rows of q permuted", ("q_proj",)),
    _permuted(f"rows of k permuted, layer {MIDDLE}", ("k_proj",), MIDDLE),
    Fault(
        "layers 4 and 7 exchanged", "layer-order", frozenset({4, 7}), partial(write_faulty, read=exchanged_layers(4, 7))
    ),
    Fault(
        "layers as text",
        "layer-order",
        None,
        _written(lambda checkpoint: in_order_of_text(checkpoint.config.num_hidden_layers)),
        frozenset({"ten layers"}),
    ),
    Fault("head from the embedding", "lm-head-wrong", frozenset(), partial(write_faulty, read=head_from_embedding)),
    Fault("weights rounded to float16", "weights-rounded", None, partial(write_faulty, read=rounded)),
)
