"""How a group of values gets its scale, its zero and its codes: one function a rule.

Each takes float32 values whose last axis is a group and the largest code, and returns the codes (as floats), the scales
and, where there is one, the zeros.
"""

import numpy as np

from refengine.errors import CacheError


def outward(x_XG: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smallest value and step in float16; `x = code * scale + zero`.

    Both are rounded outwards, so that no value is clipped and the error is at most half a step.
    """
    zero_X = _float16(x_XG.min(axis=-1), -np.inf)
    above_XG = x_XG - zero_X.astype(np.float32)[..., None]
    scale_X = _float16(above_XG.max(axis=-1) / levels, np.inf)
    return _codes(above_XG, scale_X.astype(np.float32), 0, levels), scale_X, zero_X


def outward_symmetric(x_XG: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """A float16 step rounded outwards, and signed codes of equal reach; `x = code * scale`."""
    reach = levels // 2
    scale_X = _float16(np.abs(x_XG).max(axis=-1) / reach, np.inf)
    return _codes(x_XG, scale_X.astype(np.float32), -reach, reach), scale_X


def openvino_by_token(x_XG: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The zero point is a float; values are scaled by the inverse in a fused multiply-add; `x = (code - zero) * scale`.

    Source: OpenVINO, src/plugins/intel_cpu/src/nodes/kernels/scaled_attn/attn_quant_kernel.hpp, 2026.4.
    """
    lowest_X, levels32 = x_XG.min(axis=-1), np.float32(levels)
    scale_X = (x_XG.max(axis=-1) - lowest_X) / levels32
    scale_X = np.where(scale_X == 0, np.float32(1e-4), scale_X)
    return _fused(x_XG, scale_X, -lowest_X / scale_X, levels)


def openvino_by_channel(x_XG: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As by token, but the range is multiplied by the inverse of the largest code.

    Source: OpenVINO, src/plugins/intel_cpu/src/nodes/kernels/scaled_attn/attn_quant.cpp, 2026.4.
    """
    lowest_X = x_XG.min(axis=-1)
    scale_X = (x_XG.max(axis=-1) - lowest_X) * np.float32(1 / levels)
    scale_X = np.where(scale_X == 0, np.float32(1e-4), scale_X)
    return _fused(x_XG, scale_X, -lowest_X / scale_X, levels)


def _fused(
    x_XG: np.ndarray, scale_X: np.ndarray, zero_X: np.ndarray, levels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # A product of two float32 is exact in float64, so this rounds once, as a fused multiply-add does.
    inverse_X = (np.float32(1) / scale_X).astype(np.float64)
    fused_XG = (x_XG.astype(np.float64) * inverse_X[..., None] + zero_X[..., None]).astype(np.float32)
    return np.clip(np.rint(fused_XG), 0, levels), scale_X, zero_X


def _codes(x_XG: np.ndarray, scale_X: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    steps_XG = x_XG / np.where(scale_X == 0, np.float32(1), scale_X)[..., None]
    return np.clip(np.rint(steps_XG), lowest, highest)


def _float16(x_X: np.ndarray, towards: float) -> np.ndarray:
    """The nearest float16 on this side."""
    with np.errstate(over="ignore"):
        rounded_X = x_X.astype(np.float16)
    wrong_X = rounded_X < x_X if towards > 0 else rounded_X > x_X
    rounded_X = np.where(wrong_X, np.nextafter(rounded_X, np.float16(towards)), rounded_X)
    if not np.isfinite(rounded_X).all():
        raise CacheError("cache: a key or value is beyond the range of the float16 scales of this scheme")
    return rounded_X
