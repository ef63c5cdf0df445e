"""Parts cut out of an ONNX graph, as models of their own that are fed what the part was fed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verify.candidates.onnx_file import parsed
from verify.candidates.ort import OrtCandidate
from verify.candidates.ort_session import CPU, errors, session_of

if TYPE_CHECKING:
    from onnx import ModelProto


def cut(path: Path, made: Sequence[str], fed: Mapping[str, np.ndarray], given: Sequence[str]) -> "ModelProto":
    """The nodes that make some tensors, as a model.

    Args:
        path: of the whole model.
        made: the tensors; those in `fed` are inputs of the new model, whoever makes them.
        fed: what it is fed.
        given: its outputs.
    """
    import onnx

    model = parsed(path)
    wanted = set(made)
    nodes = [node for node in model.graph.node if wanted & set(node.output) and not set(node.output) <= fed.keys()]
    used = {name for node in nodes for name in node.input}
    constants = [node for node in model.graph.node if node.op_type == "Constant" and used & set(node.output)]
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used and tensor.name not in fed]
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in fed.items()
        if name in used
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in given]
    graph = onnx.helper.make_graph([*constants, *nodes], "part", inputs, outputs, tensors)
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    part.functions.extend(model.functions)
    return part


def cut_bytes(
    candidate: OrtCandidate, made: Sequence[str], fed: Mapping[str, np.ndarray], given: Sequence[str]
) -> bytes:
    """The same of a candidate's graph, as a file holds it."""
    serialized: bytes = cut(candidate.file.path, made, fed, given).SerializeToString()
    return serialized


def replay(
    candidate: OrtCandidate, made: Sequence[str], fed: Mapping[str, np.ndarray], given: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """What nodes alone give: on ONNX's own reference evaluator, and on ONNX Runtime's CPU provider, unoptimised.

    Whoever has no such operator is left out.
    """
    part = cut(candidate.file.path, made, fed, given)
    used = {value.name for value in part.graph.input}
    feeds = {name: array for name, array in fed.items() if name in used}
    runners = {"onnx": _by_reference, CPU: _by_runtime}
    found = {}
    for name, run in runners.items():
        arrays = run(part, given, feeds)
        if arrays is not None:
            found[name] = dict(zip(given, arrays, strict=True))
    return found


def _by_reference(part: "ModelProto", given: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray] | None:
    from onnx.reference import ReferenceEvaluator

    try:
        return list(ReferenceEvaluator(part).run(list(given), dict(feeds)))
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError, KeyError, IndexError):
        return None  # an operator that it does not have, or not in this version


def _by_runtime(part: "ModelProto", given: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray] | None:
    failures: tuple[type[Exception], ...] = errors()
    try:
        session: Any = session_of(part.SerializeToString())
        arrays: list[np.ndarray] = session.run(list(given), dict(feeds))
    except failures:
        return None
    return arrays
