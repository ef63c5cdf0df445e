"""What the graph of an ONNX model holds: nodes and weights wherever they are, and its attention's width."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verify.interface import Declared

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

HEADS_ATTRIBUTES = ("num_heads", "q_num_heads")  # of com.microsoft's attention operators, and of ONNX's own
LINEAR = ("MatMul", "Gemm", "MatMulInteger", "MatMulNBits")
BETWEEN = ("Transpose", "Cast", "DequantizeLinear", "Identity")  # may stand between a weight and its product
INT8_ACCURACY = 4  # accuracy_level of MatMulNBits
# What makes uint8 of all inputs of a product, with one scale; the second multiplies too.
ROUNDING_TOGETHER = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul")
BITS: Mapping[str, int] = {
    "int4": 4,
    "uint4": 4,
    "float4_e2m1fn": 4,
    "int2": 2,
    "uint2": 2,
}  # of dtypes that fill no whole byte


@dataclass(frozen=True)
class WeightTotal:
    """Weights of one dtype: how many tensors, how many numbers in them, and their bytes as stored."""

    tensors: int
    elements: int
    nbytes: int


def every_node(model: "ModelProto") -> Iterator["NodeProto"]:
    """The nodes of the graph, of the branches and loops inside it, and of its functions."""
    for graph in every_graph(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def every_tensor(model: "ModelProto") -> Iterator["TensorProto"]:
    """Every initializer, and every constant that is kept outside the file.

    Constants in the file itself are left out: they are sizes and axes, part of the program, not weights.
    """
    for graph in every_graph(model):
        yield from graph.initializer
    for node in every_node(model):
        for attribute in node.attribute:
            tensors = [attribute.t] if attribute.HasField("t") else attribute.tensors
            yield from (tensor for tensor in tensors if tensor.external_data)


def stored_dtype(onnx: Any, elem_type: int) -> np.dtype:
    """NumPy's dtype, ml_dtypes' where NumPy has none, of an ONNX element type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def stored_nbytes(onnx: Any, tensor: "TensorProto") -> int:
    """The bytes of a tensor's numbers as ONNX stores them, small ones packed."""
    dtype = stored_dtype(onnx, tensor.data_type)
    return (math.prod(tensor.dims) * BITS.get(dtype.name, 8 * dtype.itemsize) + 7) // 8


def constants(model: "ModelProto") -> dict[str, "TensorProto"]:
    """Every tensor that the graph, its branches or its functions have from the start, by its name."""
    found = {tensor.name: tensor for graph in every_graph(model) for tensor in graph.initializer}
    for node in every_node(model):
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                found[node.output[0]] = attribute.t
    return found


def numbers_of(tensor: "TensorProto", directory: Path) -> np.ndarray:
    """A tensor's numbers, those in files of the directory too; of fewer than 8 bits they are ml_dtypes'."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    # onnx would keep the bytes in the message, and refuse the links that caches of models are made of.
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file, start = directory / entries["location"], int(entries.get("offset") or 0)
    dtype, shape = stored_dtype(onnx, tensor.data_type), tuple(tensor.dims)
    if dtype.name not in BITS:
        return np.memmap(file, dtype, "r", start, shape)
    packed = np.memmap(file, np.uint8, "r", start, (stored_nbytes(onnx, tensor),))
    message = onnx.TensorProto(data_type=tensor.data_type, dims=shape, raw_data=packed.tobytes())
    return onnx.numpy_helper.to_array(message)


def weight_totals(onnx: Any, tensors: Iterable["TensorProto"]) -> dict[str, WeightTotal]:
    """How much there is by dtype, the largest first."""
    totals: dict[str, WeightTotal] = {}
    for tensor in tensors:
        dtype = stored_dtype(onnx, tensor.data_type).name
        sum_of = totals.get(dtype, WeightTotal(0, 0, 0))
        totals[dtype] = WeightTotal(
            sum_of.tensors + 1,
            sum_of.elements + math.prod(tensor.dims),
            sum_of.nbytes + stored_nbytes(onnx, tensor),
        )
    return dict(sorted(totals.items(), key=lambda item: -item[1].nbytes))


def declared(onnx: Any, info: "ValueInfoProto") -> Declared:
    """A graph's input or output as it is declared; one without a shape gets no axes."""
    tensor = info.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else axis.dim_param or None for axis in tensor.shape.dim)
    return Declared(info.name, stored_dtype(onnx, tensor.elem_type).name, shape)


def declared_heads(nodes: Iterable["NodeProto"]) -> int | None:
    """num_attention_heads as attention operators have it; None when there is none, or they differ."""
    attributes = (attribute for node in nodes if "Attention" in node.op_type for attribute in node.attribute)
    heads = {attribute.i for attribute in attributes if attribute.name in HEADS_ATTRIBUTES and attribute.i}
    return heads.pop() if len(heads) == 1 else None


def int8_block(nodes: Iterable["NodeProto"]) -> int | None:
    """How many inputs share a scale where products with quantised weights ask for inputs rounded to int8.

    None where none asks, or not all ask for the same. Source: MatMulNBits in onnxruntime 1.24's
    docs/ContribOperators.md: accuracy_level 4 is int8, in the blocks that the weights have.
    """
    asked = set()
    for node in nodes:
        if node.op_type == "MatMulNBits":
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            asked.add(attributes.get("block_size") if attributes.get("accuracy_level") == INT8_ACCURACY else None)
    return asked.pop() if len(asked) == 1 else None


def rounds_together(nodes: Sequence["NodeProto"], constant: Collection[str]) -> bool:
    """Whether products with constants take inputs rounded to uint8, with one scale for all that is fed together.

    All of them have to, but for one: exporters may spare the head.
    """
    rounding, multiplying = ROUNDING_TOGETHER
    producers = {name: node for node in nodes for name in node.output}
    rounded = {name for name, node in producers.items() if node.op_type == rounding}
    taken = [
        node.op_type == multiplying or node.input[0] in rounded
        for node in nodes
        if node.op_type in (*LINEAR, multiplying)
        and len(node.input) > 1
        and _from(node.input[1], producers) in constant
    ]
    return sum(taken) > 1 >= len(taken) - sum(taken)


def product_dtype(nodes: Iterable["NodeProto"], dtypes: Mapping[str, np.dtype]) -> str | None:
    """The float dtype that linear maps compute in, as their weights or the scales of those have it; None: several.

    Args:
        nodes: of the graph.
        dtypes: of every weight, by its name.
    """
    places = {"MatMul": 1, "Gemm": 1, "MatMulNBits": 2}
    used = [name for node in nodes if node.op_type in places for name in node.input[places[node.op_type] :][:1]]
    found = {dtypes[name].name for name in used if name in dtypes}
    return found.pop() if len(found) == 1 else None


def attention_width(nodes: Sequence["NodeProto"], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """num_attention_heads * head_dim, the input width of `o_proj`; None when unknown or not the same."""
    producers = {name: node for node in nodes for name in node.output}
    widths = {_input_width(node, producers, shapes) for node in nodes if _is_o_proj(node)} - {None}
    return widths.pop() if len(widths) == 1 else None


def every_graph(model: "ModelProto") -> Iterator["GraphProto"]:
    """The main graph and every graph inside a node, in no particular order."""
    waiting = [model.graph]
    waiting += [graph for function in model.functions for node in function.node for graph in _bodies(node)]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [body for node in graph.node for body in _bodies(node)]


def _bodies(node: "NodeProto") -> list["GraphProto"]:
    alone = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return alone + [graph for attribute in node.attribute for graph in attribute.graphs]


def _from(name: str, producers: Mapping[str, "NodeProto"]) -> str:
    """The tensor that one is, but for what may stand between a weight and its product."""
    for _ in BETWEEN:  # each of them at most once: a damaged graph may go round in circles
        if name not in producers or producers[name].op_type not in BETWEEN or not producers[name].input:
            break
        name = producers[name].input[0]
    return name


def _is_o_proj(node: "NodeProto") -> bool:
    if node.op_type not in LINEAR or len(node.input) < 2:
        return False
    # torch's dynamo exporter names nodes by number, and keeps the module's path in their metadata.
    module_paths = [entry.value for entry in node.metadata_props]
    return any("o_proj" in text for text in (node.name, node.input[1], *module_paths))


def _input_width(
    node: "NodeProto", producers: Mapping[str, "NodeProto"], shapes: Mapping[str, tuple[int, ...]]
) -> int | None:
    """The size of a linear layer's weight along the axis that is summed over."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "MatMulNBits":
        return attributes.get("K")
    name, is_transposed = node.input[1], bool(attributes.get("transB"))
    for _ in range(len(BETWEEN)):  # each of them at most once: a damaged graph may go round in circles
        if name in shapes or name not in producers or producers[name].op_type not in BETWEEN:
            break
        is_transposed ^= producers[name].op_type == "Transpose"
        name = producers[name].input[0] if producers[name].input else ""
    shape = shapes.get(name, ())
    return shape[1 if is_transposed else 0] if len(shape) == 2 else None


def has_graphs(node: "NodeProto") -> bool:
    """Whether it has branches, or is a loop."""
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def read_by(node: "NodeProto") -> list[str]:
    """Names of what a node reads, its inputs first, and then what its branches or its body take from outside."""
    names = list(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            inside = {value.name for value in (*graph.input, *graph.initializer)}
            for each in graph.node:
                names += [name for name in read_by(each) if name and name not in inside and name not in names]
                inside |= set(each.output)
            names += [each.name for each in graph.output if each.name not in inside and each.name not in names]
    return names
