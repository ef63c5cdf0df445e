"""An `.onnx` file read without running it: what it declares, what it holds, and whether its files are all there and safe."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from refengine.errors import InputError
from verify.errors import RuntimeMissing
from verify.feeds import Declared

if TYPE_CHECKING:
    import onnx

USUAL_PLACES = ("model.onnx", "onnx/model.onnx")
HEADS_ATTRIBUTES = ("num_heads", "q_num_heads")  # of com.microsoft's attention operators, and of ONNX's own
SMALL_DTYPES = {
    "int4": 4,
    "uint4": 4,
    "float4_e2m1fn": 4,
    "int2": 2,
    "uint2": 2,
}  # bits, where NumPy counts a byte


@dataclass(frozen=True)
class WeightTotal:
    """Weights of one dtype: how many tensors, how many numbers in them, and their bytes in the file."""

    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True)
class OnnxFile:
    """What an `.onnx` file says of itself.

    `exporter` is the producer's name and version as written in the file. `opsets` has "ai.onnx" for the default domain.
    `operators` counts the nodes of the graph, its subgraphs and functions, the most frequent first, with the domain before
    the name where it is not ONNX's own. `weights` is by dtype, the largest first. `external_files` are those beside `path`
    that hold weights. `attention_width` is the inner width of attention, num_attention_heads * head_dim, or None where no
    node shows it; `declared_heads` is num_attention_heads where an attention operator says it.
    """

    path: Path
    exporter: str
    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[Declared, ...]
    outputs: tuple[Declared, ...]
    operators: Mapping[str, int]
    weights: Mapping[str, WeightTotal]
    external_files: tuple[Path, ...]
    declared_heads: int | None
    attention_width: int | None

    def query_heads(self, head_dim: int | None) -> int | None:
        """num_attention_heads, as far as the graph shows it to one who knows the head size."""
        if (
            self.declared_heads is not None
            or not self.attention_width
            or not head_dim
            or self.attention_width % head_dim
        ):
            return self.declared_heads
        return self.attention_width // head_dim

    def sha256(self) -> str:
        """Of the bytes of the `.onnx` file and then of its external files, in the order of their names; hexadecimal."""
        digest = hashlib.sha256()
        for file in (self.path, *self.external_files):
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def find_onnx(path: str | Path) -> Path:
    """The `.onnx` file that a file or an exporter's directory means. Raises InputError when there is none, or no telling which."""
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"{path}: no such file or directory; expected an .onnx file, or a directory that holds one"
        )
    if path.is_file():
        if path.suffix != ".onnx":
            raise InputError(f"{path}: expected an .onnx file, found one called {path.name}")
        return path
    places = [path / place for place in (*_decoder_of_genai_config(path), *USUAL_PLACES)]
    found = [place for place in places if place.is_file()] or sorted(path.glob("*.onnx"))
    if not found:
        raise InputError(
            f"{path}: no model.onnx, no onnx/model.onnx and no genai_config.json; expected an exported ONNX model"
        )
    if found[0] not in places and len(found) > 1:
        raise InputError(
            f"{path}: found {', '.join(file.name for file in found)} and no model.onnx; give the path of one of them"
        )
    return found[0]


def read_onnx(path: str | Path) -> OnnxFile:
    """Reads the graph and checks that the files with its weights are there, whole, and in the model's own directory.

    Raises:
        InputError: it is not a whole ONNX file, or its external data are missing, cut short or outside the directory.
        RuntimeMissing: the `onnx` package is not installed.
    """
    path = find_onnx(path)
    onnx = _import_onnx()
    model = _parse(path)
    tensors = list(_tensors(model))
    nodes = list(_nodes(model))
    _check_names(path, model, nodes, tensors)
    _check_types(onnx, path, model, tensors)
    initializers = {tensor.name: tuple(tensor.dims) for tensor in tensors}
    operators = Counter(
        f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        for node in nodes
    )
    return OnnxFile(
        path=path,
        exporter=f"{model.producer_name} {model.producer_version}".strip() or "unknown",
        ir_version=model.ir_version,
        opsets={opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        inputs=tuple(_declared(onnx, info) for info in model.graph.input if info.name not in initializers),
        outputs=tuple(_declared(onnx, info) for info in model.graph.output),
        operators=dict(operators.most_common()),
        weights=_weights(onnx, tensors),
        external_files=_external_files(onnx, path, tensors),
        declared_heads=_declared_heads(nodes),
        attention_width=_attention_width(nodes, initializers),
    )


def _import_onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise RuntimeMissing(
            f'ONNX exports are read with onnx, which cannot be imported ({error}): pip install "tokenproof[onnxruntime]"'
        ) from error
    return onnx


def _decoder_of_genai_config(directory: Path) -> list[str]:
    """The file name in onnxruntime-genai's `genai_config.json`, where there is one."""
    file = directory / "genai_config.json"
    if not file.is_file():
        return []
    try:
        filename = json.loads(file.read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected model.decoder.filename, found none ({error!r})") from error
    if not isinstance(filename, str) or _leaves(filename):
        raise InputError(
            f"{file}: model.decoder.filename is {filename!r}, which leaves the model's directory; expected a plain file name"
        )
    if not (directory / filename).is_file():
        raise InputError(f"{directory / filename}: no such file, although {file.name} names it")
    return [filename]


def _parse(path: Path) -> "onnx.ModelProto":
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path}: not a whole ONNX file ({error}); export or copy it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not model.graph.node or not model.opset_import:
        raise InputError(f"{path}: expected an ONNX model, found no graph in it; export or copy it again")
    return model


def _check_names(
    path: Path,
    model: "onnx.ModelProto",
    nodes: Sequence["onnx.NodeProto"],
    tensors: Sequence["onnx.TensorProto"],
) -> None:
    """Protobuf hands out text that is no UTF-8 as bytes: then the file is damaged, and later comparisons would fail oddly."""
    texts: list[str | bytes] = [
        model.producer_name,
        model.producer_version,
        *(opset.domain for opset in model.opset_import),
    ]
    for info in (*model.graph.input, *model.graph.output):
        texts += [info.name, *(size.dim_param for size in info.type.tensor_type.shape.dim)]
    for tensor in tensors:
        texts += [tensor.name, *(text for entry in tensor.external_data for text in (entry.key, entry.value))]
    for node in nodes:
        texts += [
            node.name,
            node.domain,
            node.op_type,
            *node.input,
            *node.output,
            *(attribute.name for attribute in node.attribute),
        ]
        texts += [item.value for item in node.metadata_props]
    for text in texts:
        if isinstance(text, bytes):
            raise InputError(
                f"{path}: expected names in UTF-8, found {text[:40]!r}: the file is damaged; export or copy it again"
            )


def _check_types(
    onnx: Any, path: Path, model: "onnx.ModelProto", tensors: Sequence["onnx.TensorProto"]
) -> None:
    types = {tensor.name: tensor.data_type for tensor in tensors}
    types |= {
        info.name: info.type.tensor_type.elem_type for info in (*model.graph.input, *model.graph.output)
    }
    known = set(onnx.helper.get_all_tensor_dtypes()) - {onnx.TensorProto.UNDEFINED}
    for name, elem_type in types.items():
        if elem_type not in known:
            raise InputError(
                f"{path}: {name}: expected a tensor of a known type, found type {elem_type}: the file is damaged, or newer than "
                f"onnx {onnx.__version__}"
            )
    for tensor in tensors:
        if any(size < 0 for size in tensor.dims):
            raise InputError(
                f"{path}: {tensor.name}: expected sizes from 0, found {tuple(tensor.dims)}: the file is damaged"
            )


def _leaves(location: str) -> bool:
    """Whether a file name, read as on any system, is absolute or climbs out of its directory."""
    # Compared as written, not resolved: model caches keep their files as links to a store elsewhere.
    kinds = (PurePosixPath(location), PureWindowsPath(location))
    return not location or any(
        kind.is_absolute() or kind.drive or kind.root or ".." in kind.parts for kind in kinds
    )


def _external_files(onnx: Any, path: Path, tensors: Sequence["onnx.TensorProto"]) -> tuple[Path, ...]:
    needed: dict[
        str, tuple[int, str]
    ] = {}  # location -> the size that the file has to have, and the tensor that needs it
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        if _leaves(location):
            raise InputError(
                f"{path}: the weights of {tensor.name} are said to be in {location!r}, which leaves the model's directory; "
                "expected a plain file name"
            )
        try:
            offset = int(entry.get("offset") or 0)
            length = int(entry.get("length") or _nbytes(onnx, tensor))
        except ValueError as error:
            raise InputError(
                f"{path}: the external data of {tensor.name} are described wrongly ({error}); export it again"
            ) from error
        if offset < 0 or length < _nbytes(onnx, tensor):
            raise InputError(
                f"{path}: the external data of {tensor.name} are said to be {length} bytes from {offset}; expected "
                f"{_nbytes(onnx, tensor)} bytes for {tuple(tensor.dims)}; export it again"
            )
        needed[location] = max(needed.get(location, (0, "")), (offset + length, tensor.name))
    for location, (size, name) in needed.items():
        file = path.parent / location
        if not file.is_file():
            raise InputError(
                f"{file}: no such file, although {path.name} keeps the weights of {name} in it; copy it from the export"
            )
        if file.stat().st_size < size:
            raise InputError(
                f"{file}: expected at least {size} bytes, which {path.name} needs for {name}, found "
                f"{file.stat().st_size}: the file is cut short; copy it again"
            )
    return tuple(path.parent / location for location in sorted(needed))


def _graphs(model: "onnx.ModelProto") -> Iterator["onnx.GraphProto"]:
    """The main graph and every graph inside a node, in no particular order."""
    waiting = [model.graph]
    waiting += [graph for function in model.functions for node in function.node for graph in _bodies(node)]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [body for node in graph.node for body in _bodies(node)]


def _bodies(node: "onnx.NodeProto") -> list["onnx.GraphProto"]:
    with_graph = [attribute for attribute in node.attribute if attribute.HasField("g") or attribute.graphs]
    return [
        graph
        for attribute in with_graph
        for graph in ([attribute.g] if attribute.HasField("g") else attribute.graphs)
    ]


def _nodes(model: "onnx.ModelProto") -> Iterator["onnx.NodeProto"]:
    for graph in _graphs(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _tensors(model: "onnx.ModelProto") -> Iterator["onnx.TensorProto"]:
    """Initializers, and constants kept outside the file; small constants inside it are part of the program, not weights."""
    for graph in _graphs(model):
        yield from graph.initializer
    for node in _nodes(model):
        for attribute in node.attribute:
            for tensor in (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors):
                if tensor.external_data:
                    yield tensor


def _dtype(onnx: Any, elem_type: int) -> np.dtype:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def _nbytes(onnx: Any, tensor: "onnx.TensorProto") -> int:
    dtype = _dtype(onnx, tensor.data_type)
    return (math.prod(tensor.dims) * SMALL_DTYPES.get(dtype.name, 8 * dtype.itemsize) + 7) // 8


def _weights(onnx: Any, tensors: Sequence["onnx.TensorProto"]) -> dict[str, WeightTotal]:
    totals: dict[str, WeightTotal] = {}
    for tensor in tensors:
        dtype = _dtype(onnx, tensor.data_type).name
        known = totals.get(dtype, WeightTotal(0, 0, 0))
        totals[dtype] = WeightTotal(
            known.tensors + 1, known.elements + math.prod(tensor.dims), known.nbytes + _nbytes(onnx, tensor)
        )
    return dict(sorted(totals.items(), key=lambda item: -item[1].nbytes))


def _declared(onnx: Any, info: "onnx.ValueInfoProto") -> Declared:
    tensor = info.type.tensor_type
    shape = tuple(
        size.dim_value if size.HasField("dim_value") else size.dim_param or None for size in tensor.shape.dim
    )
    return Declared(info.name, _dtype(onnx, tensor.elem_type).name, shape)


def _declared_heads(nodes: Sequence["onnx.NodeProto"]) -> int | None:
    """num_attention_heads as attention operators have it in an attribute; None when there is none, or they differ."""
    heads = {
        attribute.i
        for node in nodes
        if "Attention" in node.op_type
        for attribute in node.attribute
        if attribute.name in HEADS_ATTRIBUTES and attribute.i
    }
    return heads.pop() if len(heads) == 1 else None


def _attention_width(
    nodes: Sequence["onnx.NodeProto"], initializers: Mapping[str, tuple[int, ...]]
) -> int | None:
    """The input width of `o_proj`, from the shape of its weight; None when there is none, or they differ."""
    producers = {name: node for node in nodes for name in node.output}
    widths = {
        width for node in nodes if _is_o_proj(node) and (width := _input_width(node, producers, initializers))
    }
    return widths.pop() if len(widths) == 1 else None


def _is_o_proj(node: "onnx.NodeProto") -> bool:
    # torch's dynamo exporter names nodes by number, and keeps the module path in their metadata.
    if node.op_type not in ("MatMul", "Gemm", "MatMulInteger", "MatMulNBits") or len(node.input) < 2:
        return False
    return any(
        "o_proj" in text for text in (node.name, node.input[1], *(item.value for item in node.metadata_props))
    )


def _input_width(
    node: "onnx.NodeProto",
    producers: Mapping[str, "onnx.NodeProto"],
    initializers: Mapping[str, tuple[int, ...]],
) -> int | None:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "MatMulNBits":
        return attributes.get("K")
    name, is_transposed = node.input[1], bool(attributes.get("transB"))
    while (
        name not in initializers
        and name in producers
        and producers[name].op_type in ("Transpose", "Cast", "DequantizeLinear", "Identity")
    ):
        is_transposed ^= producers[name].op_type == "Transpose"
        name = producers[name].input[0]
    shape = initializers.get(name, ())
    return shape[1 if is_transposed else 0] if len(shape) == 2 else None
