"""TurboQuant, as OpenVINO's CPU plugin has it: a rotation, and one table of levels for every coordinate.

Rotated, a vector of any kind has coordinates that are close to normally distributed, and of the variance that its norm
says; so the levels that suit such numbers best are the same for all vectors, and the norm is the only scale.

Source: arXiv 2504.19874, without its correction of inner products; OpenVINO, src/plugins/intel_cpu/src/nodes/kernels/
scaled_attn/codecs/turboq_{quantize,rotation}.cpp and turboq_tables.h, 2026.4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refengine.codecs.codec import Codec, check_finite
from refengine.codecs.hadamard import butterflies
from refengine.codecs.packing import pack_nibbles, pack_threes, unpack_nibbles, unpack_threes
from refengine.errors import CacheError, InputError
from refengine.slots import Arrays

HEAD_DIMS = (64, 128, 256, 512)

# Which coordinates keep their sign before they are mixed (bit 1), the first in the highest bit: the top bits of what
# std::mt19937_64, seeded with 0xafa07b2f51763885, draws first.
KEPT = (
    "62ef4fa12853940f6cf4c251e96e9cf5f92181c3c71eb34af0e2df6dce43156d"
    "726b324be99932490af1c09f36fcf557a68f236ad3840ea3143e1f582c6ab3a4"
)

# The positive levels by bits and head_dim, those of least square error for a coordinate of a random vector of norm
# sqrt(head_dim); the negative ones mirror them.
LEVELS: Mapping[tuple[int, int], Sequence[float]] = {
    (3, 64): (0.24507484, 0.75595247, 1.34383723, 2.15187458),  # of a normal distribution, as for any other head_dim
    (3, 128): (0.24440650, 0.75328017, 1.33653124, 2.13140531),
    (3, 256): (0.24474095, 0.75461598, 1.34017750, 2.14160037),
    (3, 512): (0.24490797, 0.75528415, 1.34200568, 2.14672756),
    (4, 64): (0.12835875, 0.38794210, 0.65659074, 0.94212216, 1.25597887, 1.61777864, 2.06875481, 2.73235729),
    (4, 128): (0.12783692, 0.38627496, 0.65345125, 0.93688023, 1.24752097, 1.60407964, 2.04567026, 2.68863793),
    (4, 256): (0.12809709, 0.38710608, 0.65501613, 0.93949232, 1.25173367, 1.61089805, 2.05714788, 2.71033623),
    (4, 512): (0.12822853, 0.38752582, 0.65580594, 0.94080983, 1.25385775, 1.61433642, 2.06294084, 2.72131117),
}


@dataclass(frozen=True)
class Turbo(Codec):
    """A code of `bits` bits, 3 or 4, for each rotated coordinate, and the float32 norm of the vector."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (3, 4):
            raise InputError(f"KV cache: TurboQuant: expected codes of 3 or 4 bits, found {self.bits}")

    def empty(self, rows: int, heads: int, head_dim: int) -> Arrays:
        """Packed codes, and norms. Raises InputError for a head_dim that cannot be rotated like this."""
        if head_dim not in HEAD_DIMS:
            fitting = ", ".join(map(str, HEAD_DIMS))
            raise InputError(f"KV cache: TurboQuant: expected a head_dim among {fitting}, found {head_dim}")
        return self.encode(np.empty((rows, heads, 0, head_dim), np.float32))

    def encode(self, x_BKTH: np.ndarray) -> Arrays:
        """Packed codes, and norms. A norm below 1e-30 counts as zero."""
        check_finite(x_BKTH)
        x_BKTH = x_BKTH.astype(np.float32, copy=False)
        norm_BKT1 = _norm(x_BKTH)
        if not np.isfinite(norm_BKT1).all():
            raise CacheError("cache: the norm of a key or value is beyond the range of float32")
        inverse_BKT1 = np.divide(1, norm_BKT1, out=np.zeros_like(norm_BKT1), where=norm_BKT1 >= np.float32(1e-30))
        y_BKTH = butterflies(x_BKTH * inverse_BKT1 * _signs(x_BKTH))
        levels = self._levels(x_BKTH.shape[-1])
        codes_BKTH = np.searchsorted((levels[:-1] + levels[1:]) / 2, y_BKTH)
        return (pack_nibbles if self.bits == 4 else pack_threes)(codes_BKTH), norm_BKT1

    def decode(self, arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        """Rotated back in float32."""
        rotated_BKTH, scale_BKT1 = self._rotated(arrays)
        return _back(rotated_BKTH * scale_BKT1).astype(dtype, copy=False)

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Codes and norms."""
        return tokens * (head_dim * self.bits // 8 + 4)

    def scores(self, q_BKRH: np.ndarray, arrays: Arrays) -> np.ndarray:
        """The query is rotated, not the keys."""
        rotated_BKTH, scale_BKT1 = self._rotated(arrays)
        turned_BKRH = butterflies(q_BKRH * _signs(q_BKRH)) * _shrinking(q_BKRH)
        return turned_BKRH @ rotated_BKTH.swapaxes(-1, -2) * scale_BKT1.swapaxes(-1, -2)

    def weighted_sum(self, p_BKRT: np.ndarray, arrays: Arrays) -> np.ndarray:
        """The sum is rotated back, not the values."""
        rotated_BKTH, scale_BKT1 = self._rotated(arrays)
        return _back((p_BKRT * scale_BKT1.swapaxes(-1, -2)) @ rotated_BKTH)

    def _rotated(self, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """The level of each coordinate, and by what it is multiplied."""
        packed, norm_BKT1 = arrays
        codes_BKTH = (unpack_nibbles if self.bits == 4 else unpack_threes)(packed)
        head_dim = codes_BKTH.shape[-1]
        return self._levels(head_dim)[codes_BKTH], norm_BKT1 / np.sqrt(np.float32(head_dim))

    def _levels(self, head_dim: int) -> np.ndarray:
        above = np.array(LEVELS[self.bits, head_dim], np.float32)
        return np.concatenate([-above[::-1], above])


def _norm(x_BKTH: np.ndarray) -> np.ndarray:
    """Summed in the order of a processor with 16 lanes: two sums in each, then halves of the lanes together.

    Another order rounds otherwise, and moves a coordinate across the bound between two levels now and then.
    """
    parts_BKTPJL = x_BKTH.astype(np.float64).reshape(*x_BKTH.shape[:3], x_BKTH.shape[3] // 32, 2, 16)
    sums_BKTJL = np.zeros((*x_BKTH.shape[:3], 2, 16), np.float32)
    with np.errstate(over="ignore"):
        for part in range(parts_BKTPJL.shape[3]):
            # The square is exact in float64: rounded once, as by a fused multiply-add.
            sums_BKTJL = (parts_BKTPJL[:, :, :, part] ** 2 + sums_BKTJL).astype(np.float32)
        sums_BKTL = sums_BKTJL[..., 0, :] + sums_BKTJL[..., 1, :]
        while (half := sums_BKTL.shape[-1] // 2) > 0:
            sums_BKTL = sums_BKTL[..., :half] + sums_BKTL[..., half:]
    return np.sqrt(sums_BKTL)


def _back(rotated_XH: np.ndarray) -> np.ndarray:
    return butterflies(rotated_XH) * _shrinking(rotated_XH) * _signs(rotated_XH)


def _signs(x_XH: np.ndarray) -> np.ndarray:
    kept_H = np.unpackbits(np.frombuffer(bytes.fromhex(KEPT), np.uint8))[: x_XH.shape[-1]]
    return kept_H.astype(x_XH.dtype) * 2 - 1


def _shrinking(x_XH: np.ndarray) -> np.floating:
    """By what a transform is multiplied so that norms stay."""
    return x_XH.dtype.type(x_XH.shape[-1] ** -0.5)
