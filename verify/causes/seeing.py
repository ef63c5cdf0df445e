"""Attention in which other tokens are seen, or heads come out in another order."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refengine.ops import Ops, attention_mask
from verify.naming.counterfactual import Fed

Positions = tuple[np.ndarray, np.ndarray]
Seen = Callable[[np.ndarray, np.ndarray, int | None], tuple[np.ndarray, np.ndarray, int | None]]


def with_mask(seen: Seen, right: Ops, *, alike: bool = False) -> Ops:
    """Attention whose mask follows from other positions and another window.

    Args:
        seen: the right positions of queries and slots, and the window, to those that the mask follows from.
        right: the operators that are right.
        alike: a query that sees nothing is given the mean of all slots, not zero.
    """

    def attend(
        q_BTNH: np.ndarray,
        k_BKSH: np.ndarray,
        v_BKSH: np.ndarray,
        positions_BT: np.ndarray,
        positions_BS: np.ndarray,
        window: int | None,
    ) -> np.ndarray:
        where = seen(positions_BT, positions_BS, window)
        y_BTNH = right.attend(q_BTNH, k_BKSH, v_BKSH, *where)
        if not alike:
            return y_BTNH
        blind_BT = ~np.logical_or.reduce(attention_mask(*where), axis=-1)
        mean_BKH = np.asarray(v_BKSH).mean(axis=2)
        mean_BNH = np.repeat(mean_BKH, q_BTNH.shape[2] // mean_BKH.shape[1], axis=1)
        return np.where(blind_BT[:, :, None, None], mean_BNH[:, None], y_BTNH)

    return replace(right, attend=attend)


def as_it_is(positions_BT: np.ndarray, positions_BS: np.ndarray, window: int | None) -> tuple:
    """What is right to see."""
    return positions_BT, positions_BS, window


def all_alike(right: Ops) -> Ops:
    """Masks that add a large negative number: where it is added to every score, all slots weigh the same.

    Of right exports, only padding sees nothing, and nobody sees padding; so no right result depends on this.
    """
    return with_mask(as_it_is, right, alike=True)


def everything(positions_BT: np.ndarray, positions_BS: np.ndarray, window: int | None) -> tuple:
    """Every token of the row, those that come later too."""
    last_B1 = positions_BS.max(axis=1, keepdims=True)
    return np.where(positions_BT < 0, -1, last_B1), positions_BS, None


def counted_from_first_slot(positions_BT: np.ndarray, positions_BS: np.ndarray, window: int | None) -> tuple:
    """New token t sees slots 0 to t, but for padding."""
    slots_BT = np.broadcast_to(np.arange(positions_BT.shape[1]), positions_BT.shape)
    slots_BS = np.broadcast_to(np.arange(positions_BS.shape[1]), positions_BS.shape)
    return slots_BT, np.where(positions_BS < 0, -1, slots_BS), window


def padding_too(positions_BT: np.ndarray, positions_BS: np.ndarray, window: int | None) -> tuple:
    """Every slot up to the token's own; ages are counted in slots."""
    slots_BS = np.broadcast_to(np.arange(positions_BS.shape[1]), positions_BS.shape)
    return slots_BS[:, positions_BS.shape[1] - positions_BT.shape[1] :], slots_BS, window


def padding_rotated_for(position: int, fed: Fed) -> Fed:
    """Padding is rotated for this position."""
    return replace(fed, rope_positions_BT=np.where(fed.rope_positions_BT < 0, position, fed.rope_positions_BT))


def heads_reordered(order_I: np.ndarray, right: Ops) -> Ops:
    """The numbers of all heads of a token, laid side by side, in this order."""

    def attend(q_BTNH: np.ndarray, *others: np.ndarray) -> np.ndarray:
        y_BTNH = right.attend(q_BTNH, *others)
        own_BTNH = y_BTNH[..., : len(order_I) // q_BTNH.shape[2]]  # another mistake may have made heads longer
        ordered_BTNH = own_BTNH.reshape(*q_BTNH.shape[:2], -1)[:, :, order_I].reshape(own_BTNH.shape)
        return np.concatenate([ordered_BTNH, y_BTNH[..., own_BTNH.shape[-1] :]], axis=-1)

    return replace(right, attend=attend)


def heads_scrambled(right: Ops) -> Ops:
    """All tokens of head 0, then all of head 1, cut into as many tokens again: a transposition is missing."""

    def attend(q_BTNH: np.ndarray, *others: np.ndarray) -> np.ndarray:
        y_BTNH = right.attend(q_BTNH, *others)
        return np.ascontiguousarray(y_BTNH.swapaxes(1, 2)).reshape(q_BTNH.shape)

    return replace(right, attend=attend)
