"""The reference along what another system decoded: its choice after the same tokens, and the noise at those steps."""

from dataclasses import replace

import numpy as np

from refengine.ops import OPS, Ops
from refengine.quant import ops_for
from refengine.weights import Weights
from verify.naming.as_if import Passes, run_as_if
from verify.naming.counterfactual import Counterfactual, Mistakes
from verify.truth.noise import ENOUGH_DRAWS, EQUIVALENT_ORDERS, Noise, rms
from verify.truth.opened import open_weights
from verify.truth.reference import Measured, Reference, ReferenceRun, Rows, chosen

FEWEST_DRAWS = ENOUGH_DRAWS // (2 * len(EQUIVALENT_ORDERS))


def follow(
    engine: Reference, prompts: Rows, tokens: Rows, asked_SK: np.ndarray | None = None, mistakes: Mistakes = ()
) -> tuple[ReferenceRun, Measured | None]:
    """The reference's choices where another system chose `tokens`, and log-probabilities of the tokens asked for.

    Other than in `Reference.run`, rows may have any number of tokens, and each choice follows the tokens given, not the
    reference's own. What comes back begins at the last token of each prompt: nothing before it is judged.

    Of log-probabilities, the noise at a step is that of the whole vocabulary's, and its bound is what any single one of
    them strays: on the few that are asked for, every order may happen to be exact.

    Args:
        tokens: of each row, at least one.
        asked_SK: at each of all rows' steps, token ids; -1 for none, whose log-probability is then 0.
        mistakes: of a reference that decodes row after row, each token in a pass of its own.
    """
    engine.on_progress("reading the checkpoint in float64")
    weights = open_weights(engine.checkpoint, np.float64)
    engine.on_progress("the reference in float64")
    ops64 = OPS if engine.scheme is None else ops_for(engine.scheme)
    logits64_SV = _logits(engine, weights, prompts, tokens, ops64, mistakes)
    logprobs64_SV = log_softmax(logits64_SV)
    weights, orders = engine.noisy(_draws(logits64_SV))
    flips_S = np.zeros(len(logits64_SV))
    errors, asked_errors, units, largest = [], [], [], []
    for order, ops in orders.items():
        engine.on_progress(f"the reference in {engine.arithmetic.name} ({order})")
        logits_SV = _logits(engine, weights, prompts, tokens, ops, mistakes)
        np.maximum(flips_S, np.abs(logits_SV - logits64_SV).max(axis=-1), out=flips_S)
        errors.append(rms(logits_SV - logits64_SV, axis=-1))
        if asked_SK is not None:
            error_SV = log_softmax(logits_SV) - logprobs64_SV
            asked_errors.append(rms(picked(error_SV, asked_SK), axis=-1))
            units.append(rms(error_SV, axis=-1))
            largest.append(np.abs(error_SV).max(axis=-1))
    logits = Measured(logits64_SV, Noise.of(errors, logits64_SV))
    last = [list(prompt[-1:]) for prompt in prompts]
    run = ReferenceRun(last, chosen(logits64_SV, last, tokens), logits, flips_S, caches={})
    if asked_SK is None:
        return run, None
    noise = Noise.of(asked_errors, logprobs64_SV, units)
    noise = replace(noise, position_bound=Noise.of(largest, logprobs64_SV, units).position_bound)
    return run, Measured(picked(logprobs64_SV, asked_SK), noise)


def _draws(logits_SV: np.ndarray) -> int:
    """How many draws of the noise so many steps are worth: those with the same logits are one.

    A loop that forgets its past decodes one token again and again. No fewer than make the orders twice as many as
    usual, since each of them takes as long as the first.

    Source: L. Kish, Survey Sampling (1965), effective sample size.
    """
    _, counts = np.unique(logits_SV.astype(np.float32), axis=0, return_counts=True)
    effective = counts.sum() ** 2 / np.square(counts).sum()
    return min(len(logits_SV), max(FEWEST_DRAWS, int(effective)))


def log_softmax(logits_SV: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, in the logits' dtype."""
    below_SV = logits_SV - logits_SV.max(axis=-1, keepdims=True)
    return below_SV - np.log(np.exp(below_SV).sum(axis=-1, keepdims=True))


def picked(values_SV: np.ndarray, asked_SK: np.ndarray) -> np.ndarray:
    """The values of the tokens asked for at each step, 0 where -1 asks for none."""
    return np.where(asked_SK >= 0, np.take_along_axis(values_SV, np.maximum(asked_SK, 0), axis=-1), 0)


def _logits(
    engine: Reference, weights: Weights, prompts: Rows, tokens: Rows, ops: Ops, mistakes: Mistakes
) -> np.ndarray:
    """The logits that choose each token of each row. Every row is read alone, so that none waits for a longer one."""
    rows = list(zip(prompts, tokens, strict=True))
    if mistakes:
        passes = Passes(prompts, tokens, [(row,) for row in range(len(rows))], use_cache=True)
        expected = Counterfactual("", scheme=engine.scheme, is_causal=engine.scheme is None)
        logits = run_as_if(weights, passes, [expected, *mistakes], ops)
    else:
        logits = [engine.as_fed(weights, [old], [new], ops)[0] for old, new in rows]
    return np.concatenate([logits_PV[-len(new) :] for logits_PV, (_, new) in zip(logits, rows, strict=True)])
