"""Faults made by editing what other exporters wrote: nodes, attributes, constants, weights, the names of outputs."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from refengine.checkpoint import Checkpoint
from refengine.config import Config
from verify.export.faults.cache import give_layers_in_order_of_text, swap_keys_and_values_given
from verify.export.faults.changes import (
    ChangeOfTable,
    by_place_in_group,
    held_after,
    in_bfloat16,
    in_float16,
    keys_and_values_exchanged,
    scaled,
    slower,
    to_pairs,
    with_theta,
    zeroed,
)
from verify.export.faults.editing import (
    GraphEdit,
    Layers,
    cached_unrotated,
    changed,
    constant,
    exchanged,
    initializers,
    insert,
    nodes,
    norms_with_eps,
    on_scores,
    projections,
    readers,
    set_weight,
    unrotated,
    weight_of,
    with_attribute,
    with_frequencies,
)
from verify.export.faults.writing import Fault, Need

Make = Callable[[Layers], GraphEdit]
ATTENTION = ("GroupQueryAttention",)
MIDDLE = 3


def edited(source: Path, edit: GraphEdit, checkpoint: Checkpoint, out: Path) -> Path:
    """Writes an export with an edit made in it, all in one file; returns that."""
    model = onnx.load(source)
    edit(model, checkpoint.config)
    onnx.save(model, out)
    return out


def both(one: GraphEdit, other: GraphEdit) -> GraphEdit:
    """Two edits, one after the other."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        one(model, config)
        other(model, config)

    return edit


def soft_cap(cap: float) -> list[tuple[str, float | None]]:
    """Operators that keep scores between -cap and cap."""
    return [("Div", cap), ("Tanh", None), ("Mul", cap)]


def keys_and_values_given_swapped(layers: Layers) -> GraphEdit:
    """Keys given out as values, and values as keys."""
    return lambda model, config: swap_keys_and_values_given(None if layers is None else sorted(layers))(model)


def layers_as_text(model: onnx.ModelProto, config: Config) -> None:
    """The cache of layer 2 given out under the name of layer 10."""
    give_layers_in_order_of_text(model)


def sharper_silu(steepness: float, layers: Layers) -> GraphEdit:
    """`x * sigmoid(steepness * x)`."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        for layer, sigmoid in enumerate(nodes(model, "Sigmoid")):
            if layers is None or layer in layers:
                insert(model, sigmoid.input[0], "Mul", constant(model, steepness, "steepness"), into=[sigmoid])

    return edit


def layers_exchanged(one: int, other: int) -> GraphEdit:
    """All weights of two layers mistaken for each other's."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        found = projections(model)
        for name in {name for _, name in found}:
            first, second = found[one, name], found[other, name]
            first.input[1], second.input[1] = second.input[1], first.input[1]
        for name, first in initializers(model).items():
            if f"layers.{one}." in name and "norm" in name:
                second = initializers(model)[name.replace(f"layers.{one}.", f"layers.{other}.")]
                first.raw_data, second.raw_data = second.raw_data, first.raw_data

    return edit


def padding_unmasked(model: onnx.ModelProto, config: Config) -> None:
    """A mask that knows no padding."""
    kept = insert(model, "attention_mask", "Mul", constant(model, np.int64(0), "none"))
    insert(model, kept, "Add", constant(model, np.int64(1), "kept"))


def new_tokens_late(model: onnx.ModelProto, config: Config) -> None:
    """Tokens that come one at a time stand one position further on."""
    asking = readers(model, "position_ids")
    shape = insert(model, "position_ids", "Shape", into=[])
    new = insert(model, shape, "Gather", constant(model, np.int64(1), "axis"), into=[], axis=0)
    alone = insert(model, new, "Equal", constant(model, np.int64(1), "alone"), into=[])
    late = insert(model, alone, "Cast", into=[], to=TensorProto.INT64)
    insert(model, "position_ids", "Add", late, into=asking)


def with_tables(change: ChangeOfTable) -> GraphEdit:
    """Other tables of cos and sin, made of the right one and its name."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        (attention, *_) = nodes(model, *ATTENTION)
        for place, name in ((7, "cos"), (8, "sin")):
            set_weight(model, attention, change(weight_of(model, attention, place), name), place)

    return edit


def tables_of(theta: float) -> GraphEdit:
    """Tables of cos and sin of another base."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        inv_freq_P = with_theta(theta)(np.ones(0), config)

        def change(table: np.ndarray, name: str) -> np.ndarray:
            angles = np.arange(len(table))[:, None] * inv_freq_P
            return (np.cos if name == "cos" else np.sin)(angles).astype(np.float32)

        with_tables(change)(model, config)

    return edit


def frozen_faults(exports: Path) -> Sequence[Fault]:
    """Faults in the exports of other exporters: of those that are there, each in a directory of its name.

    Args:
        exports: holds `optimum`, `dynamo`, `optimum-no-past` and `genai`, or some of them.
    """
    families = {
        "optimum": (of_plain, of_cached),
        "dynamo": (of_plain, of_cached),
        "optimum-no-past": (of_plain_in_all_layers,),
        "genai": (of_fused,),
    }
    files = {name: exports / name / "model.onnx" for name in families}
    there = {name: file for name, file in files.items() if file.is_file()}
    return [fault for name, file in there.items() for family in families[name] for fault in family(file)]


def of_plain_in_all_layers(source: Path) -> Iterator[Fault]:
    """Faults of all layers in an export of plain operators."""
    fault = partial(_fault, source)
    yield fault("eps 1e-6", "norm-eps", partial(norms_with_eps, 1e-6))
    yield fault("scores times 0.9", "attention-scale", partial(on_scores, [("Mul", 0.9)]))
    yield fault("gate and up exchanged", "mlp-gate-up-swapped", partial(exchanged, "gate_proj", "up_proj"))
    yield fault("no rotation", "rope-missing", unrotated)
    yield fault("soft cap of 4", "attention-softcap", partial(on_scores, soft_cap(4.0)))
    yield fault("theta 500000", "rope-theta", lambda _: with_frequencies(with_theta(5e5)))
    yield fault("frequencies halved", "rope-scaling", lambda _: with_frequencies(slower(2.0)))
    yield fault("frequencies in bfloat16", "rope-table-precision", lambda _: with_frequencies(in_bfloat16))
    yield fault("padding unmasked", "padding-unmasked", lambda _: padding_unmasked, needs=["padding"])
    yield fault("quick gelu", "activation", partial(sharper_silu, 1.702))


def of_plain(source: Path) -> Iterator[Fault]:
    """Faults in an export of plain operators."""
    yield from of_plain_in_all_layers(source)
    fault = partial(_fault, source)
    yield fault("eps 1e-4", "norm-eps", partial(norms_with_eps, 1e-4), layer=4)
    yield fault("eps 1e-3 before the MLP", "norm-eps", partial(norms_with_eps, 1e-3, which=(1,)), layer=MIDDLE)
    yield fault("scores times 4", "attention-scale", partial(on_scores, [("Mul", 4.0)]), layer=MIDDLE)
    yield fault("gate and up exchanged", "mlp-gate-up-swapped", partial(exchanged, "gate_proj", "up_proj"), layer=2)
    yield fault("no rotation", "rope-missing", unrotated, layer=2)
    yield fault("soft cap of 2", "attention-softcap", partial(on_scores, soft_cap(2.0)), layer=4)
    yield fault("quick gelu", "activation", partial(sharper_silu, 1.702), layer=1)
    yield fault("values zeroed", "weights-changed", partial(changed, "v_proj", zeroed), layer=4)
    yield fault("down_proj 1 % larger", "weights-changed", partial(changed, "down_proj", scaled(1.01)), layer=MIDDLE)
    yield fault("keys for pairs", "qk-permuted", partial(changed, "k_proj", to_pairs), layer=2)
    yield fault("heads by place in group", "head-order", partial(changed, "o_proj", by_place_in_group), layer=1)
    yield fault("2 and 3 exchanged", "layer-order", lambda _: layers_exchanged(2, 3), layer=2)


def of_cached(source: Path) -> Iterator[Fault]:
    """Faults of what a plain export does with its cache."""
    fault = partial(_fault, source, needs=["cache"])
    yield fault("keys and values exchanged", "cache-key-value-swapped", keys_and_values_given_swapped)
    yield fault("keys and values exchanged", "cache-key-value-swapped", keys_and_values_given_swapped, layer=4)
    yield fault("layers in order of text", "cache-layer-order", lambda _: layers_as_text, needs=["ten layers"])
    yield fault("keys cached unrotated", "cache-before-rope", cached_unrotated)
    yield fault("keys cached unrotated", "cache-before-rope", cached_unrotated, layer=2)
    yield fault("new tokens one position late", "position-offset", lambda _: new_tokens_late)


def of_fused(source: Path) -> Iterator[Fault]:
    """Faults in an export with GroupQueryAttention and fused norms."""
    fault = partial(_fault, source)
    yield fault("eps 1e-6", "norm-eps", partial(norms_with_eps, 1e-6))
    yield fault("eps 1e-3", "norm-eps", partial(norms_with_eps, 1e-3), layer=4)
    for layer in (None, MIDDLE):
        yield fault("scale 0.2", "attention-scale", partial(with_attribute, ATTENTION, "scale", 0.2), layer=layer)
        yield fault(
            "soft cap of 3", "attention-softcap", partial(with_attribute, ATTENTION, "softcap", 3.0), layer=layer
        )
        window = partial(with_attribute, ATTENTION, "local_window_size", 8)
        yield fault("window of 8", "sliding-window", window, layer=layer)
        pairs = partial(with_attribute, ATTENTION, "rotary_interleaved", 1)
        yield fault("rotated in pairs", "rope-interleaved", pairs, layer=layer)
        yield fault("no rotation", "rope-missing", partial(with_attribute, ATTENTION, "do_rotary", 0), layer=layer)
        yield fault(
            "gate and up exchanged", "mlp-gate-up-swapped", partial(exchanged, "gate_proj", "up_proj"), layer=layer
        )
    yield fault("tables of theta 100000", "rope-theta", lambda _: tables_of(1e5))
    yield fault("tables of 16 rows", "rope-table-short", lambda _: with_tables(held_after(16)))
    yield fault("tables in float16", "rope-table-precision", lambda _: with_tables(in_float16))
    yield fault(
        "keys and values of a fused weight exchanged",
        "weights-changed",
        partial(changed, "qkv_proj", keys_and_values_exchanged),
        layer=2,
    )
    yield fault("up_proj stale", "weights-changed", partial(changed, "up_proj", scaled(0.97)), layer=4)
    yield fault("keys and values exchanged", "cache-key-value-swapped", keys_and_values_given_swapped, needs=["cache"])
    yield fault(
        "keys and values exchanged", "cache-key-value-swapped", keys_and_values_given_swapped, needs=["cache"], layer=2
    )
    order = partial(fault, "layers in order of text", "cache-layer-order", lambda _: layers_as_text)
    yield order(needs=["cache", "ten layers"])


def _fault(
    source: Path, name: str, cause: str, make: Make, *, needs: Collection[Need] = (), layer: int | None = None
) -> Fault:
    """A fault of all layers of an export, or of one."""
    layers = None if layer is None else frozenset({layer})
    of = f"{source.parent.name}: {name}" + ("" if layer is None else f", layer {layer}")
    return Fault(of, cause, layers, partial(edited, source, make(layers)), frozenset(needs), source=source)
