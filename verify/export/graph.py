"""A small builder of ONNX graphs: nodes named after their module, weights after their checkpoint tensor."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

OPSET = 18  # optimum's; ONNX Runtime's OpenVINO provider takes every operator used here at it
IR_VERSION = 8  # the oldest that may carry this opset, so that old runtimes load it too
TRANSPOSED = ".T"  # ends the name of a weight that holds the checkpoint's tensor transposed

Dim = int | str
Value = str  # the name of a tensor in the graph; as in array code, the variable's name ends in its axes


@dataclass
class Graph:
    """An ONNX graph being written down.

    Attributes:
        shapes: the tensors that the checkpoint has, with their shapes.
        constants: tensors that are small and known now, by name.
        weights: float32 tensors that are filled in when the model is written, by name, with their shapes.
    """

    shapes: dict[str, tuple[int, ...]]
    nodes: list[NodeProto] = field(default_factory=list)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    _named: Counter[str] = field(default_factory=Counter)

    def input(self, name: str, dtype: int, dims: Sequence[Dim]) -> Value:
        """Declares an input; a string is a dimension that is known at run time only."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, dims))
        return name

    def output(self, name: Value, dtype: int, dims: Sequence[Dim]) -> None:
        """Declares a value, the `output` of some node, as an output of the model."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, dims))

    def at(self, path: str) -> "Scope":
        """The module at this path, such as "model/layers.3/mlp"."""
        return Scope(self, path)

    def unique(self, name: str) -> str:
        """This name, with `_1`, `_2`, ... appended where it is taken."""
        self._named[name] += 1
        return name if self._named[name] == 1 else f"{name}_{self._named[name] - 1}"

    def model(self) -> ModelProto:
        """The model without its weights."""
        constants = list(self.constants.values())
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, constants)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, producer_name="verify", ir_version=IR_VERSION, opset_imports=[opset])
        helper.set_model_props(model, self.metadata)
        return model


@dataclass(frozen=True)
class Scope:
    """One module of a graph. Called with an operator and inputs, it adds the node and gives its output."""

    graph: Graph
    path: str

    def __truediv__(self, name: str) -> "Scope":
        return Scope(self.graph, f"{self.path}/{name}")

    def __call__(self, op_type: str, *inputs: Value, output: Value | None = None, **attributes: Any) -> Value:
        name = self.graph.unique(f"/{self.path}/{op_type}")
        output = output or f"{name}_output_0"
        self.graph.nodes.append(helper.make_node(op_type, inputs, [output], name, **attributes))
        return output

    def constant(self, name: str, value: np.typing.ArrayLike) -> Value:
        """A constant called `name` in this module: floats are stored as float32, whole numbers as int64."""
        array = np.asarray(value)
        full_name = self.graph.unique(f"/{self.path}/{name}")
        dtype = np.float32 if array.dtype.kind == "f" else np.int64
        self.graph.constants[full_name] = numpy_helper.from_array(array.astype(dtype), full_name)
        return full_name

    def weight(self, name: str = "weight", transposed: bool = False) -> Value:
        """The checkpoint's tensor of this module with this name, declared once however often it is used."""
        tensor = f"{self.path.replace('/', '.')}.{name}"
        shape = self.graph.shapes[tensor]
        full_name = tensor + TRANSPOSED if transposed else tensor
        self.graph.weights[full_name] = shape[::-1] if transposed else shape
        return full_name
