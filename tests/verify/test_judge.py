"""The verdict on a run: what is equal, a tie, drift and a mismatch, and what is said of the first difference."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from verify.drive import CandidateRun, run_candidate
from verify.judge import judge
from verify.truth.reference import ReferenceRun, step_slices

Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def reference(compared) -> ReferenceRun:
    return compared.reference


@pytest.fixture(scope="module")
def run(compared, clean) -> CandidateRun:
    """An honest run: three rows, with the cache."""
    return run_candidate(compared.open(clean), compared.prompts, [(0, 1, 2)] * compared.max_new_tokens, use_cache=True)


def with_logits(run: CandidateRun, row: int, position: int, change: Change) -> CandidateRun:
    """The run with the logits of one position changed."""
    logits = [array.copy() for array in run.logits]
    logits[row][position] = change(logits[row][position])
    return replace(run, logits=logits)


def with_token(run: CandidateRun, row: int, step: int, token: int) -> CandidateRun:
    """The run with another choice at one step, and nothing else changed."""
    tokens = [list(chosen) for chosen in run.tokens]
    tokens[row][step] = token
    return replace(run, tokens=tokens)


def place(reference: ReferenceRun, row: int, step: int) -> int:
    """Where among all positions the logits stand that choose this token."""
    return step_slices(reference.prompts, reference.tokens)[row].start + step


def runner_up(reference: ReferenceRun, row: int, step: int) -> tuple[int, float]:
    """The reference's second choice, and by how much it prefers its first."""
    logits_V = reference.logits.value64_PX[place(reference, row, step)]
    second, first = np.argsort(logits_V)[-2:]
    assert first == reference.tokens[row][step]
    return int(second), float(logits_V[first] - logits_V[second])


def test_an_honest_run_is_equal(run, reference):
    verdict, tokens, noise = judge(run, reference)
    assert verdict == "equal"
    assert (tokens.compared, tokens.equal, tokens.ties, tokens.first_mismatch) == (24, 24, 0, None)
    assert 0.2 < noise.logits <= noise.bound
    assert noise.worst_position.ratio <= noise.position_bound
    assert len(noise.cache) == 2 * 12


def test_the_reference_itself_has_no_noise_at_all(run, reference):
    ends = np.cumsum(reference.lengths)[:-1]
    exact = replace(run, logits=np.split(reference.logits.value64_PX, ends), caches={})
    verdict, _, noise = judge(exact, reference)
    assert (verdict, noise.logits, noise.worst.ratio, noise.cache) == ("equal", 0, 0, {})


def test_another_token_that_the_reference_clearly_rejects_is_a_mismatch_that_says_where(run, reference):
    token, margin = runner_up(reference, 1, 3)
    verdict, tokens, _ = judge(with_token(run, 1, 3, token), reference)
    assert verdict == "mismatch"
    assert (tokens.compared, tokens.equal, tokens.ties) == (24, 23, 0)
    first = tokens.first_mismatch
    assert (first.row, first.step, first.expected, first.actual) == (1, 3, reference.tokens[1][3], token)
    assert first.margin == pytest.approx(margin)


def test_the_first_mismatch_is_the_first_of_the_first_row_that_has_one(run, reference):
    for row, step in ((2, 0), (1, 6), (1, 5)):
        run = with_token(run, row, step, runner_up(reference, row, step)[0])
    _, tokens, _ = judge(run, reference)
    assert (tokens.first_mismatch.row, tokens.first_mismatch.step, tokens.equal) == (1, 5, 21)


def with_margin(reference: ReferenceRun, row: int, step: int, flips: float) -> tuple[ReferenceRun, int]:
    """The reference as if it preferred its token by so many times what the noise may move one logit; and its second."""
    token, margin = runner_up(reference, row, step)
    at = place(reference, row, step)
    value64_PX = reference.logits.value64_PX.copy()
    value64_PX[at, token] += margin - flips * reference.flips_P[at]
    return replace(reference, logits=replace(reference.logits, value64_PX=value64_PX)), token


# A float32 run may move each of two logits by what it moved one, so twice that is surely a tie.
@pytest.mark.parametrize(("row", "step"), [(0, 0), (1, 3), (2, 7)])
@pytest.mark.parametrize("flips", [0, 0.5, 2])
def test_a_margin_within_the_noise_is_a_tie_and_no_mismatch(run, reference, row, step, flips):
    nearly_tied, token = with_margin(reference, row, step, flips)
    _, tokens, _ = judge(with_token(run, row, step, token), nearly_tied)
    assert (tokens.equal, tokens.ties, tokens.first_mismatch) == (23, 1, None)


@pytest.mark.parametrize(("row", "step"), [(0, 0), (1, 3), (2, 7)])
@pytest.mark.parametrize("flips", [20, 500])
def test_a_margin_above_the_noise_is_a_mismatch(run, reference, row, step, flips):
    decided, token = with_margin(reference, row, step, flips)
    verdict, tokens, _ = judge(with_token(run, row, step, token), decided)
    assert (verdict, tokens.equal, tokens.ties) == ("mismatch", 23, 0)
    assert tokens.first_mismatch.margin == pytest.approx(flips * reference.flips_P[place(reference, row, step)])


def test_a_tie_is_judged_on_the_references_margin_whatever_the_candidates_is(run, reference):
    token, _ = runner_up(reference, 0, 0)
    column = -len(reference.tokens[0])

    def prefer(logits_V: np.ndarray) -> np.ndarray:
        logits_V[token] = logits_V.max() + 1e-7  # the candidate finds the two as good as equal
        return logits_V

    verdict, tokens, _ = judge(with_logits(with_token(run, 0, 0, token), 0, column, prefer), reference)
    assert (verdict, tokens.ties) == ("mismatch", 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, -1], ids=["in the prompt", "at the last step"])
@pytest.mark.parametrize("logits", [slice(None), slice(300, 301)], ids=["all", "one"])
def test_logits_that_are_not_finite_are_never_equal(run, reference, value, position, logits):
    def spoil(logits_V: np.ndarray) -> np.ndarray:
        logits_V[logits] = value
        return logits_V

    verdict, _, noise = judge(with_logits(run, 1, position, spoil), reference)
    assert verdict == "drift"  # the tokens are as they were
    assert not np.isfinite([noise.logits, noise.worst_position.ratio, noise.worst.ratio]).any()
    assert (noise.worst.point, noise.worst.row) == ("lm_head", 1)


def test_a_choice_among_logits_that_are_not_finite_is_never_a_tie(run, reference):
    nearly_tied, token = with_margin(reference, 2, 1, 0.5)
    column = 1 - len(reference.tokens[2])
    spoilt = with_logits(with_token(run, 2, 1, token), 2, column, lambda logits_V: logits_V * np.nan)
    verdict, tokens, _ = judge(spoilt, nearly_tied)
    assert (verdict, tokens.ties, tokens.first_mismatch.step) == ("mismatch", 0, 1)


def test_one_position_far_off_is_drift_although_all_together_are_honest(run, reference):
    # The noisiest position allows most; one of the quieter is put off by 20 of its own units.
    quiet = int(np.argmin(reference.logits.noise.rms_P[: reference.lengths[0]]))
    off = 20 * reference.logits.noise.rms_P[quiet]
    verdict, tokens, noise = judge(with_logits(run, 0, quiet, lambda logits_V: logits_V + off), reference)
    assert (verdict, tokens.equal) == ("drift", 24)
    assert noise.logits <= noise.bound
    assert (noise.worst_position.row, noise.worst_position.position) == (0, quiet)
    assert noise.worst_position.ratio == pytest.approx(20, rel=0.1)


def test_all_positions_a_little_off_are_drift(run, reference):
    """Three units everywhere: beyond the bound of all together, within that of each."""
    lengths, unit_P = reference.lengths, reference.logits.noise.rms_P
    rng = np.random.default_rng(0)
    exact = np.split(reference.logits.value64_PX, np.cumsum(lengths)[:-1])
    units = np.split(unit_P, np.cumsum(lengths)[:-1])
    signs = [rng.choice([-3.0, 3.0], size=logits.shape) for logits in exact]
    logits = [right + sign * unit[:, None] for right, sign, unit in zip(exact, signs, units, strict=True)]
    verdict, _, noise = judge(replace(run, logits=logits), reference)
    assert noise.logits == pytest.approx(3)
    assert noise.worst_position.ratio == pytest.approx(3)
    assert noise.worst_position.ratio <= noise.position_bound
    assert verdict == "drift"


def test_the_worst_place_of_a_cache_is_named_with_row_and_position(run, reference):
    point = "layers.7.self_attn.v_cache"
    rows = [array.copy() for array in run.caches[point]]
    rows[1][17] += 1
    verdict, _, noise = judge(replace(run, caches={**run.caches, point: rows}), reference)
    assert (noise.worst.point, noise.worst.row, noise.worst.position) == (point, 1, 17)
    assert max(noise.cache, key=noise.cache.get) == point
    # What counts is what comes of the cache: its own error is told, and not judged.
    assert verdict == "equal"


def test_where_arithmetic_is_so_coarse_that_logits_hide_it_keys_and_values_are_judged_too(run, reference):
    point = "layers.0.self_attn.k_cache"
    rows = [array + 1e-4 for array in run.caches[point]]
    spoilt = replace(run, caches={**run.caches, point: rows})
    assert [judge(spoilt, reference, coarse=coarse)[0] for coarse in (False, True)] == ["equal", "drift"]
    assert judge(run, reference, coarse=True)[0] == "equal"


def test_logits_of_the_last_positions_alone_are_held_against_those(run, reference):
    new = len(reference.tokens[0])
    _, _, all_of_them = judge(run, reference)
    verdict, tokens, noise = judge(replace(run, logits=[logits[-new:] for logits in run.logits]), reference)
    assert (verdict, tokens.equal) == ("equal", 24)
    assert noise.logits != all_of_them.logits
    prompt = len(reference.prompts[noise.worst_position.row])
    assert prompt - 1 <= noise.worst_position.position < prompt - 1 + new
