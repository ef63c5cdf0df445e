"""Codes with a scale, and most often a zero point, for each group of neighbouring values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from refengine.codecs.codec import BLOCK, Codec, check_finite, scores_in_blocks, sums_in_blocks
from refengine.codecs.packing import pack_nibbles, pack_quarters, unpack_nibbles, unpack_quarters
from refengine.errors import InputError
from refengine.slots import Arrays

Fit = Callable[[np.ndarray, int], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Affine(Codec):
    """Codes of `bits` bits, with a scale and a zero for each group of values; 4-bit codes are packed two a byte, 2-bit
    codes four a byte.

    A group is `group_size` neighbours along head_dim of one token and head, or where `tokens` is more than 1, so many
    consecutive tokens of one channel ("by channel").

    Attributes:
        fit: float32 `x_XG` and the largest code -> codes_XG, scale_X and, unless `zero` is "none", zero_X; the last two
            rounded to `params`.
        bits: 2, 4 or 8.
        group_size: None is the whole of head_dim.
        tokens: as `Codec.tokens`.
        zero: "point": x = (code - zero) * scale; "offset": x = code * scale + zero; "none": x = code * scale, with
            signed codes.
        params: dtype of scales and zeros.
        high_first: in a byte, the even code has the high half.
    """

    fit: Fit
    bits: int
    group_size: int | None = None
    tokens: int = 1
    zero: Literal["point", "offset", "none"] = "point"
    params: np.typing.DTypeLike = np.float32
    high_first: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise InputError(f"KV cache: expected codes of 2, 4 or 8 bits, found {self.bits}")
        if self.tokens < 1 or BLOCK % self.tokens:
            raise InputError(f"KV cache: expected groups of 1, 2, 4, ... or {BLOCK} tokens, found {self.tokens}")

    def empty(self, rows: int, heads: int, head_dim: int) -> Arrays:
        """Codes, scales, and zeros if there are any."""
        group = self.group_size or head_dim
        if group < 1 or head_dim % group:
            raise InputError(f"KV cache: expected a group size that divides head_dim {head_dim}, found {group}")
        if self.bits == 4 and head_dim % 2:
            raise InputError(f"KV cache: expected an even head_dim to pack 4-bit codes two a byte, found {head_dim}")
        if self.bits == 2 and head_dim % 4:
            raise InputError(f"KV cache: expected a multiple of 4 as head_dim to pack 2-bit codes, found {head_dim}")
        one_slot = self.encode(np.zeros((rows, heads, self.tokens, head_dim), np.float32))
        return tuple(array[:, :, :0] for array in one_slot)

    def encode(self, x_BKTH: np.ndarray) -> Arrays:
        """Codes, scales, and zeros if there are any."""
        check_finite(x_BKTH)
        x_BKTH = x_BKTH.astype(np.float32, copy=False)
        if self.tokens == 1:
            group = self.group_size or x_BKTH.shape[3]
            groups = x_BKTH.reshape(*x_BKTH.shape[:3], x_BKTH.shape[3] // group, group)
            codes, *params = self.fit(groups, 2**self.bits - 1)
            return (self._stored(codes.reshape(x_BKTH.shape)), *params)
        whole = x_BKTH.shape[2] // self.tokens * self.tokens
        parts = [self._by_channel(x_BKTH[:, :, :whole], self.tokens)] if whole else []
        if whole < x_BKTH.shape[2]:
            parts.append(self._by_channel(x_BKTH[:, :, whole:], x_BKTH.shape[2] - whole))
        return tuple(np.concatenate(arrays, axis=2) for arrays in zip(*parts, strict=True))

    def _by_channel(self, x_BKTH: np.ndarray, tokens: int) -> Arrays:
        """Groups of so many tokens, each in a slot that has room for `self.tokens`."""
        B, K, _, H = x_BKTH.shape
        x_BKMTH = x_BKTH.reshape(B, K, x_BKTH.shape[2] // tokens, tokens, H)
        codes_BKMHT, *params = self.fit(np.ascontiguousarray(x_BKMTH.swapaxes(-1, -2)), 2**self.bits - 1)
        codes_BKMTH = np.zeros((*x_BKMTH.shape[:3], self.tokens, H), codes_BKMHT.dtype)
        codes_BKMTH[..., :tokens, :] = codes_BKMHT.swapaxes(-1, -2)
        return (self._stored(codes_BKMTH), *params)

    def decode(self, arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        """In float32 arithmetic: zero point subtracted, then scaled; or scaled, then moved."""
        codes, *params = self.codes(arrays[0], np.dtype(np.float32)), *arrays[1:]
        B, K, M = codes.shape[:3]
        grouped = codes if self.tokens > 1 else codes.reshape(B, K, M, params[0].shape[3], -1)
        axis = -2 if self.tokens > 1 else -1
        scale, *zero = (np.expand_dims(array.astype(np.float32, copy=False), axis) for array in params)
        if self.zero == "point":
            grouped -= zero[0]
        grouped *= scale
        if self.zero == "offset":
            grouped += zero[0]
        return grouped.reshape(B, K, M * self.tokens, codes.shape[-1]).astype(dtype, copy=False)

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Codes, and the scales and zeros of every group that is begun."""
        groups = head_dim // (self.group_size or head_dim) * tokens
        if self.tokens > 1:
            groups = head_dim * -(-tokens // self.tokens)
        each = np.dtype(self.params).itemsize * (1 if self.zero == "none" else 2)
        return tokens * head_dim * self.bits // 8 + groups * each

    def scores(self, q_BKRH: np.ndarray, arrays: Arrays) -> np.ndarray:
        """The products with the codes; scale and zero are then applied to the scores, which are fewer."""
        if self.tokens > 1:
            return super().scores(q_BKRH, arrays)
        scale_BKJ1T, zero_BKJ1T = self._params(arrays, q_BKRH.dtype)
        B, K, R, _ = q_BKRH.shape
        q_BKJRG = q_BKRH.reshape(B, K, R, scale_BKJ1T.shape[2], -1).swapaxes(2, 3)
        scores_BKJRT = scores_in_blocks(q_BKJRG, arrays, lambda part: self._grouped(part, q_BKRH.dtype))
        sums_BKJR1 = q_BKJRG.sum(axis=-1, keepdims=True)
        if self.zero == "point":
            scores_BKJRT -= sums_BKJR1 * zero_BKJ1T
        scores_BKJRT *= scale_BKJ1T
        if self.zero == "offset":
            scores_BKJRT += sums_BKJR1 * zero_BKJ1T
        return scores_BKJRT.sum(axis=2) if scores_BKJRT.shape[2] > 1 else scores_BKJRT[:, :, 0]

    def weighted_sum(self, p_BKRT: np.ndarray, arrays: Arrays) -> np.ndarray:
        """The weights are scaled in place of the values."""
        if self.tokens > 1:
            return super().weighted_sum(p_BKRT, arrays)
        scale_BKJ1T, zero_BKJ1T = self._params(arrays, p_BKRT.dtype)
        p_BKJRT = p_BKRT[:, :, None]
        scaled_BKJRT = p_BKJRT * scale_BKJ1T
        y_BKJRG = sums_in_blocks(scaled_BKJRT, arrays, lambda part: self._grouped(part, p_BKRT.dtype))
        if self.zero == "point":
            y_BKJRG -= np.vecdot(scaled_BKJRT, zero_BKJ1T)[..., None]
        if self.zero == "offset":
            y_BKJRG += np.vecdot(p_BKJRT, zero_BKJ1T)[..., None]
        return y_BKJRG.swapaxes(2, 3).reshape(*p_BKRT.shape[:3], -1)

    def _params(self, arrays: Arrays, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zeros, `BKJ1T`: the groups of head_dim in front of the tokens."""
        scale_BKJ1T, *zero = (array.swapaxes(-1, -2)[..., None, :].astype(dtype, order="C") for array in arrays[1:])
        return scale_BKJ1T, zero[0] if zero else scale_BKJ1T  # where there is no zero, none is read

    def _grouped(self, arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        """Codes, `BKJTG`."""
        codes_BKTH = self.codes(arrays[0], dtype)
        if arrays[1].shape[3] == 1:
            return codes_BKTH[:, :, None]
        codes_BKTJG = codes_BKTH.reshape(*codes_BKTH.shape[:3], arrays[1].shape[3], -1)
        return codes_BKTJG.swapaxes(2, 3)

    def codes(self, stored: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The codes as numbers, in a float dtype."""
        if self.bits == 8:
            return stored.astype(dtype)
        codes = self._unpacked(stored).astype(dtype)
        if self.zero == "none":
            codes -= 2 ** (self.bits - 1)
        return codes

    def _stored(self, codes: np.ndarray) -> np.ndarray:
        if self.bits == 8:
            return codes.astype(np.int8 if self.zero == "none" else np.uint8)
        return self._packed(codes + 2 ** (self.bits - 1) if self.zero == "none" else codes)

    def _packed(self, codes: np.ndarray) -> np.ndarray:
        return pack_quarters(codes) if self.bits == 2 else pack_nibbles(codes, self.high_first)

    def _unpacked(self, stored: np.ndarray) -> np.ndarray:
        return unpack_quarters(stored) if self.bits == 2 else unpack_nibbles(stored, self.high_first)
