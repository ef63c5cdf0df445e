"""What attention reads of a cache that holds codes: an array-like that multiplies without being decoded whole."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from refengine.slots import Arrays

if TYPE_CHECKING:
    from refengine.codecs.codec import Codec


class Piece(Protocol):
    """Vectors of consecutive tokens, `x_BKTH`, in one way of keeping them."""

    def __len__(self) -> int:
        """Tokens T."""

    def cut(self, start: int, stop: int) -> "Piece":
        """The tokens from `start` to `stop`."""

    def decoded(self, dtype: np.dtype) -> np.ndarray:
        """`x_BKTH`."""

    def scores(self, q_BKRH: np.ndarray) -> np.ndarray:
        """`q @ x.T`."""

    def weighted_sum(self, p_BKRT: np.ndarray) -> np.ndarray:
        """`p @ x`."""


@dataclass(frozen=True)
class Plain:
    """Vectors as they came."""

    x_BKTH: np.ndarray

    def __len__(self) -> int:
        return self.x_BKTH.shape[2]

    def cut(self, start: int, stop: int) -> "Plain":
        """A view."""
        return Plain(self.x_BKTH[:, :, start:stop])

    def decoded(self, dtype: np.dtype) -> np.ndarray:
        """In `dtype`."""
        return self.x_BKTH.astype(dtype, copy=False)

    def scores(self, q_BKRH: np.ndarray) -> np.ndarray:
        """`q @ x.T`."""
        return q_BKRH @ self.x_BKTH.swapaxes(-1, -2)

    def weighted_sum(self, p_BKRT: np.ndarray) -> np.ndarray:
        """`p @ x`."""
        return p_BKRT @ self.x_BKTH


@dataclass(frozen=True)
class Coded:
    """The tokens from `start` to `stop` of those that these arrays hold as codes."""

    codec: "Codec"
    arrays: Arrays
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> "Coded":
        """Of the same arrays."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def decoded(self, dtype: np.dtype) -> np.ndarray:
        """In `dtype`."""
        arrays, wanted = self._slots()
        return self.codec.decode(arrays, dtype)[:, :, wanted]

    def scores(self, q_BKRH: np.ndarray) -> np.ndarray:
        """`q @ x.T`."""
        arrays, wanted = self._slots()
        return self.codec.scores(q_BKRH, arrays)[..., wanted]

    def weighted_sum(self, p_BKRT: np.ndarray) -> np.ndarray:
        """`p @ x`; tokens of the first and last slot that were not asked for weigh nothing."""
        arrays, wanted = self._slots()
        held = arrays[0].shape[2] * self.codec.tokens
        if held > len(self):
            p_BKRT = np.pad(p_BKRT, [(0, 0)] * 3 + [(wanted.start, held - wanted.stop)])
        return self.codec.weighted_sum(p_BKRT, arrays)

    def _slots(self) -> tuple[Arrays, slice]:
        """Arrays of whole slots, and which of the tokens in them are asked for."""
        unit = self.codec.tokens
        first, last = self.start // unit, -(-self.stop // unit)
        wanted = slice(self.start - first * unit, self.stop - first * unit)
        return tuple(array[:, :, first:last] for array in self.arrays), wanted


class View:
    """Stands for the array `x_BKSH` whose tokens are those of some pieces, one after the other.

    Attention asks an array for a slice of its tokens, its transpose, and its product from the left: these are here.
    Whatever else is wanted, `np.asarray` gives the whole array.
    """

    __array_ufunc__ = None  # so that `array @ view` asks `__rmatmul__`

    def __init__(self, pieces: Sequence[Piece], shape_BKSH: tuple[int, ...], dtype: np.dtype, transposed: bool = False):
        self.pieces = [piece for piece in pieces if len(piece)]
        self.dtype = dtype
        self._shape_BKSH, self._transposed = shape_BKSH, transposed

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that this stands for."""
        B, K, S, H = self._shape_BKSH
        return (B, K, H, S) if self._transposed else (B, K, S, H)

    def __getitem__(self, index: Any) -> "View | np.ndarray":
        """Another view for a slice of tokens, `[:, :, start:stop]`; else what the array has there."""
        if self._transposed or not _is_of_tokens(index):
            return np.asarray(self)[index]
        B, K, S, H = self._shape_BKSH
        start, stop, _ = index[2].indices(S)
        pieces, before = [], 0
        for piece in self.pieces:
            first, last = max(start - before, 0), min(stop - before, len(piece))
            if first < last:
                pieces.append(piece.cut(first, last))
            before += len(piece)
        return View(pieces, (B, K, max(stop - start, 0), H), self.dtype)

    def swapaxes(self, first: int, second: int) -> "View | np.ndarray":
        """Another view when the last two axes change places."""
        if {first % 4, second % 4} == {2, 3}:
            return View(self.pieces, self._shape_BKSH, self.dtype, not self._transposed)
        return np.asarray(self).swapaxes(first, second)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        B, K, _, H = self._shape_BKSH
        none = np.empty((B, K, 0, H), self.dtype)
        x_BKSH = np.concatenate([none, *(piece.decoded(self.dtype) for piece in self.pieces)], axis=2)
        return (x_BKSH.swapaxes(-1, -2) if self._transposed else x_BKSH).astype(dtype or self.dtype, copy=False)

    def __rmatmul__(self, left: np.ndarray) -> np.ndarray:
        """`left @ self`, piece by piece."""
        products = [np.zeros((*left.shape[:-1], 0 if self._transposed else self.shape[-1]), left.dtype)]
        before = 0
        for piece in self.pieces:
            if self._transposed:
                products.append(piece.scores(left))
            else:
                products.append(piece.weighted_sum(left[..., before : before + len(piece)]))
                before += len(piece)
        return np.concatenate(products, axis=-1) if self._transposed else np.add.reduce(products)


Vectors = np.ndarray | View


def joined(parts: Sequence[Vectors]) -> Vectors:
    """Vectors of the same rows and heads, their tokens one after the other."""
    there = [part for part in parts if part.shape[2]]
    if len(there) == 1:
        return there[0]
    pieces: list[Piece] = []
    for part in there:
        pieces += part.pieces if isinstance(part, View) else [Plain(part)]
    B, K, _, H = parts[0].shape
    return View(pieces, (B, K, sum(map(len, pieces)), H), parts[0].dtype)


def _is_of_tokens(index: Any) -> bool:
    everything = slice(None)
    return (
        isinstance(index, tuple)
        and len(index) == 3
        and index[0] == everything == index[1]
        and isinstance(index[2], slice)
        and index[2].step in (None, 1)
    )
