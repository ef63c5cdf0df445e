"""From a run that is not equal to its diagnosis: where it goes wrong, on which rung, and by which cause."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refengine.checkpoint import Checkpoint
from verify.as_if import Passes
from verify.causes import Evidence
from verify.causes.catalogue import CATALOGUE
from verify.causes.footprint import likely_at
from verify.causes.pages import fix
from verify.compare import Progress, Unequal
from verify.contestant import Contestant
from verify.diagnose import diagnose
from verify.locate import Located, Rung, blamed, ladder, locate, write_repro
from verify.report.figures import figure
from verify.report.result import Diagnosis, Location
from verify.schedule import Schedule
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
    if (where := _not_finite(unequal)) is not None:
        return Diagnosis("unexplained", notes=(f"{where}, so that nothing can be held against the rest",))
    reference, run = unequal.reference, unequal.run
    batches = batches_of(unequal.request.schedule)
    passes = Passes(reference.prompts, reference.tokens, batches, unequal.mode == "on")
    on_own = unequal.expectation.own_weights and own is not None
    right = own if on_own and own is not None else checkpoint
    others = own if own is not None and not own.is_exact and not on_own else None

    located = locate(
        right, contestant, run, reference, passes, unequal.expectation, partial(progress.begin, steps=None)
    )
    notes = list(located.notes)
    if repro is not None and located.shown is not None:
        write_repro(contestant, located.shown, repro, "CPUExecutionProvider")
        notes.append(f"{repro}: the smallest graph that shows it; run python repro.py there")
    progress.begin("the ladder from the plain graph to this run", None)
    rungs = ladder(contestant, run, reference, passes, others)
    evidence = Evidence(
        *(checkpoint.config, passes.use_cache, unequal.request.is_padded, max(reference.lengths)),
        batches=len(passes.batches),
        suspects=located.suspects,
        constants=constants,
        own=None if on_own else own,
    )
    progress.begin("looking for the cause", None)
    step = partial(progress.advance, 1)
    likely = likely_at(located.first.point) if located.layers and located.first else ()
    found = diagnose(
        *(right, passes, run, reference, evidence, CATALOGUE), likely=likely, seconds=seconds, on_step=step
    )
    causes = tuple(replace(cause, fix=fix(cause.name)) for cause in found.causes)
    notes = [*_climbed(rungs), *notes, *found.notes]
    return replace(found, causes=causes, location=_location(located, rungs), notes=tuple(notes))


def batches_of(schedule: Schedule) -> list[tuple[int, ...]]:
    """The rows that were decoded together from first to last; where rows join and leave, each alone."""
    batches = list(dict.fromkeys(tuple(rows) for rows in schedule))
    rows = [row for batch in batches for row in batch]
    return batches if len(rows) == len(set(rows)) else [(row,) for row in sorted(set(rows))]


def _location(located: Located, rungs: tuple[Rung, ...]) -> Location:
    first = located.first
    if first is None:
        return Location(rung=blamed(rungs))
    node = first.node and f"{first.node} ({', '.join(filter(None, (first.operator, first.provider)))})"
    heads = f", heads {', '.join(map(str, first.heads))}" if first.heads else ""
    others = [layer for layer in located.layers if layer != first.layer]
    also = f", and in {len(others)} other layers" if others else ""
    detail = f"first in row {first.row} at position {first.position}, {first.phase}{heads}{also}"
    return Location(first.layer, first.point, node, blamed(rungs), detail)


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
            return f"logits are NaN or infinite from row {row}, position {position} on"
    return None
