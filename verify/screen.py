"""A part of a run on which counterfactuals are cheap to try, and the search along a parameter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from refengine.weights import Weights
from verify.as_if import Passes, run_as_if
from verify.causes import Family
from verify.counterfactual import Counterfactual
from verify.drive import CandidateRun
from verify.noise import rms
from verify.reference import ReferenceRun

NEW_TOKENS = 6  # of each row that is screened
GRID, REFINEMENTS = 13, 26  # of a search along a parameter
ROUNDEST, AS_WELL = 5, 1.02  # digits that a rounded value may have, and how much worse it may fit
SHOWS = 0.2  # of the largest ratio, that a row must have to be worth screening
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Tried:
    """A counterfactual, or several at once, and the noise ratio of the candidate against it."""

    mistakes: tuple[Counterfactual, ...]
    ratio: float


class Screen:
    """Some rows of a run, and their first new tokens.

    Args:
        weights: in the dtype in which counterfactuals are run.
        passes: of the whole run.
        run: the candidate's.
        reference: of the same tokens.
        rows: to be screened.
        new_tokens: of each.
    """

    def __init__(
        self,
        weights: Weights,
        passes: Passes,
        run: CandidateRun,
        reference: ReferenceRun,
        rows: Sequence[int],
        new_tokens: int = NEW_TOKENS,
    ):
        new = min(new_tokens, len(passes.tokens[0]))
        self.weights = weights
        self.rows = list(rows)
        self.passes = replace(passes, tokens=[tokens[:new] for tokens in passes.tokens])
        units = np.split(reference.logits.noise.rms_P, np.cumsum(reference.lengths)[:-1])
        self._judged = {}  # of each row: its positions, what the candidate gave there, and the noise
        for row in rows:
            given, length = run.logits[row], len(units[row])
            positions = np.arange(length - len(given), len(passes.prompts[row]) + new - 1)
            self._judged[row] = positions, given[: len(positions)], units[row][positions]

    def ratio(self, mistakes: Sequence[Counterfactual]) -> float:
        """The noise ratio of the candidate against the reference with these mistakes."""
        logits = run_as_if(self.weights, self.passes, mistakes, wanted=self.rows)
        errors, units = [], []
        for row, right_PV in zip(self.rows, logits, strict=True):
            positions, given_PV, unit_P = self._judged[row]
            there_P = ~np.isposinf(right_PV[positions, 0])  # of what a mistake leaves out there are no logits
            errors.append(rms(given_PV[there_P] - right_PV[positions[there_P]], axis=-1))
            units.append(unit_P[there_P])
        ratio = float(rms(np.concatenate(errors)) / rms(np.concatenate(units)))
        return ratio if math.isfinite(ratio) else math.inf  # NaN compares with nothing

    def distance(self, weights: Weights, mistakes: Sequence[Counterfactual]) -> float:
        """How far the reference with these mistakes is from itself on other weights, in the same unit."""
        both = (run_as_if(each, self.passes, mistakes, wanted=self.rows) for each in (self.weights, weights))
        errors, units = [], []
        for row, one_PV, other_PV in zip(self.rows, *both, strict=True):
            positions, _, unit_P = self._judged[row]
            there_P = ~np.isposinf(one_PV[positions, 0])
            errors.append(rms((other_PV - one_PV)[positions[there_P]], axis=-1))
            units.append(unit_P[there_P])
        return float(rms(np.concatenate(errors)) / rms(np.concatenate(units)))

    def tried(self, *mistakes: Counterfactual) -> Tried:
        """The same, with what was tried."""
        return Tried(mistakes, self.ratio(mistakes))

    def best_of(self, family: Family, beside: Sequence[Counterfactual] = ()) -> Tried:
        """The member of a family that fits best: a grid first, then golden sections beside its best point.

        Of values that fit as well, the roundest: people write 3e-6 and not 2.9964e-6.
        """

        def at(exponent: float) -> Tried:
            return self.tried(*beside, family.make(math.exp(exponent)))

        exponents = np.linspace(math.log(family.low), math.log(family.high), GRID).tolist()
        grid = [at(exponent) for exponent in exponents]
        best = min(range(GRID), key=lambda place: grid[place].ratio)
        low, high = exponents[max(0, best - 1)], exponents[min(GRID - 1, best + 1)]
        inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
        tried = [at(exponent) for exponent in inner]
        found = min(zip([grid[best], *tried], [exponents[best], *inner], strict=True), key=lambda each: each[0].ratio)
        for _ in range(REFINEMENTS):
            if tried[0].ratio < tried[1].ratio:
                high = inner[1]
                inner, tried = [high - GOLDEN * (high - low), inner[0]], [tried[0], tried[0]]
                tried[0] = at(inner[0])
            else:
                low = inner[0]
                inner, tried = [inner[1], low + GOLDEN * (high - low)], [tried[1], tried[1]]
                tried[1] = at(inner[1])
            found = min(found, *zip(tried, inner, strict=True), key=lambda each: each[0].ratio)
        best_found, exponent = found
        for digits in range(ROUNDEST):
            rounded = self.tried(*beside, family.make(float(f"{math.exp(exponent):.{digits}e}")))
            if rounded.ratio <= AS_WELL * best_found.ratio:
                return rounded
        return best_found


def telling_rows(run: CandidateRun, reference: ReferenceRun) -> list[int]:
    """The shortest row that shows what is wrong, and the one that shows most of it."""
    ends = np.cumsum(reference.lengths)
    ratios = []
    for end, given_PV in zip(ends, run.logits, strict=True):
        at = slice(end - len(given_PV), end)
        error_P = rms(given_PV - reference.logits.value64_PX[at], axis=-1)
        ratios.append(float(rms(error_P) / rms(reference.logits.noise.rms_P[at])))
    most = int(np.nanargmax(ratios))
    shows = [row for row, ratio in enumerate(ratios) if ratio >= SHOWS * ratios[most]]
    shortest = min(shows, key=lambda row: reference.lengths[row], default=most)
    return list(dict.fromkeys([shortest, most]))
