"""Mistakes tried one after the other: values that are known, then those that are searched for, then pairs."""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from verify.causes import Cause, Evidence, Family
from verify.naming.along import best_of
from verify.naming.counterfactual import Counterfactual
from verify.naming.screen import Tried

PAIRED = 4  # mistakes that explain a part, each of which is tried with every other one
# What is left by another cause that explains as much, times what the best one leaves; the noise in both is the same.
AS_WELL = 1.2
AT_REST = 2  # mistakes that are likeliest to be half of what is wrong
SHARE_AT_REST = 0.25  # of the wrong positions that such a mistake explains
Mistakes = tuple[Counterfactual, ...]


class Clock:
    """Seconds that there are for something.

    Args:
        seconds: so many.
        on_seconds: told of whole ones that are over, all of them once it has ended.
    """

    def __init__(self, seconds: float, on_seconds: Callable[[int], None]):
        self._began, self.ends = time.monotonic(), time.monotonic() + seconds
        self._on_seconds, self._all, self._told = on_seconds, math.ceil(seconds), 0

    def look(self) -> None:
        """Tells how many are over."""
        self._tell(int(time.monotonic() - self._began))

    def end(self) -> None:
        """It took no longer than this."""
        self._tell(self._all)

    def _tell(self, over: int) -> None:
        over = min(over, self._all)
        if over > self._told:
            self._on_seconds(over - self._told)
            self._told = over


@dataclass
class Search:
    """What was tried so far, and when to stop.

    Attributes:
        run: what several mistakes at once leave.
        nothing: what no mistake leaves.
        ends: by the monotonic clock; from then on nothing is begun.
        on_step: told of everything that is tried.
        tried: all of it.
        not_tried: causes for which there was no time, alone and beside others.
    """

    run: Callable[..., Tried]
    nothing: Tried
    ends: float
    on_step: Callable[[], None] = lambda: None
    tried: list[Tried] = field(default_factory=list)
    not_tried: dict[str, bool] = field(default_factory=dict)
    _begun: set[frozenset[tuple]] = field(default_factory=set)

    def go(
        self, causes: Iterable[Cause], evidence: Evidence, beside: Tried | None = None, *, searching: bool = True
    ) -> None:
        """Tries what causes yield, together with what is `beside`: values that are known first, then searches.

        A value is searched for only where none that is known explains everything, and only when `searching`.
        """
        before = beside or self.nothing
        searches: list[Family] = []
        for one in itertools.chain.from_iterable(cause(evidence) for cause in causes):
            if isinstance(one, Family):
                searches.append(one)
            elif isinstance(one, Counterfactual):
                self.one(*before.mistakes, one)
        for family in searches if searching and not self.promising else ():
            first = family.make(family.low)
            if self._is_to_try((*before.mistakes, first)):
                self._keep(best_of(family, self.run, before, is_over=lambda: self.is_over))

    def one(self, *mistakes: Counterfactual) -> None:
        """Tries these mistakes together, if there is time and they were not tried before."""
        if self._is_to_try(mistakes):
            self._keep(self.run(*mistakes))

    @property
    def is_over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() > self.ends

    @property
    def promising(self) -> list[Tried]:
        """What may explain everything, the best first."""
        return sorted((each for each in self.tried if each.is_promising), key=lambda each: each.ratio)

    def best_of_each(self) -> list[Tried]:
        """Of each cause alone, what left least; the best cause first."""
        best: dict[str, Tried] = {}
        for each in sorted((each for each in self.tried if len(each.mistakes) == 1), key=_left):
            best.setdefault(each.mistakes[0].cause, each)
        return list(best.values())

    def known(self, causes: Iterable[Cause], evidence: Evidence) -> Tried:
        """What the export itself says is wrong, all that explains something of it together."""
        found = self.nothing
        for one in read_from_export(causes, evidence):
            if self.is_over:
                break
            together = self.run(*found.mistakes, one)
            self._keep(together)
            if together.helps(found):
                found = together
        return found

    def necessary(self, tried: Tried) -> Tried:
        """Of several mistakes those without which less is explained."""
        for mistake in tried.mistakes if len(tried.mistakes) > 1 else ():
            without = self.run(*(each for each in tried.mistakes if each is not mistake))
            if without.is_promising and without.ratio <= AS_WELL * tried.ratio:
                return self.necessary(without)
        return tried

    def beside_best(self, causes: Mapping[str, Cause], evidence: Evidence) -> None:
        """Known values beside the mistakes after which many of the positions are as good as right."""
        at_rest = [each for each in self.best_of_each() if each.rest >= SHARE_AT_REST]
        for base in sorted(at_rest, key=lambda each: (-each.rest, each.ratio))[:AT_REST]:
            others = [cause for name, cause in causes.items() if name != base.mistakes[0].cause]
            if not self.promising:
                self.go(others, evidence, base, searching=False)

    def pairs(self, causes: Mapping[str, Cause], evidence: Evidence, first: Sequence[Tried] = ()) -> None:
        """Mistakes that explain a part, each with those of every other cause.

        Args:
            first: mistakes that explain a part, to be tried before the best that were found.
        """
        alone = [each for each in self.best_of_each() if each.helps(self.nothing)]
        if self.promising:
            return
        bases = [*first, *sorted(alone, key=lambda each: (-each.rest, each.ratio))[:PAIRED]]
        for base in {_key(each.mistakes): each for each in bases}.values():
            named = {mistake.cause for mistake in base.mistakes}
            tried = len(self.tried)
            self.go([cause for name, cause in causes.items() if name not in named], evidence, base)
            if self.promising or self.is_over:
                return
            both = min(self.tried[tried:], key=_left, default=None)
            if both is not None and both.helps(base):
                self._other_values(causes, evidence, both)
            if self.promising:
                return

    def _other_values(self, causes: Mapping[str, Cause], evidence: Evidence, both: Tried) -> None:
        """What was best of a cause alone may not be so beside another one: its other values once more."""
        *first, second = both.mistakes
        for mistake in first:
            others = [each for each in both.mistakes if each is not mistake]
            if mistake.cause in causes and mistake.cause != second.cause:
                self.go([causes[mistake.cause]], evidence, self.run(*others))

    def _keep(self, tried: Tried) -> None:
        self.tried.append(tried)
        self.on_step()

    def _is_to_try(self, mistakes: Collection[Counterfactual]) -> bool:
        key = _key(mistakes)
        if key in self._begun:
            return False
        if self.is_over:
            *beside, one = mistakes
            self.not_tried[one.cause] = self.not_tried.get(one.cause, False) or not beside
            return False
        self._begun.add(key)
        return True


def read_from_export(causes: Iterable[Cause], evidence: Evidence) -> Iterator[Counterfactual]:
    """What causes yield for the export's own numbers and weights, and would not yield without them."""
    nowhere = replace(evidence, suspects=())
    nothing_known = replace(nowhere, constants={}, own=None)
    for cause in causes:
        guesses = {_key((each,)) for each in cause(nothing_known) if isinstance(each, Counterfactual)}
        for one in cause(nowhere):
            if isinstance(one, Counterfactual) and _key((one,)) not in guesses:
                yield one


def _key(mistakes: Iterable[Counterfactual]) -> frozenset[tuple]:
    """Mistakes are the same in any order."""
    return frozenset((*each.said, each.layers) for each in mistakes)


def _left(tried: Tried) -> float:
    return tried.ratio
