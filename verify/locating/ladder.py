"""The ladder of blame: from token ids to the loop that drives an export, and the first rung that is wrong."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.errors import CheckpointError
from refengine.weights import Weights
from verify.candidates.ort_session import Level, requested_of
from verify.candidates.rerun import Setting, rerun
from verify.contestant import Contestant
from verify.drive import CandidateRun
from verify.errors import NoVerdict
from verify.expect import EXACT, Expectation
from verify.locating.sample import Sample, sample_of
from verify.naming.as_if import Passes, run_as_if
from verify.truth.noise import rms
from verify.truth.reference import ReferenceRun

Name = Literal["tokens", "weights", "export", "optimizer", "provider", "precision", "cache", "driver"]
PLAIN, OPENVINO = "ort-cpu", "openvino"
# Of the noise ratio of a candidate: what a rung may add without being the one where it goes wrong, as the float16 or
# the rounded weights do that an export is honest about.
LITTLE = 1 / 3
LEVELS: Sequence[Level] = ("basic", "extended", "all")  # of optimisation, each with those before it
CACHE_OPTIONS = ("KV_CACHE_PRECISION", "KEY_CACHE", "VALUE_CACHE")  # begin the names of options of a cache
# How OpenVINO computes where it may not save on anything.
PLAIN_PRECISION: Mapping[str, str] = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
PLAIN_CACHE: Mapping[str, str] = {"KV_CACHE_PRECISION": "f32"}


@dataclass(frozen=True)
class Rung:
    """One more thing that a candidate does, and how far it is from right with all of them up to this one.

    Attributes:
        name: of the rung.
        ratio: noise ratio of the logits on the rows that are traced; None where it could not be run.
        is_wrong: it is beyond what is honest, and not by little of what the candidate is.
        why: it could not be run.
        distance: noise ratio of what the candidate's own run is from this one; None where this one was not run.
        level: of optimisation, the first that is wrong.
    """

    name: Name
    ratio: float | None
    is_wrong: bool
    why: str | None = None
    distance: float | None = None
    level: Level | None = None


@dataclass(frozen=True)
class _Judge:
    """The rows that are run again, and what they are held against."""

    sample: Sample
    run: CandidateRun
    reference: ReferenceRun

    def rung(self, name: Name, logits: Sequence[np.ndarray]) -> Rung:
        """Of a run with everything up to this rung."""
        ratio = noise_ratio(logits, self.reference, self.sample.rows)
        distance = noise_distance(self.run, logits, self.reference, self.sample.rows)
        return Rung(name, ratio, self.is_wrong(logits), distance=distance)

    def is_wrong(self, logits: Sequence[np.ndarray]) -> bool:
        """Whether a run is beyond what is honest, and by a good part of what the candidate's own is."""
        ratio = noise_ratio(logits, self.reference, self.sample.rows)
        own = [self.run.logits[row] for row in self.sample.rows]
        little = LITTLE * noise_ratio(own, self.reference, self.sample.rows)
        return not ratio <= max(self.reference.logits.noise.overall_bound, little)


def ladder(
    contestant: Contestant,
    run: CandidateRun,
    reference: ReferenceRun,
    passes: Passes,
    own: Checkpoint | None = None,
    expectation: Expectation = EXACT,
) -> tuple[Rung, ...]:
    """Every rung that this candidate has, up to the first that is wrong; behind the weights one more.

    Args:
        contestant: the candidate, open.
        run: its run in which it was fed the reference's tokens.
        reference: the run that it was held against.
        passes: that `run` was made in.
        own: the weights that the export holds, where they are not those of the reference.
        expectation: what the reference was run with.
    """
    judge = _Judge(sample_of(passes, run, reference), run, reference)
    rungs = []
    for rung in _rungs(contestant, judge, own, expectation):
        rungs.append(rung)
        if rung.is_wrong and rung.name != "weights":
            break
    return tuple(_believed(rungs))


def blamed(rungs: Sequence[Rung]) -> Name | None:
    """The first rung that is wrong; None where one before it could not be run and may be wrong too."""
    right = [place for place, rung in enumerate(rungs) if rung.ratio is not None and not rung.is_wrong]
    first = next((rung for rung in rungs[max(right, default=-1) + 1 :] if rung.is_wrong or rung.ratio is None), None)
    return first.name if first is not None and first.is_wrong else None


def is_of_plain_graph(rungs: Sequence[Rung], bound: float) -> bool:
    """Whether the plain CPU, with nothing optimised, gives the very run: but for the noise of both of them.

    Args:
        bound: on the noise ratio of what is honest.
    """
    found = [rung.distance for rung in rungs if rung.name == "export" and rung.is_wrong]
    return any(distance is not None and distance <= 2 * bound for distance in found)


def _believed(rungs: Sequence[Rung]) -> Iterator[Rung]:
    """The rungs, without an account of the weights that the export, as it runs, shows to be mistaken."""
    for rung, behind in zip(rungs, [*rungs[1:], None], strict=True):
        if rung.name == "weights" and behind is not None and behind.ratio is not None and not behind.is_wrong:
            yield replace(rung, is_wrong=False, ratio=None, why="the weights were misread: what they make is right")
        else:
            yield rung


def _rungs(contestant: Contestant, judge: _Judge, own: Checkpoint | None, expectation: Expectation) -> Iterator[Rung]:
    sample = judge.sample
    yield Rung("tokens", 0.0, False)  # both were fed the same ids
    if own is not None:
        rows = list(range(len(sample.rows)))
        passes = Passes(sample.prompts, sample.tokens, [rows], sample.use_cache)
        try:
            yield judge.rung("weights", run_as_if(Weights.open(own, np.float32), passes, ()))
        except CheckpointError:
            yield Rung("weights", math.nan, True, "they are not all finite")

    def again(setting: Setting) -> Sequence[np.ndarray]:
        given = (setting, sample.prompts, sample.schedule, sample.tokens, sample.use_cache)
        return contestant.apply(rerun, *given).logits

    if contestant.runtime == OPENVINO and expectation.scheme is not None:
        yield Rung("export", None, False, "the reference has a coded cache, which nobody else has")
    for name, setting in _settings(contestant, expectation):
        try:
            rung = judge.rung(name, again(setting))
            if name == "optimizer" and rung.is_wrong:
                levels = (level for level in LEVELS[:-1] if judge.is_wrong(again(replace(setting, level=level))))
                rung = replace(rung, level=next(levels, LEVELS[-1]))
        except NoVerdict as error:
            rung = Rung(name, None, False, str(error))
        yield rung
    yield judge.rung("driver", [judge.run.logits[row] for row in sample.rows])


def _settings(contestant: Contestant, expectation: Expectation) -> Iterator[tuple[Name, Setting]]:
    """How to run it again: plainly, and then with one thing more that it was run with."""
    runtime, options = contestant.runtime, contestant.settings.requested
    if runtime == OPENVINO:
        # A reference with a coded cache is right for who has it: a plain run would be wrong by the codes it lacks.
        if expectation.scheme is None:
            yield "export", Setting(PLAIN, {}, "disabled")
        yield from _openvino_settings(options, expectation)
        return
    yield "export", Setting(PLAIN, {}, "disabled")
    yield "optimizer", Setting(PLAIN, {})
    if runtime.startswith("ort") and runtime != PLAIN:
        yield "provider", Setting(runtime, {})
        if options != requested_of(runtime, {}):
            yield "precision", Setting(runtime, options)


def _openvino_settings(options: Mapping[str, str], expectation: Expectation) -> Iterator[tuple[Name, Setting]]:
    """Of OpenVINO itself, whose defaults save on the cache and may save on the arithmetic."""
    cached = {name: value for name, value in options.items() if name.startswith(CACHE_OPTIONS)}
    precise = {name: value for name, value in options.items() if name in PLAIN_PRECISION}
    others = {name: value for name, value in options.items() if name not in {**cached, **precise}}
    cache = PLAIN_CACHE if expectation.scheme is None else cached
    yield "provider", Setting(OPENVINO, {**others, **PLAIN_PRECISION, **cache})
    yield "precision", Setting(OPENVINO, {**others, **precise, **cache})
    if cache != cached:
        yield "cache", Setting(OPENVINO, options)


def noise_ratio(logits: Sequence[np.ndarray], reference: ReferenceRun, rows: Sequence[int]) -> float:
    """Of some rows of a run, each given at its last positions."""
    found = [reference.error_and_noise(row, given) for row, given in zip(rows, logits, strict=True)]
    errors, units = zip(*found, strict=True)
    return float(rms(np.concatenate(errors)) / rms(np.concatenate(units)))


def noise_distance(
    run: CandidateRun, logits: Sequence[np.ndarray], reference: ReferenceRun, rows: Sequence[int]
) -> float:
    """The noise ratio of what some rows of a run are from those of another, each given at its last positions."""
    pairs = [(run.logits[row], given) for row, given in zip(rows, logits, strict=True)]
    # An export that gives the last logits alone in its prompts does so wherever it runs; the engine gives all.
    errors = [rms(own - given[-len(own) :], axis=-1) for own, given in pairs]
    ends = np.cumsum(reference.lengths)
    units = [
        reference.logits.noise.rms_P[ends[row] - len(error) : ends[row]]
        for row, error in zip(rows, errors, strict=True)
    ]
    return float(rms(np.concatenate(errors)) / rms(np.concatenate(units)))
