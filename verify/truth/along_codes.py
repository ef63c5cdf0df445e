"""The reference after a run's tokens, with the codes that another system's cache held after the same ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from refengine.model import forward
from refengine.ops import Ops
from refengine.quant import ops_for
from refengine.scheme import Scheme
from refengine.weights import Weights
from verify.truth.arithmetic import FLOAT32
from verify.truth.codes import Given, GivenCache, can_be_given, is_whole, plainest_of_codes
from verify.truth.noise import PLAIN_POSITIONS, PLAINEST, Errors, Plain, rms
from verify.truth.opened import open_weights
from verify.truth.reference import LOGITS, Reference, ReferenceRun, Truth, as_run, chosen, logits_after, longest

Right = Mapping[str, np.ndarray]  # by trace point, at every position of every row


def along_codes(engine: Reference, truth: Truth, caches: Mapping[str, Sequence[np.ndarray]]) -> ReferenceRun | None:
    """The reference after the tokens of a run, with the codes that another's cache held after the same ones.

    These are taken where honest noise may decide between two codes, and nowhere else. Its tokens are what it chooses
    after those of the run; the noise is that of arithmetic alone, all orders reading the same cache.

    Args:
        caches: trace point -> of each row, keys or values at every position, as attention read them; or where that is
            not known, their codes (uint8).

    Returns:
        None where they are not known of every layer, or do not tell what every pass has read, and of a coarser
        arithmetic than float32, whose noise is of the size of a step.
    """
    scheme = engine.scheme
    held = {point: np.concatenate(rows) for point, rows in caches.items()}
    if scheme is None or engine.arithmetic != FLOAT32 or not can_be_given(scheme, held):
        return None
    if {LOGITS, *held} != set(truth.right) or not is_whole(caches, truth.lengths):
        return None
    given = Given(held, np.cumsum([0, *truth.lengths[:-1]]))
    errors, plain = _errors(engine, truth, scheme, given)
    noise = errors.noise(plain)
    moved = {point: noise[point].position_bound * errors.largest[point] for point in held}
    engine.on_progress("the reference in float64, with the candidate's choice of codes")
    weights = open_weights(engine.checkpoint, np.float64)
    logits_PV, filled = _given_pass(weights, truth, scheme, ops_for(scheme), replace(given, noise=moved))
    right = {LOGITS: logits_PV, **_flat(filled.read)}
    tokens = chosen(logits_PV, truth.prompts, truth.tokens)
    return as_run(Truth(truth.prompts, tokens, right), noise, errors.largest[LOGITS])


def _errors(engine: Reference, truth: Truth, scheme: Scheme, given: Given) -> tuple[Errors, dict[str, Plain]]:
    """Of every order, reading a cache that holds what is given; and of the plainest sums at some positions."""
    engine.on_progress("the reference in float64, on the candidate's cache")
    weights = open_weights(engine.checkpoint, np.float64)
    logits_PV, filled = _given_pass(weights, truth, scheme, ops_for(scheme), given)
    del weights  # before the same is read in float32
    right = {LOGITS: logits_PV, **_flat(filled.brought)}
    errors = Errors(right)
    weights, orders = engine.noisy(len(logits_PV))
    for order, ops in orders.items():
        engine.on_progress(f"the reference in {engine.arithmetic.name} on the candidate's cache ({order})")
        logits_PV, found = _given_pass(weights, truth, scheme, ops, given)
        errors.add({LOGITS: logits_PV, **_flat(found.brought)})
    engine.on_progress(f"the reference in {engine.arithmetic.name} on the candidate's cache (sums one by one)")
    return errors, _plain(weights, truth, scheme, filled, right)


def _given_pass(
    weights: Weights, truth: Truth, scheme: Scheme, ops: Ops, given: Given
) -> tuple[np.ndarray, GivenCache]:
    """Logits at every position, and the cache after them, which keeps to what is given.

    What is given is known of later tokens too, so all new ones can go through a pass together.
    """
    cache = GivenCache(scheme, given, np.empty((len(truth.prompts), 0), np.int64))
    prompts = max(map(len, truth.prompts))
    return logits_after(weights, truth.prompts, truth.tokens, ops, cache, prompts), cache


def _plain(weights: Weights, truth: Truth, scheme: Scheme, filled: GivenCache, right: Right) -> dict[str, Plain]:
    """The plainest sums at some positions of the row with the longest prompt: its first ones, and its first new ones.

    The latter read the cache, and are off by less than the former where these came to it with their own noise.
    """
    row, before = longest(truth.prompts, truth.tokens)
    prompt, new = truth.prompts[row], truth.tokens[row][:-1]
    ops = ops_for(scheme, plainest_of_codes(scheme, PLAINEST))
    given = Given(_flat(filled.read), np.array([before]))
    found: dict[str, list[np.ndarray]] = {}
    places = []
    for past, tokens in ((0, prompt[: PLAIN_POSITIONS // 2]), (len(prompt), new[: PLAIN_POSITIONS // 2])):
        if not tokens:
            continue
        read = {point: x_PKH.astype(weights.dtype) for point, x_PKH in filled.read.items()}
        cache = GivenCache(scheme, given, np.arange(past)[None], read=read)
        positions_T = past + np.arange(len(tokens))
        logits_1TV = forward(weights, np.array([tokens]), positions_T[None], cache, ops=ops)
        at = before + positions_T
        places.append(at)
        for point, value in {LOGITS: logits_1TV[0], **_flat(cache.brought)}.items():
            value_TX = value if point == LOGITS else value[at]
            found.setdefault(point, []).append(rms(value_TX - right[point][at], axis=-1))
    return {point: Plain(np.concatenate(errors), np.concatenate(places)) for point, errors in found.items()}


def _flat(x_PKH: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With heads flattened."""
    return {point: x.reshape(len(x), -1) for point, x in x_PKH.items()}
