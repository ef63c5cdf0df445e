"""What an export computes as a list of operators with their constants, alike for ONNX graphs and OpenVINO's IR."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from verify.candidates.onnx_file import describe, parsed
from verify.candidates.onnx_graph import constants, every_graph, numbers_of
from verify.candidates.openvino_weights import CODES, PLAIN, ir_graph

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

IR_SUFFIX = ".xml"
NAMES_OF_IR: Mapping[str, str] = {  # what OpenVINO calls otherwise than ONNX
    "Broadcast": "Expand",
    "Convert": "Cast",
    "Divide": "Div",
    "GreaterEqual": "GreaterOrEqual",
    "LessEqual": "LessOrEqual",
    "Maximum": "Max",
    "Minimum": "Min",
    "Multiply": "Mul",
    "Power": "Pow",
    "Select": "Where",
    "SoftMax": "Softmax",
    "Subtract": "Sub",
}
OPTIONAL_VALUES = ("value_float", "value_int")  # of Constant, in place of a tensor
TYPE_ATTRIBUTES = ("to", "dtype")  # of what an operator gives
NARROW_FLOATS = (10, 16, 17, 18, 19, 20, 23, 24, 27, 28)  # ONNX's numbers of float16, bfloat16, and narrower ones
RESHAPED = ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape")
TEXT = "OSU"  # NumPy's kinds of it
DEEPEST = 8  # operators between a number and the constants that it is made of
NUMBERS: Mapping[str, Callable[..., float]] = {
    "Add": lambda one, other: one + other,
    "Sub": lambda one, other: one - other,
    "Mul": lambda one, other: one * other,
    "Div": lambda one, other: one / other,
    "Pow": lambda one, other: one**other,
    "Neg": lambda one: -one,
    "Sqrt": lambda one: one**0.5,
    "Reciprocal": lambda one: 1 / one,
}


@dataclass(frozen=True)
class Operator:
    """One operator: its kind in ONNX's words, the names of what it takes and gives, and its numbers."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, float]


@dataclass(frozen=True)
class Operators:
    """A graph, each operator after those whose results it takes.

    Attributes:
        listed: the operators.
        shapes: of the constants, by name.
        read: a constant's numbers.
        has_narrow_floats: some number that it says the type of is a float of less than 32 bits, or may be.
    """

    listed: Sequence[Operator]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    has_narrow_floats: bool

    @cached_property
    def makers(self) -> Mapping[str, int]:
        """Which operator gives a value."""
        return {name: place for place, operator in enumerate(self.listed) for name in operator.outputs}

    @cached_property
    def users(self) -> Mapping[str, Sequence[int]]:
        """Which operators take a value."""
        users = defaultdict(list)
        for place, operator in enumerate(self.listed):
            for name in operator.inputs:
                users[name].append(place)
        return users

    def maker(self, name: str) -> Operator | None:
        """What gives a value; None for constants and inputs."""
        return self.listed[self.makers[name]] if name in self.makers else None

    def number(self, name: str, deepest: int = DEEPEST) -> float | None:
        """The one number that a value is, where it is known before a run."""
        if name in self.shapes:
            array = self.read(name) if prod(self.shapes[name]) == 1 else np.array("several")
            return None if array.dtype.kind in TEXT else float(array.reshape(-1)[0])
        maker = self.maker(name)
        if maker is None or not deepest:
            return None
        if maker.kind in RESHAPED:
            return self.number(maker.inputs[0], deepest - 1)
        operands = [self.number(operand, deepest - 1) for operand in maker.inputs]
        if maker.kind not in NUMBERS or None in operands:
            return None
        try:
            return float(NUMBERS[maker.kind](*operands))
        except (ArithmeticError, TypeError):  # a number of a damaged graph, or a complex one
            return None

    def operand(self, operator: Operator) -> tuple[float, str] | None:
        """The number among two operands, and the name of the other one; None where neither or both are numbers.

        Of a quotient, only what it is divided by.
        """
        numbers = [self.number(name) for name in operator.inputs]
        if len(numbers) != 2 or (numbers[0] is None) == (numbers[1] is None):
            return None
        place = 1 if numbers[0] is None else 0
        return (
            None if operator.kind == "Div" and not place else (float(numbers[place] or 0), operator.inputs[1 - place])
        )


def operators_of(path: Path) -> Iterator[Operators]:
    """Every graph of an export: of an ONNX file also its branches, and the file beside it that goes on from a past.

    Raises:
        InputError: it cannot be read.
        RuntimeMissing: the `onnx` package is not installed.
    """
    if path.suffix == IR_SUFFIX:
        yield _of_ir(path)
        return
    file = describe(path)
    for half in (file, file.with_past):
        if half is not None:
            yield from _of_onnx(half.path)


def _of_onnx(path: Path) -> Iterator[Operators]:
    model = parsed(path)
    tensors = constants(model)
    for graph in every_graph(model):
        yield _graph(graph, tensors, path.parent)


def _graph(graph: "GraphProto", tensors: Mapping[str, "TensorProto"], directory: Path) -> Operators:
    listed, given = [], {}
    for node in graph.node:
        attributes = _numbers_of(node)
        value = next((attributes[name] for name in OPTIONAL_VALUES if name in attributes), None)
        if node.op_type == "Constant" and value is not None:
            given[node.output[0]] = np.array(value)
        elif node.op_type != "Constant":
            listed.append(Operator(node.name, node.op_type, tuple(node.input), tuple(node.output), attributes))
    shapes = {name: tuple(tensor.dims) for name, tensor in tensors.items()} | dict.fromkeys(given, ())

    def read(name: str) -> np.ndarray:
        return given[name] if name in given else numbers_of(tensors[name], directory)

    types = {tensor.data_type for tensor in tensors.values()}
    types |= {int(each.attributes.get(name, 0)) for each in listed for name in TYPE_ATTRIBUTES}
    return Operators(listed, shapes, read, not types.isdisjoint(NARROW_FLOATS))


def _numbers_of(node: "NodeProto") -> dict[str, float]:
    # Types 1 and 2 of ONNX's AttributeProto are a float and a whole number.
    return {each.name: each.f if each.type == 1 else each.i for each in node.attribute if each.type in (1, 2)}


def _of_ir(path: Path) -> Operators:
    graph = ir_graph(path)
    listed = [
        Operator(
            graph.names[number],
            NAMES_OF_IR.get(kind, kind),
            tuple(graph.fed[number][place] for place in sorted(graph.fed.get(number, {}))),
            (number,),
            {},
        )
        for number, kind in graph.types.items()
        if number not in graph.constants
    ]
    readable = {**PLAIN, **CODES}
    shapes = {number: each.shape for number, each in graph.constants.items() if each.dtype in readable}
    # What an IR computes in is what the runtime chooses.
    return Operators(listed, shapes, lambda number: graph.constants[number].read(), has_narrow_floats=True)
