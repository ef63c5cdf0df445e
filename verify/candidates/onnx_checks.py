"""What is refused in an ONNX file before it is used: damage, and weights that are not where they belong."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from refengine.errors import InputError
from verify.candidates.onnx_graph import stored_nbytes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto


def leaves_directory(location: str) -> bool:
    """Whether a file name, read as on any system, is absolute, climbs out of its directory, or is none."""
    # Compared as written, not resolved: model caches keep their files as links to a store elsewhere.
    kinds = (PurePosixPath(location), PureWindowsPath(location))
    return not location or any(kind.drive or kind.root or ".." in kind.parts for kind in kinds)


def check_names(
    path: Path, model: "ModelProto", nodes: Iterable["NodeProto"], tensors: Iterable["TensorProto"]
) -> None:
    """Raises InputError for a name that is not UTF-8.

    Protobuf hands such a name out as bytes: the file is damaged, and comparing it with text would fail later.
    """
    texts: list[str | bytes] = [model.producer_name, model.producer_version]
    texts += [opset.domain for opset in model.opset_import]
    for info in (*model.graph.input, *model.graph.output):
        texts += [info.name, *(axis.dim_param for axis in info.type.tensor_type.shape.dim)]
    for tensor in tensors:
        texts += [tensor.name, *(text for entry in tensor.external_data for text in (entry.key, entry.value))]
    for node in nodes:
        texts += [node.name, node.domain, node.op_type, *node.input, *node.output]
        texts += [attribute.name for attribute in node.attribute]
        texts += [entry.value for entry in node.metadata_props]
    for text in texts:
        if isinstance(text, bytes):
            raise InputError(
                f"{path}: expected names in UTF-8, found {text[:40]!r}: the file is damaged; export or copy it again"
            )


def check_types(onnx: Any, path: Path, model: "ModelProto", tensors: Sequence["TensorProto"]) -> None:
    """Raises InputError for an element type that the `onnx` package does not know, or a negative size."""
    types = {tensor.name: tensor.data_type for tensor in tensors}
    infos = (*model.graph.input, *model.graph.output)
    types |= {info.name: info.type.tensor_type.elem_type for info in infos}
    known = set(onnx.helper.get_all_tensor_dtypes()) - {onnx.TensorProto.UNDEFINED}
    for name, elem_type in types.items():
        if elem_type not in known:
            raise InputError(
                f"{path}: {name}: expected a tensor of a known type, found type {elem_type}: "
                f"the file is damaged, or newer than onnx {onnx.__version__}"
            )
    for tensor in tensors:
        if any(size < 0 for size in tensor.dims):
            raise InputError(
                f"{path}: {tensor.name}: expected sizes from 0, found {tuple(tensor.dims)}: the file is damaged"
            )


def external_files(onnx: Any, path: Path, tensors: Iterable["TensorProto"]) -> tuple[Path, ...]:
    """The files beside `path` that hold weights, by name.

    Raises:
        InputError: one of them is missing, cut short, outside the model's directory, or described wrongly.
    """
    needed: dict[str, tuple[int, str]] = {}  # file -> the size that it has to have, and which tensor needs it
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location, size = _external(onnx, path, tensor)
            needed[location] = max(needed.get(location, (0, "")), (size, tensor.name))
    for location, (size, name) in needed.items():
        file = path.parent / location
        if not file.is_file():
            raise InputError(
                f"{file}: no such file, although {path.name} keeps the weights of {name} in it; "
                "copy it from where the export was made"
            )
        if file.stat().st_size < size:
            raise InputError(
                f"{file}: expected at least {size} bytes, which {path.name} needs for {name}, "
                f"found {file.stat().st_size}: the file is cut short; copy it again"
            )
    return tuple(path.parent / location for location in sorted(needed))


def _external(onnx: Any, path: Path, tensor: "TensorProto") -> tuple[str, int]:
    """The file that holds a tensor, and where in it the tensor ends."""
    entries: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if leaves_directory(location):
        raise InputError(
            f"{path}: the weights of {tensor.name} are said to be in {location!r}, which leaves "
            "the model's directory; expected a plain file name"
        )
    wanted = stored_nbytes(onnx, tensor)
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or wanted)
    except ValueError as error:
        raise InputError(
            f"{path}: the external data of {tensor.name} are described wrongly ({error}); export it again"
        ) from error
    if offset < 0 or length < wanted:
        raise InputError(
            f"{path}: the external data of {tensor.name} are said to be {length} bytes from "
            f"{offset}; expected {wanted} bytes for {tuple(tensor.dims)}; export it again"
        )
    return location, offset + length
