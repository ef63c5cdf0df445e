"""The key-value cache of grouped-query attention: an argument of the forward pass, never part of a layer.

Two independent values make a kind of cache: a `Scheme` says how vectors are stored, `window` what is kept.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from refengine.config import Config
from refengine.errors import CacheError
from refengine.scheme import FLOAT32, Scheme
from refengine.slots import Slots
from refengine.stores import Store
from refengine.views import Vectors


class Cache(Protocol):
    """Where a forward pass leaves its keys and values, and finds those of earlier passes."""

    def update(
        self, layer: int, k_BKTH: np.ndarray, v_BKTH: np.ndarray, positions_BT: np.ndarray
    ) -> tuple[Vectors, Vectors, np.ndarray]:
        """Adds a layer's new tokens; returns `k_BKSH`, `v_BKSH`, `positions_BS` to attend to, these T included."""


class _NoCache:
    """Keeps nothing: attention sees the tokens of this pass alone."""

    def update(
        self, layer: int, k_BKTH: np.ndarray, v_BKTH: np.ndarray, positions_BT: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The new tokens, as they came."""
        return k_BKTH, v_BKTH, positions_BT


NO_CACHE = _NoCache()


class KVCache:
    """Keys (after rotation) and values of every layer, for a batch of rows, with the position of each slot.

    A slot holds one token of every row; a row that has no token there has position -1. Storage grows by doubling and is
    written in place. Layers of one pass call `update` in any order, each once, with the same positions.

    Args:
        config: layers, KV heads and head size.
        batch_size: number of rows B.
        scheme: how vectors are stored.
        window: drop slots that no row will see again through a sliding window of this size; None keeps everything.

    Raises:
        InputError: the scheme cannot store vectors of this head size.
    """

    def __init__(self, config: Config, batch_size: int, scheme: Scheme = FLOAT32, window: int | None = None):
        self.config = config
        self.scheme = scheme
        self.window = window
        self._has_dropped = False  # then earlier states cannot be restored
        self._awaited: set[int] = set()  # layers that still have to bring the tokens of this pass
        self._newest_BT = np.empty((batch_size, 0), np.int64)  # positions of this pass
        self._there_BT = self._newest_BT >= 0
        self._first_pass = False  # this pass found the cache empty
        self._positions = Slots((np.empty((batch_size, 1, 0), np.int64),))
        shape = batch_size, config.num_key_value_heads, config.head_dim
        self._keys = [scheme.keys.store(layer, *shape) for layer in range(config.num_hidden_layers)]
        self._values = [scheme.values.store(layer, *shape) for layer in range(config.num_hidden_layers)]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self._positions.rows

    @property
    def length(self) -> int:
        """Slots held, the same for every row (padding counts)."""
        return len(self._positions)

    @property
    def positions_BS(self) -> np.ndarray:
        """The position in each held slot; -1 where a row has no token there."""
        return self._positions.held[0][:, 0]

    @property
    def nbytes(self) -> int:
        """Bytes of the held keys and values as they are stored, scales included; spare capacity is not counted."""
        return sum(store.nbytes for store in self._keys + self._values)

    def update(
        self, layer: int, k_BKTH: np.ndarray, v_BKTH: np.ndarray, positions_BT: np.ndarray
    ) -> tuple[Vectors, Vectors, np.ndarray]:
        """Adds one layer's new tokens and returns all that layer holds, in slot order.

        Returns:
            `k_BKSH` and `v_BKSH` in the dtype of the new ones, and `positions_BS`; views of the cache where possible,
            valid until the next pass.

        Raises:
            CacheError: rows or heads do not fit, a layer comes twice in one pass, or a value that the scheme has no
                code for.
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
        positions_BS = self.positions_BS
        k_BKSH = self._add(self._keys[layer], k_BKTH)
        v_BKSH = self._add(self._values[layer], v_BKTH)
        self._awaited.remove(layer)
        if not self._awaited:
            self._drop_unseen()
        return k_BKSH, v_BKSH, positions_BS

    def _add(self, store: Store, x_BKTH: np.ndarray) -> Vectors:
        """Stores new vectors; returns what attention reads."""
        store.append(x_BKTH, self._there_BT)
        x_BKSH = store.read(x_BKTH.dtype)
        if self._first_pass and self.scheme.first_pass_raw:
            raw_B = self._there_BT.sum(axis=1) >= self.scheme.first_pass_raw
            x_BKSH = x_BKTH if raw_B.all() else np.where(raw_B[:, None, None, None], x_BKTH, x_BKSH)
        store.settle()
        return x_BKSH

    def read(self, layer: int, dtype: np.typing.DTypeLike) -> tuple[np.ndarray, np.ndarray]:
        """`k_BKSH` and `v_BKSH` that one layer holds, in `dtype`, in the order of `positions_BS`; nothing is added."""
        stores = self._keys[layer], self._values[layer]
        k_BKSH, v_BKSH = (np.asarray(store.read(np.dtype(dtype))) for store in stores)
        return k_BKSH, v_BKSH

    def crop(self, length: int) -> None:
        """Forgets the newest slots so that `length` are left.

        Raises CacheError when a window has dropped older ones.
        """
        self._check_whole()
        if not 0 <= length <= self.length or (self._has_dropped and length < self.length):
            why = "its window has dropped the tokens before" if self._has_dropped else f"it holds {self.length}"
            raise CacheError(f"cache: cannot crop to {length} tokens: {why}")
        self._positions.crop(length)
        for store in self._keys + self._values:
            store.crop(length)

    def select(self, rows: Sequence[int] | np.ndarray) -> "KVCache":
        """A cache of these rows, in this order (a row may come twice); slots that none of them uses are left out."""
        rows_R = np.asarray(rows, dtype=np.intp)
        if rows_R.ndim != 1 or (rows_R.size and not (rows_R.min() >= 0 and rows_R.max() < self.batch_size)):
            raise CacheError(f"cache: expected rows from 0 to {self.batch_size - 1}, found {rows_R.tolist()}")
        return self._taken(rows_R, np.flatnonzero((self.positions_BS[rows_R] >= 0).any(axis=0)))

    def merge(self, other: "KVCache") -> "KVCache":
        """A cache with the rows of both, this one's first; the shorter one is padded in front with empty slots."""
        if (self.scheme, self.window, self.config) != (other.scheme, other.window, other.config):
            raise CacheError("cache: expected caches of one model, scheme and window to merge, found two kinds")
        length = max(self.length, other.length)
        mine, theirs = (
            cache._taken(np.arange(cache.batch_size), np.arange(cache.length), before=length - cache.length)
            for cache in (self, other)
        )
        mine._positions = mine._positions.stacked(theirs._positions)
        mine._keys = [one.stacked(two) for one, two in zip(mine._keys, theirs._keys, strict=True)]
        mine._values = [one.stacked(two) for one, two in zip(mine._values, theirs._values, strict=True)]
        mine._has_dropped |= theirs._has_dropped
        return mine

    def _check_whole(self) -> None:
        if self._awaited:
            raise CacheError(
                f"cache: a pass was broken off before layers {sorted(self._awaited)} came; it cannot be used"
            )

    def _begin(self, positions_BT: np.ndarray) -> None:
        """Notes the positions of the new tokens, for every layer."""
        if positions_BT.shape[0] != self.batch_size:
            raise CacheError(f"cache: expected {self.batch_size} rows, found {positions_BT.shape[0]}")
        self._first_pass = not self.length
        self._positions.append((positions_BT[:, None],))
        self._newest_BT, self._there_BT = positions_BT, positions_BT >= 0
        self._awaited = set(range(self.config.num_hidden_layers))

    def _drop_unseen(self) -> None:
        """After a pass: forgets leading slots that no later token can see."""
        if self.window is None:
            return
        # The next token is at least one further on, and sees ages below the window.
        oldest_seen_B = self.positions_BS.max(axis=1) + 2 - self.window
        still_seen_BS = (self.positions_BS >= 0) & (self.positions_BS >= oldest_seen_B[:, None])
        dropped = int(np.argmax(np.append(still_seen_BS.any(axis=0), True)))
        if dropped:
            self._has_dropped = True
            self._positions.drop(dropped)
            for store in self._keys + self._values:
                store.drop(dropped)

    def _taken(self, rows_R: np.ndarray, slots_S: np.ndarray, before: int = 0) -> "KVCache":
        """These rows and slots in a cache of their own, behind `before` empty slots."""
        self._check_whole()
        taken = KVCache(self.config, 0, self.scheme, self.window)
        taken._has_dropped = self._has_dropped
        positions_B1S = np.full((len(rows_R), 1, before + len(slots_S)), -1)
        positions_B1S[:, 0, before:] = self.positions_BS[np.ix_(rows_R, slots_S)]
        taken._positions = Slots((positions_B1S,))
        taken._keys = [store.taken(rows_R, slots_S, before) for store in self._keys]
        taken._values = [store.taken(rows_R, slots_S, before) for store in self._values]
        return taken
