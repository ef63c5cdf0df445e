"""Weights in the four bits of bitsandbytes: codes of numbers that are not evenly spaced, as MatMulBnb4 takes them.

Source: onnxruntime 1.24, contrib_ops/cpu/quantization/blockwise_quant_block_bnb4.h.
"""

from collections.abc import Mapping

import numpy as np

from verify.weights.stored import Grid, Values, unpacked

FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)  # then the same below zero
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
KINDS: Mapping[int, tuple[str, tuple[float, ...]]] = {  # quant_type -> name, the number of each code
    0: ("fp4", (*FP4, *(-number for number in FP4))),
    1: ("nf4", NF4),
}


def bnb4_values(packed: np.ndarray, largest: np.ndarray, shape: tuple[int, int], block: int, kind: int) -> Values:
    """The numbers of a matrix whose codes lie row after row, with a scale for so many of them in a row.

    Raises ValueError when the parts do not fit together.

    Args:
        packed: two codes a byte, the first in the high bits.
        largest: of each block, what a number of 1 stands for.
        shape: of the matrix.
        block: codes that share a scale; a block may go on in the next row.
        kind: of `KINDS`.
    """
    count = shape[0] * shape[1]
    if packed.size != -(-count // 2) or largest.size != -(-count // block):
        raise ValueError(f"expected codes and scales of {count} numbers, found {packed.size} and {largest.size}")
    numbers = np.array(KINDS[kind][1], np.float32)
    in_order = np.sort(numbers)
    gaps = np.diff(in_order, prepend=in_order[0], append=in_order[-1])
    widest = np.maximum(gaps[:-1], gaps[1:])[np.searchsorted(in_order, numbers)]
    codes = unpacked(packed.reshape(-1), 4).reshape(-1, 2)[:, ::-1].reshape(-1)[:count]
    scale = np.repeat(largest.reshape(-1).astype(np.float32), block)[:count]
    step_RC, values_RC, scale_RC = (x.reshape(shape) for x in (widest[codes] * scale, numbers[codes] * scale, scale))
    unit = float(np.finfo(largest.dtype).eps) / 2
    return Values(values_RC, Grid(1, step_RC, -scale_RC, scale_RC, unit))
