"""Inside the part of a model that is wrong: its tensors, from a copy of the graph that gives them, one by one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from verify.candidates.cut_onnx import replay
from verify.candidates.trace_onnx import Pass, Traced, trace_onnx
from verify.contestant import Contestant
from verify.errors import NoVerdict
from verify.locating.flow import Flow, named, part_of
from verify.locating.inside import Inside, inside_attention, inside_head, inside_mlp
from verify.locating.introduced import CACHED, CLEARLY, Arithmetics, Part
from verify.locating.sample import Sample
from verify.locating.walk import Guilty, Shown, Walk


@dataclass(frozen=True)
class Location:
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
        replays: who gives what is right when the node alone is run on its own inputs; None where it was not run.
            Where somebody does, the mistake is the runtime's.
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
    replays: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Tracer:
    """A candidate, and the rows that it is traced on."""

    contestant: Contestant
    sample: Sample
    flow: Flow

    def stream(self) -> Traced:
        """The residual stream, in all passes."""
        names = [self.flow.embedding] if self.flow.embedding else []
        return self.tensors([*names, *self.flow.sums], len(self.sample.tokens[0]))

    def tensors(self, names: Iterable[str], steps: int) -> Traced:
        """Tensors of the graph in the first passes."""
        missing = self.flow.missing_sums
        taps = [name for name in dict.fromkeys(names) if name in self.flow.maker and name not in self.flow.outputs]
        given = [name for name in dict.fromkeys(names) if name in (*self.flow.outputs, *self.flow.inputs)]
        return self.contestant.apply(
            trace_onnx,
            self.sample.prompts,
            self.sample.schedule[:steps],
            self.sample.tokens,
            self.sample.use_cache,
            taps,
            {name: missing[name] for name in names if name in missing},
            given,
        )


def inside_part(tracer: Tracer, arithmetics: Arithmetics, first: Part, traced: Traced) -> tuple[Location, Shown | None]:
    """The node and point in a part that is wrong, without a node where none was found, and a few nodes that show it."""
    sample = tracer.sample
    where = Location(
        first.layer,
        first.point,
        row=sample.rows[first.row],
        position=first.position,
        phase=sample.phase(first.row, first.position),
    )
    start, ends = _borders(tracer, first)
    if start is None:
        place = tracer.flow.maker.get(tracer.flow.embedding or "")
        guilty = None if place is None else Guilty(place, first.point, (), True)
        return (where if guilty is None else _at(where, guilty, tracer.flow, traced, 0)), None
    cached = [name for name, point in ends.items() if point.endswith("_cache")]
    places = part_of(tracer.flow, start, [name for name in ends if name not in cached], cached)
    nodes = [tracer.flow.nodes[place] for place in places]
    names = dict.fromkeys(name for node in nodes for name in (*node.inputs, *node.outputs) if name)
    # A cache that is given wrongly is found at the end of a run alone; it may have been so from the beginning.
    steps = sorted({0, sample.pass_of(first.row, first.position)})
    try:
        shown = tracer.tensors([start, *names, *ends], steps[-1] + 1)
    except NoVerdict:
        return where, None
    for step in steps:
        here = shown.passes[: step + 1]
        known = _known(arithmetics, first, start, here, sample)
        if known is None:
            continue
        window = arithmetics.truth[0].config.sliding_window
        allowed = min(CLEARLY, first.excess**0.5)
        walk = Walk(tracer.flow, places, ends, here[-1].arrays, known, window, allowed)
        guilty = walk.guilty()
        if guilty is not None:
            at = _at(where, guilty, tracer.flow, shown, step)
            return replace(at, replays=_replays(tracer, walk, guilty)), walk.shown_by(guilty)
    return where, None


def _replays(tracer: Tracer, walk: Walk, guilty: Guilty) -> tuple[str, ...] | None:
    """Who gives what is right when the node alone is run on its own inputs."""
    node = tracer.flow.nodes[guilty.place]
    given = [name for name in node.outputs if name in walk.arrays]
    fed = {name: walk.arrays[name] for name in node.inputs if name in walk.arrays}
    missing = [name for name in node.inputs if name and name not in fed and name not in tracer.flow.constants]
    if missing or not guilty.inputs_are_right:
        return None
    try:
        found = tracer.contestant.apply(replay, given, fed, given)
    except NoVerdict:
        return None
    wrong = [name for name in given if not walk.is_right(name, walk.arrays[name])]
    return tuple(who for who, arrays in found.items() if all(walk.is_right(name, arrays[name]) for name in wrong))


def _at(where: Location, guilty: Guilty, flow: Flow, shown: Traced, step: int) -> Location:
    node = flow.nodes[guilty.place]
    everywhere = set(shown.providers.values())
    provider = shown.providers.get(node.name) or (everywhere.pop() if len(everywhere) == 1 else None)
    if step == 0 and where.phase != "prefill":
        where = replace(where, phase="prefill", position=0)
    return replace(
        where,
        point=guilty.point,
        node=named(node),
        operator=node.operator,
        provider=provider,
        heads=guilty.heads,
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
    if not layers:
        return start, {end: "self_attn.residual"}
    names = layers[part.layer].key_out, layers[part.layer].value_out
    return start, {**dict(zip(names, CACHED, strict=True)), end: "self_attn.residual"}


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
