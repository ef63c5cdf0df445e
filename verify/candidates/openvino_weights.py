"""The weights of OpenVINO's IR: constants, and what decompresses them, read from the two files without OpenVINO.

Source: openvino 2026.4, the IR's version 11: `Const` layers name an element type, a shape, and a piece of the `.bin`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from xml.etree import ElementTree

import ml_dtypes
import numpy as np

from refengine.errors import InputError
from verify.weights.stored import StoredWeight, Values, dequantised, refused_unless_whole, unpacked

FLOATS: Mapping[str, type] = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
PLAIN: Mapping[str, type] = {**FLOATS, "i64": np.int64, "i32": np.int32, "u64": np.uint64, "boolean": np.bool_}
CODES: Mapping[str, tuple[int, int, str]] = {  # element type -> bits, the least code, its usual name
    "u8": (8, 0, "uint8"),
    "i8": (8, -128, "int8"),
    "u4": (4, 0, "uint4"),
    "i4": (4, -8, "int4"),
    "u2": (2, 0, "uint2"),
}
UNREAD = ("nf4", "f4e2m1", "f8e4m3", "f8e5m2", "u6", "u3", "u1")  # element types that are not read back here
PASSED = ("Convert", "Reshape", "Transpose", "Squeeze", "Unsqueeze")  # between a constant and what uses it

CONVERSIONS = 3  # that may follow each other: a damaged graph may go round in circles


@dataclass(frozen=True)
class _Constant:
    """A constant, and the name and operators of the layer that uses it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class _Graph:
    """Layers by number: their types, names, and who feeds whom, through which input."""

    types: Mapping[str, str]
    names: Mapping[str, str]
    feeds: Mapping[str, list[tuple[str, int]]]  # layer -> the layers that it feeds, and by which input
    fed: Mapping[str, Mapping[int, str]]  # layer -> input -> the layer that feeds it
    constants: Mapping[str, _Constant]
    with_transposed_weight: frozenset[str]  # products whose second factor has outputs as rows


def ir_weights(path: Path) -> Iterator[StoredWeight]:
    """Every vector and matrix among the constants; codes with their scales and zero points.

    Raises:
        InputError: the files are not a whole IR; later, by a weight's `read`, when codes and scales do not fit.
    """
    yield from (refused_unless_whole(weight, path) for weight in _weights(path))


def _weights(path: Path) -> Iterator[StoredWeight]:
    graph = ir_graph(path)
    for layer, constant in graph.constants.items():
        if constant.dtype in UNREAD:
            raise InputError(f"{path}: {constant.name}: weights stored as {constant.dtype} cannot be read back")
        sizes = [size for size in constant.shape if size != 1]
        if not sizes or constant.dtype not in (*FLOATS, *CODES):
            continue
        if constant.dtype in FLOATS:
            if len(sizes) <= 2 and not _is_scale(graph, layer):
                rows, columns = (1, *sizes)[-2:]
                dtype = np.dtype(FLOATS[constant.dtype]).name
                yield StoredWeight(
                    constant.name,
                    (rows, columns),
                    dtype,
                    None,
                    None,
                    *_use(graph, layer),
                    _plain(constant, (rows, columns)),
                )
        elif (weight := _decompressed(graph, layer, constant)) is not None:
            yield weight


def _plain(constant: _Constant, shape: tuple[int, int]) -> Callable[[], Values]:
    return lambda: Values(constant.read().reshape(shape))


def ir_graph(path: Path) -> _Graph:
    """What an IR computes, layer by layer. Raises InputError when it is not whole."""
    types, names, constants, turned = {}, {}, {}, set()
    feeds: dict[str, list[tuple[str, int]]] = defaultdict(list)
    fed: dict[str, dict[int, str]] = defaultdict(dict)
    root = ElementTree.parse(path).getroot()
    try:
        blob = np.memmap(path.with_suffix(".bin"), np.uint8, "r")
        for layer in root.iterfind("layers/layer"):
            number, data = layer.attrib["id"], layer.find("data")
            types[number], names[number] = layer.attrib["type"], layer.attrib["name"]
            if types[number] == "Const" and data is not None:
                constants[number] = _constant(names[number], data.attrib, blob)
            if types[number] == "MatMul" and data is not None and data.attrib.get("transpose_b") == "true":
                turned.add(number)
        ports = {
            (layer.attrib["id"], port.attrib["id"]): place
            for layer in root.iterfind("layers/layer")
            for place, port in enumerate(layer.iterfind("input/port"))
        }
        for edge in root.iterfind("edges/edge"):
            source, target = edge.attrib["from-layer"], edge.attrib["to-layer"]
            place = ports[target, edge.attrib["to-port"]]
            if source not in types:
                raise ValueError(f"layer {source} is not there")
            feeds[source].append((target, place))
            fed[target][place] = source
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a whole IR ({error!r}); export or copy it again") from error
    return _Graph(types, names, feeds, fed, constants, frozenset(turned))


def _constant(name: str, data: Mapping[str, str], blob: np.ndarray) -> _Constant:
    """Raises ValueError when the `.bin` does not hold it."""
    dtype, start, size = data["element_type"], int(data["offset"]), int(data["size"])
    shape = tuple(int(axis) for axis in data["shape"].split(",") if axis.strip())
    if start + size > len(blob):
        raise ValueError(f"{name} needs {start + size} bytes of the .bin, which has {len(blob)}")

    def read() -> np.ndarray:
        stored = blob[start : start + size]
        if dtype in PLAIN:
            return stored.view(PLAIN[dtype]).reshape(shape)
        bits, low, _ = CODES[dtype]
        codes = unpacked(stored, bits)[: prod(shape)].reshape(shape)
        if low == 0:
            return codes
        # Two's complement in `bits` bits.
        return (codes.view(np.int8) << (8 - bits)) >> (8 - bits)

    return _Constant(name, dtype, shape, read)


def _use(graph: _Graph, layer: str) -> tuple[tuple[str, ...], bool | None]:
    """The names of what uses a layer's result, through what merely passes it on, and whether outputs are its rows."""
    names, ways, waiting, seen = [], set(), [(layer, False)], {layer}
    while waiting:
        given, is_turned = waiting.pop()
        for user, place in graph.feeds.get(given, []):
            kind = graph.types[user]
            names.append(graph.names[user])
            if kind in PASSED and user not in seen:
                seen.add(user)
                waiting.append((user, is_turned ^ (kind == "Transpose")))
            if kind == "MatMul" and place == 1:
                ways.add(is_turned ^ (user in graph.with_transposed_weight))
            if kind == "Gather" and place == 0:
                ways.add(not is_turned)
    return tuple(names), ways.pop() if len(ways) == 1 else None


def _behind(graph: _Graph, layer: str | None) -> str | None:
    """The constant whose converted value a layer is; None where it is none."""
    for _ in range(CONVERSIONS):
        if layer is None or graph.types[layer] != "Convert":
            break
        layer = graph.fed[layer].get(0)
    return layer if layer in graph.constants else None


def _after(graph: _Graph, layer: str) -> str:
    """The one layer that a layer's converted value goes into."""
    for _ in range(CONVERSIONS):
        users = graph.feeds.get(layer, [])
        if len(users) != 1 or graph.types[users[0][0]] != "Convert":
            break
        layer = users[0][0]
    return layer


def _is_scale(graph: _Graph, layer: str) -> bool:
    """Whether a constant scales or shifts codes, rather than being a weight itself."""
    users = graph.feeds.get(_after(graph, layer), [])
    return any(
        graph.types[user] in ("Multiply", "Subtract") and place == 1 and _codes_behind(graph, graph.fed[user].get(0))
        for user, place in users
    )


def _codes_behind(graph: _Graph, layer: str | None) -> bool:
    """Whether a layer is codes, perhaps less their zero points."""
    if layer is not None and graph.types[layer] == "Subtract":
        layer = graph.fed[layer].get(0)
    constant = _behind(graph, layer)
    return constant is not None and graph.constants[constant].dtype in CODES


def _decompressed(graph: _Graph, layer: str, codes: _Constant) -> StoredWeight | None:
    """Codes, less their zero points, times their scales; None for codes that are used otherwise."""
    step, zero_point = _next(graph, layer), None
    if step is not None and graph.types[step] == "Subtract" and _behind(graph, graph.fed[step].get(0)) == layer:
        zero_point, step = _behind(graph, graph.fed[step].get(1)), _next(graph, step)
        if zero_point is None:
            return None
    if step is None or graph.types[step] != "Multiply":
        return None
    scale = _behind(graph, graph.fed[step].get(1))
    if scale is None or len(codes.shape) not in (2, 3) or graph.constants[scale].dtype not in FLOATS:
        return None
    rows, block = codes.shape[0], codes.shape[-1]
    bits, low, name = CODES[codes.dtype]
    scales, zeros = graph.constants[scale], graph.constants[zero_point] if zero_point else None

    def read() -> Values:
        scale_RB = _by_block(scales.read(), codes.shape)
        zero_RB = np.zeros_like(scale_RB, np.float32) if zeros is None else _by_block(zeros.read(), codes.shape)
        return dequantised(codes.read().reshape(rows, -1), bits, low, scale_RB, zero_RB, block)

    shape = (rows, prod(codes.shape[1:]))
    return StoredWeight(codes.name, shape, name, bits, block, *_use(graph, step), read)


def _next(graph: _Graph, layer: str) -> str | None:
    users = graph.feeds.get(_after(graph, layer), [])
    return users[0][0] if users else None


def _by_block(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale or zero point of each block, (rows, blocks), where it may be given for all of them at once."""
    return np.broadcast_to(array, (*shape[:-1], 1)).reshape(shape[0], -1)
