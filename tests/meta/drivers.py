"""Candidates in loops with a mistake: right exports, wrongly driven."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from verify.candidates import Candidate, Past, Step


@dataclass
class Driven:
    """A candidate around which a loop makes a mistake.

    Attributes:
        right: the candidate.
        mistaken: what it is fed in place of new tokens, their positions and the past.
    """

    right: Candidate
    mistaken: Callable[[np.ndarray, np.ndarray, Past | None], tuple[np.ndarray, np.ndarray, Past | None]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        return self.right.run(*self.mistaken(token_ids_BT, positions_BT, past))


def losing(slots: Callable[[int], slice], *, once: bool = False) -> Callable[..., Any]:
    """A loop that hands on these slots of the past alone; `once`: after the prompts only.

    Args:
        slots: made from the number that there are.
    """
    is_over = False

    def mistaken(token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None) -> tuple[Any, ...]:
        nonlocal is_over
        if past is None or is_over:
            is_over = is_over and past is not None
            return token_ids_BT, positions_BT, past
        is_over = once
        cut = slots(past.positions_BS.shape[1])
        arrays = {name: array[:, :, cut] for name, array in past.arrays.items()}
        return token_ids_BT, positions_BT, Past(arrays, past.positions_BS[:, cut])

    return mistaken


class NotReset:
    """A candidate whose loop keeps the cache of the prompts before; `go_on`: positions too go on from there."""

    def __init__(self, right: Candidate, *, go_on: bool):
        self._right, self._go_on = right, go_on
        self._left: Past | None = None
        self._before = np.zeros((1, 1), np.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._right, name)

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        if past is None and self._left is not None:
            past = self._left
            self._before = (past.positions_BS >= 0).sum(axis=1, keepdims=True)
        if self._go_on:
            positions_BT = np.where(positions_BT >= 0, positions_BT + self._before, -1)
        step = self._right.run(token_ids_BT, positions_BT, past)
        self._left = step.past
        return step
