"""Names the mistake that reproduces what a candidate gave: counterfactuals are run until one leaves only noise."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.ops import Ops
from refengine.weights import Weights
from verify.causes import Cause, Evidence, Unit
from verify.causes.footprint import AFTER_PROMPTS
from verify.drive import CandidateRun
from verify.naming.as_if import Passes
from verify.naming.coarse import Coarse, Explaining
from verify.naming.counterfactual import Counterfactual, Mistakes
from verify.naming.layer_screen import HALVES, Given, LayerScreen
from verify.naming.layerwise import Layerwise, explain_layers, without_last_norm
from verify.naming.screen import EXPLAINED, Screen, Tried, telling_rows
from verify.naming.search import AS_WELL, Clock, Search, read_from_export
from verify.naming.telling_apart import telling_probe
from verify.report.result import CauseFound, Diagnosis, Residual
from verify.truth.arithmetic import FLOAT32, Arithmetic
from verify.truth.opened import open_weights
from verify.truth.reference import ReferenceRun

MOST_CONFIRMED = 6  # promising ones that are run once more on everything
COARSE_HELPS = 0.5  # a mistake beside which only rounding is left leaves no more of the ratio than this
MOST_BESIDE = 3  # mistakes beside which coarser arithmetic is tried
ANY_TENSOR = "weights-changed"
Status = Literal["confirmed", "equivalent", "ruled-out"]


def diagnose(
    checkpoint: Checkpoint,
    passes: Passes,
    run: CandidateRun,
    reference: ReferenceRun,
    evidence: Evidence,
    causes: Mapping[str, Cause],
    *,
    likely: Collection[str] = (),
    given: Sequence[Given] = (),
    arithmetic: Arithmetic = FLOAT32,
    seconds: float,
    on_seconds: Callable[[int], None] = lambda seconds: None,
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
        given: what the candidate had around the layers that are wrong by themselves.
        arithmetic: in which the candidate is expected to compute.
        seconds: after which nothing new is begun.
        on_seconds: told of those that are over, of all of them in the end.
    """
    clock = Clock(seconds, on_seconds)
    rows = telling_rows(run, reference)
    weights = open_weights(checkpoint, np.float32)
    screen = Screen(weights, passes, run, reference, rows)
    search = Search(screen.tried, Tried((), screen.before), clock.ends, clock.look)
    coarse = Coarse(checkpoint, passes, run, reference, rows)
    stages = _Stages(search, screen, coarse, causes, evidence, frozenset(likely), given)
    noisy = stages.run(in_prompts=not _prompts_are_right(run, reference))
    promising = list(map(search.necessary, search.promising))
    honest = weights if arithmetic == FLOAT32 else arithmetic.weights(checkpoint)
    order = next(iter(arithmetic.orders(sum(reference.lengths)).values()))
    confirmed, whole = _confirmed(checkpoint, (honest, order), passes, run, reference, promising, search)
    found = _diagnosis(confirmed, noisy, search, whole)
    if found.status == "ambiguous" and not noisy:
        found = replace(found, notes=(*found.notes, *_apart(weights, confirmed, passes.use_cache)))
    clock.end()
    said = (_last_norm_by_name(each, checkpoint.config.num_hidden_layers) for each in found.causes)
    return replace(found, causes=tuple(said))


@dataclass(frozen=True)
class _Stages:
    """What is tried one after the other, until something explains everything; as `diagnose` is given it."""

    search: Search
    screen: Screen
    coarse: Coarse
    causes: Mapping[str, Cause]
    evidence: Evidence
    likely: Collection[str]
    given: Sequence[Given]

    def run(self, *, in_prompts: bool) -> list[Explaining]:
        """Fills the search; returns the arithmetic that explains everything, where one does and no mistake alone.

        Args:
            in_prompts: prompts are wrong already; by what acts after them alone they are not, and by coarser
                arithmetic they are.
        """
        possible, units, told = self.causes, list[Unit](), Layerwise()
        if in_prompts:
            possible = {name: cause for name, cause in self.causes.items() if name not in AFTER_PROMPTS}
            units = list(self.coarse.units(self.causes.values(), self.evidence)) if self._is_everywhere else []
        arithmetics = partial(self.coarse.explaining, units)
        # Asked for once, and only where it is needed.
        alone = cache(lambda: list[Explaining]() if self.search.is_over else arithmetics())
        told = self._layers(possible, lambda: bool(alone()))
        if not self.search.promising and not (self.given and alone()):
            self._singles(possible)
        if self.search.promising:
            return []
        if noisy := alone() or self._beside(arithmetics):
            return noisy
        known = self.search.known(self.causes.values(), self.evidence)
        first = [*(self.screen.tried(*each) for each in told.partial), *([known] if known.mistakes else [])]
        self.search.pairs(self.causes, self.evidence, first)
        return []

    @property
    def _is_everywhere(self) -> bool:
        """Whether every half of every layer is wrong by itself, as coarser arithmetic makes it, as far as is known."""
        halves = sum(len(each.wrong) for each in self.given)
        return not self.given or halves == self.evidence.config.num_hidden_layers * len(HALVES)

    def _layers(self, possible: Mapping[str, Cause], is_noise: Callable[[], bool]) -> Layerwise:
        """What explains single layers; where that leaves steps after the prompts, with what acts there."""
        search = self.search
        screens = (LayerScreen(self.screen.weights, each, self.coarse.passes.scheme) for each in self.given)
        told = explain_layers(screens, possible, self.evidence, search.ends, search.on_step, is_noise)
        # What is not seen in some layers may be there too: a number that the export has knows where it is.
        read = {each.said: each for each in read_from_export(possible.values(), self.evidence)}
        for each in (*told.proposed, *(some for some in told.partial if any(one.said in read for one in some))):
            search.one(*_as_read(each, read))
        for each in () if search.promising else told.proposed:
            search.one(*each)
            if not search.promising:
                search.one(*without_last_norm(each, self.evidence.config))
        later = [cause for name, cause in self.causes.items() if name in AFTER_PROMPTS]
        for each in () if search.promising else told.partial:
            base = self.screen.tried(*each)
            if base.helps(search.nothing):
                search.go(later, self.evidence, base)
        return told

    def _singles(self, possible: Mapping[str, Cause]) -> None:
        """One mistake: a likely one where it is likeliest, any there or in all layers, any anywhere."""
        first = self.evidence.suspects[:1]
        there = [cause for name, cause in possible.items() if name in self.likely]
        self.search.go(there, replace(self.evidence, suspects=first))
        for suspects in (tuple(dict.fromkeys([*first, None])), self.evidence.suspects):
            if not self.search.promising:
                self.search.go(possible.values(), replace(self.evidence, suspects=suspects))

    def _beside(self, arithmetics: Callable[..., list[Explaining]]) -> list[Explaining]:
        """Coarser arithmetic beside one of the mistakes that explain most."""
        nothing = self.search.nothing.ratio
        best = [each for each in self.search.best_of_each() if each.ratio < COARSE_HELPS * nothing]
        for each in best[:MOST_BESIDE]:
            if not self.search.is_over and (found := arithmetics(each.mistakes)):
                return found
        return []


def _as_read(mistakes: Mistakes, read: Mapping[tuple[str, str], Counterfactual]) -> Mistakes:
    """Mistakes in the layers in which the export has them, where it says so."""
    known = {each.said: read[each.said] for each in mistakes if each.said in read}
    return (*known.values(), *(each for each in mistakes if each.said not in known))


def _prompts_are_right(run: CandidateRun, reference: ReferenceRun) -> bool:
    """Whether everything before the first decoding step is within the noise, as far as it is shown."""
    noise = reference.logits.noise
    for row, (prompt, given_PV) in enumerate(zip(reference.prompts, run.logits, strict=True)):
        shown = max(0, len(prompt) - (reference.lengths[row] - len(given_PV)))
        error_P, unit_P = reference.error_and_noise(row, given_PV)
        if not (error_P[:shown] <= noise.position_bound * unit_P[:shown]).all():
            return False
    return True


def _confirmed(
    checkpoint: Checkpoint,
    honest: tuple[Weights, Ops],
    passes: Passes,
    run: CandidateRun,
    reference: ReferenceRun,
    promising: Sequence[Tried],
    search: Search,
) -> tuple[list[Tried], float]:
    """Those that leave no more than honest noise of the whole run, and no more than the best; of each cause one.

    Honest noise is that of the reference with the mistake, which may have more of it than the right one, with weights
    and operators that are `honest`. Also returned is the ratio before.
    """
    screen = _whole(open_weights(checkpoint, np.float64), passes, run, reference)
    whole = screen.before
    best: dict[tuple[str, ...], Tried] = {}
    for each in promising:
        best.setdefault(tuple(sorted(mistake.cause for mistake in each.mistakes)), each)
    found = []
    for each in list(best.values())[:MOST_CONFIRMED]:
        if search.is_over and each is not next(iter(best.values())):
            break  # the best alone, which the time was given for
        ratio, noise = screen.ratio_and_noise(each.mistakes, *honest)
        if ratio <= min(max(1.0, noise) * reference.logits.noise.overall_bound, EXPLAINED * whole):
            found.append(Tried(each.mistakes, ratio))
    least = AS_WELL * min((each.ratio for each in found), default=0.0)
    return sorted((each for each in found if each.ratio <= least), key=lambda each: each.ratio), whole


def _whole(weights: Weights, passes: Passes, run: CandidateRun, reference: ReferenceRun) -> Screen:
    return Screen(weights, passes, run, reference, range(len(passes.prompts)), len(passes.tokens[0]))


def _diagnosis(confirmed: Sequence[Tried], noisy: Sequence[Explaining], search: Search, whole: float) -> Diagnosis:
    notes = list(_not_tried(search, is_explained=bool(confirmed or noisy)))
    explaining = [*(each.mistakes for each in confirmed), *(each.mistakes for each in noisy)]
    named = {mistake.cause for mistakes in explaining for mistake in mistakes}
    ruled_out = [
        found
        for each in search.best_of_each()
        if each.mistakes[0].cause not in named
        for found in _found(each, search.nothing.ratio, "ruled-out")
    ]
    if noisy:
        return Diagnosis(
            "ambiguous" if len(noisy) > 1 else "named", (*_in_noise(noisy, whole), *ruled_out), notes=tuple(notes)
        )
    if not confirmed:
        return Diagnosis("unexplained", tuple(ruled_out), notes=tuple(notes))
    # The export's own tensor explains whatever is wrong with it: what else does says more.
    first, *others = sorted(confirmed, key=lambda each: any(one.cause == ANY_TENSOR for one in each.mistakes))
    found = [*_found(first, whole, "confirmed")]
    for each in others:
        found += _found(each, whole, "equivalent")
    specific = [each for each in others if all(one.cause != ANY_TENSOR for one in each.mistakes)]
    return Diagnosis("ambiguous" if specific else "named", (*found, *ruled_out), notes=tuple(notes))


def _not_tried(search: Search, *, is_explained: bool) -> Iterator[str]:
    """What there was no time for; of what is explained, causes alone, which might explain it as well."""
    more = "give more with --diagnose-seconds"
    tried = {each.mistakes[0].cause for each in search.tried if len(each.mistakes) == 1}
    missed = [cause for cause, alone in search.not_tried.items() if alone]
    if never := [cause for cause in missed if cause not in tried]:
        yield f"not tried within the time: {', '.join(never)}; {more}"
    if is_explained:
        return
    if partly := [cause for cause in missed if cause in tried]:
        yield f"not all values and layers were tried within the time of: {', '.join(partly)}; {more}"
    if search.is_over:
        yield f"not all pairs of causes were tried within the time; {more}"


def _apart(weights: Weights, confirmed: Sequence[Tried], use_cache: bool) -> Iterator[str]:
    """For all that explains a run as well as the first: on which prompts it would not."""
    first, *others = (each for each in confirmed if all(one.cause != ANY_TENSOR for one in each.mistakes))
    for other in others:
        names = [" and ".join(mistake.cause for mistake in each.mistakes) for each in (first, other)]
        probe = telling_probe(weights, first.mistakes, other.mistakes, use_cache=use_cache)
        if probe is None:
            yield f"{' and '.join(names)} are equivalent on this model: no probe tells them apart"
        else:
            yield f"{probe} would tell {names[0]} from {names[1]}: --probe adds prompts of that kind"


def _in_noise(noisy: Sequence[Explaining], whole: float) -> Iterator[CauseFound]:
    """Mistakes, and the arithmetic whose noise is all that they leave."""
    for number, each in enumerate(noisy):
        yield from _found(Tried(each.mistakes, each.ratio), whole, "confirmed") if number == 0 else ()
        status: Status = "confirmed" if number == 0 else "equivalent"
        yield CauseFound(each.unit.cause, each.unit.parameters, None, Residual(whole, each.ratio), status)


def _last_norm_by_name(cause: CauseFound, behind: int) -> CauseFound:
    """The norm behind the layers is no layer, though a mistake counts it as the one after the last."""
    if cause.layers is None or behind not in cause.layers:
        return cause
    layers = tuple(layer for layer in cause.layers if layer != behind)
    said = {"beside them": "norm"} if layers else {"norm": "norm"}
    return replace(cause, layers=layers, parameters={**cause.parameters, **said})


def _found(tried: Tried, before: float, status: Status) -> Iterator[CauseFound]:
    for mistake in tried.mistakes:
        layers = None if mistake.layers is None else tuple(sorted(mistake.layers))
        yield CauseFound(mistake.cause, mistake.parameters, layers, Residual(before, tried.ratio), status)
