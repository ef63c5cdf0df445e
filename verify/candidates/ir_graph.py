"""OpenVINO's model of an export, with names of its tensors that are the same whenever it is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from verify.candidates.openvino import STATE_NAME, OpenVinoCandidate
from verify.candidates.operators import IR_SUFFIX, NAMES_OF_IR
from verify.locating.flow import Node

SOURCES = ("Constant", "Parameter", "ReadValue")  # compute nothing
SINKS = ("Assign", "Result")
WITH_BRANCHES = ("If", "Loop", "TensorIterator")


@dataclass(frozen=True)
class IrGraph:
    """A model that nobody has compiled yet, and names of its tensors that are the same whenever it is read.

    The names that OpenVINO makes up while it converts an ONNX file are others each time; the order of operators is not.
    """

    model: Any
    is_ir: bool

    @classmethod
    def of(cls, candidate: OpenVinoCandidate) -> "IrGraph":
        """That of a candidate, read once more."""
        return cls(candidate.model(), candidate.path.suffix == IR_SUFFIX)

    @cached_property
    def operators(self) -> Sequence[Any]:
        """Each after those that make what it reads."""
        listed: Sequence[Any] = self.model.get_ordered_ops()
        return listed

    @cached_property
    def computing(self) -> Sequence[Any]:
        """The operators that compute something from what is fed."""
        constant = self.constants
        return [
            each
            for each in self.operators
            if each.get_type_name() not in (*SOURCES, *SINKS) and self._name(each.output(0)) not in constant
        ]

    @cached_property
    def ports(self) -> Mapping[str, Any]:
        """Tensors by name: those that are fed or given by the name in the interface."""
        return {
            self._name(port): port
            for each in self.operators
            if each.get_type_name() not in SINKS
            for port in each.outputs()
        }

    @cached_property
    def _names(self) -> Mapping[tuple[str, int], str]:
        names = {
            _key(port): f"{place}:{port.get_index()}"
            for place, each in enumerate(self.operators)
            for port in each.outputs()
        }
        given = {_key(port.get_node().input_value(0)): port.get_any_name() for port in self.model.outputs}
        return {**names, **given, **{_key(port): port.get_any_name() for port in self.model.inputs}}

    def _name(self, port: Any) -> str:
        return self._names[_key(port)]

    @cached_property
    def constants(self) -> set[str]:
        """Constants, and what is made of constants alone, as weights that are decompressed."""
        found: set[str] = set()
        for each in self.operators:
            kind, inputs = each.get_type_name(), each.input_values()
            if kind == "Constant" or (inputs and kind not in SOURCES and all(self._name(i) in found for i in inputs)):
                found |= {self._name(port) for port in each.outputs()}
        return found

    @cached_property
    def past(self) -> Sequence[str]:
        """What is read of what an earlier run has kept."""
        return [self._name(each.output(0)) for each in self.operators if each.get_type_name() == "ReadValue"]

    @cached_property
    def cached(self) -> Mapping[str, str]:
        """The tensors that are kept as keys and values, by trace point."""
        kept = ((each, each.get_attributes()) for each in self.operators if each.get_type_name() == "Assign")
        found = ((STATE_NAME.match(attributes["variable_id"]), each) for each, attributes in kept)
        return {
            f"layers.{name[1]}.self_attn.{name[2][0]}_cache": self._name(each.input_value(0))
            for name, each in found
            if name is not None
        }

    def node(self, operator: Any) -> Node:
        """An operator in ONNX's words."""
        kind = operator.get_type_name()
        return Node(
            self.name(operator),
            NAMES_OF_IR.get(kind, kind),
            tuple(self._name(port) for port in operator.input_values()),
            tuple(self._name(port) for port in operator.outputs()),
            kind in WITH_BRANCHES,
        )

    def name(self, operator: Any) -> str:
        """As it is called in the file: what is made up in its place has the name of the first behind it that is."""
        return self._names_in_file[operator.get_name()]

    @cached_property
    def _names_in_file(self) -> Mapping[str, str]:
        names: dict[str, str] = {}
        for each in reversed(self.operators):
            users = [port.get_node().get_name() for output in each.outputs() for port in output.get_target_inputs()]
            behind = next((names[user] for user in users if user in names), "")
            is_known = self.is_ir or any(port.get_names() for port in each.outputs())
            names[each.get_name()] = each.get_friendly_name() if is_known or not behind else behind
        return names

    def fused(self, layers: Sequence[Sequence[str]]) -> Iterator[str]:
        """Tensors that are inside an operator of the compiled model.

        Args:
            layers: of each operator of the compiled model, which operators of this one it is, by their names.
        """
        places = {each.get_friendly_name(): place for place, each in enumerate(self.computing)}
        last = {max((places[name] for name in names if name in places), default=None) for names in layers}
        for place, each in enumerate(self.computing):
            if place not in last:
                yield from (self._name(port) for port in each.outputs())


def _key(port: Any) -> tuple[str, int]:
    return port.get_node().get_name(), port.get_index()
