"""Whether what is left of a run is the noise of arithmetic coarser than float32, and no more than that."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from refengine.checkpoint import Checkpoint
from verify.causes import Cause, Evidence, Unit
from verify.causes.precision import is_that_noise
from verify.drive import CandidateRun
from verify.naming.as_if import Passes, run_as_if
from verify.naming.counterfactual import Counterfactual, Mistakes
from verify.truth.noise import Noise, rms
from verify.truth.opened import open_weights
from verify.truth.reference import ReferenceRun

ORDERS = 4  # of summing and of where to round, on which the noise of an arithmetic is measured
NEAR = 8.0  # times the error in one of them, or that part of it: further off, and the others are not measured


@dataclass(frozen=True)
class Explaining:
    """An arithmetic that leaves nothing to explain, beside mistakes or alone.

    Attributes:
        unit: of the catalogue.
        mistakes: that the reference has too.
        ratio: of the run's error, in units of its noise.
    """

    unit: Unit
    mistakes: tuple[Counterfactual, ...]
    ratio: float


@dataclass(frozen=True)
class Coarse:
    """A run, to be held against the reference as if in a coarser arithmetic.

    Attributes:
        checkpoint: what the reference ran on.
        passes: how the candidate was driven.
        run: what it gave.
        reference: of the same tokens.
        few: rows that tell whether an arithmetic is worth measuring.
    """

    checkpoint: Checkpoint
    passes: Passes
    run: CandidateRun
    reference: ReferenceRun
    few: Sequence[int]

    @staticmethod
    def units(causes: Iterable[Cause], evidence: Evidence) -> Iterator[Unit]:
        """The arithmetics that causes yield."""
        for cause in causes:
            yield from (one for one in cause(evidence) if isinstance(one, Unit))

    def explaining(self, units: Iterable[Unit], mistakes: tuple[Counterfactual, ...] = ()) -> list[Explaining]:
        """Of each cause the arithmetic that fits best, where one does."""
        best: dict[str, Explaining] = {}
        for unit in units:
            ratio = self._ratio(unit, mistakes)
            was = best.get(unit.cause)
            if ratio is not None and (was is None or _off(ratio) < _off(was.ratio)):
                best[unit.cause] = Explaining(unit, mistakes, ratio)
        return sorted(best.values(), key=lambda each: _off(each.ratio))

    def _ratio(self, unit: Unit, mistakes: Mistakes) -> float | None:
        """Of the whole run's error to the noise of an arithmetic; None where that is not what it is."""
        weights = unit.arithmetic.weights(self.checkpoint)
        rows = range(len(self.passes.prompts))
        orders = list(islice(unit.arithmetic.orders(sum(self.reference.lengths)).values(), ORDERS))
        right, given = self._right(mistakes, self.few), self._given(self.few)
        once = self._shown(run_as_if(weights, self.passes, mistakes, orders[0], self.few), self.few)
        if not 1 / NEAR <= rms(given - right) / rms(once - right) <= NEAR:
            return None
        right, given = self._right(mistakes, rows), self._given(rows)
        errors = [
            rms(self._shown(run_as_if(weights, self.passes, mistakes, order, rows), rows) - right, axis=-1)
            for order in orders
        ]
        noise = Noise.of(errors, right)
        error_P = rms(given - right, axis=-1)
        ratio, worst = float(rms(error_P) / rms(noise.rms_P)), float((error_P / noise.rms_P).max())
        is_it = is_that_noise(ratio, noise.overall_bound, worst, noise.position_bound)
        return ratio if is_it else None

    def _right(self, mistakes: Mistakes, rows: Sequence[int]) -> np.ndarray:
        """Logits in float64 where the candidate gave some, row after row."""
        if mistakes:
            weights = open_weights(self.checkpoint, np.float64)
            return self._shown(run_as_if(weights, self.passes, mistakes, wanted=rows), rows)
        ends = np.cumsum(self.reference.lengths)
        values_PV = self.reference.logits.value64_PX
        return np.concatenate([values_PV[ends[row] - len(self.run.logits[row]) : ends[row]] for row in rows])

    def _given(self, rows: Sequence[int]) -> np.ndarray:
        return np.concatenate([self.run.logits[row] for row in rows])

    def _shown(self, logits: Sequence[np.ndarray], rows: Sequence[int]) -> np.ndarray:
        return np.concatenate(
            [logits_PV[-len(self.run.logits[row]) :] for row, logits_PV in zip(rows, logits, strict=True)]
        )


def _off(ratio: float) -> float:
    """How far a ratio is from 1, either way."""
    return max(ratio, 1 / ratio)
