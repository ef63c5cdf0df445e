"""How stored numbers follow from a checkpoint's: equal, rounded, quantised, or changed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from verify.report.weights import Relation
from verify.weights.on_grid import rounded_to_codes
from verify.weights.stored import Grid, Values

PIECE = 2**20  # elements that are compared at a time
COARSEST = 0.6  # of the tensor's rms: what rounding to the fewest codes may be off

Rounding = Callable[[np.ndarray], np.ndarray]


def _to(dtype: type) -> Rounding:
    def rounding(array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # an overflow is compared like any other number
            return array.astype(dtype)

    return rounding


def _lifted(smallest: float, largest: float) -> Rounding:
    """float16 as a well-known converter makes it: numbers under `smallest` are lifted to it, large ones cut."""

    def rounding(array: np.ndarray) -> np.ndarray:
        lifted = np.where((array != 0) & (np.abs(array) < smallest), np.copysign(smallest, array), array)
        return np.clip(lifted, -largest, largest).astype(np.float16)

    return rounding


# The last two: onnxconverter-common 1.16 and onnxruntime 1.24's transformers, float16.py, convert_np_to_float16.
ROUNDINGS: Mapping[str, Rounding] = {
    "float32": _to(np.float32),
    "bfloat16": _to(ml_dtypes.bfloat16),
    "float16": _to(np.float16),
    "float16 with its smallest numbers lifted to 1e-7": _lifted(1e-7, 1e4),
    "float16 with its smallest numbers lifted to 5.96e-8": _lifted(5.96e-8, 65504.0),
}


@dataclass(frozen=True)
class Compared:
    """Stored numbers against a checkpoint's.

    Attributes:
        relation: equal, rounded, quantised or changed.
        rounded_to: which rounding; None unless "rounded".
        error: rms of the difference over rms of the tensor.
        different: how many numbers are not the checkpoint's; of quantised ones, how many are more than half a step
            from it.
        worst_steps: the largest difference of a quantised number in steps of its block; 0 for floats.
    """

    relation: Relation
    rounded_to: str | None
    error: float
    different: int
    worst_steps: float = 0.0

    @property
    def is_faithful(self) -> bool:
        """Whether this is the tensor."""
        return self.relation != "changed"


def compare_values(tensor_OI: np.ndarray, stored: Values, rows: np.ndarray, factor: float = 1.0) -> Compared:
    """Row o of a tensor, times a factor, against row `rows[o]` of a stored weight.

    Args:
        tensor_OI: the checkpoint's, in the dtype it has there.
        stored: the weight, with as many columns.
        rows: which of its rows, one for each of the tensor.
        factor: what an exporter may have multiplied the tensor by. Floats then count as equal within a unit in
            the last place of float32, since nobody knows in which dtype it multiplied.
    """
    squares = difference = 0.0
    is_equal, roundings, different = True, dict(ROUNDINGS), 0
    fits_grid, worst_steps = stored.grid is not None, 0.0
    for piece in _pieces(tensor_OI.shape):
        exact, found = tensor_OI[piece], stored.rows(rows[piece])
        if factor != 1:
            exact = (exact.astype(np.float64) * factor).astype(np.float32)
        wide, values = exact.astype(np.float64), found.values_RC.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = values - wide  # NaN where both are infinite
        squares += float(np.square(wide).sum())
        difference += float(np.square(error).sum())
        if found.grid is not None:
            beyond, worst, is_within = _off_grid(wide, values, found.grid)
            different, worst_steps, fits_grid = different + beyond, max(worst_steps, worst), fits_grid and is_within
            continue
        if factor != 1:
            error[np.abs(error) <= np.spacing(np.abs(exact))] = 0
        different += int(np.count_nonzero(error))  # NaN counts
        is_equal = is_equal and not error.any()
        if not is_equal:
            roundings = {
                name: rounding
                for name, rounding in roundings.items()
                if np.array_equal(rounding(exact).astype(np.float64), values)
            }
    relative = float(np.sqrt(difference / squares)) if squares else float("inf" if difference else 0)
    if stored.grid is not None:
        return Compared("quantised" if fits_grid else "changed", None, relative, different, worst_steps)
    if is_equal:
        return Compared("equal", None, relative, 0)
    rounded_to = next(iter(roundings), None)
    if rounded_to is None and relative < COARSEST:
        both = ((tensor_OI[piece], stored.rows(rows[piece]).values_RC) for piece in _pieces(tensor_OI.shape))
        rounded_to = rounded_to_codes((exact * factor, values) for exact, values in _in_double(both))
    return Compared("rounded" if rounded_to else "changed", rounded_to, relative, different)


def _in_double(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((one.astype(np.float64), other.astype(np.float64)) for one, other in pairs)


def _pieces(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, PIECE // max(1, shape[1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _off_grid(exact_RC: np.ndarray, values_RC: np.ndarray, grid: Grid) -> tuple[int, float, bool]:
    """How many numbers are more than half a step off, the worst in steps, and whether every block is within bounds.

    Rounding to the nearest code leaves at most half a step, in each number and so in the rms of each block; a
    quantiser that chooses codes otherwise, to make a layer's output better, may exceed it in some numbers but
    spends less than that on average. Numbers beyond the grid's ends can but be cut off there. A scale that was
    rounded to its own dtype after the codes were chosen, from weights that may have been rounded to it before,
    moves a number by twice that rounding.
    """
    columns = exact_RC.shape[1]
    starts = np.arange(0, columns, grid.block)

    def wide(array_RB: np.ndarray) -> np.ndarray:
        return np.repeat(array_RB.astype(np.float64), grid.block, axis=1)[:, :columns]

    step = wide(grid.step_RB)
    slack = 2 * grid.scale_error * np.maximum(np.abs(values_RC), np.abs(exact_RC))
    cut = np.clip(exact_RC, wide(grid.lowest_RB), wide(grid.highest_RB))
    error = np.abs(values_RC - cut)
    allowed = step / 2 + slack
    beyond = int(np.count_nonzero(~(error <= allowed)))
    with np.errstate(divide="ignore", invalid="ignore"):  # a block of zeros may have no step
        steps = np.where(error <= slack, 0, error / step)
    by_block = (np.add.reduceat(np.square(array), starts, axis=1) for array in (error, allowed))
    spent, granted = by_block
    return beyond, float(steps.max(initial=0)), bool((spent <= granted).all())
