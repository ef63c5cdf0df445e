"""The key-value cache of grouped-query attention: an argument of the forward pass, never part of a layer.

Two independent values make a kind of cache: a `Scheme` says how vectors are stored, `window` what is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from refengine.config import Config
from refengine.errors import CacheError

Stored = tuple[np.ndarray, ...]  # the arrays of one layer's keys or values: rows on axis 0, slots on axis 2


class Cache(Protocol):
    """Where a forward pass leaves its keys and values, and finds those of earlier passes."""

    def update(
        self, layer: int, k_BKTH: np.ndarray, v_BKTH: np.ndarray, positions_BT: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Adds a layer's new tokens; returns `k_BKSH`, `v_BKSH`, `positions_BS` to attend to, these T included."""


class _NoCache:
    """Keeps nothing: attention sees the tokens of this pass alone."""

    def update(
        self, layer: int, k_BKTH: np.ndarray, v_BKTH: np.ndarray, positions_BT: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The new tokens, as they came."""
        return k_BKTH, v_BKTH, positions_BT


NO_CACHE = _NoCache()


class Scheme(Protocol):
    """How the vectors of keys or values are stored."""

    def allocate(self, shape_BKSH: tuple[int, int, int, int]) -> Stored:
        """Uninitialised arrays for so many slots; each has rows on axis 0 and slots on axis 2."""

    def write(self, stored: Stored, slots: slice, x_BKTH: np.ndarray) -> None:
        """Stores vectors in place."""

    def read(self, stored: Stored, slots: slice, dtype: np.dtype) -> np.ndarray:
        """`x_BKSH` in `dtype`: a view where that is how it is stored."""


@dataclass(frozen=True)
class Float:
    """Vectors stored as they are, rounded to `dtype`: float32, float64, float16 or bfloat16."""

    dtype: np.typing.DTypeLike = np.float32

    def allocate(self, shape_BKSH: tuple[int, int, int, int]) -> Stored:
        """One array of the shape asked for."""
        return (np.empty(shape_BKSH, self.dtype),)

    def write(self, stored: Stored, slots: slice, x_BKTH: np.ndarray) -> None:
        """Rounds to the stored dtype."""
        stored[0][:, :, slots] = x_BKTH

    def read(self, stored: Stored, slots: slice, dtype: np.dtype) -> np.ndarray:
        """A view when `dtype` is the stored one, else a cast copy."""
        return stored[0][:, :, slots].astype(dtype, copy=False)


FLOAT32 = Float(np.float32)


class KVCache:
    """Keys (after rotation) and values of every layer, for a batch of rows, with the position of each slot.

    A slot holds one token of every row; a row that has no token there has position -1. Storage grows by doubling and is
    written in place. Layers of one pass call `update` in any order, each once, with the same positions.

    Args:
        config: layers, KV heads and head size.
        batch_size: number of rows B.
        scheme: how vectors are stored.
        window: drop slots that no row will see again through a sliding window of this size; None keeps everything.
    """

    def __init__(self, config: Config, batch_size: int, scheme: Scheme = FLOAT32, window: int | None = None):
        self.config = config
        self.scheme = scheme
        self.window = window
        self._start = self._end = 0  # the slots in use; those before _start are dropped
        self._has_dropped = False  # then earlier states cannot be restored
        self._awaited: set[int] = set()  # layers that still have to bring the tokens of this pass
        self._newest_BT = np.empty((batch_size, 0), np.int64)  # positions of this pass
        self._positions_BC = np.empty((batch_size, 0), np.int64)
        self._keys = [self._allocate(0) for _ in range(config.num_hidden_layers)]
        self._values = [self._allocate(0) for _ in range(config.num_hidden_layers)]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self._positions_BC.shape[0]

    @property
    def length(self) -> int:
        """Slots held, the same for every row (padding counts)."""
        return self._end - self._start

    @property
    def positions_BS(self) -> np.ndarray:
        """The position in each held slot; -1 where a row has no token there."""
        return self._positions_BC[:, self._start : self._end]

    @property
    def nbytes(self) -> int:
        """Bytes of the held keys and values as they are stored, scales included; spare capacity is not counted."""
        held = slice(self._start, self._end)
        return sum(array[:, :, held].nbytes for stored in self._keys + self._values for array in stored)

    def update(
        self, layer: int, k_BKTH: np.ndarray, v_BKTH: np.ndarray, positions_BT: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Adds one layer's new tokens and returns all that layer holds, in slot order.

        Returns:
            `k_BKSH` and `v_BKSH` in the dtype of the new ones, and `positions_BS`; views of the cache where possible,
            valid until the next pass.

        Raises:
            CacheError: rows or heads do not fit, or a layer comes twice in one pass.
        """
        expected = (
            self.batch_size,
            self.config.num_key_value_heads,
            positions_BT.shape[1],
            self.config.head_dim,
        )
        if k_BKTH.shape != expected or v_BKTH.shape != expected:
            raise CacheError(
                f"cache: expected keys and values of shape {expected} (rows, KV heads, tokens, head_dim), found "
                f"{k_BKTH.shape} and {v_BKTH.shape}"
            )
        if not 0 <= layer < self.config.num_hidden_layers:
            raise CacheError(f"cache: expected layers 0 to {self.config.num_hidden_layers - 1}, found layer {layer}")
        if not self._awaited:
            self._begin(positions_BT)
        elif layer not in self._awaited:
            raise CacheError(f"cache: layer {layer} came twice before layers {sorted(self._awaited)} came once")
        elif positions_BT is not self._newest_BT and not np.array_equal(positions_BT, self._newest_BT):
            raise CacheError(f"cache: layer {layer} brings other positions than the layers before it in this pass")
        new, held = slice(self._end - positions_BT.shape[1], self._end), slice(self._start, self._end)
        positions_BS = self.positions_BS
        self.scheme.write(self._keys[layer], new, k_BKTH)
        self.scheme.write(self._values[layer], new, v_BKTH)
        k_BKSH = self.scheme.read(self._keys[layer], held, k_BKTH.dtype)
        v_BKSH = self.scheme.read(self._values[layer], held, v_BKTH.dtype)
        self._awaited.remove(layer)
        if not self._awaited:
            self._drop_unseen()
        return k_BKSH, v_BKSH, positions_BS

    def read(self, layer: int, dtype: np.typing.DTypeLike) -> tuple[np.ndarray, np.ndarray]:
        """`k_BKSH` and `v_BKSH` that one layer holds, in `dtype`, in the order of `positions_BS`; nothing is added."""
        held = slice(self._start, self._end)
        k_BKSH = self.scheme.read(self._keys[layer], held, np.dtype(dtype))
        return k_BKSH, self.scheme.read(self._values[layer], held, np.dtype(dtype))

    def crop(self, length: int) -> None:
        """Forgets the newest slots so that `length` are left.

        Raises CacheError when a window has dropped older ones.
        """
        self._check_whole()
        if not 0 <= length <= self.length or (self._has_dropped and length < self.length):
            why = "its window has dropped the tokens before" if self._has_dropped else f"it holds {self.length}"
            raise CacheError(f"cache: cannot crop to {length} tokens: {why}")
        self._end = self._start + length

    def select(self, rows: Sequence[int] | np.ndarray) -> "KVCache":
        """A cache of these rows, in this order (a row may come twice); slots that none of them uses are left out."""
        rows_R = np.asarray(rows, dtype=np.intp)
        if rows_R.ndim != 1 or (rows_R.size and not (rows_R.min() >= 0 and rows_R.max() < self.batch_size)):
            raise CacheError(f"cache: expected rows from 0 to {self.batch_size - 1}, found {rows_R.tolist()}")
        used = self._start + np.flatnonzero((self.positions_BS[rows_R] >= 0).any(axis=0))
        return self._copied(rows_R, used, before=0)

    def merge(self, other: "KVCache") -> "KVCache":
        """A cache with the rows of both, this one's first; the shorter one is padded in front with empty slots."""
        if (self.scheme, self.window, self.config) != (other.scheme, other.window, other.config):
            raise CacheError("cache: expected caches of one model, scheme and window to merge, found two kinds")
        length = max(self.length, other.length)
        mine, theirs = (
            cache._copied(
                np.arange(cache.batch_size), np.arange(cache._start, cache._end), before=length - cache.length
            )
            for cache in (self, other)
        )
        mine._positions_BC = np.concatenate([mine._positions_BC, theirs._positions_BC])
        mine._keys = [_stack(a, b) for a, b in zip(mine._keys, theirs._keys, strict=True)]
        mine._values = [_stack(a, b) for a, b in zip(mine._values, theirs._values, strict=True)]
        mine._has_dropped |= theirs._has_dropped
        return mine

    def _check_whole(self) -> None:
        if self._awaited:
            raise CacheError(
                f"cache: a pass was broken off before layers {sorted(self._awaited)} came; it cannot be used"
            )

    def _allocate(self, capacity: int) -> Stored:
        return self.scheme.allocate((self.batch_size, self.config.num_key_value_heads, capacity, self.config.head_dim))

    def _begin(self, positions_BT: np.ndarray) -> None:
        """Makes room for the new tokens of every layer, and notes their positions."""
        if positions_BT.shape[0] != self.batch_size:
            raise CacheError(f"cache: expected {self.batch_size} rows, found {positions_BT.shape[0]}")
        self._make_room(positions_BT.shape[1])
        self._positions_BC[:, self._end : self._end + positions_BT.shape[1]] = positions_BT
        self._end += positions_BT.shape[1]
        self._newest_BT = positions_BT
        self._awaited = set(range(self.config.num_hidden_layers))

    def _make_room(self, tokens: int) -> None:
        if self._end + tokens <= self._positions_BC.shape[1]:
            return
        # A window moves on through its buffer: twice its size makes the move to the front rare.
        wanted = self.length + tokens if self.window is None else 2 * (self.length + tokens)
        self._move_to(_power_of_two(wanted))

    def _move_to(self, capacity: int) -> None:
        """Moves what is held to the front of new arrays of `capacity` slots."""
        moved = self._copied(np.arange(self.batch_size), np.arange(self._start, self._end), before=0, capacity=capacity)
        self._positions_BC, self._keys, self._values = moved._positions_BC, moved._keys, moved._values
        self._start, self._end = moved._start, moved._end

    def _drop_unseen(self) -> None:
        """After a pass: forgets leading slots that no later token can see, and gives back memory they needed."""
        if self.window is None:
            return
        # The next token is at least one further on, and sees ages below the window.
        oldest_seen_B = self.positions_BS.max(axis=1) + 2 - self.window
        still_seen_BS = (self.positions_BS >= 0) & (self.positions_BS >= oldest_seen_B[:, None])
        dropped = int(np.argmax(np.append(still_seen_BS.any(axis=0), True)))
        self._start += dropped
        self._has_dropped |= dropped > 0
        if self._positions_BC.shape[1] > 8 * max(self.length, 1):
            self._move_to(_power_of_two(2 * self.length))

    def _copied(self, rows_R: np.ndarray, slots_S: np.ndarray, before: int, capacity: int = 0) -> "KVCache":
        """These rows and slots in a cache of their own, behind `before` empty slots."""
        self._check_whole()
        copy = KVCache(self.config, len(rows_R), self.scheme, self.window)
        copy._end, copy._has_dropped = before + len(slots_S), self._has_dropped
        capacity = max(capacity, copy._end)
        copy._positions_BC = np.full((len(rows_R), capacity), -1, np.int64)
        copy._positions_BC[:, before : copy._end] = self._positions_BC[np.ix_(rows_R, slots_S)]
        copy._keys = [copy._taken(stored, rows_R, slots_S, before, capacity) for stored in self._keys]
        copy._values = [copy._taken(stored, rows_R, slots_S, before, capacity) for stored in self._values]
        return copy

    def _taken(self, stored: Stored, rows_R: np.ndarray, slots_S: np.ndarray, before: int, capacity: int) -> Stored:
        taken = self._allocate(capacity)
        for into, source in zip(taken, stored, strict=True):
            into[:, :, :before] = 0  # a masked value is multiplied by zero, so it has to be finite
            into[:, :, before : before + len(slots_S)] = source[rows_R[:, None], :, slots_S[None, :]].swapaxes(1, 2)
        return taken


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()


def _stack(first: Stored, second: Stored) -> Stored:
    return tuple(np.concatenate(pair) for pair in zip(first, second, strict=True))
