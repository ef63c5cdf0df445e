"""Whole runs of the reference with mistakes in it, in the passes that a candidate made."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from refengine.kvcache import Cache
from refengine.ops import OPS, Ops
from refengine.scheme import Scheme
from refengine.tokens import Rows, left_padded
from refengine.weights import Weights
from verify.naming.counterfactual import Fed, LayerPast, Mistakes, Pasts, forward_as_if, on_top_of, unchanged
from verify.naming.handed_cache import HandedCache, cache_with, seen_by_all
from verify.truth.codes import Given


@dataclass(frozen=True)
class Passes:
    """How a candidate was driven: what it was fed, by which the passes of a run follow.

    Attributes:
        prompts: of each row.
        tokens: fed after each prompt, the last of them only chosen; of one number in a batch.
        batches: the rows that were decoded together.
        use_cache: each new token was a pass of its own.
        scheme: how its cache is expected to store vectors; None: as they are.
        given: what its cache held in the end, where that is known of every layer.
    """

    prompts: Rows
    tokens: Rows
    batches: Sequence[Sequence[int]]
    use_cache: bool
    scheme: Scheme | None = None
    given: Given | None = None


def run_as_if(
    weights: Weights, passes: Passes, mistakes: Mistakes, ops: Ops = OPS, wanted: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Logits of each row (positions, V), at every position fed, by a reference with these mistakes.

    A mistake may make prompts shorter or longer: of what was added in front there are no logits here, and those of what
    was left out are infinite.

    Args:
        weights: right ones, in the dtype of the computation.
        mistakes: all of them at once, on top of the scheme that is expected; none is the reference itself.
        wanted: rows, all by default. Others are run only where what a row gives depends on them.
    """
    mistakes = on_top_of(passes.scheme, mistakes)
    wanted = range(len(passes.prompts)) if wanted is None else wanted
    together = any(mistake.is_of_batches or mistake.keeps_rows for mistake in mistakes)
    batches = passes.batches if together else [[row] for row in wanted]  # padding takes time and changes nothing
    weights = reduce(lambda right, mistake: mistake.weights(right), mistakes, weights)
    in_one = all(mistake.is_causal for mistake in mistakes)
    rows: dict[int, np.ndarray] = {}
    left: Pasts = ()
    for batch in batches:
        prompts = [reduce(lambda right, each: each.prompt(right), mistakes, passes.prompts[row]) for row in batch]
        tokens = [passes.tokens[row] for row in batch]
        # Where something else is fed, the candidate's positions are not those of the reference.
        same = all(each.fed is unchanged and each.prompt is unchanged and not each.keeps_rows for each in mistakes)
        given = passes.given.of_rows(batch) if passes.given is not None and same else None
        cache = _cache(weights, len(batch), mistakes, left, given)
        if in_one:
            logits = _one_pass(weights, prompts, tokens, cache, mistakes, ops)
        elif passes.use_cache:
            logits = _cached_passes(weights, prompts, tokens, cache, mistakes, ops)
        else:
            logits = _whole_passes(weights, prompts, tokens, mistakes, ops)
        left = cache.pasts if isinstance(cache, HandedCache) else ()
        for row, prompt, new, logits_PV in zip(batch, prompts, tokens, logits, strict=True):
            for mistake in mistakes:
                logits_PV = mistake.logits(logits_PV, [*prompt, *new[:-1]], len(prompt) - 1)
            rows[row] = _as_long(logits_PV, len(passes.prompts[row]) + len(new) - 1)
    return [rows[row] for row in wanted]


def _one_pass(
    weights: Weights, prompts: Rows, tokens: Rows, cache: Cache, mistakes: Mistakes, ops: Ops
) -> list[np.ndarray]:
    fed = _fed([[*prompt, *new[:-1]] for prompt, new in zip(prompts, tokens, strict=True)], cache)
    logits_BTV = forward_as_if(weights, fed, cache, mistakes, ops=ops)
    return _at_tokens(logits_BTV, fed.positions_BT)


def _cached_passes(
    weights: Weights, prompts: Rows, tokens: Rows, cache: Cache, mistakes: Mistakes, ops: Ops
) -> list[np.ndarray]:
    fed = _fed(prompts, cache)
    rows = [[row] for row in _at_tokens(forward_as_if(weights, fed, cache, mistakes, ops=ops), fed.positions_BT)]
    for step in range(1, len(tokens[0])):
        if isinstance(cache, HandedCache):
            cache.hand_over(step, mistakes)
        token_ids_B1 = np.array([new[step - 1 : step] for new in tokens])
        positions_B1 = np.array([[len(prompt) + step - 1] for prompt in prompts])
        fed = Fed(token_ids_B1, positions_B1, positions_B1, step, fed.kept_B1)
        logits_B1V = forward_as_if(weights, fed, cache, mistakes, ops=ops)
        for row, logits_1V in zip(rows, logits_B1V, strict=True):
            row.append(logits_1V)
    return [np.concatenate(row) for row in rows]


def _whole_passes(weights: Weights, prompts: Rows, tokens: Rows, mistakes: Mistakes, ops: Ops) -> list[np.ndarray]:
    rows: list[list[np.ndarray]] = [[] for _ in prompts]
    for step in range(len(tokens[0])):
        cache = _cache(weights, len(prompts), mistakes, (), None)
        fed = _fed([[*prompt, *new[:step]] for prompt, new in zip(prompts, tokens, strict=True)], cache)
        logits_BTV = forward_as_if(weights, fed, cache, mistakes, ops=ops)
        for row, logits_TV in zip(rows, _at_tokens(logits_BTV, fed.positions_BT), strict=True):
            row.append(logits_TV if step == 0 else logits_TV[-1:])
    return [np.concatenate(row) for row in rows]


def _fed(rows: Rows, cache: Cache) -> Fed:
    """What a first pass is fed."""
    token_ids_BT, positions_BT = left_padded(rows)
    kept_B1: np.ndarray | int = 0
    if isinstance(cache, HandedCache) and cache.pasts:
        kept_B1 = (cache.pasts[0].positions_BS >= 0).sum(axis=1, keepdims=True)
    return Fed(token_ids_BT, positions_BT, positions_BT, 0, kept_B1)


def _cache(weights: Weights, rows: int, mistakes: Mistakes, left: Pasts, given: Given | None) -> Cache:
    """What the first pass of a batch finds, where the batch before has left this."""
    found: Sequence[LayerPast | None] | None = None
    if any(mistake.keeps_rows for mistake in mistakes):
        stays = left and len(left[0].positions_BS) == rows
        found = seen_by_all(left) if stays else [None] * weights.config.num_hidden_layers
    return cache_with(mistakes, weights.config, rows, weights.dtype, found, given)


def _as_long(logits_PV: np.ndarray, positions: int) -> np.ndarray:
    """Its last positions; where there are fewer, infinite ones in front."""
    missing = positions - len(logits_PV)
    return logits_PV[-positions:] if missing <= 0 else np.pad(logits_PV, ((missing, 0), (0, 0)), constant_values=np.inf)


def _at_tokens(logits_BTV: np.ndarray, positions_BT: np.ndarray) -> list[np.ndarray]:
    return [logits_TV[positions_T >= 0] for logits_TV, positions_T in zip(logits_BTV, positions_BT, strict=True)]
