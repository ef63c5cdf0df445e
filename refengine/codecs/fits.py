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
    """The zero point is a float, `x = (code - zero) * scale`, and values are scaled in a fused multiply-add.

    What is left when a group is cut in sixteens, as for AVX-512, is divided instead, and not clipped.

    Source: OpenVINO, src/plugins/intel_cpu/src/nodes/kernels/scaled_attn/attn_quant_kernel.hpp, 2026.4.
    """
    lowest_X = x_XG.min(axis=-1)
    scale_X, zero_X = _openvino_params(_range(x_XG, lowest_X) / np.float32(levels), lowest_X)
    codes_XG = _fused(x_XG, scale_X, zero_X, levels)
    rest = slice(x_XG.shape[-1] // 16 * 16, None)
    rest_XR = _divided(x_XG[..., rest], scale_X, zero_X)
    if levels == 15:  # what is too large for the low half of a byte runs into the high one
        rest_XR[..., 0::2] |= rest_XR[..., 1::2] >> 4
    codes_XG[..., rest] = rest_XR & levels
    return codes_XG, scale_X, zero_X


def openvino_by_channel(x_XHG: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As by token, but the range is multiplied by the inverse of the largest code, and the channels are cut in eights.

    Source: OpenVINO, src/plugins/intel_cpu/src/nodes/kernels/scaled_attn/attn_quant.cpp, 2026.4.
    """
    lowest_XH = x_XHG.min(axis=-1)
    scale_XH = _range(x_XHG, lowest_XH)
    rest = slice(x_XHG.shape[-2] // 8 * 8, None)
    scale_XH[..., : rest.start] *= np.float32(1 / levels)
    scale_XH[..., rest] /= np.float32(levels)
    scale_XH, zero_XH = _openvino_params(scale_XH, lowest_XH)
    codes_XHG = _fused(x_XHG, scale_XH, zero_XH, levels)
    codes_XHG[..., rest, :] = _divided(x_XHG[..., rest, :], scale_XH[..., rest], zero_XH[..., rest]) & levels
    return codes_XHG, scale_XH, zero_XH


def quanto_groups(x_XG: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smallest value and step in float32. Where a group is constant theirs divides zero by zero; here its codes are 0.

    Source: optimum-quanto 0.2.7, tensor/optimizers/max_optimizer.py and library/quantize.py.
    """
    zero_X = x_XG.min(axis=-1)
    above_XG = x_XG - zero_X[..., None]
    scale_X = above_XG.max(axis=-1) / np.float32(levels)
    return _codes(above_XG, scale_X, 0, levels), scale_X, zero_X


def hqq_groups(x_XG: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A zero point that makes large errors few: half-quadratic steps towards the least sum of |error|**0.7.

    They end when the mean error of all groups together no longer falls, so that a group's codes depend on the others.
    torch sums in another order, which moves a zero by some last bits, and rarely a code with it.

    Source: hqq 0.2.8, core/quantize.py and core/optimize.py, optimize_weights_proximal_legacy on a CPU.
    """
    lowest_X1, most = x_XG.min(axis=-1, keepdims=True), np.float32(levels)
    span_X1 = x_XG.max(axis=-1, keepdims=True) - lowest_X1
    inverse_X1 = np.where(span_X1 <= 1e-4, np.float32(1), most / np.maximum(span_X1, np.float32(1e-4)))
    inverse_X1 = np.minimum(inverse_X1, np.float32(2e4))
    zero_X1 = -lowest_X1 * inverse_X1
    least = np.inf
    for _ in range(20):
        codes_XG = np.clip(np.rint(x_XG * inverse_X1 + zero_X1), 0, most)
        error_XG = x_XG - (codes_XG - zero_X1) / inverse_X1
        size_XG = np.abs(error_XG)
        with np.errstate(divide="ignore"):  # no error: minus infinity, of which nothing is kept
            kept_XG = np.maximum(size_XG - np.float32(0.1) * size_XG ** np.float32(-0.3), 0) * np.sign(error_XG)
        zero_X1 = (codes_XG - (x_XG - kept_XG) * inverse_X1).mean(axis=-1, keepdims=True)
        if not (mean := size_XG.mean()) < least:
            break
        least = mean
    codes_XG = np.clip(np.rint(x_XG * inverse_X1 + zero_X1), 0, most)
    return codes_XG, (np.float32(1) / inverse_X1)[..., 0], zero_X1[..., 0]


def kivi_groups(x_XG: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Everything in float16. Where a group is constant theirs divides zero by zero; here its codes are 0.

    Source: github.com/jy-yuan/KIVI at 150def8, quant/new_pack.py.
    """
    x_XG = float16_nearest(x_XG)
    zero_X = x_XG.min(axis=-1)
    with np.errstate(over="ignore"):
        above_XG = x_XG - zero_X[..., None]
    scale_X = _in_range(above_XG.max(axis=-1)) / np.float16(levels)
    return _codes(above_XG, scale_X, 0, levels), scale_X, zero_X


def ggml_q8(x_XG: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """q8_0: codes of the largest magnitude's step in float32, which is then stored in float16; halves away from zero.

    Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_q8_0_ref, and gguf 0.19, which does the same.
    """
    step_X = np.abs(x_XG).max(axis=-1) / np.float32(levels // 2)
    size_XG = np.abs(x_XG * _inverse(step_X)[..., None])
    whole_XG = np.floor(size_XG)
    return np.copysign(whole_XG + (size_XG - whole_XG >= 0.5), x_XG), float16_nearest(step_X)


def ggml_symmetric(x_XG: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """q4_0 and q5_0: the value of the largest magnitude has the lowest code, so the step may be negative.

    Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_q4_0_ref and quantize_row_q5_0_ref, and gguf 0.19.
    """
    half = np.float32((levels + 1) // 2)
    extreme_X = np.take_along_axis(x_XG, np.abs(x_XG).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    step_X = extreme_X / -half
    codes_XG = np.trunc(x_XG * _inverse(step_X)[..., None] + (half + np.float32(0.5)))
    return np.minimum(codes_XG, levels) - half, float16_nearest(step_X)


def ggml_lowest(x_XG: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q4_1 and q5_1: steps from the lowest value, both stored in float16, which the codes know nothing of.

    Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_q4_1_ref and quantize_row_q5_1_ref, and gguf 0.19.
    """
    lowest_X = x_XG.min(axis=-1)
    step_X = (x_XG.max(axis=-1) - lowest_X) / np.float32(levels)
    codes_XG = np.trunc((x_XG - lowest_X[..., None]) * _inverse(step_X)[..., None] + np.float32(0.5))
    return np.minimum(codes_XG, levels), float16_nearest(step_X), float16_nearest(lowest_X)


def _range(x_XG: np.ndarray, lowest_X: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x_XG.max(axis=-1) - lowest_X


def _openvino_params(scale_X: np.ndarray, lowest_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale_X = np.where(scale_X == 0, np.float32(1e-4), scale_X)
    with np.errstate(over="ignore", invalid="ignore"):
        zero_X = -lowest_X / scale_X
    if not (np.isfinite(scale_X) & np.isfinite(zero_X)).all():
        raise CacheError("cache: a key or value is beyond the range of the float32 scales of this scheme")
    return scale_X, zero_X


def _fused(x_XG: np.ndarray, scale_X: np.ndarray, zero_X: np.ndarray, levels: int) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        inverse_X = (np.float32(1) / scale_X).astype(np.float64)
        # A product of two float32 is exact in float64, and the sum all but exact: one rounding, as when fused.
        steps_XG = (x_XG * inverse_X[..., None] + zero_X[..., None]).astype(np.float32)
    # The inverse of a scale below 3e-39 is infinite; the processor makes 0 of what is then no number.
    return np.clip(np.rint(np.where(np.isfinite(steps_XG), steps_XG, 0)), 0, levels)


def _divided(x_XG: np.ndarray, scale_X: np.ndarray, zero_X: np.ndarray) -> np.ndarray:
    """Bytes. Halves go away from zero, and of what is no byte the lowest eight bits are taken, as by C's cast."""
    steps_XG = (x_XG / scale_X[..., None] + zero_X[..., None]).astype(np.float64)
    return np.mod(np.trunc(steps_XG + np.copysign(0.5, steps_XG)), 256).astype(np.uint8)


def _codes(x_XG: np.ndarray, scale_X: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    steps_XG = x_XG / np.where(scale_X == 0, scale_X.dtype.type(1), scale_X)[..., None]
    np.rint(steps_XG, out=steps_XG)
    np.minimum(steps_XG, highest, out=steps_XG)  # for a single token np.clip takes five times as long
    return np.maximum(steps_XG, lowest, out=steps_XG)


def _inverse(x_X: np.ndarray) -> np.ndarray:
    """`1 / x`, and zero where that is no finite number: there x is zero in float16 as well."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse_X = np.float32(1) / x_X
    return np.where(np.isfinite(inverse_X), inverse_X, np.float32(0))


def _float16(x_X: np.ndarray, towards: float) -> np.ndarray:
    """The nearest float16 on this side."""
    with np.errstate(over="ignore"):
        rounded_X = x_X.astype(np.float16)
    wrong_X = rounded_X < x_X if towards > 0 else rounded_X > x_X
    return _in_range(np.where(wrong_X, np.nextafter(rounded_X, np.float16(towards)), rounded_X))


def float16_nearest(x_X: np.ndarray) -> np.ndarray:
    """The nearest float16. Raises CacheError beyond its range."""
    with np.errstate(over="ignore"):
        return _in_range(x_X.astype(np.float16))


def _in_range(rounded_X: np.ndarray) -> np.ndarray:
    if not np.isfinite(rounded_X).all():
        raise CacheError("cache: a key or value is beyond the range of the float16 scales of this scheme")
    return rounded_X
