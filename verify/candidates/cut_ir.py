"""Parts cut out of OpenVINO's model of an export, as models of their own that are fed what the part was fed."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from verify.candidates.ir_graph import IrGraph
from verify.candidates.openvino import OpenVinoCandidate
from verify.candidates.openvino_session import ALONE, REFERENCE, cut, save
from verify.errors import NoVerdict

WITHOUT_REFERENCE = ("ScaledDotProductAttention",)  # operators of whose results OpenVINO has no second opinion (2026.4)


def files_ir(
    candidate: OpenVinoCandidate, made: Sequence[str], fed: Mapping[str, np.ndarray], given: Sequence[str]
) -> dict[str, bytes]:
    """The nodes that make some tensors, as the files of an IR, by name.

    Args:
        candidate: of whose graph they are.
        made: what they make, all of which is between `fed` and `given`.
        fed: inputs of the new model, whoever makes them.
        given: its outputs.
    """
    with tempfile.TemporaryDirectory(prefix="verify-part-") as directory:
        save(_part(candidate, fed, given), Path(directory) / "part.xml")
        return {file.name: file.read_bytes() for file in sorted(Path(directory).iterdir())}


def replay_each_ir(
    candidate: OpenVinoCandidate, made: Sequence[str], fed: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What each of some nodes gives by itself, by the reference implementations of OpenVINO.

    Args:
        candidate: whose graph they are of.
        made: what they give.
        fed: what they are fed, whoever makes it.

    Returns:
        By name; nothing of nodes that read what is neither fed nor constant, nor of attention as one operator.

    Raises:
        NoVerdict: OpenVINO has no reference implementation of one of them.
    """
    graph = IrGraph.of(candidate)
    there = set(graph.constants) | fed.keys()
    computing = [each for each in graph.computing if each.get_type_name() not in WITHOUT_REFERENCE]
    nodes = [node for node in map(graph.node, computing) if set(node.outputs) & set(made)]
    alone = [node for node in nodes if set(node.inputs) <= there]
    given = [name for node in alone for name in node.outputs if name in made]
    read = {name: fed[name] for name in dict.fromkeys(name for node in alone for name in node.inputs) if name in fed}
    part = cut({name: graph.ports[name] for name in read}, [graph.ports[name] for name in given])
    arrays = ALONE[REFERENCE](part, list(read.values()))
    if arrays is None:
        raise NoVerdict(f"{candidate.path}: its nodes cannot be run alone")
    return dict(zip(given, arrays, strict=True))


def _part(candidate: OpenVinoCandidate, fed: Sequence[str] | Mapping[str, np.ndarray], given: Sequence[str]) -> object:
    ports = IrGraph.of(candidate).ports
    return cut({name: ports[name] for name in fed}, [ports[name] for name in given])


def replay_ir(
    candidate: OpenVinoCandidate, made: Sequence[str], fed: Mapping[str, np.ndarray], given: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """What nodes alone give: in plain float32 on the CPU, and by the reference implementations of OpenVINO.

    Whoever has no such operator is left out.
    """
    part = _part(candidate, fed, given)
    found = {who: run(part, list(fed.values())) for who, run in ALONE.items()}
    return {who: dict(zip(given, arrays, strict=True)) for who, arrays in found.items() if arrays is not None}
