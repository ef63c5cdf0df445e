"""The reference's side: the right tokens, their logits and caches in float64, and the noise of float32."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.generate import generate
from refengine.kvcache import Cache, KVCache
from refengine.model import forward
from refengine.ops import OPS, Ops
from refengine.quant import ops_for
from refengine.scheme import Scheme, stored_as
from refengine.tokens import Rows, left_padded
from refengine.weights import Weights
from verify.truth.arithmetic import FLOAT32, Arithmetic
from verify.truth.noise import PLAIN_POSITIONS, Errors, Noise, Plain, rms
from verify.truth.opened import open_weights
from verify.truth.rows_alone import TOKENS_A_PASS, held, rows_anew, rows_in_steps

LOGITS = "lm_head"  # their trace point


@dataclass(frozen=True)
class Measured:
    """One tensor of the reference at every position of every row (P of them, row after row), and its float32 noise."""

    value64_PX: np.ndarray
    noise: Noise


@dataclass(frozen=True)
class ReferenceRun:
    """Greedy decoding of some prompts as the reference does it.

    Attributes:
        prompts: token ids of each row.
        tokens: what the reference chooses after each prompt.
        logits: at every position fed: each row's prompt and all its tokens but the last.
        flips_P: the largest float32 deviation of any single logit at each position; how far a tie may be apart.
        caches: trace point -> keys (after rotation) or values at the same positions, heads flattened.
    """

    prompts: Rows
    tokens: Rows
    logits: Measured
    flips_P: np.ndarray
    caches: Mapping[str, Measured]

    @property
    def lengths(self) -> list[int]:
        """Positions of each row."""
        return lengths_of(self.prompts, self.tokens)

    def error_and_noise(self, row: int, given_PV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rms error of logits that are given at the last positions of a row, and what is honest of it; both `P`."""
        end = sum(self.lengths[: row + 1])
        at = slice(end - len(given_PV), end)
        return rms(given_PV - self.logits.value64_PX[at], axis=-1), self.logits.noise.rms_P[at]


@dataclass(frozen=True)
class Truth:
    """A run of the reference without its noise; `right`: logits, keys and values by trace point, at every position."""

    prompts: Rows
    tokens: Rows
    right: Mapping[str, np.ndarray]

    @property
    def lengths(self) -> list[int]:
        """Positions of each row."""
        return lengths_of(self.prompts, self.tokens)


class Reference:
    """A checkpoint, run to judge others.

    Weights are read when first needed, in float64 for the truth and in float32 for its noise, one after the other, so
    that never both are in memory.

    Args:
        checkpoint: the model.
        on_progress: told what is being done.
        scheme: how its cache is stored; None keeps what is computed. With a scheme the noise of float32 includes the
            codes that it makes fall on the other side of a step.
        arithmetic: whose noise is measured. The truth is float64 in any case.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        on_progress: Callable[[str], None] = lambda what: None,
        scheme: Scheme | None = None,
        arithmetic: Arithmetic = FLOAT32,
    ):
        self.checkpoint = checkpoint
        self.on_progress = on_progress
        self.scheme = scheme
        self.arithmetic = arithmetic

    def noisy(self, positions: int) -> tuple[Weights, dict[str, Ops]]:
        """Weights, and the orders for so many positions, in the arithmetic whose noise is measured."""
        orders = self.arithmetic.orders(positions)
        if self.scheme is not None:
            orders = {name: ops_for(self.scheme, ops) for name, ops in orders.items()}
        return self.arithmetic.weights(self.checkpoint), orders

    def as_fed(
        self, weights: Weights, prompts: Rows, tokens: Rows, ops: Ops
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Like `one_pass`, in the passes that the arithmetic is of, where it depends on them."""
        if not self.arithmetic.together:
            return one_pass(weights, prompts, tokens, self.scheme, ops)
        read = rows_anew if self.arithmetic.anew else rows_in_steps
        return read(weights, prompts, tokens, self.scheme, ops)

    def run(self, prompts: Rows, max_new_tokens: int, guess: Rows | None = None) -> ReferenceRun:
        """The reference's greedy run of `prompts`, `max_new_tokens` each, going on past end tokens.

        Args:
            guess: tokens that are probably right, such as a candidate's. One teacher-forced pass over them gives the
                reference's choice at every step; where each is the guess, then by induction the guess is its greedy
                run, and nothing had to be decoded step by step.
        """
        # What was read in float64 is let go before the same is read in float32.
        return self.with_noise(self.truth(prompts, max_new_tokens, guess))

    def truth(self, prompts: Rows, max_new_tokens: int, guess: Rows | None) -> Truth:
        """The same run without its noise."""
        self.on_progress("reading the checkpoint in float64")
        weights = open_weights(self.checkpoint, np.float64)
        endless = replace(weights, config=replace(weights.config, eos_token_id=()))
        self.on_progress("the reference in float64")
        ops = OPS if self.scheme is None else ops_for(self.scheme)
        tokens = guess or generate(endless, prompts, max_new_tokens, scheme=self.scheme, ops=ops)
        logits_PV, caches = one_pass(endless, prompts, tokens, self.scheme, ops)
        if chosen(logits_PV, prompts, tokens) != [list(row) for row in tokens]:
            self.on_progress("the reference decodes its own tokens in float64")
            tokens = generate(endless, prompts, max_new_tokens, scheme=self.scheme, ops=ops)
            logits_PV, caches = one_pass(endless, prompts, tokens, self.scheme, ops)
        return Truth(prompts, tokens, {LOGITS: logits_PV, **caches})

    def with_noise(self, truth: Truth) -> ReferenceRun:
        """A run, and the noise of the arithmetic in it."""
        weights, orders = self.noisy(len(truth.right[LOGITS]))
        errors = Errors(truth.right)
        for order, ops in orders.items():
            self.on_progress(f"the reference in {self.arithmetic.name} ({order})")
            logits_PV, caches = self.as_fed(weights, truth.prompts, truth.tokens, ops)
            errors.add({LOGITS: logits_PV, **caches})
        plain = self._plain(weights, truth.prompts, truth.tokens, truth.right)
        return as_run(truth, errors.noise(plain), errors.largest[LOGITS])

    def _plain(
        self, weights: Weights, prompts: Rows, tokens: Rows, right64: Mapping[str, np.ndarray]
    ) -> dict[str, Plain]:
        """The plainest sums by trace point, at the first positions of the row with the longest prompt.

        None where noise is of another kind: of a coarser arithmetic, or of codes that fall on the other side of a step.
        """
        plainest = self.arithmetic.plainest
        if plainest is None or self.scheme is not None:
            return {}
        self.on_progress(f"the reference in {self.arithmetic.name} (sums one by one)")
        row, before = longest(prompts, tokens)
        tried = [*prompts[row], *tokens[row][:-1]][:PLAIN_POSITIONS]
        logits_PV, caches = one_pass(weights, [tried], [[0]], None, plainest)
        found = {LOGITS: logits_PV, **caches}
        at = slice(before, before + len(tried))
        return {name: Plain(rms(value - right64[name][at], axis=-1), at) for name, value in found.items()}


def lengths_of(prompts: Rows, tokens: Rows) -> list[int]:
    """Positions that are fed of each row: its prompt and all its new tokens but the last."""
    return [len(prompt) + len(new) - 1 for prompt, new in zip(prompts, tokens, strict=True)]


def longest(prompts: Rows, tokens: Rows) -> tuple[int, int]:
    """The row with the longest prompt, and how many positions those before it have."""
    row = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    return row, sum(lengths_of(prompts[:row], tokens[:row]))


def as_run(truth: Truth, noise: Mapping[str, Noise], flips_P: np.ndarray) -> ReferenceRun:
    """A run with the noise at every trace point, and the largest float32 deviation of any logit at each position."""
    measured = {name: Measured(value, noise[name]) for name, value in truth.right.items()}
    return ReferenceRun(truth.prompts, truth.tokens, measured.pop(LOGITS), flips_P, measured)


def chosen(logits_PV: np.ndarray, prompts: Rows, tokens: Rows) -> list[list[int]]:
    """The token that the logits choose at every step of every row."""
    return [logits_PV[steps].argmax(axis=-1).tolist() for steps in step_slices(prompts, tokens)]


def step_slices(prompts: Rows, tokens: Rows) -> list[slice]:
    """Of each row, the positions whose logits choose its new tokens, counted through all rows."""
    slices, end = [], 0
    for prompt, new in zip(prompts, tokens, strict=True):
        end += len(prompt) + len(new) - 1
        slices.append(slice(end - len(new), end))
    return slices


def one_pass(
    weights: Weights, prompts: Rows, tokens: Rows, scheme: Scheme | None, ops: Ops
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and keys and values by trace point, at every position of every row, rows one after the other.

    With a scheme in the passes of a runtime that decodes, since what a token attends to may then depend on the pass
    that brings it: the prompts are one pass, and every new token is one.
    """
    cache = KVCache(weights.config, len(prompts), scheme or stored_as(weights.dtype))
    first, most = (None, None) if scheme is None else (max(map(len, prompts)), 1)
    return logits_after(weights, prompts, tokens, ops, cache, first, most), held(cache, weights.dtype)


def logits_after(
    weights: Weights,
    prompts: Rows,
    tokens: Rows,
    ops: Ops,
    cache: Cache,
    first: int | None = None,
    most: int | None = None,
) -> np.ndarray:
    """Logits at every position of every row, rows one after the other, after passes that fill an empty cache.

    Args:
        first: columns of the first pass; as many as of the others unless given.
        most: of any other; as many as memory is meant for unless given.
    """
    token_ids_BT, positions_BT = left_padded(
        [[*prompt, *new[:-1]] for prompt, new in zip(prompts, tokens, strict=True)]
    )
    rows, width = positions_BT.shape
    most = most or max(1, TOKENS_A_PASS // rows)
    there_BT = positions_BT >= 0
    place_BT = there_BT.cumsum().reshape(there_BT.shape) - 1
    logits_PV = np.empty((np.count_nonzero(there_BT), weights.config.vocab_size), weights.dtype)
    for start, stop in pairwise([0, *range(first or most, width, most), width]):
        columns = slice(start, stop)
        logits_BTV = forward(weights, token_ids_BT[:, columns], positions_BT[:, columns], cache, ops=ops)
        logits_PV[place_BT[:, columns][there_BT[:, columns]]] = logits_BTV[there_BT[:, columns]]
    return logits_PV
