"""A way of storing a key-value cache, as data: for keys and for values a codec, and when tokens go through it."""

from dataclasses import dataclass

import numpy as np

from refengine.codecs.codec import Codec, Float
from refengine.config import Config
from refengine.histories import AT_ONCE, Flow, History, HistoryStore
from refengine.slots import Slots
from refengine.stores import Store, TokenStore


@dataclass(frozen=True)
class Storage:
    """How keys, or values, are stored: what codes they become, and when."""

    codec: Codec
    flow: Flow = AT_ONCE

    def store(self, layer: int, rows: int, heads: int, head_dim: int) -> Store:
        """An empty store for one layer. Raises InputError when vectors of `head_dim` cannot be stored like this."""
        codec = self.codec.for_layer(layer)
        if codec.tokens == 1 and self.flow == AT_ONCE:
            return TokenStore(codec, head_dim, Slots(codec.empty(rows, heads, head_dim)))
        none_1KTH = np.empty((1, heads, 0, head_dim), np.float32)
        histories = [
            History(codec, self.flow, none_1KTH, Slots(codec.empty(1, heads, head_dim)), none_1KTH) for _ in range(rows)
        ]
        return HistoryStore(histories, Slots((np.empty((rows, 1, 0), np.bool_),)))

    def nbytes(self, tokens: int, heads: int, head_dim: int, dtype: np.typing.DTypeLike = np.float32) -> int:
        """Bytes of one layer and row: codes with their scales, and in `dtype` what is kept as it came."""
        coded = self.flow.coded(tokens)
        as_they_came = (tokens - coded) * head_dim * np.dtype(dtype).itemsize
        return heads * (self.codec.nbytes(coded, head_dim) + as_they_came)


@dataclass(frozen=True)
class Scheme:
    """How a cache stores keys and values.

    Attributes:
        first_pass_raw: a row with at least so many tokens in a pass that finds the cache empty attends to keys and
            values as they came; else what is stored is attended to, a pass's own tokens too. 0: no row does.
    """

    keys: Storage
    values: Storage
    first_pass_raw: int = 0

    @property
    def groups_tokens(self) -> bool:
        """Whether what becomes of a token depends on its neighbours in time."""
        return self.keys.codec.tokens > 1 or self.values.codec.tokens > 1


def stored_as(dtype: np.typing.DTypeLike) -> Scheme:
    """Vectors as they are, rounded to a float dtype."""
    return both(Float(dtype))


def both(codec: Codec, first_pass_raw: int = 0) -> Scheme:
    """Keys and values alike, coded at once."""
    return Scheme(Storage(codec), Storage(codec), first_pass_raw)


FLOAT32 = stored_as(np.float32)


def check_scheme(config: Config, scheme: Scheme) -> None:
    """Raises InputError when a scheme cannot store the heads of this model."""
    for side in (scheme.keys, scheme.values):
        side.store(0, 1, config.num_key_value_heads, config.head_dim)
