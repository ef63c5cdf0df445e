"""A part of a run on which counterfactuals are cheap to try, and what each of them leaves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from refengine.ops import OPS, Ops
from refengine.weights import Weights
from verify.drive import CandidateRun
from verify.naming.as_if import Passes, run_as_if
from verify.naming.counterfactual import Counterfactual
from verify.truth.noise import rms
from verify.truth.reference import ReferenceRun

NEW_TOKENS = 6  # of each row that is screened
SHOWS = 0.2  # of the largest ratio, that a row must have to be worth screening
PROMISING = 10.0  # times the bound: a float32 rerun brings noise of its own, and a broken model has more of it
RESIDUE = 1e-5  # of the ratio: the further a mistake is from right, the more its own float32 noise is
HALF = 0.5  # of the ratio: a small effect is within that many bounds before anything is explained
EXPLAINED = 1 / 3  # of the ratio: what a cause may leave; of a small effect a part can be had by chance
HELPS = 0.97  # a cause that leaves more than this of the ratio explains nothing of it


@dataclass(frozen=True)
class Tried:
    """A counterfactual, or several at once, and what the candidate has left against it.

    Attributes:
        mistakes: of the reference.
        ratio: noise ratio over all positions.
        is_promising: it may be all that is wrong.
        rest: the share of the positions that are wrong without mistakes, and are as good as right with them.
    """

    mistakes: tuple[Counterfactual, ...]
    ratio: float
    is_promising: bool = False
    rest: float = 0.0

    def helps(self, before: "Tried", most: float = HELPS) -> bool:
        """Whether it explains a part of what others leave.

        Where another mistake is in the way, one may explain some positions and leave the ratio of all as it was.
        """
        return self.ratio < most * before.ratio or self.rest > before.rest


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
        self._whole = passes
        self._noise = reference.logits.noise
        starts = np.cumsum([0, *reference.lengths])
        self._judged = {}  # of each row: its positions, what the candidate gave there, and the noise
        errors, units = [], []
        for row in rows:
            given, length = run.logits[row], reference.lengths[row]
            positions = np.arange(length - len(given), len(passes.prompts[row]) + new - 1)
            unit_P = self._noise.rms_P[starts[row] + positions]
            self._judged[row] = positions, given[: len(positions)], unit_P
            right_PV = reference.logits.value64_PX[starts[row] + positions]
            errors.append(rms(given[: len(positions)] - right_PV, axis=-1))
            units.append(unit_P)
        self._before = np.concatenate(errors), np.concatenate(units)

    @property
    def before(self) -> float:
        """The noise ratio against the reference as it is."""
        return _ratio(*self._before)

    def ratio(self, mistakes: Sequence[Counterfactual]) -> float:
        """The noise ratio of the candidate against the reference with these mistakes."""
        return _ratio(*self._errors(self._run(self.weights, mistakes)))

    def ratio_and_noise(self, mistakes: Sequence[Counterfactual], weights: Weights, ops: Ops) -> tuple[float, float]:
        """The same, and how far the reference with these mistakes is from itself so computed, in the same unit."""
        right, other = self._run(self.weights, mistakes), self._run(weights, mistakes, ops)
        errors, units = [], []
        for row, one_PV, other_PV in zip(self.rows, right, other, strict=True):
            positions, _, unit_P = self._judged[row]
            there_P = ~np.isposinf(one_PV[positions, 0])
            errors.append(rms((other_PV - one_PV)[positions[there_P]], axis=-1))
            units.append(unit_P[there_P])
        return _ratio(*self._errors(right)), _ratio(np.concatenate(errors), np.concatenate(units))

    def tried(self, *mistakes: Counterfactual) -> Tried:
        """What they leave."""
        before_P, unit_P = self._before
        error_P, left_unit_P = self._errors(self._run(self.weights, mistakes))
        ratio = _ratio(error_P, left_unit_P)
        rest = 0.0
        if len(error_P) == len(before_P):
            rest = share_at_rest(before_P / unit_P, error_P / unit_P, self._noise.position_bound)
        is_promising = ratio <= promising(self._noise.overall_bound, self.before, HALF)
        return Tried(mistakes, ratio, is_promising, rest)

    def _run(self, weights: Weights, mistakes: Sequence[Counterfactual], ops: Ops = OPS) -> list[np.ndarray]:
        # What a row leaves to the next one is of all its tokens.
        passes = self._whole if any(each.keeps_rows for each in mistakes) else self.passes
        return run_as_if(weights, passes, mistakes, ops, wanted=self.rows)

    def _errors(self, logits: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The rms error at each position for which the reference has logits, and its noise."""
        errors, units = [], []
        for row, right_PV in zip(self.rows, logits, strict=True):
            positions, given_PV, unit_P = self._judged[row]
            there_P = ~np.isposinf(right_PV[positions, 0])  # of what a mistake leaves out there are no logits
            errors.append(rms(given_PV[there_P] - right_PV[positions[there_P]], axis=-1))
            units.append(unit_P[there_P])
        return np.concatenate(errors), np.concatenate(units)


def promising(bound: float, before: float, share: float) -> float:
    """The noise ratio up to which mistakes may explain everything: a share of what there was, hardly beyond noise."""
    return min(max(PROMISING * bound, RESIDUE * before), share * before)


def share_at_rest(before_P: np.ndarray, left_P: np.ndarray, bound: float) -> float:
    """The share of wrong positions that are as good as right.

    Args:
        before_P: noise ratios without mistakes.
        left_P: with them.
        bound: on what is honest at one position.
    """
    wrong_P = ~(before_P <= bound)
    rest_P = wrong_P & (left_P <= PROMISING * bound) & (left_P <= EXPLAINED * before_P)
    return float(rest_P.sum() / max(1, wrong_P.sum()))


def telling_rows(run: CandidateRun, reference: ReferenceRun) -> list[int]:
    """The shortest row that shows what is wrong, and the one that shows most of it."""
    rows = [reference.error_and_noise(row, given_PV) for row, given_PV in enumerate(run.logits)]
    ratios = [float(rms(error_P) / rms(unit_P)) for error_P, unit_P in rows]
    most = int(np.nanargmax(ratios))
    shows = [row for row, ratio in enumerate(ratios) if ratio >= SHOWS * ratios[most]]
    shortest = min(shows, key=lambda row: reference.lengths[row], default=most)
    return list(dict.fromkeys([shortest, most]))


def _ratio(error_P: np.ndarray, unit_P: np.ndarray) -> float:
    ratio = float(rms(error_P) / rms(unit_P))
    return ratio if math.isfinite(ratio) else math.inf  # NaN compares with nothing
