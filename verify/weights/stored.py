"""A weight as an export stores it, and the numbers that it stands for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refengine.errors import InputError


@dataclass(frozen=True)
class Grid:
    """The codes of a quantised matrix `values_RC`: which numbers each block of a row can be.

    Blocks are `block` consecutive columns of one row, the last of a row perhaps shorter. Number b of a row covers
    the columns [b * block, (b + 1) * block).

    Attributes:
        block: columns that share a step.
        step_RB: the distance of neighbouring codes, positive.
        lowest_RB: the least number that a code stands for.
        highest_RB: the greatest.
        scale_error: how far off, relatively, a number may be since its block's scale is rounded to its dtype.
    """

    block: int
    step_RB: np.ndarray
    lowest_RB: np.ndarray
    highest_RB: np.ndarray
    scale_error: float

    def rows(self, rows: np.ndarray) -> "Grid":
        """The same of some rows."""
        return Grid(self.block, self.step_RB[rows], self.lowest_RB[rows], self.highest_RB[rows], self.scale_error)

    def transposed(self, columns: int) -> "Grid":
        """The same of `values_CR`: every column has a step of its own then."""
        step_CR, lowest_CR, highest_CR = (
            np.repeat(array, self.block, axis=1)[:, :columns].T
            for array in (self.step_RB, self.lowest_RB, self.highest_RB)
        )
        return Grid(1, step_CR, lowest_CR, highest_CR, self.scale_error)


@dataclass(frozen=True)
class Values:
    """The numbers of a weight: `values_RC` in a float dtype, and the grid they are on where they are quantised."""

    values_RC: np.ndarray
    grid: Grid | None = None

    def transposed(self) -> "Values":
        """Rows as columns."""
        columns = self.values_RC.shape[1]
        return Values(self.values_RC.T, self.grid.transposed(columns) if self.grid else None)

    def rows(self, rows: np.ndarray) -> "Values":
        """Some rows, copied."""
        return Values(self.values_RC[rows], self.grid.rows(rows) if self.grid else None)


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a graph: a matrix, or a vector as a matrix of one row.

    Attributes:
        name: of the tensor in the graph.
        shape: of the numbers, (rows, columns).
        dtype: of what is stored: "float16", or "uint4" of codes.
        bits: of a code; None where floats are stored.
        block: codes that share a scale; None where floats are stored.
        used_by: names of the operators that use it, as the exporter gave them.
        outputs_in_rows: whether each row makes one output of the layer, as in a checkpoint, rather than each column;
            None where its use does not show it.
        read: the numbers, read afresh at each call.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    bits: int | None
    block: int | None
    used_by: tuple[str, ...]
    outputs_in_rows: bool | None
    read: Callable[[], Values]


def refused_unless_whole(weight: StoredWeight, path: Path) -> StoredWeight:
    """The same weight, whose numbers are refused with an InputError when the parts that make them do not fit."""

    def read() -> Values:
        try:
            values = weight.read()
            if values.values_RC.shape != weight.shape:
                raise ValueError(f"expected numbers of shape {weight.shape}, found {values.values_RC.shape}")
        except (ValueError, IndexError, TypeError) as error:
            raise InputError(
                f"{path}: {weight.name}: its parts do not fit together ({error}); export it again"
            ) from error
        return values

    return replace(weight, read=read)


def dequantised(
    codes_RC: np.ndarray, bits: int, low: int, scale_RB: np.ndarray, zero_point_RB: np.ndarray, block: int
) -> Values:
    """`(code - zero point) * scale`, in float32, and the grid that these numbers are on.

    Raises ValueError when the blocks of scales and zero points are not those of the codes.

    Args:
        codes_RC: whole numbers from `low` to `low + 2**bits - 1`.
        bits: of a code.
        low: the least code.
        scale_RB: of each block of a row, in the float dtype it is stored in.
        zero_point_RB: of each block of a row, in codes; not always a whole number.
        block: columns that share a scale.
    """
    scale = scale_RB.astype(np.float32)
    zero_point = zero_point_RB.astype(np.float32)
    columns = codes_RC.shape[1]
    blocks = (len(codes_RC), -(-columns // block))
    if scale.shape != blocks or zero_point.shape != blocks:
        raise ValueError(f"expected scales and zero points of shape {blocks}, found {scale.shape}, {zero_point.shape}")
    wide_scale, wide_zero = (
        array if array.shape[1] == 1 else np.repeat(array, block, axis=1)[:, :columns] for array in (scale, zero_point)
    )
    values_RC = codes_RC.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # of a damaged file: the numbers say it
        values_RC -= wide_zero
        values_RC *= wide_scale
        ends = np.stack([(low - zero_point) * scale, (low + 2**bits - 1 - zero_point) * scale])
    # bfloat16 is ml_dtypes' own and unknown to finfo; it keeps 8 bits of a number.
    unit = 2.0**-8 if scale_RB.dtype.name == "bfloat16" else float(np.finfo(scale_RB.dtype).eps) / 2
    return Values(values_RC, Grid(block, np.abs(scale), ends.min(axis=0), ends.max(axis=0), unit))


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of fewer than 8 bits out of the bytes of the last axis, the low bits first; unsigned."""
    if bits == 8:
        return packed
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)
