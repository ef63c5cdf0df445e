"""The weights of an ONNX graph, one at a time: plain ones, and codes with their scales and zero points.

Source: onnxruntime 1.24 docs/ContribOperators.md for the operators of com.microsoft; ONNX 1.20 for the others.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refengine.errors import InputError
from verify.candidates.bnb4 import KINDS, bnb4_values
from verify.candidates.onnx_file import parsed
from verify.candidates.onnx_graph import BITS, constants, every_node, numbers_of, stored_dtype
from verify.weights.stored import StoredWeight, Values, dequantised, refused_unless_whole, unpacked

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

FLOATS = ("float64", "float32", "float16", "bfloat16")
PASSED = ("Cast", "Identity", "Transpose", "Reshape", "Unsqueeze", "Squeeze")  # between a weight and what uses it
# Operators that take codes -> the inputs with the codes, their scales and their zero points.
CODED: Mapping[str, tuple[int, int, int]] = {
    "MatMulNBits": (1, 2, 3),
    "GatherBlockQuantized": (0, 2, 3),
    "DequantizeLinear": (0, 1, 2),
    "DynamicQuantizeMatMul": (1, 2, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "QLinearMatMul": (3, 4, 5),
}
UNREAD = ("MatMulFpQ4",)  # with weights that are not read back here
# Of (inputs, outputs) weights, the input that is one.
COLUMNS: Mapping[str, int] = {
    **dict.fromkeys(("MatMul", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"), 1),
    "QLinearMatMul": 3,
}


@dataclass(frozen=True)
class _Graph:
    """Constant tensors by name, read without being kept, and who uses what."""

    tensors: Mapping[str, "TensorProto"]
    users: Mapping[str, list["NodeProto"]]
    directory: Path

    def of(self, name: str) -> np.ndarray:
        """A tensor's numbers; of fewer than 8 bits they are ml_dtypes'."""
        return numbers_of(self.tensors[name], self.directory)

    def dtype(self, name: str) -> str:
        """The name of what is stored."""
        import onnx

        return stored_dtype(onnx, self.tensors[name].data_type).name

    def use_of(self, name: str) -> "_Use":
        """Who uses a tensor, through what merely passes it on."""
        names, ways, waiting, seen = [], set(), [(name, False)], {name}
        while waiting:
            given, is_turned = waiting.pop()
            for node in self.users.get(given, []):
                names += [node.name, *(entry.value for entry in node.metadata_props)]
                if node.op_type in PASSED:
                    turned = is_turned ^ (node.op_type == "Transpose")
                    waiting += [(output, turned) for output in node.output if output not in seen]
                    seen.update(node.output)
                elif (in_rows := _outputs_in_rows(node, given)) is not None:
                    ways.add(in_rows ^ is_turned)
        return _Use(tuple(names), ways.pop() if len(ways) == 1 else None)


@dataclass(frozen=True)
class _Use:
    """Names of operators and of the modules they came from, and whether each row of a weight makes one output."""

    names: tuple[str, ...]
    outputs_in_rows: bool | None

    def of_read(self, *, is_turned: bool) -> "_Use":
        """The same of a weight that is read transposed."""
        in_rows = self.outputs_in_rows
        return self if in_rows is None else _Use(self.names, in_rows ^ is_turned)


def _outputs_in_rows(node: "NodeProto", name: str) -> bool | None:
    """Whether an operator makes one output of each row of its weight; None when that is not known."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type in ("MatMulNBits", "Gather", "GatherBlockQuantized"):
        return not attributes.get("axis", 0)
    if node.op_type == "Gemm" and name == node.input[1]:
        return bool(attributes.get("transB"))
    return False if node.op_type in COLUMNS and name == node.input[COLUMNS[node.op_type]] else None


def onnx_weights(path: Path) -> Iterator[StoredWeight]:
    """Every vector and matrix among the initializers and constants of a graph that `describe` has found whole.

    Raises:
        InputError: codes are stored in a way that is not known; later, by a weight's `read`, when they do not fit
            together with their scales.
    """
    try:
        yield from (refused_unless_whole(weight, path) for weight in _weights(path))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path}: a quantised weight is not one that can be read ({error})") from error


def _weights(path: Path) -> Iterator[StoredWeight]:
    model = parsed(path)
    graph = _Graph(constants(model), _users(model), path.parent)
    taken: set[str] = set()
    for node in every_node(model):
        if node.op_type in UNREAD:
            raise ValueError(f"{node.name}: weights of {node.op_type} cannot be read back")
        if node.op_type == "MatMulBnb4" and {node.input[1], node.input[2]} <= set(graph.tensors):
            taken |= {node.input[1], node.input[2]}
            yield _bnb4(graph, node)
            continue
        coded = _integer_product(graph, node) if node.op_type == "MatMulInteger" else _coded(graph, node)
        if coded is not None:
            taken |= {name for name in coded if name is not None}
            yield _quantised(graph, node, *coded)
    for name, tensor in graph.tensors.items():
        sizes = [size for size in tensor.dims if size != 1]
        if name not in taken and 1 <= len(sizes) <= 2 and graph.dtype(name) in FLOATS:
            rows, columns = (1, *sizes)[-2:]
            use, read = graph.use_of(name), _plain(graph, name, (rows, columns))
            yield StoredWeight(
                name, (rows, columns), graph.dtype(name), None, None, use.names, use.outputs_in_rows, read
            )


def _plain(graph: _Graph, name: str, shape: tuple[int, int]) -> Callable[[], Values]:
    return lambda: Values(graph.of(name).reshape(shape))


def _users(model: "ModelProto") -> dict[str, list["NodeProto"]]:
    users = defaultdict(list)
    for node in every_node(model):
        for name in node.input:
            users[name].append(node)
    return users


def _coded(graph: _Graph, node: "NodeProto") -> tuple[str, str, str | None] | None:
    """The codes, scales and zero points (None where there are none) of an operator, all of them constants."""
    if node.op_type not in CODED:
        return None
    codes, scale, zero_point = (node.input[place] if place < len(node.input) else "" for place in CODED[node.op_type])
    if node.op_type == "DequantizeLinear":
        codes = _gathered_from(graph, codes)
    if not {codes, scale, *([zero_point] if zero_point else [])} <= set(graph.tensors):
        return None
    return codes, scale, zero_point or None


def _gathered_from(graph: _Graph, name: str) -> str:
    """The table whose rows are gathered before they are dequantised, or the name itself."""
    nodes = (node for users in graph.users.values() for node in users)
    return next((node.input[0] for node in nodes if node.op_type == "Gather" and name in node.output), name)


def _integer_product(graph: _Graph, node: "NodeProto") -> tuple[str, str, str | None] | None:
    """Codes and zero point of a product of integers, and the scale: a constant that its result is multiplied by."""
    codes, zero_point = node.input[1], node.input[3] if len(node.input) > 3 else ""
    followers = [user for cast in graph.users.get(node.output[0], []) for user in graph.users.get(cast.output[0], [])]
    factors = {name for follower in followers if follower.op_type == "Mul" for name in follower.input}
    makers = [user for users in graph.users.values() for user in users if factors & set(user.output)]
    scale = next(
        (name for maker in makers if maker.op_type == "Mul" for name in maker.input if name in graph.tensors), ""
    )
    if codes not in graph.tensors or not scale or (zero_point and zero_point not in graph.tensors):
        return None
    return codes, scale, zero_point or None


def _quantised(graph: _Graph, node: "NodeProto", codes: str, scale: str, zero_point: str | None) -> StoredWeight:
    """A weight out of the tensors of an operator."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return _in_blocks(graph, node.op_type, attributes, codes, scale, zero_point)
    use = graph.use_of(codes)
    if node.op_type == "DequantizeLinear":
        of_result = graph.use_of(node.output[0])
        in_rows = use.outputs_in_rows if of_result.outputs_in_rows is None else of_result.outputs_in_rows
        use = _Use(use.names + of_result.names, in_rows)
    return _scaled(graph, attributes, use, codes, scale, zero_point)


def _in_blocks(
    graph: _Graph, operator: str, attributes: Mapping[str, int], codes: str, scale: str, zero_point: str | None
) -> StoredWeight:
    """Codes of MatMulNBits or GatherBlockQuantized, in blocks along each row."""
    dims, dtype = graph.tensors[codes].dims, graph.dtype(codes)
    bits, block = attributes.get("bits", BITS.get(dtype, 4)), attributes.get("block_size", 128)
    if bits not in (2, 4, 8) or block < 1:
        raise ValueError(f"{codes}: {bits} bits in blocks of {block}; expected 2, 4 or 8 bits, and blocks")
    columns = math.prod(dims[1:]) * (8 // bits if dtype == "uint8" else 1)
    is_product = operator == "MatMulNBits"
    shape = (attributes["N"], attributes["K"]) if is_product else (dims[0], columns)
    use, read = graph.use_of(codes), _packed if is_product else _gathered
    return StoredWeight(
        codes,
        shape,
        f"{'int' if dtype.startswith('int') else 'uint'}{bits}",
        bits,
        block,
        use.names,
        True,
        lambda: read(graph, shape, bits, block, codes, scale, zero_point),
    )


def _bnb4(graph: _Graph, node: "NodeProto") -> StoredWeight:
    """The weight of MatMulBnb4: its rows are outputs."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    shape, block, kind = (attributes["N"], attributes["K"]), attributes["block_size"], attributes["quant_type"]
    codes, largest = node.input[1:3]
    if kind not in KINDS or block < 1:
        raise ValueError(f"{node.name}: quant_type {kind} in blocks of {block}; expected 0 or 1, and blocks")

    def read() -> Values:
        return bnb4_values(graph.of(codes), graph.of(largest), shape, block, kind)

    return StoredWeight(codes, shape, KINDS[kind][0], 4, block, graph.use_of(codes).names, True, read)


def _packed(
    graph: _Graph, shape: tuple[int, int], bits: int, block: int, codes: str, scale: str, zero_point: str | None
) -> Values:
    """`B (N, blocks, bytes)` of MatMulNBits: its rows are outputs; the last block is padded."""
    rows, columns = shape
    codes_RC = unpacked(graph.of(codes).reshape(rows, -1), bits)[:, :columns]
    scale_RB = graph.of(scale).reshape(rows, -1)
    if zero_point is None:
        zero_RB = np.full(scale_RB.shape, 2 ** (bits - 1), np.float32)
    else:
        zero_RB = graph.of(zero_point).reshape(rows, -1)
        if zero_RB.dtype == np.uint8:
            zero_RB = unpacked(zero_RB, bits)[:, : scale_RB.shape[1]]
    return dequantised(codes_RC, bits, 0, scale_RB, zero_RB, block)


def _gathered(
    graph: _Graph, shape: tuple[int, int], bits: int, block: int, codes: str, scale: str, zero_point: str | None
) -> Values:
    """A table (rows, columns) of GatherBlockQuantized, quantised along its columns."""
    rows, columns = shape
    stored = graph.of(codes)
    is_packed = stored.dtype == np.uint8
    codes_RC = unpacked(stored, bits) if is_packed else stored.astype(np.int8)
    low = -(2 ** (bits - 1)) if graph.dtype(codes).startswith("int") else 0
    scale_RB = graph.of(scale).reshape(rows, -1)
    zero_RB = np.full(scale_RB.shape, 2 ** (bits - 1) if is_packed else 0, np.float32)
    if zero_point is not None:
        given = graph.of(zero_point)
        zero_RB = unpacked(given, bits)[:, : scale_RB.shape[1]] if given.dtype == np.uint8 else given.astype(np.float32)
    return dequantised(codes_RC.reshape(rows, columns), bits, low, scale_RB, zero_RB, block)


def _scaled(
    graph: _Graph,
    attributes: Mapping[str, int],
    use: _Use,
    codes: str,
    scale: str,
    zero_point: str | None,
) -> StoredWeight:
    """Codes with one scale, one for each slice of an axis, or one for each block of it (DequantizeLinear)."""
    dtype, dims = graph.dtype(codes), tuple(graph.tensors[codes].dims)
    if not dtype.removeprefix("u").startswith("int"):
        raise ValueError(f"{codes}: codes of {dtype}; expected whole numbers")
    bits = BITS.get(dtype) or int(dtype.partition("int")[2])
    low = -(2 ** (bits - 1)) if dtype.startswith("int") else 0
    size, scales = attributes.get("block_size", 0), math.prod(graph.tensors[scale].dims)
    axis = attributes.get("axis", 1) % max(len(dims), 1)
    # Blocks lie along columns here: a scale for every column, or blocks down a column, are read transposed.
    is_turned = len(dims) == 2 and ((size and axis == 0) or (not size and axis == 1 and scales == dims[1] > 1))
    rows, columns = dims[::-1] if is_turned else (1, *dims)[-2:]
    block = size or columns

    def by_block(array: np.ndarray) -> np.ndarray:
        if size:
            return array.T if is_turned else array
        return np.broadcast_to(array.reshape(-1, 1), (rows, 1))

    def read() -> Values:
        codes_RC = graph.of(codes).astype(np.int64 if bits > 8 else np.int16)
        scale_RB = by_block(graph.of(scale))
        zero_RB = np.zeros(scale_RB.shape, np.float32) if zero_point is None else by_block(graph.of(zero_point))
        turned = codes_RC.T if is_turned else codes_RC.reshape(rows, columns)
        return dequantised(turned, bits, low, scale_RB, zero_RB, block)

    use = use.of_read(is_turned=is_turned)
    return StoredWeight(codes, (rows, columns), dtype, bits, block, use.names, use.outputs_in_rows, read)
