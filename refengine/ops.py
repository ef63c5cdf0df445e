"""The operators of a Llama, and the frozen namespace through which the forward pass calls them.

A counterfactual ("as if it had this mistake") is another namespace: `replace(OPS, rotate=...)`; nothing has switches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refengine.rope import rope_table
from refengine.weights import Linear

QUERY_BLOCK = 128  # queries attended at a time: bounds the scores' memory, and lets causal blocks skip later keys
FEW_ROWS = 32  # up to here BLAS is faster with the weight as the left factor


def linear(x_BTI: np.ndarray, proj: Linear) -> np.ndarray:
    """`x @ weight.T + bias` over the last axis, in the form that is fastest for the number of rows."""
    x_RI = x_BTI.reshape(-1, x_BTI.shape[-1])
    if len(x_RI) == 1:
        y_RO = (proj.weight_OI @ x_RI[0])[None]
    elif len(x_RI) <= FEW_ROWS:
        y_RO = (proj.weight_OI @ np.ascontiguousarray(x_RI.T)).T
    else:
        y_RO = x_RI @ proj.weight_OI.T
    if proj.bias_O is not None:
        y_RO += proj.bias_O
    return y_RO.reshape(*x_BTI.shape[:-1], -1)


def rms_norm(x_BTD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    """`x / sqrt(mean(x**2) + eps) * weight`, the mean over the last axis. Source: arXiv 1910.07467, equation 4."""
    mean_square_BT = np.vecdot(x_BTD, x_BTD) / x_BTD.dtype.type(x_BTD.shape[-1])
    y_BTD = x_BTD / np.sqrt(mean_square_BT + x_BTD.dtype.type(eps))[..., None]
    y_BTD *= weight_D
    return y_BTD


def rotate(x_BTMH: np.ndarray, cos_BTP: np.ndarray, sin_BTP: np.ndarray) -> np.ndarray:
    """Rotary embedding: dimension p turns with dimension p + P, the pairing of Hugging Face checkpoints.

    Source: arXiv 2104.09864, equation 34, with the pairs (p, p + P) for the paper's (2p, 2p + 1).
    """
    cos_BT1P, sin_BT1P = cos_BTP[:, :, None], sin_BTP[:, :, None]
    half = x_BTMH.shape[-1] // 2
    first_BTMP, second_BTMP = x_BTMH[..., :half], x_BTMH[..., half:]
    y_BTMH = np.empty_like(x_BTMH)
    np.subtract(first_BTMP * cos_BT1P, second_BTMP * sin_BT1P, out=y_BTMH[..., :half])
    np.add(second_BTMP * cos_BT1P, first_BTMP * sin_BT1P, out=y_BTMH[..., half:])
    return y_BTMH


def attention_mask(positions_BT: np.ndarray, positions_BS: np.ndarray, window: int | None) -> np.ndarray:
    """`allowed_BTS`: which cached tokens each query may see. Follows from positions alone; -1 is padding.

    A token sees itself and what came before it; with a window, only the `window - 1` tokens before it: age < window.
    """
    age_BTS = positions_BT[:, :, None] - positions_BS[:, None, :]
    allowed_BTS = (positions_BS >= 0)[:, None, :] & (age_BTS >= 0)
    return allowed_BTS if window is None else allowed_BTS & (age_BTS < window)


def scores(q_BTNH: np.ndarray, k_BKSH: np.ndarray) -> np.ndarray:
    """`q @ k / sqrt(H)` as `scores_BKRS`: the G queries of each key-value head and the T tokens are its R = G * T rows.

    Stacked like this, the queries of a group share one product, and keys and values are never repeated.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    # In C order the scaled queries are already the rows of the product: one copy for both.
    scaled_BKGTH = np.multiply(q_BKGTH, q_BTNH.dtype.type(H**-0.5), order="C")
    return scaled_BKGTH.reshape(B, K, -1, H) @ k_BKSH.swapaxes(-1, -2)


def hide(scores_BKRS: np.ndarray, allowed_BTS: np.ndarray) -> None:
    """Overwrites with -inf the scores of what a query may not see; rows are stacked as `scores` stacks them."""
    if allowed_BTS.all():
        return
    B, K, _, S = scores_BKRS.shape
    # Most slots of a long past are seen by every query: only those that are not need the slow masked copy.
    hidden = _span(~np.logical_and.reduce(allowed_BTS, axis=(0, 1)))
    scores_BKGTS = scores_BKRS.reshape(B, K, -1, allowed_BTS.shape[1], S)[..., hidden]
    np.copyto(scores_BKGTS, -np.inf, where=~allowed_BTS[:, None, None, :, hidden])


def softmax_weighted_sum(scores_BKRS: np.ndarray, v_BKSH: np.ndarray) -> np.ndarray:
    """`softmax(scores) @ v`, dividing once at the end. Overwrites `scores`. A row of -inf only gives zeros, not NaN."""
    highest_BKR1 = scores_BKRS.max(axis=-1, keepdims=True)
    scores_BKRS -= np.maximum(highest_BKR1, np.finfo(scores_BKRS.dtype).min)
    np.exp(scores_BKRS, out=scores_BKRS)
    total_BKR1 = scores_BKRS.sum(axis=-1, keepdims=True)
    y_BKRH = scores_BKRS @ v_BKSH
    y_BKRH /= np.maximum(total_BKR1, np.finfo(scores_BKRS.dtype).tiny)
    return y_BKRH


def attend(
    q_BTNH: np.ndarray,
    k_BKSH: np.ndarray,
    v_BKSH: np.ndarray,
    positions_BT: np.ndarray,
    positions_BS: np.ndarray,
    window: int | None,
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray] = scores,
) -> np.ndarray:
    """Grouped-query attention: query head n reads key-value head n // G. Returns `y_BTNH`.

    Source: arXiv 1706.03762, section 3.2.1; arXiv 2305.13245 for the groups.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    y_BTNH = np.empty_like(q_BTNH)
    for start in range(0, T, QUERY_BLOCK):
        block = slice(start, min(start + QUERY_BLOCK, T))
        allowed_BTS = attention_mask(positions_BT[:, block], positions_BS, window)
        seen = slice(None) if allowed_BTS.all() else _span(np.logical_or.reduce(allowed_BTS, axis=(0, 1)))
        scores_BKRS = scores(q_BTNH[:, block], k_BKSH[:, :, seen])
        if seen != slice(None):
            hide(scores_BKRS, allowed_BTS[:, :, seen])
        y_BKRH = softmax_weighted_sum(scores_BKRS, v_BKSH[:, :, seen])
        y_BKGTH = y_BKRH.reshape(B, K, N // K, block.stop - block.start, H)
        y_BTNH[:, block] = y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)
    return y_BTNH


def _span(used_S: np.ndarray) -> slice:
    """The shortest slice that holds every used slot (one slot at least, so that no axis is empty)."""
    used = np.flatnonzero(used_S)
    return slice(used[0], used[-1] + 1) if len(used) else slice(0, 1)


def silu_gate(gate_BTF: np.ndarray, up_BTF: np.ndarray) -> np.ndarray:
    """SwiGLU's gate: `gate * sigmoid(gate) * up`. Source: arXiv 2002.05202, equation 5."""
    # exp overflows to inf for very negative gates, and x / inf is the right 0.
    with np.errstate(over="ignore"):
        y_BTF = np.exp(-gate_BTF)
    y_BTF += 1
    np.divide(gate_BTF, y_BTF, out=y_BTF)
    y_BTF *= up_BTF
    return y_BTF


@dataclass(frozen=True)
class Ops:
    """What a forward pass computes with."""

    linear: Callable[..., np.ndarray] = linear
    rms_norm: Callable[..., np.ndarray] = rms_norm
    rope_table: Callable[..., tuple[np.ndarray, np.ndarray]] = rope_table
    rotate: Callable[..., np.ndarray] = rotate
    attend: Callable[..., np.ndarray] = attend
    silu_gate: Callable[..., np.ndarray] = silu_gate


OPS = Ops()
