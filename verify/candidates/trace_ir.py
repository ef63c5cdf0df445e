"""What a graph computes inside OpenVINO: an IR, or an ONNX file that it has converted, run with more outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from verify.candidates import Past, Step
from verify.candidates.ir_graph import IrGraph
from verify.candidates.openvino import OpenVinoCandidate
from verify.candidates.traced import LARGEST, Pass, Traced
from verify.drive import Rows, run_candidate
from verify.locating.flow import Flow
from verify.schedule import Schedule


def read_ir(candidate: OpenVinoCandidate) -> Flow:
    """The graph before it is compiled, and what of it is fused away then."""
    graph = IrGraph.of(candidate)
    nodes = tuple(graph.node(operator) for operator in graph.computing)
    return Flow(
        nodes,
        (*(port.get_any_name() for port in graph.model.inputs), *graph.past),
        tuple(port.get_any_name() for port in graph.model.outputs),
        frozenset(graph.constants),
        graph.cached,
        frozenset(graph.fused(candidate.reopened(graph.model).fused)),
    )


def trace_ir(
    candidate: OpenVinoCandidate,
    prompts: Rows,
    schedule: Schedule,
    forced: Rows,
    use_cache: bool,
    taps: Sequence[str],
    given: Sequence[str] = (),
) -> Traced:
    """Runs a candidate from a copy of its graph that gives these tensors too.

    What a graph keeps to itself as a past is read from there, since the runtime fuses what leads to it.

    Args:
        taps: names of tensors of the graph that are no outputs of it yet.
        given: outputs and inputs of the graph that are looked at too.

    Raises:
        NoVerdict: the graph cannot be run like that.
    """
    graph = IrGraph.of(candidate)
    kept = {name: point for point, name in graph.cached.items() if name in taps}
    added = [name for name in taps if name not in kept]
    graph.model.add_outputs([graph.ports[name] for name in added])
    tapped = _Tapped(candidate.reopened(graph.model), added, given, kept)
    run = run_candidate(tapped, prompts, schedule, use_cache=use_cache, forced=forced)
    providers = dict.fromkeys((graph.name(each) for each in graph.computing), candidate.device)
    return Traced(run, tapped.passes, providers)


class _Request:
    """A request that gives more than it is asked for, which is kept."""

    def __init__(self, request: Any, added: Sequence[str], given: Sequence[str]):
        self._request = request
        self._added = added
        self._given = given
        self.looked_at: dict[str, np.ndarray] = {}
        self.reset_state: Callable[[], None] = request.reset_state
        self.query_state: Callable[[], Any] = request.query_state

    def infer(self, fed: Mapping[str, np.ndarray]) -> dict[Any, np.ndarray]:
        """As a request does it."""
        results = list(self._request.infer(fed).items())
        first = len(results) - len(self._added)
        asked = dict(zip(self._added, (array for _, array in results[first:]), strict=True))
        known = {**fed, **{name: array for port, array in results[:first] for name in port.get_names()}}
        asked |= {name: known[name] for name in self._given if name in known}
        self.looked_at = {name: np.array(array) for name, array in asked.items() if array.size <= LARGEST}
        return dict(results[:first])


class _Tapped(OpenVinoCandidate):
    """A candidate that keeps what is looked at."""

    def __init__(
        self, candidate: OpenVinoCandidate, added: Sequence[str], given: Sequence[str], kept: Mapping[str, str]
    ):
        request = _Request(candidate._request, added, given)
        super().__init__(
            candidate.path,
            candidate.interface,
            candidate.settings,
            candidate._arithmetic,
            candidate._config,
            request,
        )
        self._request: _Request = request
        self._kept = kept
        self.passes: list[Pass] = []

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """As the candidate does it."""
        step = super().run(token_ids_BT, positions_BT, past)
        shown = self.caches(step.past) if self._kept and step.past is not None else {}
        held = {name: shown[point] for name, point in self._kept.items() if point in shown}
        self.passes.append(Pass(positions_BT, {**self._request.looked_at, **held}))
        return step
