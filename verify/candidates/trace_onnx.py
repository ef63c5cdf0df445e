"""What an ONNX graph computes inside: it is run from a copy that gives more tensors."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from verify.candidates import Past, Step
from verify.candidates.onnx_passes import PassGraph, pass_graphs
from verify.candidates.ort import OrtCandidate
from verify.candidates.traced import LARGEST, Pass, Traced
from verify.drive import Rows, run_candidate
from verify.locating.flow import Flow
from verify.schedule import Schedule

TENSORS = tuple(f"tensor({kind})" for kind in ("float", "float16", "double", "int64", "int32", "bool"))


def read_onnx(candidate: OrtCandidate) -> Flow:
    """The graph as it is in the file, or that which reads prompts, with the other one as what runs later."""
    first, *others = (graph.flow for graph in pass_graphs(candidate))
    return replace(first, later=others[0]) if others else first


def trace_onnx(
    candidate: OrtCandidate,
    prompts: Rows,
    schedule: Schedule,
    forced: Rows,
    use_cache: bool,
    taps: Sequence[str],
    given: Sequence[str] = (),
    sums: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> Traced:
    """Runs a candidate from a copy of its graph that gives these tensors too.

    Args:
        taps: names of tensors of the graph that are no outputs of it yet.
        given: outputs and inputs of the graph that are looked at too.
        sums: of two tensors each, computed in the copy under these names and given too.

    Raises:
        NoVerdict: the graph cannot be run like that.
    """
    graphs = pass_graphs(candidate)
    twins = _twins(graphs) if use_cache else {}
    asked = [*taps, *sums]
    asked += [twins[name] for name in asked if name in twins]
    looked_at = [_Looked(graph, [*filter(graph.has, asked), *filter(graph.gives, given)]) for graph in graphs]
    with tempfile.TemporaryDirectory(prefix="verify-trace-") as directory:
        sources = [
            _copy(graph, [name for name in asked if graph.has(name) and name not in sums], sums, Path(directory))
            for graph in graphs
        ]
        tapped = _Tapped(candidate.reopened(sources), looked_at, twins)
    run = run_candidate(tapped, prompts, schedule, use_cache=use_cache, forced=forced)
    return Traced(run, tapped.passes, tapped.providers)


@dataclass(frozen=True)
class _Looked:
    """The tensors that are looked at in one of a candidate's graphs."""

    graph: PassGraph
    names: Sequence[str]


def _twins(graphs: Sequence[PassGraph]) -> dict[str, str]:
    """Of the residual stream in two graphs: each tensor of one by that of the other, in both directions."""
    if len(graphs) == 1:
        return {}
    first, later = ([graph.flow.embedding or "", *graph.flow.sums] for graph in graphs)
    pairs = list(zip(first, later, strict=True)) if len(first) == len(later) else []
    return {**dict(pairs), **{name: twin for twin, name in pairs}}


def _copy(graph: PassGraph, taps: Sequence[str], sums: Mapping[str, tuple[str, str]], directory: Path) -> Path | bytes:
    """The graph with more outputs: a protobuf message that follows another one adds to its lists.

    Where the weights are in files of their own, what is left is small, and is kept in memory.
    """
    import onnx

    added = onnx.GraphProto()
    for name, (one, other) in sums.items():
        added.node.append(onnx.helper.make_node("Add", [one, other], [name]))
    names = (*map(graph.own, taps), *sums)
    added.output.extend(onnx.ValueInfoProto(name=name) for name in names)  # the runtime infers their types
    more: bytes = onnx.ModelProto(graph=added).SerializeToString()
    if graph.changed is not None:
        whole: bytes = graph.changed.SerializeToString()
        return whole + more
    if graph.file.external_files:
        return graph.file.path.read_bytes() + more
    copy = directory / graph.file.path.name
    shutil.copyfile(graph.file.path, copy)
    with copy.open("ab") as stream:
        stream.write(more)
    return copy


class _Session:
    """A session that gives more than it is asked for, which is kept."""

    def __init__(self, session: Any, looked: _Looked):
        self.session = session
        kinds = {value.name: value.type for value in session.get_outputs()}
        own = {name: looked.graph.own(name) for name in looked.names}
        # Of the others, such as bfloat16, no array is made: a run would fail.
        self._names = {name: inside for name, inside in own.items() if kinds.get(inside, TENSORS[0]) in TENSORS}
        self.looked_at: dict[str, np.ndarray] = {}

    def run(self, names: Sequence[str], fed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """As a session does it."""
        asked = [inside for inside in self._names.values() if inside not in fed]
        given = self.session.run([*names, *asked], fed)
        shown = {**dict(zip(asked, given[len(names) :], strict=True)), **fed}
        self.looked_at = {
            name: np.array(shown[inside])
            for name, inside in self._names.items()
            if isinstance(shown[inside], np.ndarray) and shown[inside].size <= LARGEST
        }
        return given[: len(names)]

    @property
    def providers(self) -> dict[str, str]:
        """Who runs a node, by its name."""
        assigned = self.session.get_provider_graph_assignment_info()
        return {node.name: part.ep_name for part in assigned for node in part.get_nodes()}


class _Tapped(OrtCandidate):
    """A candidate that keeps what is looked at; what has a twin in the other graph under both names."""

    def __init__(self, candidate: OrtCandidate, looked_at: Sequence[_Looked], twins: Mapping[str, str]):
        super().__init__(candidate.runtime, candidate._opened, candidate.settings, candidate._config)
        self._sessions = [_Session(one.session, each) for one, each in zip(self._opened, looked_at, strict=True)]
        self._opened = [
            replace(one, session=session) for one, session in zip(self._opened, self._sessions, strict=True)
        ]
        self._twins = twins
        self.passes: list[Pass] = []

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """As the candidate does it."""
        step = super().run(token_ids_BT, positions_BT, past)
        shown = self._sessions[0 if past is None else -1].looked_at
        shown |= {self._twins[name]: array for name, array in shown.items() if name in self._twins}
        self.passes.append(Pass(positions_BT, shown))
        return step

    @property
    def providers(self) -> dict[str, str]:
        """Who runs a node, by its name."""
        return {name: provider for session in self._sessions for name, provider in session.providers.items()}
