"""Edits of finished graphs, whoever exported them: nodes are found by what they are, and not by their names.

Every decoder here has one Sigmoid a layer, two norms a layer and one behind the last, seven projections a layer or five
where queries, keys and values are one: the n-th of a kind belongs to a layer that follows from n.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from refengine.config import Config
from verify.export.faults.changes import Change
from verify.export.faults.writing import rename_output

Layers = Collection[int] | None  # None: all of them
GraphEdit = Callable[[onnx.ModelProto, Config], None]

FUSED_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED_PROJECTIONS = ("qkv_proj", *PROJECTIONS[3:])


def nodes(model: onnx.ModelProto, *operators: str) -> list[NodeProto]:
    """All nodes of these kinds, in order."""
    return [node for node in model.graph.node if node.op_type in operators]


def maker(model: onnx.ModelProto, tensor: str) -> NodeProto:
    """The node that makes a tensor."""
    return next(node for node in model.graph.node if tensor in node.output)


def readers(model: onnx.ModelProto, tensor: str) -> list[NodeProto]:
    """The nodes that read a tensor."""
    return [node for node in model.graph.node if tensor in node.input]


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The graph's, by name."""
    return {initializer.name: initializer for initializer in model.graph.initializer}


def constant(model: onnx.ModelProto, value: np.typing.ArrayLike, name: str) -> str:
    """A new initializer; floats are stored as float32."""
    array = np.asarray(value)
    taken = initializers(model)
    full_name = next(each for n in range(len(taken) + 1) if (each := f"{name}_{n}") not in taken)
    dtype = np.float32 if array.dtype.kind == "f" else array.dtype
    model.graph.initializer.append(numpy_helper.from_array(array.astype(dtype), full_name))
    return full_name


def insert(
    model: onnx.ModelProto,
    tensor: str,
    operator: str,
    *beside: str,
    into: Sequence[NodeProto] | None = None,
    **attributes: Any,
) -> str:
    """Puts an operator on a tensor, for those who read the tensor, or for `into` alone, to read; returns its result.

    `beside` are its further inputs.
    """
    into = readers(model, tensor) if into is None else into
    made = next(
        name
        for n in range(99)
        if not any((name := f"{tensor}/{operator}_{n}") in each.output for each in model.graph.node)
    )
    node = helper.make_node(operator, [tensor, *beside], [made], made, **attributes)
    for reader in into:
        _read_instead(reader, tensor, made)
    making = [place for place, each in enumerate(model.graph.node) if {tensor, *beside} & set(each.output)]
    model.graph.node.insert(max(making, default=-1) + 1, node)
    return made


def skip(model: onnx.ModelProto, node: NodeProto, tensor: str) -> None:
    """Has those who read what a node makes read another tensor."""
    for reader in readers(model, node.output[0]):
        _read_instead(reader, node.output[0], tensor)


def _read_instead(reader: NodeProto, tensor: str, instead: str) -> None:
    for place, name in enumerate(reader.input):
        if name == tensor:
            reader.input[place] = instead


def set_attribute(node: NodeProto, name: str, value: object) -> None:
    """Gives a node's attribute another value."""
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def in_layers(found: Sequence[NodeProto], layers: Layers, each: int = 1) -> Iterator[tuple[int, NodeProto]]:
    """Of nodes of which every layer has so many, those of these layers, each with its number within the layer."""
    for place, node in enumerate(found):
        if layers is None or place // each in layers:
            yield place % each, node


def projections(model: onnx.ModelProto) -> dict[tuple[int, str], NodeProto]:
    """The products with weights, by layer and name."""
    weights = initializers(model)
    found = [node for node in nodes(model, "MatMul") if node.input[1] in weights]
    names = FUSED_PROJECTIONS if nodes(model, "GroupQueryAttention") else PROJECTIONS
    layers = len(nodes(model, "Sigmoid"))
    return {divmod_name(place, names): node for place, node in enumerate(found[: layers * len(names)])}


def divmod_name(place: int, names: Sequence[str]) -> tuple[int, str]:
    """The layer and the name of the n-th projection."""
    return place // len(names), names[place % len(names)]


def weight_of(model: onnx.ModelProto, node: NodeProto, place: int = 1) -> np.ndarray:
    """A copy of the initializer that a node reads."""
    return numpy_helper.to_array(initializers(model)[node.input[place]]).copy()


def set_weight(model: onnx.ModelProto, node: NodeProto, array: np.ndarray, place: int = 1) -> None:
    """Has a node read other values, and those who share them too."""
    name = node.input[place]
    initializers(model)[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def changed(name: str, change: Change, layers: Layers = None) -> GraphEdit:
    """A projection's weight, inputs first, made into another one."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        for (layer, its_name), node in projections(model).items():
            if its_name == name and (layers is None or layer in layers):
                set_weight(model, node, change(weight_of(model, node), config))

    return edit


def exchanged(one: str, other: str, layers: Layers = None) -> GraphEdit:
    """Two projections' weights, each where the other belongs."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        found = projections(model)
        for layer in range(config.num_hidden_layers) if layers is None else layers:
            first, second = found[layer, one], found[layer, other]
            first.input[1], second.input[1] = second.input[1], first.input[1]

    return edit


def with_attribute(operators: Collection[str], name: str, value: object, layers: Layers = None) -> GraphEdit:
    """Another value of an attribute of the only node of these kinds in a layer."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        for _, node in in_layers(nodes(model, *operators), layers):
            set_attribute(node, name, value)

    return edit


def norms_with_eps(eps: float, layers: Layers = None, which: Collection[int] = (0, 1)) -> GraphEdit:
    """Another epsilon in the norms before attention (0) and before the MLP (1); in all layers, in the last norm too."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        for part, node in in_layers(nodes(model, *FUSED_NORMS), layers, 2):
            if part in which:
                set_attribute(node, "epsilon", eps)
        for part, node in in_layers(nodes(model, "ReduceMean"), layers, 2):
            if part in which:
                (added,) = readers(model, node.output[0])
                added.input[1 - list(added.input).index(node.output[0])] = constant(model, eps, "other_eps")

    return edit


def on_scores(operators: Sequence[tuple[str, float | None]], layers: Layers = None) -> GraphEdit:
    """Operators on the scores of attention, before the mask, each with the constant that is its second operand."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        for _, softmax in in_layers(nodes(model, "Softmax"), layers):
            masked = maker(model, softmax.input[0])
            for operator, value in operators:
                beside = () if value is None else (constant(model, value, "on_scores"),)
                insert(model, masked.input[0], operator, *beside, into=[masked])

    return edit


def unrotated(layers: Layers = None) -> GraphEdit:
    """Queries and keys as they are before their rotation."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        for rotated, before in _rotations(model, layers):
            skip(model, rotated, before)

    return edit


def cached_unrotated(layers: Layers = None) -> GraphEdit:
    """Keys go to the cache as they are before their rotation; attention still reads the newest ones rotated."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        before = {rotated.output[0]: tensor for rotated, tensor in _rotations(model, layers)}
        for layer in range(config.num_hidden_layers) if layers is None else layers:
            present = f"present.{layer}.key"
            concat = maker(model, present)
            given, inside = before[concat.input[1]], f"{present}_inside"
            past = concat.input[0]
            rename_output(model, present, inside)
            model.graph.node.append(helper.make_node("Concat", [past, given], [present], f"/{present}/Concat", axis=2))

    return edit


def _rotations(model: onnx.ModelProto, layers: Layers) -> Iterator[tuple[NodeProto, str]]:
    """The sums that rotation ends in, each with the tensor that it rotates."""
    for _, negated in in_layers(nodes(model, "Neg"), layers, 2):
        half = maker(model, negated.input[0])
        (beside,) = readers(model, negated.output[0])
        (times_sin,) = readers(model, beside.output[0])
        (rotated,) = readers(model, times_sin.output[0])
        yield rotated, half.input[0]


def with_frequencies(change: Change) -> GraphEdit:
    """Other frequencies of the rotation, where the graph has them."""

    def edit(model: onnx.ModelProto, config: Config) -> None:
        places = [*model.graph.initializer]
        places += [node.attribute[0].t for node in nodes(model, "Constant") if node.attribute[0].name == "value"]
        for tensor in places:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float32 and array.size == config.head_dim // 2 and array.flat[0] == 1:
                found = change(array.ravel(), config).reshape(array.shape).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(found, tensor.name))
                return
        raise LookupError("the graph has no frequencies")

    return edit
