"""Where a candidate first goes wrong: the layer, the trace point, the node of its graph.

What a run gives for nothing comes first: its keys and values. Then the residual stream, from a copy of the graph that
gives it, tells which parts bring an error in and which only carry it on, each part held against its own input. Then
everything inside the first of those is looked at, and right values are followed until they end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from refengine.checkpoint import Checkpoint
from refengine.errors import InputError
from verify.contestant import Contestant
from verify.drive import CandidateRun
from verify.errors import NoVerdict
from verify.expect import EXACT, Expectation
from verify.locating.findings import Shown
from verify.locating.flow import Flow
from verify.locating.free_taps import Suspects, Tap, free_taps, suspects
from verify.locating.introduced import Arithmetics, Part, parts, wrong_parts
from verify.locating.ladder import Rung, blamed, ladder, noise_distance, noise_ratio
from verify.locating.repro import write_repro
from verify.locating.sample import Streams, sample_of
from verify.locating.tracer import Place, Tracer, inside_part
from verify.naming.as_if import Passes
from verify.naming.layer_screen import Given, given_layers
from verify.report.figures import figure
from verify.truth.reference import Reference, ReferenceRun

__all__ = [
    "Located",
    "Place",
    "Rung",
    "Suspects",
    "Tap",
    "blamed",
    "free_taps",
    "ladder",
    "locate",
    "suspects",
    "write_repro",
]

OnProgress = Callable[[str], None]
HALVES = ("self_attn", "mlp")  # of a layer, as the names of trace points begin
VANISHES = (
    "with the tensors inside this part among its results it is right: the runtime makes one operator of several nodes "
    "there, which it cannot do then"
)
FEW = 3  # layers that are suspected one by one


@dataclass(frozen=True)
class Located:
    """What was found out of where a candidate goes wrong.

    Attributes:
        first: the first place; None where none was found.
        layers: those that bring an error in by themselves; empty where that is not known.
        suspects: sets of layers that a mistake may be in, the likeliest first; None is all of them.
        parts: how far each part of the model is from what it should make of its own input.
        vanishes: the run is right as soon as the graph gives more of its tensors.
        notes: what could not be looked at, and why.
        shown: a few nodes in which the mistake shows, for `write_repro`.
        given: what the candidate had around each layer that is wrong by itself.
    """

    first: Place | None
    layers: tuple[int, ...] = ()
    suspects: Suspects = (None,)
    parts: tuple[Part, ...] = ()
    vanishes: bool = False
    notes: tuple[str, ...] = ()
    shown: Shown | None = None
    given: tuple[Given, ...] = ()

    @property
    def is_outside_layers(self) -> bool:
        """Whether each layer was looked at and is right by itself, and what is before or behind them is not."""
        return bool(self.parts) and not self.layers and self.first is not None and self.first.layer is None


def locate(
    checkpoint: Checkpoint,
    contestant: Contestant,
    run: CandidateRun,
    reference: ReferenceRun,
    passes: Passes,
    expectation: Expectation = EXACT,
    on_progress: OnProgress = lambda what: None,
) -> Located:
    """Finds where a candidate goes wrong.

    Args:
        checkpoint: whose weights the reference has: the model's, or those that the export holds.
        contestant: the candidate, open.
        run: its run in which it was fed the reference's tokens.
        reference: the run that it was held against.
        passes: that `run` was made in.
        expectation: what the reference was run with.
    """
    head_dim = checkpoint.config.head_dim
    free = _from_taps(free_taps(run, reference, head_dim), suspects(run, reference), reference)
    sample = sample_of(passes, run, reference)
    engine = Reference(checkpoint, on_progress, expectation.scheme, expectation.arithmetic)
    on_progress("reading the graph")
    try:
        tracer = Tracer.of(contestant, sample)
        on_progress("the residual stream of the candidate")
        traced = tracer.stream()
    except (NoVerdict, InputError) as error:
        return replace(free, notes=(f"the graph could not be looked into: {error}",))
    if not tracer.flow.sums:
        why = _why_untraced(tracer.flow)
        return replace(free, notes=(f"the residual stream was not found in the graph{why}",))
    bound, logits = reference.logits.noise.overall_bound, [run.logits[row] for row in sample.rows]
    is_wrong = not noise_ratio(logits, reference, sample.rows) <= bound
    vanishes = is_wrong and noise_ratio(traced.run.logits, reference, sample.rows) <= bound
    on_progress("each part of the model on the candidate's own input")
    arithmetics = Arithmetics.of(engine, int((sample.positions_BT >= 0).sum()))
    streams = Streams(sample, traced)
    found = tuple(parts(tracer.flow, streams, arithmetics))
    beyond = wrong_parts(found, is_wrong and not vanishes)
    layers = tuple(sorted({part.layer for part in beyond if part.layer is not None}))
    located = replace(
        free,
        parts=found,
        layers=layers,
        vanishes=vanishes,
        notes=(
            *_notes(tracer.flow, checkpoint.config.num_hidden_layers),
            *said_of_trace(run, traced.run, reference, sample.rows),
        ),
        given=tuple(given_layers(tracer.flow, streams, found)),
    )
    if not beyond:
        why = "traced, every part of the model is right" if vanishes else "no part of the model is wrong by itself"
        return replace(located, notes=(*located.notes, why))
    located = replace(located, suspects=_suspects(beyond, layers, checkpoint.config.num_hidden_layers))
    on_progress("inside the part that is wrong")
    return _with_place(located, *inside_part(tracer, arithmetics, beyond[0], traced))


def _with_place(located: Located, first: Place, shown: Shown | None) -> Located:
    said = [VANISHES] if first.vanishes else []
    said += [f"the inside of this part could not be looked at: {first.untraced}"] if first.untraced else []
    vanishes, notes = located.vanishes or first.vanishes, (*located.notes, *said)
    return replace(located, first=first, shown=shown, vanishes=vanishes, notes=notes)


def said_of_trace(
    run: CandidateRun, traced: CandidateRun, reference: ReferenceRun, rows: Sequence[int]
) -> tuple[str, ...]:
    """That a run is another one when it is traced, if it is.

    Args:
        run: as it is otherwise.
        traced: of these rows alone.
        reference: of all rows.
        rows: that were traced.
    """
    if not noise_distance(run, traced.logits, reference, rows) > reference.logits.noise.overall_bound:
        return ()
    before = noise_ratio([run.logits[row] for row in rows], reference, rows)
    now = noise_ratio(traced.logits, reference, rows)
    return (
        f"with the residual stream among its results the run is another one, of a noise ratio of {figure(now)} for "
        f"{figure(before)}: what is said of its inside is said of that run",
    )


def _suspects(beyond: Sequence[Part], layers: Sequence[int], count: int) -> Suspects:
    """From the parts that bring an error in: two mistakes may be in other layers, or in other halves of them."""
    halves = [
        [part.layer for part in beyond if part.layer is not None and part.point.startswith(half)] for half in HALVES
    ]
    few = [[layer] for layer in (layers if len(layers) <= FEW else layers[:1])]
    found = [frozenset(each) for each in (layers, *halves, *few) if each]
    return tuple(dict.fromkeys([*(None if len(each) == count else each for each in found), None]))


def _from_taps(taps: Sequence[Tap], suspected: Suspects, reference: ReferenceRun) -> Located:
    """As far as keys and values alone tell it."""
    tap = next((tap for tap in taps if tap.is_beyond), None)
    if tap is None:
        return Located(None, suspects=suspected)
    step = tap.position - len(reference.prompts[tap.row]) + 1
    phase = "prefill" if step <= 0 else f"decode step {step}"
    point = tap.point.split(".", 2)[2]
    heads = tap.heads
    return Located(
        Place(tap.layer, point, row=tap.row, position=tap.position, phase=phase, heads=heads), suspects=suspected
    )


def _why_untraced(flow: Flow) -> str:
    branches = sorted({node.operator for node in flow.nodes if node.has_branches})
    return f", which has branches ({', '.join(branches)})" if branches else ""


def _notes(flow: Flow, layers: int) -> tuple[str, ...]:
    found, expected = len(flow.sums), 2 * layers
    if found == expected:
        return ()
    return (
        f"the residual stream: expected {expected} additions to it in the graph, found {found}; layers are counted by "
        "them, so what is said of layers behind the first that is wrong may be of others",
    )
