"""What a cache that rounds costs in quality: a text decoded token by token, with it and with the exact one.

One forward pass over the whole text would show nothing for half of the schemes: a runtime that reads what it has just
computed, and rounds it only for later passes, would never read anything rounded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.ops import OPS
from refengine.quant import ops_for
from refengine.scheme import Scheme, stored_as
from refengine.views import Vectors
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


def qualities(weights: Weights, schemes: Mapping[str, Scheme], token_ids_BT: np.ndarray) -> dict[str, Quality]:
    """The quality of each scheme on the same rows of text.

    All of them, the exact cache first, are rows of one batch, so that the weights are read once a step for all.

    Args:
        schemes: by name.
        token_ids_BT: rows of text, each judged by itself, from its second token on.
    """
    rows, length = token_ids_BT.shape
    caches = [KVCache(weights.config, rows, scheme) for scheme in (stored_as(weights.dtype), *schemes.values())]
    side_by_side = _SideBySide(caches)
    ops = replace(OPS, attend=side_by_side.attend)
    sums = {name: np.zeros(3) for name in schemes}
    for column in range(length - 1):
        token_ids_R1 = np.tile(token_ids_BT[:, column : column + 1], (len(caches), 1))
        positions_R1 = np.full_like(token_ids_R1, column)
        logits_RV = forward(weights, token_ids_R1, positions_R1, side_by_side, ops=ops)[:, -1]
        expected_BV, *found = np.split(_log_likelihoods(logits_RV), len(caches))
        for name, found_BV in zip(schemes, found, strict=True):
            sums[name] += _of_step(found_BV, expected_BV, token_ids_BT[:, column + 1])
    tokens = rows * (length - 1)
    return {
        name: Quality(float(np.exp(loss / tokens)), float(divergence / tokens), float(same / tokens))
        for name, (loss, divergence, same) in sums.items()
    }


class _SideBySide:
    """Caches of as many rows each, that a forward pass takes for one: their rows one after the other."""

    def __init__(self, caches: Sequence[KVCache]):
        self._caches = caches
        self._read: list[tuple[Vectors, Vectors]] = []  # of each cache, in the layer that is running
        self._operators = [ops_for(cache.scheme) for cache in caches]

    def update(
        self, layer: int, k_BKTH: np.ndarray, v_BKTH: np.ndarray, positions_BT: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each cache is given its rows, and keeps what it reads for `attend`; what is returned is not looked at."""
        self._read.clear()
        for cache, rows in zip(self._caches, self._rows(), strict=True):
            k_BKSH, v_BKSH, positions_BS = cache.update(layer, k_BKTH[rows], v_BKTH[rows], positions_BT[rows])
            self._read.append((k_BKSH, v_BKSH))
        return k_BKTH, v_BKTH, np.tile(positions_BS, (len(self._caches), 1))

    def attend(
        self,
        q_BTNH: np.ndarray,
        k_BKSH: np.ndarray,
        v_BKSH: np.ndarray,
        positions_BT: np.ndarray,
        positions_BS: np.ndarray,
        window: int | None,
    ) -> np.ndarray:
        """Each cache is read with the operator that goes with it."""
        given = zip(self._operators, self._read, self._rows(), strict=True)
        return np.concatenate(
            [
                ops.attend(q_BTNH[rows], k, v, positions_BT[rows], positions_BS[rows], window)
                for ops, (k, v), rows in given
            ]
        )

    def _rows(self) -> Iterator[slice]:
        size = self._caches[0].batch_size
        return (slice(start, start + size) for start in range(0, size * len(self._caches), size))


def _log_likelihoods(logits_RV: np.ndarray) -> np.ndarray:
    """Of every token that may follow."""
    logits_RV = logits_RV - logits_RV.max(axis=-1, keepdims=True)
    return logits_RV - np.log(np.exp(logits_RV).sum(axis=-1, keepdims=True))


def _of_step(found_BV: np.ndarray, expected_BV: np.ndarray, next_B: np.ndarray) -> np.ndarray:
    """Negative log likelihood, divergence and equal choices, summed over the rows."""
    loss = -np.take_along_axis(found_BV, next_B[:, None], axis=-1).sum(dtype=np.float64)
    divergence = (np.exp(expected_BV) * (expected_BV - found_BV)).sum(dtype=np.float64)
    same = (found_BV.argmax(axis=-1) == expected_BV.argmax(axis=-1)).sum()
    return np.array([loss, divergence, same])
