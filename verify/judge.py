"""The verdict on one run of a candidate, from what it gave and what the reference gives for the same tokens."""

from collections.abc import Sequence

import numpy as np

from verify.drive import CandidateRun
from verify.noise import rms
from verify.reference import Measured, ReferenceRun, step_slices
from verify.report.result import FirstMismatch, NoiseRatio, Tokens, Verdict, Worst


def judge(run: CandidateRun, reference: ReferenceRun) -> tuple[Verdict, Tokens, NoiseRatio]:
    """Compares a run in which the candidate was fed the reference's tokens (by choosing them itself, or by force).

    `equal`: every token is equal, or a tie, and the noise ratio of the logits is within its bounds, over all
    positions and at each. `drift`: the tokens are, the ratio is not. `mismatch`: a token differs that the noise
    cannot explain.
    """
    tokens = compare_tokens(run, reference)
    noise = compare_noise(run, reference)
    if tokens.first_mismatch is not None:
        return "mismatch", tokens, noise
    # Written so that NaN, which compares false with everything, is never within a bound.
    within = noise.logits <= noise.bound and noise.worst_position.ratio <= noise.position_bound
    return "equal" if within else "drift", tokens, noise


def compare_tokens(run: CandidateRun, reference: ReferenceRun) -> Tokens:
    """Counts the equal choices and the ties, and finds the first step that is neither.

    The noise may move each of two logits by the largest float32 deviation at that position, or by as much more as the
    bound on the noise ratio allows; where the reference prefers its token by less than both together, either choice
    is right.
    """
    equal = ties = 0
    first: FirstMismatch | None = None
    per_bound = reference.logits.noise.overall_bound
    for row, steps in enumerate(step_slices(reference.prompts, reference.tokens)):
        for step, (expected, actual) in enumerate(zip(reference.tokens[row], run.tokens[row], strict=True)):
            if expected == actual:
                equal += 1
                continue
            place = steps.start + step
            logits_V = reference.logits.value64_PX[place]
            margin = float(logits_V[expected] - logits_V[actual])
            finite = bool(np.isfinite(run.logits[row][step - len(reference.tokens[row])]).all())
            if finite and margin <= 2 * per_bound * reference.flips_P[place]:
                ties += 1
            elif first is None:
                first = FirstMismatch(row, step, int(expected), int(actual), margin)
    return Tokens(sum(map(len, reference.tokens)), equal, ties, first)


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
