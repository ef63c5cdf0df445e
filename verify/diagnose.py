"""Names the mistake that reproduces what a candidate gave: counterfactuals are run until one leaves only noise."""

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.weights import Weights
from verify.as_if import Passes
from verify.causes import Cause, Evidence, Family
from verify.causes.footprint import AFTER_PROMPTS
from verify.counterfactual import Counterfactual
from verify.drive import CandidateRun
from verify.noise import rms
from verify.opened import open_weights
from verify.reference import ReferenceRun
from verify.report.result import CauseFound, Diagnosis, Residual
from verify.screen import Screen, Tried, telling_rows

PROMISING = 10.0  # times the bound: a float32 rerun brings noise of its own, and a broken model has more of it
MOST_CONFIRMED = 6  # promising ones that are run once more on everything
PAIRED = 4  # the best single causes, each of which is tried with every other one
# What is left by another cause that explains as much, times what the best one leaves; the noise in both is the same.
AS_WELL = 1.2
EXPLAINED = 1 / 3  # of the ratio: what a cause may leave; of a small effect a part can be had by chance
HELPS = 0.97  # a cause that leaves more than this of the ratio explains nothing of it
ANY_TENSOR = "weights-changed"
Mistakes = tuple[Counterfactual, ...]


@dataclass
class _Search:
    """What was tried so far, and when to stop."""

    screen: Screen
    bound: float
    ends: float
    on_step: Callable[[], None]
    tried: list[Tried] = field(default_factory=list)
    begun: set[tuple] = field(default_factory=set)
    not_tried: dict[str, None] = field(default_factory=dict)

    def go(self, causes: Iterable[Cause], evidence: Evidence, beside: Mistakes = ()) -> None:
        """Tries what causes yield, together with what is `beside`: values that are known first, then searches."""
        searches: list[Family] = []
        for one in itertools.chain.from_iterable(cause(evidence) for cause in causes):
            if isinstance(one, Family):
                searches.append(one)
            elif isinstance(one, Counterfactual) and self._is_to_try(one, beside):  # of units, see `--expect`
                self._try(self.screen.tried, *beside, one)
        for family in () if self.promising else searches:
            if self._is_to_try(family.make(family.low), beside):
                self._try(self.screen.best_of, family, beside)

    @property
    def promising(self) -> list[Tried]:
        """What may explain everything, the best first."""
        found = (each for each in self.tried if each.ratio <= PROMISING * self.bound)
        return sorted(found, key=lambda each: each.ratio)

    def _try(self, run: Callable[..., Tried], *arguments: object) -> None:
        self.tried.append(run(*arguments))
        self.on_step()

    def _is_to_try(self, one: Counterfactual, beside: Mistakes) -> bool:
        """Whether there is time for it, and it was not tried before."""
        key = tuple((each.cause, str(each.parameters), each.layers) for each in (*beside, one))
        if key in self.begun:
            return False
        if time.monotonic() > self.ends:
            self.not_tried[one.cause] = None
            return False
        self.begun.add(key)
        return True


def diagnose(
    checkpoint: Checkpoint,
    passes: Passes,
    run: CandidateRun,
    reference: ReferenceRun,
    evidence: Evidence,
    causes: Mapping[str, Cause],
    *,
    likely: Collection[str] = (),
    seconds: float,
    on_step: Callable[[], None] = lambda: None,
) -> Diagnosis:
    """Tries causes on a part of the run, in float32, and confirms what is left of them on all of it, in float64.

    Args:
        checkpoint: what the reference ran on.
        passes: how the candidate was driven.
        run: what it gave when it was fed the reference's tokens.
        reference: of the same tokens, with the noise by which the candidate is judged.
        evidence: by which causes choose what to yield.
        causes: of the catalogue, by name.
        likely: names of those that can be at the place where the candidate first goes wrong; where one of them explains
            it, others are not tried, nor other layers than the first ones that are suspected.
        seconds: after which nothing new is begun.
        on_step: told of every counterfactual.
    """
    ends = time.monotonic() + seconds
    rows = telling_rows(run, reference)
    screen = Screen(open_weights(checkpoint, np.float32), passes, run, reference, rows)
    search = _Search(screen, reference.logits.noise.overall_bound, ends, on_step)
    before = screen.before
    possible = causes
    if not _prompts_are_right(run, reference):
        possible = {name: cause for name, cause in causes.items() if name not in AFTER_PROMPTS}
    there = [cause for name, cause in possible.items() if name in likely]
    search.go(there, replace(evidence, suspects=evidence.suspects[:1]))
    if not search.promising:
        search.go(possible.values(), evidence)
    if not search.promising:
        _try_pairs(search, causes, evidence, before)
    confirmed, whole = _confirmed(checkpoint, screen.weights, passes, run, reference, search.promising)
    return _diagnosis(confirmed, search, before, whole)


def _prompts_are_right(run: CandidateRun, reference: ReferenceRun) -> bool:
    """Whether everything before the first decoding step is within the noise, as far as it is shown."""
    noise = reference.logits.noise
    for end, length, prompt, given_PV in zip(
        np.cumsum(reference.lengths), reference.lengths, reference.prompts, run.logits, strict=True
    ):
        shown = len(prompt) - (length - len(given_PV))
        at = slice(end - len(given_PV), end - len(given_PV) + shown)
        if shown > 0:
            error_P = rms(given_PV[:shown] - reference.logits.value64_PX[at], axis=-1)
            if not (error_P <= noise.position_bound * noise.rms_P[at]).all():
                return False
    return True


def _try_pairs(search: _Search, causes: Mapping[str, Cause], evidence: Evidence, before: float) -> None:
    """Each of the best single causes with every other cause, where it explains a part."""
    helping = [each for each in _best_of_each(search.tried) if each.ratio < HELPS * before]
    for each in helping[:PAIRED]:
        others = [cause for name, cause in causes.items() if name != each.mistakes[0].cause]
        search.go(others, evidence, each.mistakes)
        if search.promising:
            return


def _confirmed(
    checkpoint: Checkpoint,
    weights32: Weights,
    passes: Passes,
    run: CandidateRun,
    reference: ReferenceRun,
    promising: Sequence[Tried],
) -> tuple[list[Tried], float]:
    """Those that leave no more than honest noise of the whole run, and no more than the best; of each cause one.

    Honest noise is that of the reference with the mistake, which may have more of it than the right one. Also returned
    is the ratio before.
    """
    screen = _whole(open_weights(checkpoint, np.float64), passes, run, reference)
    whole = screen.before
    best: dict[tuple[str, ...], Tried] = {}
    for each in promising:
        best.setdefault(tuple(sorted(mistake.cause for mistake in each.mistakes)), each)
    found = []
    for each in list(best.values())[:MOST_CONFIRMED]:
        ratio, noise = screen.ratio_and_noise(each.mistakes, weights32)
        if ratio <= min(max(1.0, noise) * reference.logits.noise.overall_bound, EXPLAINED * whole):
            found.append(Tried(each.mistakes, ratio))
    least = AS_WELL * min((each.ratio for each in found), default=0.0)
    return sorted((each for each in found if each.ratio <= least), key=lambda each: each.ratio), whole


def _whole(weights: Weights, passes: Passes, run: CandidateRun, reference: ReferenceRun) -> Screen:
    return Screen(weights, passes, run, reference, range(len(passes.prompts)), len(passes.tokens[0]))


def _diagnosis(confirmed: Sequence[Tried], search: _Search, before: float, whole: float) -> Diagnosis:
    notes = []
    if search.not_tried:
        notes.append(f"not tried within the time: {', '.join(search.not_tried)}; give more with --diagnose-seconds")
    ruled_out = [
        found
        for each in _best_of_each(search.tried)
        if all(each.mistakes[0].cause != other.mistakes[0].cause for other in confirmed)
        for found in _found(each, before, "ruled-out")
    ]
    if not confirmed:
        return Diagnosis("unexplained", tuple(ruled_out), notes=tuple(notes))
    # The export's own tensor explains whatever is wrong with it: what else does says more.
    first, *others = sorted(confirmed, key=lambda each: any(one.cause == ANY_TENSOR for one in each.mistakes))
    found = [*_found(first, whole, "confirmed")]
    for each in others:
        found += _found(each, whole, "equivalent")
    specific = [each for each in others if all(one.cause != ANY_TENSOR for one in each.mistakes)]
    return Diagnosis("ambiguous" if specific else "named", (*found, *ruled_out), notes=tuple(notes))


def _found(
    tried: Tried, before: float, status: Literal["confirmed", "equivalent", "ruled-out"]
) -> Iterator[CauseFound]:
    for mistake in tried.mistakes:
        layers = None if mistake.layers is None else tuple(sorted(mistake.layers))
        yield CauseFound(mistake.cause, mistake.parameters, layers, Residual(before, tried.ratio), status)


def _best_of_each(tried: Sequence[Tried]) -> list[Tried]:
    """Of each cause alone, what left least; the best cause first."""
    best: dict[str, Tried] = {}
    for each in sorted((each for each in tried if len(each.mistakes) == 1), key=lambda each: each.ratio):
        best.setdefault(each.mistakes[0].cause, each)
    return list(best.values())
