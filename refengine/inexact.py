"""Policies that change the result: tokens that the model would see are hidden from it, to save memory or time.

Nothing here computes what the checkpoint says. `deviation` tells how far off a policy is on given tokens; that depends
on the model and on the text, and is zero as long as nothing is hidden. Both policies hide by position alone, so what
they compute does not depend on how a prompt is cut, padded or batched.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refengine.errors import CacheError, InputError, TokensError
from refengine.generate import new_cache, teacher_forced
from refengine.kvcache import Cache
from refengine.ops import QUERY_BLOCK, Ops, attention_mask, hide, scores, softmax_weighted_sum
from refengine.weights import Weights

Visible = Callable[[np.ndarray, np.ndarray], np.ndarray]  # positions_BT, positions_BS -> visible_BTS


@dataclass(frozen=True)
class SinksAndWindow:
    """The first `sinks` positions and the last `window`, the token itself included, are seen; the rest is hidden.

    Use its `attend` as an operator, `replace(OPS, attend=policy.attend)`, and with it a `SinkCache(policy)` to hold
    only what is seen.

    Source: arXiv 2309.17453, section 3.2. It numbers positions within the cache, so that distances stay below the
    cache's size, and keeps keys before their rotation; here positions stay those of the text and keys are kept rotated.
    So a text may not be longer than what the model was trained for, which the paper's may.

    Raises:
        InputError: `sinks` is below 0 or `window` below 1.
    """

    sinks: int
    window: int

    def __post_init__(self) -> None:
        _check_least("sinks", self.sinks, 0)
        _check_least("window", self.window, 1)

    def visible(self, positions_BT: np.ndarray, positions_BS: np.ndarray) -> np.ndarray:
        """`visible_BTS`: what this policy does not hide; causality is not its business."""
        age_BTS = positions_BT[:, :, None] - positions_BS[:, None, :]
        return (positions_BS < self.sinks)[:, None] | (age_BTS < self.window)

    def attend(
        self,
        q_BTNH: np.ndarray,
        k_BKSH: np.ndarray,
        v_BKSH: np.ndarray,
        positions_BT: np.ndarray,
        positions_BS: np.ndarray,
        window: int | None,
    ) -> np.ndarray:
        """`refengine.ops.attend` of what is seen. A `window` of the model's own hides too, sinks as well."""
        return _attend(self.visible, QUERY_BLOCK, q_BTNH, k_BKSH, v_BKSH, positions_BT, positions_BS, window)


@dataclass(frozen=True)
class BlockSparse:
    """Positions in blocks of `block`: a token sees its own, the `local - 1` blocks before it and each `every`-th one.

    Block 0 is one of the last kind, so the start of the text is always seen. Of n blocks a token sees about
    `local + n / every`. Use its `attend` as an operator: `replace(OPS, attend=policy.attend)`.

    Source: arXiv 1904.10509, section 4.3, the fixed pattern, with whole blocks for the last positions of each, and
    every head seeing both kinds. Where these blocks are regular, those of arXiv 2007.14062, section 2, are random.

    Raises:
        InputError: one of the three is below 1.
    """

    block: int
    local: int
    every: int

    def __post_init__(self) -> None:
        _check_least("block", self.block, 1)
        _check_least("local", self.local, 1)
        _check_least("every", self.every, 1)

    def visible(self, positions_BT: np.ndarray, positions_BS: np.ndarray) -> np.ndarray:
        """`visible_BTS`: what this policy does not hide; causality is not its business."""
        block_BS = positions_BS // self.block
        blocks_ago_BTS = (positions_BT // self.block)[:, :, None] - block_BS[:, None, :]
        return (blocks_ago_BTS < self.local) | (block_BS % self.every == 0)[:, None]

    def attend(
        self,
        q_BTNH: np.ndarray,
        k_BKSH: np.ndarray,
        v_BKSH: np.ndarray,
        positions_BT: np.ndarray,
        positions_BS: np.ndarray,
        window: int | None,
    ) -> np.ndarray:
        """`refengine.ops.attend` of what is seen, computing only blocks that are; a `window` of the model's own hides
        too.
        """
        return _attend(self.visible, self.block, q_BTNH, k_BKSH, v_BKSH, positions_BT, positions_BS, window)


class SinkCache:
    """Keys and values of what later tokens can see through `policy`: at most `sinks + window - 1` tokens of each row.

    The bound holds between passes, for every row by itself, whatever its padding; during a pass the new tokens come on
    top. Only `policy.attend` gives the same result with this cache as without: another operator would let the first
    tokens of a pass see more than the later ones.
    """

    def __init__(self, policy: SinksAndWindow):
        self.policy = policy
        self._held: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # layer -> keys, values, positions

    @property
    def nbytes(self) -> int:
        """Bytes of the held keys and values."""
        return sum(k_BKSH.nbytes + v_BKSH.nbytes for k_BKSH, v_BKSH, _ in self._held.values())

    def update(
        self, layer: int, k_BKTH: np.ndarray, v_BKTH: np.ndarray, positions_BT: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the layer holds and the new tokens after it; then it forgets what the next token will not see.

        Raises:
            CacheError: the new ones do not fit those held: rows, heads or head_dim differ.
        """
        k_BKSH, v_BKSH, positions_BS = k_BKTH, v_BKTH, positions_BT
        if layer in self._held:
            held_k_BKSH, held_v_BKSH, held_positions_BS = self._held[layer]
            if (*held_k_BKSH.shape[:2], held_k_BKSH.shape[3]) != (*k_BKTH.shape[:2], k_BKTH.shape[3]):
                raise CacheError(
                    f"cache: expected keys and values like those held, {held_k_BKSH.shape} (rows, KV heads, tokens, "
                    f"head_dim), found {k_BKTH.shape}"
                )
            k_BKSH = np.concatenate([held_k_BKSH, k_BKTH], axis=2)
            v_BKSH = np.concatenate([held_v_BKSH, v_BKTH], axis=2)
            positions_BS = np.concatenate([held_positions_BS, positions_BT], axis=1)
        self._held[layer] = self._still_seen(k_BKSH, v_BKSH, positions_BS)
        return k_BKSH, v_BKSH, positions_BS

    def _still_seen(
        self, k_BKSH: np.ndarray, v_BKSH: np.ndarray, positions_BS: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each row's tokens that are still seen, moved together; rows with fewer have empty slots in front."""
        next_B1 = positions_BS.max(axis=1, keepdims=True, initial=-1) + 1
        seen_BS = (positions_BS >= 0) & self.policy.visible(next_B1, positions_BS)[:, 0]
        most = int(seen_BS.sum(axis=1).max())
        # A stable sort puts what is seen last, in the order that it has.
        slots_BS = np.argsort(seen_BS, axis=1, kind="stable")[:, seen_BS.shape[1] - most :]
        slots_B1S1 = slots_BS[:, None, :, None]
        return (
            np.take_along_axis(k_BKSH, slots_B1S1, axis=2),
            np.take_along_axis(v_BKSH, slots_B1S1, axis=2),
            np.where(
                np.take_along_axis(seen_BS, slots_BS, axis=1), np.take_along_axis(positions_BS, slots_BS, axis=1), -1
            ),
        )


@dataclass(frozen=True)
class Deviation:
    """How far logits are from the exact ones; all zero, and `same_choice` 1, where nothing was hidden.

    Attributes:
        largest: the largest difference of any logit, divided by the rms of the exact logits.
        rms: the rms difference, divided likewise.
        same_choice: the share of positions at which the largest logit is the same token's, 0 to 1.
    """

    largest: float
    rms: float
    same_choice: float


def deviation(
    weights: Weights,
    token_ids_BT: np.ndarray,
    positions_BT: np.ndarray,
    ops: Ops,
    cache: Cache | None = None,
    *,
    chunk: int = 512,
) -> Deviation:
    """How far the logits of these tokens are from the exact ones when computed by `ops`.

    Args:
        weights: the model; the exact logits are computed in their dtype too.
        token_ids_BT: tokens given, not chosen: every position is judged after the same past.
        positions_BT: their positions; padding (-1) does not count.
        ops: a policy's operators.
        cache: an empty cache to run the policy with; one that holds everything by default.
        chunk: columns a pass; a cache that drops has an effect from the second on.

    Raises:
        TokensError: ids or positions of the wrong shape, type or range, or padding only.
    """
    if not (positions_BT >= 0).any():
        raise TokensError("positions: expected a token to compare the logits of, found padding only")
    rows, width = len(token_ids_BT), weights.config.vocab_size
    exact = teacher_forced(weights, token_ids_BT, positions_BT, new_cache(weights, rows), chunk=chunk)
    other = teacher_forced(weights, token_ids_BT, positions_BT, cache or new_cache(weights, rows), chunk=chunk, ops=ops)
    largest, squares, exact_squares, same, positions = 0.0, 0.0, 0.0, 0, 0
    for (columns, exact_BTV), (_, other_BTV) in zip(exact, other, strict=True):
        there_BT = positions_BT[:, columns] >= 0
        exact_PV, other_PV = exact_BTV[there_BT].astype(np.float64), other_BTV[there_BT].astype(np.float64)
        difference_PV = other_PV - exact_PV
        largest = max(largest, float(np.abs(difference_PV).max(initial=0)))
        squares += float(np.square(difference_PV).sum())
        exact_squares += float(np.square(exact_PV).sum())
        same += int((exact_PV.argmax(axis=-1) == other_PV.argmax(axis=-1)).sum())
        positions += len(exact_PV)
    unit = (exact_squares / (positions * width)) ** 0.5
    return Deviation(largest / unit, (squares / (positions * width)) ** 0.5 / unit, same / positions)


def _attend(
    visible: Visible,
    query_block: int,
    q_BTNH: np.ndarray,
    k_BKSH: np.ndarray,
    v_BKSH: np.ndarray,
    positions_BT: np.ndarray,
    positions_BS: np.ndarray,
    window: int | None,
) -> np.ndarray:
    """Attention to what `visible` allows too; keys that no query of a block sees take no part in its products."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    y_BTNH = np.zeros_like(q_BTNH)
    for start in range(0, T, query_block):
        queries = slice(start, min(start + query_block, T))
        allowed_BTS = attention_mask(positions_BT[:, queries], positions_BS, window)
        allowed_BTS &= visible(positions_BT[:, queries], positions_BS)
        seen = np.flatnonzero(allowed_BTS.any(axis=(0, 1)))
        if not len(seen):
            continue
        scores_BKRS = scores(q_BTNH[:, queries], k_BKSH[:, :, seen])
        hide(scores_BKRS, allowed_BTS[:, :, seen])
        y_BKGTH = softmax_weighted_sum(scores_BKRS, v_BKSH[:, :, seen]).reshape(B, K, N // K, -1, H)
        y_BTNH[:, queries] = y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)
    return y_BTNH


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name}: expected at least {least}, found {value}")
