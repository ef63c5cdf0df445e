"""What a codec is: vectors into arrays of codes and scales, and back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from refengine.errors import CacheError
from refengine.slots import Arrays
from refengine.views import Coded, Vectors, View

BLOCK = 256  # the most tokens that may share scales
TOKENS, VECTORS = 384, 1536  # of one head, and of all rows and heads, that are decoded at a time: the fastest measured
Decode = Callable[[Arrays], np.ndarray]


class Codec(ABC):
    """How vectors are stored: with `tokens` of them, those that share scales, in a slot of each array.

    Attributes:
        tokens: a power of two, at most `BLOCK`; 1 where every token has scales of its own.
    """

    tokens: int = 1

    @abstractmethod
    def empty(self, rows: int, heads: int, head_dim: int) -> Arrays:
        """Arrays without a slot. Raises InputError when a vector of `head_dim` cannot be stored like this."""

    @abstractmethod
    def encode(self, x_BKTH: np.ndarray) -> Arrays:
        """The slots for these tokens, the last one partly filled unless `tokens` divides T.

        Raises CacheError at a value that has no code: NaN, infinity, or one beyond the range of the scales.
        """

    @abstractmethod
    def decode(self, arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        """`x_BKTH`, T = slots times `tokens`: what is in a slot that was partly filled comes with something behind it.

        Rounded as the runtime rounds it, whatever `dtype` it is given in.
        """

    @abstractmethod
    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Bytes of so many tokens of one head, scales included."""

    def for_layer(self, layer: int) -> "Codec":
        """The codec of one layer: itself, unless its scales were given for each."""
        return self

    def view(self, arrays: Arrays, tokens: int, head_dim: int, dtype: np.dtype) -> Vectors:
        """What attention reads: the first `tokens` of those that these arrays hold, in `dtype`."""
        rows, heads = arrays[0].shape[:2]
        return View([Coded(self, arrays, 0, tokens)], (rows, heads, tokens, head_dim), dtype)

    def scores(self, q_BKRH: np.ndarray, arrays: Arrays) -> np.ndarray:
        """`q @ decoded.T`, as `scores_BKRT`."""
        return scores_in_blocks(q_BKRH, arrays, lambda part: self.decode(part, q_BKRH.dtype), self.tokens)

    def weighted_sum(self, p_BKRT: np.ndarray, arrays: Arrays) -> np.ndarray:
        """`p @ decoded`, as `y_BKRH`."""
        return sums_in_blocks(p_BKRT, arrays, lambda part: self.decode(part, p_BKRT.dtype), self.tokens)


@dataclass(frozen=True)
class Float(Codec):
    """Vectors as they are, rounded to `dtype`."""

    dtype: np.typing.DTypeLike = np.float32

    def empty(self, rows: int, heads: int, head_dim: int) -> Arrays:
        """One array."""
        return (np.empty((rows, heads, 0, head_dim), self.dtype),)

    def encode(self, x_BKTH: np.ndarray) -> Arrays:
        """The rounded vectors. NaN stays NaN; CacheError where a finite value is beyond a narrow dtype's range."""
        if x_BKTH.dtype == self.dtype:
            return (x_BKTH,)
        with np.errstate(over="ignore"):
            stored = x_BKTH.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise CacheError(f"cache: a key or value is beyond the range of {np.dtype(self.dtype)}, or not finite")
        return (stored,)

    def decode(self, arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        """A view when `dtype` is the stored one, else a cast copy."""
        return arrays[0].astype(dtype, copy=False)

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Bytes of the vectors."""
        return tokens * head_dim * np.dtype(self.dtype).itemsize

    def view(self, arrays: Arrays, tokens: int, head_dim: int, dtype: np.dtype) -> Vectors:
        """The array itself when `dtype` is the stored one."""
        return arrays[0] if arrays[0].dtype == dtype else super().view(arrays, tokens, head_dim, dtype)


def check_finite(x: np.ndarray) -> None:
    """Raises CacheError at NaN and infinity, for which a group of integers with a common scale has no place."""
    if not np.isfinite(x).all():
        raise CacheError("cache: expected finite keys and values to quantise, found NaN or infinity")


def scores_in_blocks(q_XRH: np.ndarray, arrays: Arrays, decoded: Decode, tokens: int = 1) -> np.ndarray:
    """`q @ decoded(arrays).T`, as `scores_XRT`, with a few tokens decoded at a time."""
    scores_XRT = np.empty((*q_XRH.shape[:-1], arrays[0].shape[2] * tokens), q_XRH.dtype)
    start = 0
    for part in _blocks(arrays, tokens):
        stop = start + part[0].shape[2] * tokens
        np.matmul(q_XRH, decoded(part).swapaxes(-1, -2), out=scores_XRT[..., start:stop])
        start = stop
    return scores_XRT


def sums_in_blocks(p_XRT: np.ndarray, arrays: Arrays, decoded: Decode, tokens: int = 1) -> np.ndarray:
    """`p @ decoded(arrays)`, as `y_XRH`, with a few tokens decoded at a time."""
    sums, start = [], 0
    for part in _blocks(arrays, tokens):
        stop = start + part[0].shape[2] * tokens
        sums.append(p_XRT[..., start:stop] @ decoded(part))
        start = stop
    return np.add.reduce(sums)


def _blocks(arrays: Arrays, tokens: int) -> Iterator[Arrays]:
    """Slots of so many tokens that what they decode to, for all rows and heads, stays in the processor's cache."""
    rows, heads, slots = arrays[0].shape[:3]
    each = max(min(TOKENS, VECTORS // (rows * heads)) // tokens, 1)
    for start in range(0, slots, each):
        yield tuple(array[:, :, start : start + each] for array in arrays)
