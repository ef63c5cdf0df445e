"""Attention block by block with an online softmax: memory that does not grow with the sequence, for the same result.

Use it by `replace(OPS, attend=attend_blockwise)`. Source: arXiv 1805.02867, algorithm 3 (online softmax); arXiv
2112.05682 and 2205.14135 for attention in blocks.
"""

from dataclasses import replace

import numpy as np

from refengine.ops import OPS, attention_mask, hide, scores

QUERY_BLOCK, KEY_BLOCK = 128, 256


def attend_blockwise(
    q_BTNH: np.ndarray,
    k_BKSH: np.ndarray,
    v_BKSH: np.ndarray,
    positions_BT: np.ndarray,
    positions_BS: np.ndarray,
    window: int | None,
    *,
    query_block: int = QUERY_BLOCK,
    key_block: int = KEY_BLOCK,
) -> np.ndarray:
    """`refengine.ops.attend`, holding the scores of one block of queries and one of keys at a time.

    Blocks in which no query may see any key are not computed: with causal attention those above the diagonal, with a
    window those before it. Returns `y_BTNH`.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    y_BTNH = np.empty_like(q_BTNH)
    for start in range(0, T, query_block):
        queries = slice(start, min(start + query_block, T))
        softmax = _OnlineSoftmax((B, K, (queries.stop - start) * N // K, H), q_BTNH.dtype)
        for first in range(0, S, key_block):
            keys = slice(first, min(first + key_block, S))
            allowed_BTS = attention_mask(positions_BT[:, queries], positions_BS[:, keys], window)
            if allowed_BTS.any():
                scores_BKRS = scores(q_BTNH[:, queries], k_BKSH[:, :, keys])
                hide(scores_BKRS, allowed_BTS)
                softmax.add(scores_BKRS, v_BKSH[:, :, keys])
        y_BKGTH = softmax.result().reshape(B, K, N // K, -1, H)
        y_BTNH[:, queries] = y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)
    return y_BTNH


class _OnlineSoftmax:
    """`softmax(scores) @ v` of which keys come a block at a time: sums over the keys so far, scaled to the highest."""

    def __init__(self, shape_BKRH: tuple[int, int, int, int], dtype: np.dtype):
        self.highest_BKR1 = np.full((*shape_BKRH[:3], 1), np.finfo(dtype).min, dtype)
        self.total_BKR1 = np.zeros_like(self.highest_BKR1)
        self.y_BKRH = np.zeros(shape_BKRH, dtype)

    def add(self, scores_BKRS: np.ndarray, v_BKSH: np.ndarray) -> None:
        """Takes in one block of keys and values. Overwrites `scores`."""
        highest_BKR1 = np.maximum(self.highest_BKR1, scores_BKRS.max(axis=-1, keepdims=True))
        scores_BKRS -= highest_BKR1
        np.exp(scores_BKRS, out=scores_BKRS)
        # What came before was scaled to a lower maximum. Where nothing was seen yet, that is 0 times exp(min - x) = 0.
        rescale_BKR1 = np.exp(self.highest_BKR1 - highest_BKR1)
        self.total_BKR1 *= rescale_BKR1
        self.total_BKR1 += scores_BKRS.sum(axis=-1, keepdims=True)
        self.y_BKRH *= rescale_BKR1
        self.y_BKRH += scores_BKRS @ v_BKSH
        self.highest_BKR1 = highest_BKR1

    def result(self) -> np.ndarray:
        """`y_BKRH`; zeros where nothing was seen."""
        return self.y_BKRH / np.maximum(self.total_BKR1, np.finfo(self.y_BKRH.dtype).tiny)


BLOCKWISE = replace(OPS, attend=attend_blockwise)
