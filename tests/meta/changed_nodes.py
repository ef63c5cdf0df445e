"""Which nodes of an export compute other than those of the right one."""

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import NodeProto, numpy_helper


def blamable(clean: Path, faulty: Path) -> frozenset[str]:
    """Nodes by which a fault may be called: those that are other than in the right export, and who reads their results.

    A node that has no name is called by what it gives. What is only called otherwise is other too.
    """
    right, wrong = onnx.load(clean), onnx.load(faulty)
    before = _computed(right)
    blamed = {name for name, computed in _computed(wrong).items() if before.get(name) != computed}
    made = {output for node in wrong.graph.node if name_of(node) in blamed for output in node.output}
    blamed |= {name_of(node) for node in wrong.graph.node if made & set(node.input)}
    return frozenset(blamed)


def name_of(node: NodeProto) -> str:
    """A node's name, or where it has none that of what it gives."""
    return node.name or node.output[0]


def _computed(model: onnx.ModelProto) -> Mapping[str, tuple]:
    """What each node computes of what: its operator, its attributes, and its inputs, constants among them by value."""
    values: dict[str, object] = {}
    for initializer in model.graph.initializer:
        values[initializer.name] = _value(initializer)
    for node in model.graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = str(node.attribute)
    return {
        name_of(node): (
            node.op_type,
            tuple(sorted(str(attribute) for attribute in node.attribute)),
            tuple(values.get(name, name) for name in node.input),
        )
        for node in model.graph.node
        if node.op_type != "Constant"
    }


def _value(tensor: onnx.TensorProto) -> tuple:
    array = numpy_helper.to_array(tensor)
    return array.shape, array.dtype.str, hash(array.tobytes())
