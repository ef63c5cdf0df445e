"""One layer's keys or values, of every row."""

from typing import Protocol, Self

import numpy as np

from refengine.codecs.codec import Codec
from refengine.slots import Slots
from refengine.views import Vectors


class Store(Protocol):
    """Vectors in slots, the same number for every row; a row has a token in some of them."""

    @property
    def nbytes(self) -> int:
        """Bytes as stored, scales included; spare capacity is not counted."""

    def append(self, x_BKTH: np.ndarray, there_BT: np.ndarray) -> None:
        """Adds slots; `there` says in which of them a row has a token."""

    def read(self, dtype: np.dtype) -> Vectors:
        """`x_BKSH` of what is held, valid until the next append; finite where a row has no token."""

    def settle(self) -> None:
        """Ends a pass: tokens whose turn has come are coded, after attention has read them."""

    def drop(self, slots: int) -> None:
        """Forgets the oldest slots."""

    def crop(self, length: int) -> None:
        """Forgets the newest slots, so that `length` are left."""

    def taken(self, rows_R: np.ndarray, slots_S: np.ndarray, before: int) -> Self:
        """A copy of these rows, and of these slots behind `before` empty ones. No token of these rows is left out."""

    def stacked(self, other: Self) -> Self:
        """The rows of both, which hold as many slots."""


class TokenStore:
    """Every token has its own scales and is coded as it comes, so all rows are stored together."""

    def __init__(self, codec: Codec, head_dim: int, slots: Slots):
        self._codec, self._head_dim, self._slots = codec, head_dim, slots

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self._slots.nbytes

    def append(self, x_BKTH: np.ndarray, there_BT: np.ndarray) -> None:
        """Codes the vectors of every row, there or not."""
        self._slots.append(self._codec.encode(x_BKTH))

    def read(self, dtype: np.dtype) -> Vectors:
        """A view where nothing is to be decoded."""
        return self._codec.view(self._slots.held, len(self._slots), self._head_dim, dtype)

    def settle(self) -> None:
        """Nothing waits."""

    def drop(self, slots: int) -> None:
        """Forgets the oldest slots."""
        self._slots.drop(slots)

    def crop(self, length: int) -> None:
        """Forgets the newest slots."""
        self._slots.crop(length)

    def taken(self, rows_R: np.ndarray, slots_S: np.ndarray, before: int) -> "TokenStore":
        """Copied."""
        return TokenStore(self._codec, self._head_dim, self._slots.taken(rows_R, slots_S, before))

    def stacked(self, other: "TokenStore") -> "TokenStore":
        """Copied."""
        return TokenStore(self._codec, self._head_dim, self._slots.stacked(other._slots))
