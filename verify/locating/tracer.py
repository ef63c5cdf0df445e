"""Inside the part of a model that is wrong: its tensors, from a copy of the graph that gives them, one by one."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from verify.candidates.traced import Pass, Traced
from verify.contestant import Contestant
from verify.errors import NoVerdict
from verify.locating.differing import Differing, first_differing
from verify.locating.findings import Guilty, Shown
from verify.locating.flow import Flow, named, part_of
from verify.locating.inside import Inside, inside_attention, inside_head, inside_mlp
from verify.locating.insight import Insight, insight_into
from verify.locating.introduced import CACHED, CLEARLY, Arithmetics, Part
from verify.locating.repro import whole_part
from verify.locating.sample import Sample
from verify.locating.walk import Walk


@dataclass(frozen=True)
class Place:
    """Where a candidate first goes wrong.

    Attributes:
        layer: None before the first and behind the last.
        point: of `refengine.trace`, without the layer.
        node: its name in the graph, or where it has none that of what it gives; None where it was not found.
        operator: of the node.
        provider: that runs it, where it is known.
        row, position: the first that is wrong; the row of the prompts.
        phase: "prefill", or "decode step n", the first being 1.
        heads: that are wrong, where they are not all.
        order: whose values each head has, where heads have but changed places; empty else.
        replays: who gives what is right when the node alone is run on its own inputs; None where it was not run.
            Where somebody does, the mistake is the runtime's.
        differs: the first node about there that the plain CPU computes otherwise; None where none is known.
        vanishes: all of it is right as soon as the graph gives the tensors in there, so that no node is found.
        untraced: why the inside of the part could not be looked at.
    """

    layer: int | None
    point: str
    node: str | None = None
    operator: str | None = None
    provider: str | None = None
    row: int = 0
    position: int = 0
    phase: str = "prefill"
    heads: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    replays: tuple[str, ...] | None = None
    differs: Differing | None = None
    vanishes: bool = False
    untraced: str | None = None


@dataclass(frozen=True)
class Tracer:
    """A candidate, and the rows that it is traced on."""

    contestant: Contestant
    sample: Sample
    insight: Insight
    flow: Flow

    @classmethod
    def of(cls, contestant: Contestant, sample: Sample) -> "Tracer":
        """Reads the candidate's graph. Raises NoVerdict when its runtime shows none."""
        insight = insight_into(contestant)
        flow: Flow = contestant.apply(insight.read)
        return cls(contestant, sample, insight, flow if sample.use_cache else replace(flow, later=None))

    def stream(self) -> Traced:
        """The residual stream, in all passes."""
        names = [self.flow.embedding] if self.flow.embedding else []
        return self.tensors([*names, *self.flow.sums], len(self.sample.tokens[0]))

    def tensors(self, names: Iterable[str], steps: int) -> Traced:
        """Tensors of the graph in the first passes."""
        missing = self.flow.missing_sums
        taps = [name for name in dict.fromkeys(names) if name in self.flow.maker and name not in self.flow.outputs]
        given = [name for name in dict.fromkeys(names) if name in (*self.flow.outputs, *self.flow.inputs)]
        sums = {name: missing[name] for name in names if name in missing}
        return self.contestant.apply(
            self.insight.trace,
            self.sample.prompts,
            self.sample.schedule[:steps],
            self.sample.tokens,
            self.sample.use_cache,
            taps,
            given,
            *([sums] if sums else []),
        )


def inside_part(tracer: Tracer, arithmetics: Arithmetics, first: Part, traced: Traced) -> tuple[Place, Shown | None]:
    """The node and point in a part that is wrong, without a node where none was found, and a few nodes that show it."""
    place, shown = _inside(tracer, arithmetics, first, traced)
    if place.node is None and tracer.flow.later is not None:
        place, shown = _inside(replace(tracer, flow=tracer.flow.later), arithmetics, first, traced)
    return place, shown


def _inside(tracer: Tracer, arithmetics: Arithmetics, first: Part, traced: Traced) -> tuple[Place, Shown | None]:
    sample = tracer.sample
    where = Place(
        first.layer,
        first.point,
        row=sample.rows[first.row],
        position=first.position,
        phase=sample.phase(first.row, first.position),
    )
    flow = tracer.flow
    start, ends = _borders(tracer, first)
    if start is None:
        place = flow.embedder
        guilty = None if place is None else Guilty(place, first.point, (), True)
        return (where if guilty is None else _at(where, guilty, flow, traced)), None
    cached = [name for name, point in ends.items() if point.endswith("_cache")]
    places = part_of(flow, start, [name for name in ends if name not in cached], cached)
    nodes = [flow.nodes[place] for place in places]
    names = dict.fromkeys(name for node in nodes for name in (*node.inputs, *node.outputs) if name)
    look = partial(_look, tracer, arithmetics, first, start, places, ends)
    try:
        try:
            found, right = _opened(tracer, arithmetics, partial(look, [*names]))
        except NoVerdict:  # a runtime may have no tensor of sizes that it knows beforehand
            found, right = _opened(
                tracer, arithmetics, partial(look, [name for name in names if name not in flow.sizes])
            )
    except NoVerdict as error:
        return replace(where, untraced=str(error)), None
    if found is None:
        wrong = next((name for name, point in ends.items() if point == first.point), next(iter(ends)))
        whole = whole_part(flow, places, wrong, right) if right is not None else None
        return replace(where, vanishes=right is not None), whole
    position = sample.position_in(first.row, first.position, found.step)
    where = replace(where, position=position, phase=sample.phase(first.row, position))
    at = _at(where, found.guilty, flow, found.shown)
    replays = _replays(tracer, found.walk, found.guilty)
    differs = first_differing(tracer.contestant, tracer.insight, flow, places, found.walk.arrays, found.walk.is_right)
    return replace(at, replays=replays, differs=differs), found.walk.shown_by(found.guilty)


@dataclass(frozen=True)
class _Found:
    """A node that is guilty, in which step, and what tells so."""

    guilty: Guilty
    walk: Walk
    shown: Traced
    step: int


_Looked = tuple[_Found | None, Mapping[str, np.ndarray] | None]


def _look(
    tracer: Tracer,
    arithmetics: Arithmetics,
    part: Part,
    start: str,
    places: Sequence[int],
    ends: Mapping[str, str],
    names: Sequence[str],
    opened: Collection[str],
) -> _Looked:
    """Walks through a part; of what the runtime fuses, only what is `opened` is looked at, and what is kept.

    Where nothing is found, and all that the part is there for is right now: what it gave.
    """
    flow, sample = tracer.flow, tracer.sample
    closed = flow.fused - set(opened) - set(flow.kept.values())
    looked_at = {0, sample.pass_of(part.row, part.position)}
    if part.point in CACHED and sample.use_cache:
        # It is seen at the end of a run alone: it may have been so from the beginning, or since it was first read.
        looked_at |= {1, len(sample.tokens[0]) - 1}
    steps = sorted(step for step in looked_at if step < len(sample.tokens[0]) and flow.runs(step))
    if not steps:
        return None, None
    shown = tracer.tensors([name for name in (start, *names, *ends) if name not in closed], steps[-1] + 1)
    is_right = True
    for step in steps:
        here = shown.passes[: step + 1]
        known = _known(arithmetics, part, start, here, sample)
        if known is None:
            is_right = False
            continue
        window = arithmetics.truth[0].config.sliding_window
        allowed = min(CLEARLY, part.excess**0.5)
        walk = Walk(flow, places, ends, here[-1].arrays, known, window, allowed)
        guilty = walk.guilty()
        if guilty is not None:
            return _Found(guilty, walk, shown, step), None
        is_right &= all(name in walk.arrays and walk.is_right(name, walk.arrays[name]) for name in ends)
    return None, shown.passes[steps[-1]].arrays if is_right else None


def _opened(tracer: Tracer, arithmetics: Arithmetics, look: Callable[[Collection[str]], _Looked]) -> _Looked:
    """What `look` finds from outside of what the runtime has fused, and then inside the guilty one."""
    flow = tracer.flow
    found, right = look(())
    if found is None and flow.fused:
        found, right = look(flow.fused)
    if found is not None and (inner := _fused_into(tracer, arithmetics, found.guilty)):
        closer, _ = look(inner)
        there = {*inner, *flow.nodes[found.guilty.place].outputs}
        found = closer if closer is not None and there & set(flow.nodes[closer.guilty.place].outputs) else found
    return found, right


def _fused_into(tracer: Tracer, arithmetics: Arithmetics, guilty: Guilty) -> set[str]:
    """What the runtime has made one with a node, where it can be looked at by itself.

    A cache that stores less than it is given does so only as long as it is one with its attention.
    """
    flow = tracer.flow
    outputs = flow.nodes[guilty.place].outputs
    seen = set(flow.maker) - flow.fused - set(outputs)
    whole = {name for place in flow.before(outputs, stop=seen) for name in flow.nodes[place].outputs}
    coded = arithmetics.engine.scheme is not None and whole & set(flow.kept.values())
    return set() if coded else whole & flow.fused


def _replays(tracer: Tracer, walk: Walk, guilty: Guilty) -> tuple[str, ...] | None:
    """Who gives what is right when the node alone is run on its own inputs."""
    node = tracer.flow.nodes[guilty.place]
    given = [name for name in node.outputs if name in walk.arrays]
    fed = {name: walk.arrays[name] for name in node.inputs if name in walk.arrays}
    missing = [name for name in node.inputs if name and name not in fed and name not in tracer.flow.constants]
    wrong = [name for name in given if not walk.is_right(name, walk.arrays[name])]
    if missing or not wrong or not guilty.inputs_are_right:
        return None
    try:
        found = tracer.contestant.apply(tracer.insight.replay, given, fed, given)
    except NoVerdict:
        return None
    return tuple(who for who, arrays in found.items() if all(walk.is_right(name, arrays[name]) for name in wrong))


def _at(where: Place, guilty: Guilty, flow: Flow, shown: Traced) -> Place:
    node = flow.nodes[guilty.place]
    everywhere = set(shown.providers.values())
    provider = shown.providers.get(node.name) or (everywhere.pop() if len(everywhere) == 1 else None)
    return replace(
        where,
        point=guilty.point,
        node=named(node),
        operator=node.operator,
        provider=provider,
        heads=guilty.heads,
        order=guilty.order,
    )


def _borders(tracer: Tracer, part: Part) -> tuple[str | None, dict[str, str]]:
    """The tensor that a part begins with, and those that it ends in with their trace points."""
    flow = tracer.flow
    sums, missing = [flow.embedding or "", *flow.sums], flow.missing_sums
    if part.point == "embed_tokens":
        return None, {}
    if part.layer is None:
        return sums[-1], {"logits": "lm_head"}
    if part.point == "mlp.residual":
        start, end = sums[2 * part.layer + 1 : 2 * part.layer + 3]
        added = {name: "mlp.down_proj" for name in missing.get(end, ()) if name != start}
        return start, added or {end: "mlp.residual"}
    start, end = sums[2 * part.layer : 2 * part.layer + 2]
    layers = tracer.contestant.interface.layers
    kept = {point: flow.kept.get(f"layers.{part.layer}.{point}") for point in CACHED}
    if layers:
        kept = dict(zip(CACHED, (layers[part.layer].key_out, layers[part.layer].value_out), strict=True))
    return start, {**{name: point for point, name in kept.items() if name}, end: "self_attn.residual"}


def _known(arithmetics: Arithmetics, part: Part, start: str, passes: Sequence[Pass], sample: Sample) -> Inside | None:
    if any(start not in one.arrays for one in passes):
        return None
    if part.point == "lm_head" or part.layer is None:
        width = passes[-1].positions_BT.shape[1]
        logits = passes[-1].arrays.get("logits")
        return inside_head(arithmetics, start, passes[-1], logits is not None and logits.shape[1] < width)
    if part.point == "mlp.residual":
        return inside_mlp(arithmetics, part.layer, start, passes[-1])
    return inside_attention(arithmetics, part.layer, start, passes, sample.use_cache)
