"""What a candidate's coded cache holds, given to the reference as its tokens are.

A code is a choice, as a token is. Where a value lies on the border between two codes, honest arithmetic takes either;
every later pass reads it, and is off by a whole step of the cache, thousands of times what rounding costs. So the
reference moves what it brings to its cache towards what the candidate holds, by no more than honest noise, before it
codes it: on a border it takes the candidate's side, and everywhere else its own code. What it then reads of the code it
moves as far again, since a scale, too, follows what was brought. The noise is measured where all orders read the same
cache, so that no code of theirs differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from refengine import ops as reference_ops
from refengine.codecs.affine import Affine
from refengine.codecs.codec import Codec
from refengine.codecs.packing import pack_nibbles
from refengine.histories import AT_ONCE
from refengine.ops import Ops
from refengine.scheme import Scheme
from refengine.views import Vectors

NIBBLE = 4  # bits


def can_be_given(scheme: Scheme, held: Mapping[str, np.ndarray]) -> bool:
    """Whether what a cache holds at its end tells what every pass has read.

    Not where later tokens change what earlier ones became, nor where it is bare codes of another scheme.
    """
    for name, side in (("k", scheme.keys), ("v", scheme.values)):
        codec = side.codec
        shows_codes = any(x.dtype == np.uint8 for point, x in held.items() if point.endswith(f"{name}_cache"))
        if side.flow != AT_ONCE or codec.tokens > 1:
            return False
        if shows_codes and not (isinstance(codec, Affine) and codec.bits == NIBBLE):
            return False
    return bool(held)


def is_whole(caches: Mapping[str, Sequence[np.ndarray]], lengths: Sequence[int]) -> bool:
    """Whether caches hold as many positions of each row as were fed, and nothing but finite values."""
    return all(
        [len(row) for row in rows] == list(lengths) and all(np.isfinite(row).all() for row in rows)
        for rows in caches.values()
    )


@dataclass(frozen=True)
class Given:
    """What a cache held.

    Attributes:
        held: trace point -> keys or values that attention read, or codes of 4 bits (uint8) as OpenVINO shows them, at
            every position of every row (P of them, row after row), heads flattened.
        starts_B: where each row's positions begin among all.
        noise: trace point -> how far, at each position, what comes may be moved towards that before it is coded, and
            what is read of the code after it; None: what is held is read, or where that is codes, these with the scales
            of what comes.
    """

    held: Mapping[str, np.ndarray]
    starts_B: np.ndarray
    noise: Mapping[str, np.ndarray] | None = None

    def of_rows(self, rows: Sequence[int]) -> "Given":
        """For a batch of some rows."""
        return replace(self, starts_B=self.starts_B[list(rows)])

    def towards(self, point: str, x_BKSH: np.ndarray, positions_BS: np.ndarray) -> np.ndarray:
        """Keys or values, moved as far as noise allows towards those that were held."""
        if self.noise is None:
            return x_BKSH
        place_BS, there_BS = self.starts_B[:, None] + np.maximum(positions_BS, 0), positions_BS >= 0
        B, K, S, H = x_BKSH.shape
        held_BKSH = self.held[point][place_BS].reshape(B, S, K, H).swapaxes(1, 2)
        noise_BKSH = np.broadcast_to((self.noise[point][place_BS] * there_BS)[:, None, :, None], x_BKSH.shape)
        return _moved(x_BKSH, held_BKSH, noise_BKSH).astype(x_BKSH.dtype)


@dataclass
class GivenCache:
    """A cache that keeps to what another held after the same tokens.

    Attributes:
        scheme: how it stores what comes; one of those that `can_be_given`.
        given: what the other held.
        positions_BS: of what has come so far.
        brought: by trace point, keys or values as they came, `_PKH`.
        read: by trace point, what attention reads of them, `_PKH`.
    """

    scheme: Scheme
    given: Given
    positions_BS: np.ndarray
    brought: dict[str, np.ndarray] = field(default_factory=dict)
    read: dict[str, np.ndarray] = field(default_factory=dict)

    def update(
        self, layer: int, k_BKTH: np.ndarray, v_BKTH: np.ndarray, positions_BT: np.ndarray
    ) -> tuple[Vectors, Vectors, np.ndarray]:
        """As `KVCache.update`, of layers that come in their order. A first pass may read what came."""
        if layer == 0:
            self.positions_BS = np.concatenate([self.positions_BS, positions_BT], axis=1)
        scheme, is_first = self.scheme, self.positions_BS.shape == positions_BT.shape
        raw_from = scheme.first_pass_raw if scheme.first_pass_raw and is_first else np.inf
        raw_B111 = (np.count_nonzero(positions_BT >= 0, axis=1) >= raw_from)[:, None, None, None]
        place_BS = self.given.starts_B[:, None] + np.maximum(self.positions_BS, 0)
        read = []
        for name, side, x_BKTH in (("k", scheme.keys, k_BKTH), ("v", scheme.values, v_BKTH)):
            point = f"layers.{layer}.self_attn.{name}_cache"
            self._store(point, side.codec.for_layer(layer), x_BKTH, positions_BT)
            read_BKSH = self.read[point][place_BS].swapaxes(1, 2)
            read.append(np.where(raw_B111, x_BKTH, read_BKSH) if raw_B111.any() else read_BKSH)
        return read[0], read[1], self.positions_BS

    def _store(self, point: str, codec: Codec, x_BKTH: np.ndarray, positions_BT: np.ndarray) -> None:
        """Notes what came to a point, and what is read of it."""
        held_PX, (_, K, _, H), there_BT = self.given.held[point], x_BKTH.shape, positions_BT >= 0
        shape, place_R = (len(held_PX), K, H), (self.given.starts_B[:, None] + positions_BT)[there_BT]
        x_RKH = x_BKTH.swapaxes(1, 2)[there_BT]
        held_RKH = _as_values(codec, held_PX.reshape(shape)[place_R], x_RKH)
        if self.given.noise is not None:
            noise_R11 = self.given.noise[point][place_R, None, None]
            own_RKH = _coded(codec, _moved(x_RKH, held_RKH, noise_R11))
            held_RKH = _moved(own_RKH, held_RKH, noise_R11)
        for noted, x in ((self.brought, x_RKH), (self.read, held_RKH)):
            noted.setdefault(point, np.zeros(shape, x_BKTH.dtype))[place_R] = x


def _moved(x: np.ndarray, towards: np.ndarray, at_most: np.ndarray) -> np.ndarray:
    return x + np.clip(towards - x, -at_most, at_most)


def _as_values(codec: Codec, held_PKH: np.ndarray, brought_PKH: np.ndarray) -> np.ndarray:
    """What is given; of codes, what they stand for with the scales of what was brought."""
    if held_PKH.dtype != np.uint8:
        return held_PKH
    _, *params = codec.encode(brought_PKH.swapaxes(0, 1)[None])
    # The low half of a byte comes first, whatever the codec has there.
    packed = pack_nibbles(held_PKH.swapaxes(0, 1)[None])
    return codec.decode((packed, *params), brought_PKH.dtype)[0].swapaxes(0, 1)


def _coded(codec: Codec, x_PKH: np.ndarray) -> np.ndarray:
    """What vectors are after they were codes."""
    return codec.decode(codec.encode(x_PKH.swapaxes(0, 1)[None]), x_PKH.dtype)[0].swapaxes(0, 1)


def plainest_of_codes(scheme: Scheme, plainest: Ops) -> Ops:
    """The least exact attention to a cache of codes, with the least exact sums.

    Source: openvinotoolkit/openvino, src/plugins/intel_cpu/src/nodes/kernels/scaled_attn/mha_single_token.cpp at
    122ad96, which does so where a processor has AVX2 and no AVX-512.
    """
    codec = scheme.keys.codec
    if not isinstance(codec, Affine) or codec.zero == "none":
        return plainest
    return replace(plainest, attend=partial(reference_ops.attend, scores=_scores_of_codes))


def _scores_of_codes(q_BTNH: np.ndarray, k_BKSH: np.ndarray) -> np.ndarray:
    """`refengine.ops.scores`, the products taken with codes, which are not negative, and the zero point after them."""
    lowest_BKSH = np.broadcast_to(k_BKSH.min(axis=-1, keepdims=True), k_BKSH.shape)
    return reference_ops.scores(q_BTNH, k_BKSH - lowest_BKSH) + reference_ops.scores(q_BTNH, lowest_BKSH)
