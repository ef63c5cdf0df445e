"""A candidate's graph as nodes and the names of tensors, and what follows from its structure alone."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

# What these give is made of sizes, not of values.
OF_SIZES = ("Shape", "ShapeOf", "Size", "ConstantOfShape")
SKIP_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
SKIP_SUM = 3  # the output of those that is the sum, before the norm


@dataclass(frozen=True)
class Node:
    """An operation: `inputs` and `outputs` are names of tensors, "" where an optional one is left out."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    has_branches: bool = False


@dataclass(frozen=True)
class Flow:
    """The nodes of a graph, each after those that make what it reads.

    Attributes:
        inputs: what the graph is fed.
        outputs: what it gives.
        constants: initializers and constants.
    """

    nodes: Sequence[Node]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: frozenset[str]

    @cached_property
    def maker(self) -> Mapping[str, int]:
        """The place of the node that makes a tensor."""
        return {name: place for place, node in enumerate(self.nodes) for name in node.outputs if name}

    @cached_property
    def users(self) -> Mapping[str, Sequence[int]]:
        """The places of the nodes that read a tensor."""
        users = defaultdict(list)
        for place, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.inputs):
                if name:
                    users[name].append(place)
        return users

    def after(self, tensors: Iterable[str]) -> set[int]:
        """The nodes that depend on the values of these tensors."""
        found: set[int] = set()
        waiting = list(tensors)
        while waiting:
            for place in self.users.get(waiting.pop(), ()):
                if place not in found and self.nodes[place].operator not in OF_SIZES:
                    found.add(place)
                    waiting += [name for name in self.nodes[place].outputs if name]
        return found

    def before(self, tensors: Iterable[str], stop: Collection[str] = ()) -> set[int]:
        """The nodes that these tensors are made by, but for those behind `stop`."""
        found: set[int] = set()
        waiting = [name for name in tensors if name not in stop]
        while waiting:
            place = self.maker.get(waiting.pop())
            if place is not None and place not in found:
                found.add(place)
                waiting += [name for name in self.nodes[place].inputs if name and name not in stop]
        return found

    @cached_property
    def trunk(self) -> tuple[int, ...]:
        """The nodes that everything from the token ids to the logits passes through, in order."""
        between = sorted(self.after(["input_ids"]) & self.before(["logits"]))
        order = {place: number for number, place in enumerate(between)}
        reach, found = -1, []
        for number, place in enumerate(between):
            if reach <= number:
                found.append(place)
            used = [
                order[user] for name in self.nodes[place].outputs for user in self.users.get(name, ()) if user in order
            ]
            reach = max([reach, *used])
        return tuple(found)

    @cached_property
    def sums(self) -> tuple[str, ...]:
        """The tensors of the residual stream after each addition to it, in order.

        Of a norm that adds and does not give the sum: the name that `missing_sums` has for it.
        """
        found = []
        for place in self.trunk:
            node = self.nodes[place]
            if node.operator == "Add" and not set(node.inputs) & self.constants:
                found.append(node.outputs[0])
            elif node.operator in SKIP_NORMS:
                given = node.outputs[SKIP_SUM] if len(node.outputs) > SKIP_SUM else ""
                found.append(given or _missing_sum(place))
        return tuple(found)

    @property
    def missing_sums(self) -> dict[str, tuple[str, str]]:
        """Sums that no node gives, and the two tensors that they are of."""
        return {
            name: (self.nodes[place].inputs[0], self.nodes[place].inputs[1])
            for place in self.trunk
            if self.nodes[place].operator in SKIP_NORMS and (name := _missing_sum(place)) in self.sums
        }

    @cached_property
    def embedding(self) -> str | None:
        """The tensor that the first layer reads."""
        if not self.sums:
            return None
        first = min(place for place, node in enumerate(self.nodes) if self._adds(place, self.sums[0]))
        before = [place for place in self.trunk if place < first]
        return self.nodes[before[-1]].outputs[0] if before else None

    def _adds(self, place: int, name: str) -> bool:
        return name in self.nodes[place].outputs or name == _missing_sum(place)


def _missing_sum(place: int) -> str:
    return f"verify/sum/{place}"


def part_of(flow: Flow, start: str, ends: Iterable[str], beside: Iterable[str] = ()) -> list[int]:
    """The nodes between a tensor and others, and those that reckon what is needed beside it.

    The node that makes the first tensor is among them where it makes something else too, as a norm that adds does.

    Args:
        beside: tensors that are given on the way, whose own makers are among them.
    """
    if start in flow.missing_sums:
        return sorted(flow.before(ends, stop=set(flow.missing_sums[start])))
    maker = flow.maker.get(start)
    made: tuple[str, ...] = () if maker is None else flow.nodes[maker].outputs
    makers = [flow.maker[name] for name in (flow.embedding or "", *flow.sums) if name in flow.maker]
    trunk = {name for place in makers for name in flow.nodes[place].outputs} - set(ends)
    places = flow.before(ends, stop={start, *made, *trunk})
    places |= {flow.maker[name] for name in beside if name in flow.maker}
    if maker is not None and len([name for name in made if name]) > 1:
        places.add(maker)
    return sorted(places)


def named(node: Node) -> str:
    """A node's name, or where it has none that of what it gives."""
    return node.name or node.outputs[0]
