"""The ladder of blame: from token ids to the loop that drives an export, and the first rung that is wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.weights import Weights
from verify.as_if import Passes, run_as_if
from verify.candidates.rerun import Setting, rerun
from verify.contestant import Contestant
from verify.drive import CandidateRun
from verify.errors import NoVerdict
from verify.locating.sample import Sample, sample_of
from verify.noise import rms
from verify.reference import ReferenceRun

Name = Literal["tokens", "weights", "export", "optimizer", "provider", "precision", "cache", "driver"]
PLAIN = "ort-cpu"
CACHE_OPTIONS = ("KV_CACHE_PRECISION", "KEY_CACHE", "VALUE_CACHE")  # begin the names of options of a cache


@dataclass(frozen=True)
class Rung:
    """One more thing that a candidate does, and how far it is from right with all of them up to this one.

    Attributes:
        name: of the rung.
        ratio: noise ratio of the logits on the rows that are traced; None where it could not be run.
        is_wrong: it is beyond what is honest.
        why: it could not be run.
    """

    name: Name
    ratio: float | None
    is_wrong: bool
    why: str | None = None


def ladder(
    contestant: Contestant, run: CandidateRun, reference: ReferenceRun, passes: Passes, own: Checkpoint | None = None
) -> tuple[Rung, ...]:
    """Every rung that this candidate has, up to the first that is wrong.

    Args:
        contestant: the candidate, open.
        run: its run in which it was fed the reference's tokens.
        reference: the run that it was held against.
        passes: that `run` was made in.
        own: the weights that the export holds, where they are not those of the reference.
    """
    sample = sample_of(passes, run, reference)
    rungs = []
    for rung in _rungs(contestant, run, reference, sample, own):
        rungs.append(rung)
        if rung.is_wrong:
            break
    return tuple(rungs)


def blamed(rungs: Sequence[Rung]) -> Name | None:
    """The first rung that is wrong; None where one before it could not be run and may be wrong too."""
    first = next((rung for rung in rungs if rung.is_wrong or rung.ratio is None), None)
    return first.name if first is not None and first.is_wrong else None


def _rungs(
    contestant: Contestant, run: CandidateRun, reference: ReferenceRun, sample: Sample, own: Checkpoint | None
) -> Iterator[Rung]:
    yield Rung("tokens", 0.0, False)  # both were fed the same ids
    if own is not None:
        rows = list(range(len(sample.rows)))
        passes = Passes(sample.prompts, sample.tokens, [rows], sample.use_cache)
        yield _rung("weights", run_as_if(Weights.open(own, np.float32), passes, ()), reference, sample)
    for name, setting in _settings(contestant):
        try:
            again = contestant.apply(rerun, setting, sample.prompts, sample.schedule, sample.tokens, sample.use_cache)
        except NoVerdict as error:
            yield Rung(name, None, False, str(error))
            continue
        yield _rung(name, again.logits, reference, sample)
    yield _rung("driver", [run.logits[row] for row in sample.rows], reference, sample)


def _settings(contestant: Contestant) -> Iterator[tuple[Name, Setting]]:
    """How to run it again: plainly, and then with one thing more that it was run with."""
    yield "export", Setting(PLAIN, {}, optimised=False)
    yield "optimizer", Setting(PLAIN, {})
    options = contestant.settings.requested
    if contestant.runtime != PLAIN:
        yield "provider", Setting(contestant.runtime, {})
    if options:
        plain = {name: value for name, value in options.items() if not name.startswith(CACHE_OPTIONS)}
        yield "precision", Setting(contestant.runtime, plain)
        if len(plain) < len(options):
            yield "cache", Setting(contestant.runtime, options)


def _rung(name: Name, logits: Sequence[np.ndarray], reference: ReferenceRun, sample: Sample) -> Rung:
    ratio = noise_ratio(logits, reference, sample.rows)
    return Rung(name, ratio, not ratio <= reference.logits.noise.overall_bound)


def noise_ratio(logits: Sequence[np.ndarray], reference: ReferenceRun, rows: Sequence[int]) -> float:
    """Of some rows of a run, each given at its last positions."""
    ends = np.cumsum(reference.lengths)
    errors, units = [], []
    for row, given in zip(rows, logits, strict=True):
        at = slice(ends[row] - len(given), ends[row])
        errors.append(rms(given - reference.logits.value64_PX[at], axis=-1))
        units.append(reference.logits.noise.rms_P[at])
    return float(rms(np.concatenate(errors)) / rms(np.concatenate(units)))
