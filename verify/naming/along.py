"""The search along one continuous parameter of a mistake."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from verify.causes import Family
from verify.naming.screen import Tried

GRID, REFINEMENTS = 13, 26  # of a search along a parameter
HOPELESS_AFTER, HOPELESS = 4, 0.8  # refinements, after which a search is given up that leaves more of the ratio
ROUNDEST, AS_WELL = 5, 1.02  # digits that a rounded value may have, and how much worse it may fit
GOLDEN = (math.sqrt(5) - 1) / 2


def best_of(
    family: Family,
    run: Callable[..., Tried],
    before: Tried,
    *,
    is_over: Callable[[], bool] = lambda: False,
) -> Tried:
    """The member of a family that fits best: a grid first, then golden sections beside its best point.

    Of values that fit as well, the roundest: people write 3e-6 and not 2.9964e-6.

    Args:
        family: to be searched.
        run: what several mistakes at once leave.
        before: the mistakes that are there too, and what they leave alone.
        is_over: asked before each step; from then on the best that was found is the answer.
    """
    done: dict[str, Tried] = {}  # of whole numbers, many values are one

    def of(value: float) -> Tried:
        made = family.make(value)
        said = str(made.parameters)
        if said not in done:
            done[said] = run(*before.mistakes, made)
        return done[said]

    def at(exponent: float) -> tuple[Tried, float]:
        return of(math.exp(exponent)), exponent

    found = []
    for exponent in np.linspace(math.log(family.low), math.log(family.high), GRID).tolist():
        found.append(at(exponent))
        if is_over():
            return _least(found)[0]
    place = found.index(_least(found))
    low, high = found[max(0, place - 1)][1], found[min(GRID - 1, place + 1)][1]
    inner = [at(high - GOLDEN * (high - low)), at(low + GOLDEN * (high - low))]
    for refined in range(REFINEMENTS):
        best = _least([*found, *inner])[0]
        if is_over() or (refined == HOPELESS_AFTER and not best.helps(before, HOPELESS)):
            return best
        found += inner
        if inner[0][0].ratio < inner[1][0].ratio:
            high = inner[1][1]
            inner = [at(high - GOLDEN * (high - low)), inner[0]]
        else:
            low = inner[0][1]
            inner = [inner[1], at(low + GOLDEN * (high - low))]
    return _roundest(_least([*found, *inner]), of)


def _least(found: Sequence[tuple[Tried, float]]) -> tuple[Tried, float]:
    return min(found, key=lambda each: each[0].ratio)


def _roundest(best: tuple[Tried, float], of: Callable[[float], Tried]) -> Tried:
    found, exponent = best
    for digits in range(ROUNDEST):
        rounded = of(float(f"{math.exp(exponent):.{digits}e}"))
        if rounded.ratio <= AS_WELL * found.ratio:
            return rounded
    return found
