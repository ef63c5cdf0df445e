"""The verdict on one run of a candidate, from what it gave and what the reference gives for the same tokens."""

from collections.abc import Sequence

import numpy as np

from verify.drive import CandidateRun
from verify.report.result import Difference, FirstMismatch, NoiseRatio, Tokens, Verdict, Worst
from verify.truth.noise import rms
from verify.truth.reference import Measured, ReferenceRun, step_slices


def judge(run: CandidateRun, reference: ReferenceRun, *, coarse: bool = False) -> tuple[Verdict, Tokens, NoiseRatio]:
    """Compares a run in which both were fed the same tokens, whoever chose them.

    Args:
        coarse: the noise is that of an arithmetic in which logits hide much, so that keys and values, which have
            less of it behind them, are judged as well.
    """
    tokens = count_tokens(differences(run, reference), reference)
    noise = compare_noise(run, reference)
    verdict = verdict_on(tokens, noise)
    if coarse and verdict == "equal" and noise.cache_beyond:
        verdict = "drift"
    return verdict, tokens, noise


def verdict_on(tokens: Tokens, noise: NoiseRatio | None) -> Verdict:
    """What follows from the tokens and, where there are logits, from their noise ratio.

    `equal`: every token is equal, or a tie, and the ratio is within its bounds, over all positions and at each.
    `drift`: the tokens are, the ratio is not. `mismatch`: a token differs that the noise cannot explain.
    """
    if tokens.first_mismatch is not None:
        return "mismatch"
    if noise is None:
        return "equal"
    return "equal" if noise.has_logits_within else "drift"


def count_tokens(found: Sequence[Difference], reference: ReferenceRun) -> Tokens:
    """Counts the equal choices and the ties, and picks the first step that is neither."""
    wrong = next((each for each in found if not each.tie), None)
    first = FirstMismatch(wrong.row, wrong.step, wrong.expected, wrong.actual, wrong.margin) if wrong else None
    compared = sum(map(len, reference.tokens))
    return Tokens(compared, compared - len(found), sum(each.tie for each in found), first)


def differences(run: CandidateRun, reference: ReferenceRun) -> list[Difference]:
    """Every step at which the choices differ, row by row, and whether it is a tie.

    The noise may move each of two logits by the largest float32 deviation at that position, or by as much more as the
    bound on the noise ratio allows; where the reference prefers its token by less than both together, either choice
    is right.
    """
    found = []
    per_bound = reference.logits.noise.overall_bound
    for row, steps in enumerate(step_slices(reference.prompts, reference.tokens)):
        for step, (expected, actual) in enumerate(zip(reference.tokens[row], run.tokens[row], strict=True)):
            if expected == actual:
                continue
            place = steps.start + step
            logits_V = reference.logits.value64_PX[place]
            margin = float(logits_V[expected] - logits_V[actual])
            finite = bool(np.isfinite(run.logits[row][step - len(reference.tokens[row])]).all())
            tie = finite and margin <= 2 * per_bound * reference.flips_P[place]
            rank = 1 + int(np.count_nonzero(logits_V > logits_V[actual]))
            found.append(Difference(row, step, int(expected), int(actual), rank, margin, bool(tie)))
    return found


def compare_noise(run: CandidateRun, reference: ReferenceRun) -> NoiseRatio:
    """The noise ratio of the logits and, where the candidate gives its cache, of each layer's keys and values."""
    lengths = reference.lengths
    logits, worst_position = _ratio("lm_head", run.logits, reference.logits, lengths)
    cache, worsts = {}, [worst_position]
    for point, rows in run.caches.items():
        cache[point], worst = _ratio(point, rows, reference.caches[point], lengths)
        worsts.append(worst)
    bounds = reference.logits.noise
    beyond = tuple(point for point, ratio in cache.items() if not ratio <= reference.caches[point].noise.overall_bound)
    # NaN is worse than anything; max alone would pass over it.
    worst = next((worst for worst in worsts if np.isnan(worst.ratio)), max(worsts, key=lambda worst: worst.ratio))
    return NoiseRatio(logits, bounds.overall_bound, worst_position, bounds.position_bound, cache, beyond, worst)


def _ratio(point: str, rows: Sequence[np.ndarray], reference: Measured, lengths: Sequence[int]) -> tuple[float, Worst]:
    """The noise ratio over all positions of a point, and its worst position. A row may hold only its last positions."""
    ends = np.cumsum(lengths)
    places = [np.arange(end - len(row), end) for end, row in zip(ends, rows, strict=True)]
    error_P = np.concatenate(
        [rms(row - reference.value64_PX[at], axis=-1) for row, at in zip(rows, places, strict=True)]
    )
    place_P = np.concatenate(places)
    unit_P = reference.noise.rms_P[place_P]
    ratio_P = error_P / unit_P
    worst = int(np.argmax(ratio_P))  # argmax takes a NaN for the largest
    row = int(np.searchsorted(ends, place_P[worst], side="right"))
    position = int(place_P[worst] - (ends[row] - lengths[row]))
    return float(rms(error_P) / rms(unit_P)), Worst(point, row, position, float(ratio_P[worst]))
