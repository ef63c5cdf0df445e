"""Parts cut out of an ONNX graph, as models of their own that are fed what the part was fed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verify.candidates.onnx_graph import has_graphs, read_by
from verify.candidates.onnx_passes import pass_graphs
from verify.candidates.ort import OrtCandidate
from verify.candidates.ort_session import CPU, errors, session_of
from verify.errors import NoVerdict

AGAIN = "again:"  # begins the name of what a node gives when it is run alone

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def cut(
    candidate: OrtCandidate, made: Sequence[str], fed: Mapping[str, np.ndarray], given: Sequence[str]
) -> "ModelProto":
    """The nodes that make some tensors, as a model.

    Args:
        candidate: of whose graphs one makes them.
        made: the tensors; those in `fed` are inputs of the new model, whoever makes them.
        fed: what it is fed.
        given: its outputs.
    """
    model, directory = _graph_of(candidate, made)
    wanted = set(made)
    nodes = [node for node in model.graph.node if wanted & set(node.output) and not set(node.output) <= fed.keys()]
    return _part(model, directory, nodes, fed, given)


def _graph_of(candidate: OrtCandidate, made: Sequence[str]) -> tuple["ModelProto", Path]:
    """The graph that makes some tensors, and where its weights are. Raises NoVerdict when it is no ONNX graph."""
    if not isinstance(candidate, OrtCandidate):
        raise NoVerdict("only nodes of an ONNX graph on ONNX Runtime are run alone")
    first, *others = pass_graphs(candidate)
    graph = next((each for each in others if any(not first.has(name) for name in made)), first)
    return graph.renamed, graph.file.path.parent


def _part(
    model: "ModelProto",
    directory: Path,
    nodes: Sequence["NodeProto"],
    fed: Mapping[str, np.ndarray],
    given: Sequence[str],
) -> "ModelProto":
    """A model of some nodes, with the constants that they read."""
    import onnx

    used = {name for node in nodes for name in read_by(node)}
    constants = [node for node in model.graph.node if node.op_type == "Constant" and used & set(node.output)]
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used and tensor.name not in fed]
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(directory))
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


def files_onnx(
    candidate: OrtCandidate, made: Sequence[str], fed: Mapping[str, np.ndarray], given: Sequence[str]
) -> dict[str, bytes]:
    """The same as a file, by its name."""
    return {"part.onnx": cut(candidate, made, fed, given).SerializeToString()}


def replay(
    candidate: OrtCandidate, made: Sequence[str], fed: Mapping[str, np.ndarray], given: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """What nodes alone give: on ONNX's own reference evaluator, and on ONNX Runtime's CPU provider, unoptimised.

    Whoever has no such operator is left out.
    """
    part = cut(candidate, made, fed, given)
    used = {value.name for value in part.graph.input}
    feeds = {name: array for name, array in fed.items() if name in used}
    runners = {"onnx": _by_reference, CPU: _by_runtime}
    found = {}
    for name, run in runners.items():
        arrays = run(part, given, feeds)
        if arrays is not None:
            found[name] = dict(zip(given, arrays, strict=True))
    return found


def replay_each(candidate: OrtCandidate, made: Sequence[str], fed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each of some nodes gives by itself, on ONNX Runtime's CPU provider, unoptimised.

    Args:
        candidate: whose graph they are of.
        made: what they give.
        fed: what they are fed, whoever makes it.

    Returns:
        By name; nothing of nodes that read what is neither fed nor constant.

    Raises:
        NoVerdict: it is no ONNX graph, or a node cannot be run.
    """
    model, directory = _graph_of(candidate, made)
    constant = {tensor.name for tensor in model.graph.initializer}
    constant |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    there, wanted, nodes = constant | fed.keys() | {""}, set(made), []
    for node in model.graph.node:
        if wanted & set(node.output) and set(node.input) <= there and not has_graphs(node):
            nodes.append(type(node)())
            nodes[-1].CopyFrom(node)
            nodes[-1].output[:] = [name and AGAIN + name for name in node.output]
    given = [name for node in nodes for name in node.output if name.removeprefix(AGAIN) in wanted]
    part = _part(model, directory, nodes, fed, given)
    used = {value.name for value in part.graph.input}
    arrays = _by_runtime(part, given, {name: array for name, array in fed.items() if name in used})
    if arrays is None:
        raise NoVerdict(f"{candidate.path}: its nodes cannot be run alone")
    return {name.removeprefix(AGAIN): array for name, array in zip(given, arrays, strict=True)}


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
