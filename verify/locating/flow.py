"""A candidate's graph as nodes and the names of tensors, and what follows from its structure alone."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

# What these give is made of sizes, not of values.
OF_SIZES = ("Shape", "ShapeOf", "Size", "ConstantOfShape")
COUNTING = ("CumSum", "NonZero", "Range")  # make positions out of sizes
# What these give is what they are fed, in another shape or dtype.
SHAPING = ("Cast", "Identity", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Slice")
# What these give of a tensor and constants is what it was, but for its size.
SCALING = ("Cast", "Identity", "Mul", "Div", "Clip", "Add", "Sub", "Neg")
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
        kept: keys and values that the graph keeps to itself from run to run, by trace point.
        fused: tensors that are inside an operator of the runtime's own, which it does not make unless it has to.
        later: the graph of the passes that go on from a past, where they have their own.
        is_later: it is such a graph.
    """

    nodes: Sequence[Node]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: frozenset[str]
    kept: Mapping[str, str] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()
    later: "Flow | None" = None
    is_later: bool = False

    def runs(self, step: int) -> bool:
        """Whether a pass with a cache, the prompts' being number 0, is one of this graph."""
        return step > 0 if self.is_later else step == 0 or self.later is None

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
    def sizes(self) -> frozenset[str]:
        """The tensors that are reckoned of sizes alone, as shapes are; positions are none of them."""
        found: set[str] = set()
        for node in self.nodes:
            read = {name for name in node.inputs if name} - self.constants
            if node.operator in OF_SIZES or (read and read <= found and node.operator not in COUNTING):
                found |= set(node.outputs)
        return frozenset(found)

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
    def _additions(self) -> tuple[int, ...]:
        """The nodes of the trunk that add to the residual stream."""
        adding = (place for place in self.trunk if self.nodes[place].operator in ("Add", *SKIP_NORMS))
        return tuple(place for place in adding if not set(self.nodes[place].inputs[:2]) & self.constants)

    @cached_property
    def sums(self) -> tuple[str, ...]:
        """The tensors of the residual stream after each addition to it, in order, as they are where it branches.

        Of a norm that adds and does not give the sum: the name that `missing_sums` has for it.
        """
        found = []
        for place in self._additions:
            node = self.nodes[place]
            if node.operator == "Add":
                found.append(self._unbranched(node.outputs[0]))
            else:
                given = node.outputs[SKIP_SUM] if len(node.outputs) > SKIP_SUM else ""
                found.append(given or _missing_sum(place))
        return tuple(found)

    def _unbranched(self, name: str) -> str:
        """What a tensor has become where it is first read by several nodes, or by one that does more than scale it."""
        users = [place for place in self.users.get(name, ()) if self.nodes[place].operator not in OF_SIZES]
        while len(users) == 1 and name not in self.outputs:
            node = self.nodes[users[0]]
            if node.operator not in SCALING or set(node.inputs) - {name} - self.constants:
                break
            name = node.outputs[0]
            users = [place for place in self.users.get(name, ()) if self.nodes[place].operator not in OF_SIZES]
        return name

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
        before = [place for place in self.trunk if place < min(self._additions, default=0)]
        return self.nodes[before[-1]].outputs[0] if before else None

    @property
    def embedder(self) -> int | None:
        """The node that makes what the first layer reads, whatever shape and dtype that is put into."""
        place = self.maker.get(self.embedding or "")
        while place is not None and self.nodes[place].operator in SHAPING:
            place = self.maker.get(self.nodes[place].inputs[0])
        return place


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
