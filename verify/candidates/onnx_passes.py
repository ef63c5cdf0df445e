"""The graphs that the passes of an ONNX export run: one, or one that reads prompts and one that goes on from them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from verify.candidates.onnx_file import OnnxFile, parsed
from verify.candidates.onnx_graph import has_graphs, read_by
from verify.candidates.ort import OrtCandidate
from verify.interface import USE_CACHE
from verify.locating.flow import Flow, Node

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

MICROSOFT = "com.microsoft."  # a domain of operators, not of functions
LATER = "with past: "  # begins the names of tensors in the second graph, which may be called as others in the first


@dataclass(frozen=True)
class PassGraph:
    """A graph that passes of a candidate run.

    Attributes:
        file: that it is of.
        is_later: it goes on from a past, and another one reads prompts.
        changed: it, where the file holds it as a branch only, or with functions.
    """

    file: OnnxFile
    is_later: bool = False
    changed: "ModelProto | None" = None

    @cached_property
    def model(self) -> "ModelProto":
        """The graph without external data; of a file, read when it is asked for."""
        return parsed(self.file.path) if self.changed is None else self.changed

    def has(self, name: str) -> bool:
        """Whether a tensor, as `flow` names it, may be in this graph."""
        return name.startswith(LATER) is self.is_later or name in self._at_borders

    def gives(self, name: str) -> bool:
        """Whether an input or output is one of this graph: one that reads prompts may take no past."""
        return name in self._at_borders

    def own(self, name: str) -> str:
        """A tensor as this graph names it."""
        return name.removeprefix(LATER) if self.is_later else name

    def named(self, name: str) -> str:
        """A tensor of this graph as `flow` names it."""
        return LATER + name if self.is_later and name and name not in self._at_borders else name

    @cached_property
    def _at_borders(self) -> set[str]:
        graph = self.model.graph
        return {value.name for value in (*graph.input, *graph.output)}

    @property
    def flow(self) -> Flow:
        """Its nodes, but for those inside branches and loops that are left."""
        graph = self.model.graph
        constants = {tensor.name for tensor in graph.initializer}
        constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
        nodes = tuple(
            Node(node.name, node.op_type, self._named(read_by(node)), self._named(node.output), has_graphs(node))
            for node in graph.node
            if node.op_type != "Constant"
        )
        inputs = tuple(value.name for value in graph.input if value.name not in constants)
        outputs = tuple(value.name for value in graph.output)
        return Flow(nodes, inputs, outputs, frozenset(self._named(constants)), is_later=self.is_later)

    @property
    def renamed(self) -> "ModelProto":
        """The model with its tensors named as `flow` names them."""
        if not self.is_later:
            return self.model
        renamed = type(self.model)()
        renamed.CopyFrom(self.model)
        for node in renamed.graph.node:
            node.input[:], node.output[:] = self._named(node.input), self._named(node.output)
        for tensor in renamed.graph.initializer:
            tensor.name = self.named(tensor.name)
        return renamed

    def _named(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(map(self.named, names))


def pass_graphs(candidate: OrtCandidate) -> list[PassGraph]:
    """The graphs of a candidate, the one that reads prompts first; calls of the model's own functions are their nodes.

    An older exporter made two files of a decoder, or one with two branches, of which a pass takes one.
    """
    file = candidate.file
    if file.with_past is not None:
        return [PassGraph(file, False, _inlined(file)), PassGraph(file.with_past, True, _inlined(file.with_past))]
    model = _inlined(file) or (parsed(file.path) if "If" in file.operators else None)
    if model is None or not any(map(_is_about_the_past, model.graph.node)):
        return [PassGraph(file, False, model)]
    return [PassGraph(file, with_past, _taken(model, with_past)) for with_past in (False, True)]


def _inlined(file: OnnxFile) -> "ModelProto | None":
    """The model with its functions written out where they are called; None where it has none."""
    import onnx.inliner

    if all("." not in name or name.startswith(MICROSOFT) for name in file.operators):
        return None
    model = parsed(file.path)
    return onnx.inliner.inline_local_functions(model) if model.functions else None


def _is_about_the_past(node: "NodeProto") -> bool:
    return node.op_type == "If" and node.input[0] == USE_CACHE


def _taken(model: "ModelProto", with_past: bool) -> "ModelProto":
    """The model with one branch in place of each node that chooses by the past."""
    import onnx

    branch = "then_branch" if with_past else "else_branch"
    taken = onnx.ModelProto()
    taken.CopyFrom(model)
    del taken.graph.node[:]
    for node in model.graph.node:
        if not _is_about_the_past(node):
            taken.graph.node.append(node)
            continue
        inside = next(attribute.g for attribute in node.attribute if attribute.name == branch)
        taken.graph.initializer.extend(inside.initializer)
        taken.graph.node.extend(inside.node)
        for value, name in zip(inside.output, node.output, strict=True):
            if value.name != name:
                taken.graph.node.append(onnx.helper.make_node("Identity", [value.name], [name]))
    return taken
