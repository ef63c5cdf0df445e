"""What a cache that rounds costs in quality: a text decoded token by token, with it and with the exact one.

One forward pass over the whole text would show nothing for half of the schemes: a runtime that reads what it has just
computed, and rounds it only for later passes, would never read anything rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.ops import OPS, Ops
from refengine.quant import ops_for
from refengine.scheme import Scheme, stored_as
from refengine.weights import Weights


@dataclass(frozen=True)
class Quality:
    """How well a text is predicted through a cache.

    Attributes:
        perplexity: exp of the mean negative log likelihood of each token after those before it, in nats.
        divergence: mean Kullback-Leibler divergence of the predictions from those with an exact cache, in nats a token.
        same_choice: share of positions at which the likeliest token is the exact cache's, 0 to 1.
    """

    perplexity: float
    divergence: float
    same_choice: float


def qualities(
    weights: Weights,
    schemes: Mapping[str, Scheme],
    token_ids_BT: np.ndarray,
) -> dict[str, Quality]:
    """The quality of each scheme on the same rows of text, all decoded side by side.

    Args:
        schemes: by name.
        token_ids_BT: rows of text, each judged by itself, from its second token on.
    """
    exact = KVCache(weights.config, len(token_ids_BT), stored_as(weights.dtype))
    caches = {name: KVCache(weights.config, len(token_ids_BT), scheme) for name, scheme in schemes.items()}
    sums = {name: np.zeros(3) for name in schemes}
    for column in range(token_ids_BT.shape[1] - 1):
        expected_BV = _log_likelihoods(weights, token_ids_BT, column, exact)
        for name, cache in caches.items():
            found_BV = _log_likelihoods(weights, token_ids_BT, column, cache, ops_for(cache.scheme))
            sums[name] += _of_step(found_BV, expected_BV, token_ids_BT[:, column + 1])
    tokens = len(token_ids_BT) * (token_ids_BT.shape[1] - 1)
    return {
        name: Quality(float(np.exp(loss / tokens)), float(divergence / tokens), float(same / tokens))
        for name, (loss, divergence, same) in sums.items()
    }


def _log_likelihoods(
    weights: Weights, token_ids_BT: np.ndarray, column: int, cache: KVCache, ops: Ops = OPS
) -> np.ndarray:
    """Of every token that may follow this column, which is fed."""
    positions_B1 = np.full((len(token_ids_BT), 1), column)
    logits_BV = forward(weights, token_ids_BT[:, column : column + 1], positions_B1, cache, last=True, ops=ops)[:, -1]
    logits_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    return logits_BV - np.log(np.exp(logits_BV).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(logits_BV.dtype)


def _of_step(found_BV: np.ndarray, expected_BV: np.ndarray, next_B: np.ndarray) -> np.ndarray:
    """Negative log likelihood, divergence and equal choices, summed over the rows."""
    loss = -np.take_along_axis(found_BV, next_B[:, None], axis=-1).sum(dtype=np.float64)
    divergence = (np.exp(expected_BV) * (expected_BV - found_BV)).sum(dtype=np.float64)
    same = (found_BV.argmax(axis=-1) == expected_BV.argmax(axis=-1)).sum()
    return np.array([loss, divergence, same])
