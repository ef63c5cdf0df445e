"""What an ONNX graph computes inside: it is run from a copy that gives more tensors."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verify.candidates import Past, Step
from verify.candidates.onnx_file import OnnxFile, parsed
from verify.candidates.ort import OrtCandidate
from verify.drive import CandidateRun, Rows, run_candidate
from verify.locating.flow import Flow, Node
from verify.schedule import Schedule

if TYPE_CHECKING:
    from onnx import NodeProto

TENSORS = tuple(f"tensor({kind})" for kind in ("float", "float16", "double", "int64", "int32", "bool"))
LARGEST = 2**26  # elements of a tensor that is looked at


@dataclass(frozen=True)
class Pass:
    """One run of the graph: the positions of its tokens (-1 is padding), and the tensors looked at, by name."""

    positions_BT: np.ndarray
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Traced:
    """A candidate's run with more of its tensors given.

    Attributes:
        run: what it gave otherwise, which has to be what it gives untraced.
        passes: in order.
        providers: who ran a node, by its name; of nodes that were not fused away.
    """

    run: CandidateRun
    passes: Sequence[Pass]
    providers: Mapping[str, str]


def read_flow(path: Path) -> Flow:
    """The graph of an `.onnx` file, without what is inside branches and loops."""
    graph = parsed(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    nodes = tuple(
        Node(node.name, node.op_type, tuple(node.input), tuple(node.output), any(_graphs(node)))
        for node in graph.node
        if node.op_type != "Constant"
    )
    inputs = tuple(value.name for value in graph.input if value.name not in constants)
    return Flow(nodes, inputs, tuple(value.name for value in graph.output), frozenset(constants))


def _graphs(node: "NodeProto") -> list[str]:
    return [attribute.name for attribute in node.attribute if attribute.HasField("g") or attribute.graphs]


def trace_onnx(
    candidate: OrtCandidate,
    prompts: Rows,
    schedule: Schedule,
    forced: Rows,
    use_cache: bool,
    taps: Sequence[str],
    sums: Mapping[str, tuple[str, str]],
    given: Sequence[str] = (),
) -> Traced:
    """Runs a candidate from a copy of its graph that gives these tensors too.

    Args:
        taps: names of tensors of the graph that are no outputs of it yet.
        sums: of two tensors each, computed in the copy under these names and given too.
        given: outputs and inputs of the graph that are looked at too.

    Raises:
        NoVerdict: the graph cannot be run like that.
    """
    with tempfile.TemporaryDirectory(prefix="verify-trace-") as directory:
        source = _copy(candidate.file, taps, sums, Path(directory))
        tapped = _Tapped(candidate.reopened(source), [*taps, *sums, *given])
    run = run_candidate(tapped, prompts, schedule, use_cache=use_cache, forced=forced)
    return Traced(run, tapped.passes, tapped.providers)


def _copy(file: OnnxFile, taps: Sequence[str], sums: Mapping[str, tuple[str, str]], directory: Path) -> Path | bytes:
    """The file with more outputs: a protobuf message that follows another one adds to its lists.

    Where the weights are in files of their own, what is left is small, and is kept in memory.
    """
    import onnx

    graph = onnx.GraphProto()
    for name, (one, other) in sums.items():
        graph.node.append(onnx.helper.make_node("Add", [one, other], [name]))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in (*taps, *sums))  # the runtime infers their types
    more = onnx.ModelProto(graph=graph).SerializeToString()
    if file.external_files:
        return file.path.read_bytes() + more
    copy = directory / file.path.name
    shutil.copyfile(file.path, copy)
    with copy.open("ab") as stream:
        stream.write(more)
    return copy


class _Session:
    """A session that gives more than it is asked for, which is kept."""

    def __init__(self, session: Any, taps: Sequence[str]):
        self.session = session
        kinds = {value.name: value.type for value in session.get_outputs()}
        # Of the others, such as bfloat16, no array is made: a run would fail.
        self._taps = [name for name in taps if kinds.get(name, TENSORS[0]) in TENSORS]
        self.looked_at: Mapping[str, np.ndarray] = {}

    def run(self, names: Sequence[str], fed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """As a session does it."""
        asked = [name for name in self._taps if name not in fed]
        given = self.session.run([*names, *asked], fed)
        shown = {**dict(zip(asked, given[len(names) :], strict=True)), **fed}
        self.looked_at = {
            name: np.array(shown[name])
            for name in self._taps
            if isinstance(shown[name], np.ndarray) and shown[name].size <= LARGEST
        }
        return given[: len(names)]


class _Tapped(OrtCandidate):
    """A candidate that keeps what is looked at."""

    def __init__(self, candidate: OrtCandidate, taps: Sequence[str]):
        opened = candidate.with_session(lambda session: _Session(session, taps))._opened
        super().__init__(candidate.runtime, opened, candidate.settings, candidate._config)
        self._session: _Session = opened[0].session
        self.passes: list[Pass] = []

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """As the candidate does it."""
        step = super().run(token_ids_BT, positions_BT, past)
        self.passes.append(Pass(positions_BT, self._session.looked_at))
        return step

    @property
    def providers(self) -> dict[str, str]:
        """Who runs a node, by its name."""
        assigned = self._session.session.get_provider_graph_assignment_info()
        return {node.name: part.ep_name for part in assigned for node in part.get_nodes()}
