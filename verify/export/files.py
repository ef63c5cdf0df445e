"""Writing an export: weights go to the file one at a time, and the files appear whole or not at all."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, StringStringEntryProto, TensorProto

from refengine.checkpoint import Checkpoint
from refengine.errors import CheckpointError, InputError
from refengine.weights import check_names_and_shapes
from verify.export.graph import TRANSPOSED, Graph

ReadWeight = Callable[[str], np.ndarray]  # name of a weight in the graph -> its float32 values

# A protobuf message ends below 2 GiB; the margin holds the nodes of the deepest model many times over.
EMBEDDED_BYTES = 2**31 - 2**26
ALIGNMENT = 2**16  # external data can be memory-mapped at multiples of this on every system


def weight_reader(checkpoint: Checkpoint) -> ReadWeight:
    """A function that reads the weights of an export from its checkpoint, one at a time.

    Raises:
        CheckpointError: a tensor is missing or misshapen; at a later read, that it is not finite in float32.
    """
    check_names_and_shapes(checkpoint)

    def read(name: str) -> np.ndarray:
        tensor_name = name.removesuffix(TRANSPOSED)
        with np.errstate(over="ignore"):  # found as an infinite value below
            tensor = checkpoint.tensor(tensor_name).astype(np.float32, copy=False)
        if bad := tensor.size - np.count_nonzero(np.isfinite(tensor)):
            found = f"found {bad} NaN or infinite values as float32"
            raise CheckpointError(f"{checkpoint.path}: {tensor_name}: expected finite weights, {found}")
        return tensor.T if name.endswith(TRANSPOSED) else tensor

    return read


def write_model(graph: Graph, read: ReadWeight, out: Path, *, embedded_bytes: int = EMBEDDED_BYTES) -> None:
    """Writes a graph and its weights to `out`; more than `embedded_bytes` of weights go to `out` + "_data".

    Raises:
        InputError: `out` is a directory, has another suffix than `.onnx`, or cannot be written.
    """
    try:
        _check_place(out)
        # Beside the target, so that the renaming at the end stays within one file system.
        with TemporaryDirectory(prefix=".export.", dir=out.parent) as temporary:
            _write_files(graph, read, Path(temporary) / out.name, embedded_bytes)
            # OUT_data sorts last and goes first, since OUT needs it.
            for written in sorted(Path(temporary).iterdir(), reverse=True):
                os.replace(written, out.parent / written.name)
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(f"{out}: cannot be written ({why}); choose another place") from error


def _check_place(out: Path) -> None:
    if out.is_dir():
        raise InputError(f"{out}: expected a file to write, found a directory; try {out / 'model.onnx'}")
    if out.suffix != ".onnx":
        raise InputError(f"{out}: expected a file name that ends in .onnx to write the export to")
    if not out.parent.is_dir():
        raise InputError(f"{out}: no such directory {out.parent} to write the export in; create it first")


def _write_files(graph: Graph, read: ReadWeight, file: Path, embedded_bytes: int) -> None:
    if sum(map(_nbytes, graph.weights.values())) > embedded_bytes:
        _write_external(graph, read, file)
    else:
        _write_embedded(graph, read, file)


def _write_external(graph: Graph, read: ReadWeight, file: Path) -> None:
    model = graph.model()
    data = file.with_name(f"{file.name}_data")
    with data.open("wb") as stream:
        for name, shape in graph.weights.items():
            stream.seek(-stream.tell() % ALIGNMENT, os.SEEK_CUR)
            where = {"location": data.name, "offset": stream.tell(), "length": _nbytes(shape)}
            stream.write(_values(read, name, shape))
            entries = [StringStringEntryProto(key=key, value=str(value)) for key, value in where.items()]
            header = _header(name, shape, data_location=TensorProto.EXTERNAL, external_data=entries)
            model.graph.initializer.append(header)
    file.write_bytes(model.SerializeToString())


def _write_embedded(graph: Graph, read: ReadWeight, file: Path) -> None:
    """Frames the weights as protobuf does, since message objects would hold the whole model, and twice."""
    model = graph.model()
    nodes = model.graph.SerializeToString()
    model.ClearField("graph")
    fronts = [_weight_front(name, shape) for name, shape in graph.weights.items()]
    length = len(nodes) + sum(map(len, fronts)) + sum(map(_nbytes, graph.weights.values()))
    with file.open("wb") as stream:
        stream.write(model.SerializeToString() + _frame(ModelProto.GRAPH_FIELD_NUMBER, length) + nodes)
        for front, (name, shape) in zip(fronts, graph.weights.items(), strict=True):
            stream.write(front)
            stream.write(_values(read, name, shape))


def _weight_front(name: str, shape: tuple[int, ...]) -> bytes:
    """All of an initializer's message but its values, which come last."""
    values = _frame(TensorProto.RAW_DATA_FIELD_NUMBER, _nbytes(shape))
    front = _header(name, shape).SerializeToString() + values
    return _frame(GraphProto.INITIALIZER_FIELD_NUMBER, len(front) + _nbytes(shape)) + front


def _header(name: str, shape: tuple[int, ...], **more: Any) -> TensorProto:
    return TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, **more)


def _frame(number: int, length: int) -> bytes:
    """What precedes a field of `length` bytes: its tag, then the length in groups of 7 bits, lowest first.

    Source: protobuf.dev/programming-guides/encoding, wire type 2 (LEN) and base 128 varints.
    """
    frame = bytearray([number << 3 | 2])
    while length > 0x7F:
        frame.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*frame, length])


def _values(read: ReadWeight, name: str, shape: tuple[int, ...]) -> memoryview:
    values = np.ascontiguousarray(read(name), "<f4")
    assert values.shape == shape, f"{name}: declared with shape {shape}, read with {values.shape}"
    return values.data


def _nbytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)
