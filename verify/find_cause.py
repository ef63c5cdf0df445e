"""From a run that is not equal to its diagnosis: where it goes wrong, on which rung, and by which cause."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.errors import InputError
from verify.causes import Evidence
from verify.causes.catalogue import CATALOGUE
from verify.causes.footprint import likely_at
from verify.causes.pages import fix
from verify.compare import Progress, Unequal
from verify.contestant import Contestant
from verify.diagnose import diagnose
from verify.errors import NoVerdict
from verify.expect import WEIGHTS
from verify.locate import Located, Place, Rung, blamed, ladder, locate, write_repro
from verify.locating.free_taps import misplaced
from verify.locating.ladder import is_of_plain_graph
from verify.naming.as_if import Passes
from verify.naming.runtime_fault import with_runtime_fault
from verify.report.figures import figure
from verify.report.result import Diagnosis, Location
from verify.schedule import Schedule
from verify.truth.arithmetic import FLOAT32
from verify.truth.codes import Given, is_whole
from verify.truth.reference import ReferenceRun
from verify.weights.exported import ExportedCheckpoint


def find_cause(
    checkpoint: Checkpoint,
    own: ExportedCheckpoint | None,
    contestant: Contestant,
    unequal: Unequal,
    constants: Mapping[str, tuple[Any, ...]],
    seconds: float,
    progress: Progress,
    repro: Path | None = None,
) -> Diagnosis:
    """What made a run other than the reference's.

    Args:
        checkpoint: the model.
        own: the weights that the export holds; None where they could not be read.
        contestant: the candidate, open.
        unequal: its run.
        constants: numbers read from the export's graph.
        seconds: after which no other cause is begun.
        progress: told how far it is.
        repro: a directory for the smallest graph that shows it.

    Raises:
        InputError: `repro` cannot be written.
        NoVerdict: the candidate could not be run once more.
    """
    reference, run = unequal.reference, unequal.run
    batches = batches_of(unequal.request.schedule)
    scheme = unequal.expectation.scheme
    passes = Passes(reference.prompts, reference.tokens, batches, unequal.mode == "on", scheme)
    on_own = unequal.expectation.own_weights and own is not None
    right = own if on_own and own is not None else checkpoint
    others = own if own is not None and not own.is_exact and not on_own else None
    begin = partial(progress.begin, steps=None)
    located = locate(_but_for_damage(right, others), contestant, run, reference, passes, unequal.expectation, begin)
    begin("the ladder from the plain graph to this run")
    rungs = ladder(contestant, run, reference, passes, others, unequal.expectation)
    notes = [*_climbed(rungs), *located.notes]
    if repro is not None:
        notes.append(_written(contestant, located, rungs, repro))
    if (not_finite := _not_finite(unequal)) is not None:
        found = Diagnosis("unexplained", untried=not_finite)
        return _told(found, located, rungs, reference, [not_finite, *notes])
    evidence = _evidence(checkpoint, unequal, passes, located, rungs, constants, None if on_own else own)
    progress.begin(f"looking for the cause, {seconds:g} seconds at most", math.ceil(seconds))
    likely = likely_at(located.first.point) if located.layers and located.first else ()
    honest = unequal.along or reference
    found = diagnose(
        *(right, replace(passes, given=_given(unequal, honest)), run, honest, evidence, CATALOGUE),
        likely=likely,
        given=located.given,
        arithmetic=unequal.expectation.arithmetic,
        seconds=seconds,
        on_seconds=progress.advance,
    )
    return _told(found, located, rungs, reference, notes)


def _given(unequal: Unequal, honest: ReferenceRun) -> Given | None:
    """What the run's cache held, and how far honest noise may move it; None where that is not told of every layer."""
    caches, expectation = unequal.run.caches, unequal.expectation
    if expectation.arithmetic != FLOAT32 or (expectation.scheme is not None and unequal.along is None):
        return None
    if set(caches) != set(honest.caches) or not is_whole(caches, honest.lengths):
        return None
    return Given(
        {point: np.concatenate(rows) for point, rows in caches.items()},
        np.cumsum([0, *honest.lengths[:-1]]),
        {point: honest.caches[point].noise.honest_P for point in caches},
    )


def _evidence(
    checkpoint: Checkpoint,
    unequal: Unequal,
    passes: Passes,
    located: Located,
    rungs: tuple[Rung, ...],
    constants: Mapping[str, tuple[Any, ...]],
    own: ExportedCheckpoint | None,
) -> Evidence:
    """What is known of the run, its graph and its place, by which causes are chosen."""
    reference = unequal.reference
    seen = {"cache_sources": misplaced(unequal.run, reference)}
    return Evidence(
        *(checkpoint.config, passes.use_cache, unequal.request.is_padded, max(reference.lengths)),
        batches=len(passes.batches),
        suspects=located.suspects,
        constants={**_with_order_of_heads(constants, located), **seen},
        is_plain=is_of_plain_graph(rungs, reference.logits.noise.overall_bound),
        is_outside_layers=located.is_outside_layers,
        own=own,
    )


def _but_for_damage(right: Checkpoint, others: ExportedCheckpoint | None) -> Checkpoint:
    """What parts are held against: where weights are rounded and one is more than that, that one is to be found."""
    is_rounded = others is not None and others.stored_as != WEIGHTS[0]
    return others.without_damage() if others is not None and is_rounded and not others.is_faithful else right


def _told(
    found: Diagnosis, located: Located, rungs: tuple[Rung, ...], reference: ReferenceRun, notes: Sequence[str]
) -> Diagnosis:
    """The diagnosis with what the ladder proves, the place, and what puts it right."""
    found = with_runtime_fault(found, located, rungs, reference.logits.noise.overall_bound)
    causes = tuple(replace(cause, fix=fix(cause.name)) for cause in found.causes)
    return replace(found, causes=causes, location=_location(located, rungs), notes=(*notes, *found.notes))


def _written(contestant: Contestant, located: Located, rungs: tuple[Rung, ...], repro: Path) -> str:
    """What is said of the smallest graph, which is run by who has it wrong."""
    first, shown = located.first, located.shown
    if shown is None:
        return f"{repro}: not written: no node was found that is wrong by itself"
    provider = first.provider if first is not None and blamed(rungs) == "provider" else None
    try:
        write_repro(contestant, shown, repro, provider or "CPUExecutionProvider")
    except (NoVerdict, InputError) as error:
        return f"{repro}: not written: {error}"
    return f"{repro}: the smallest graph that shows it; run python repro.py there"


def _with_order_of_heads(constants: Mapping[str, tuple[Any, ...]], located: Located) -> Mapping[str, tuple[Any, ...]]:
    order = located.first.order if located.first is not None else ()
    return {**constants, "head_order": (order,)} if order else constants


def batches_of(schedule: Schedule) -> list[tuple[int, ...]]:
    """The rows that were decoded together from first to last; where rows join and leave, each alone."""
    batches = list(dict.fromkeys(tuple(rows) for rows in schedule))
    rows = [row for batch in batches for row in batch]
    return batches if len(rows) == len(set(rows)) else [(row,) for row in sorted(set(rows))]


def _location(located: Located, rungs: tuple[Rung, ...]) -> Location:
    first, rung = located.first, blamed(rungs)
    if first is None:
        return Location(rung=rung)
    node, operator = first.node, first.operator
    if rung == "provider" and first.differs is not None:
        node, operator = first.differs.node, first.differs.operator
    named = node and f"{node} ({', '.join(filter(None, (operator, first.provider)))})"
    heads = f", heads {', '.join(map(str, first.heads))}" if first.heads else ""
    others = [layer for layer in located.layers if layer != first.layer]
    also = f", and in {len(others)} other layers" if others else ""
    detail = f"first in row {first.row} at position {first.position}, {first.phase}{heads}{also}{_alone(first)}"
    return Location(first.layer, first.point, named, rung, detail)


def _alone(first: Place) -> str:
    """What became of nodes that were run by themselves, in words; nothing where nobody has them right."""
    if first.differs is not None:
        others, by = " and ".join(first.differs.others), figure(first.differs.by)
        return f"; {first.differs.node} is off by {by} of its result from what {others} make of the same inputs"
    return f"; alone it is right on {' and '.join(first.replays)}" if first.replays else ""


def _climbed(rungs: tuple[Rung, ...]) -> list[str]:
    """The noise ratio at each rung, in a line."""
    told = [
        f"{rung.name} not run" if rung.ratio is None else f"{rung.name} {figure(rung.ratio)}"
        for rung in rungs
        if rung.name != "tokens"
    ]
    return [f"ladder, noise ratio up to each rung: {', '.join(told)}"] if told else []


def _not_finite(unequal: Unequal) -> str | None:
    """Where logits are NaN or infinite first; None where all are finite."""
    for row, logits_PV in enumerate(unequal.run.logits):
        wrong_P = ~np.isfinite(logits_PV).all(axis=-1)
        if wrong_P.any():
            position = unequal.reference.lengths[row] - len(logits_PV) + int(wrong_P.argmax())
            where = f"logits are NaN or infinite from row {row}, position {position} on"
            return f"{where}, so that no cause of the catalogue can be tried"
    return None
