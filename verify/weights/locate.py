"""Where in one stored weight a checkpoint's tensor is: which way round, and in which rows."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from verify.weights.relation import Compared, compare_values
from verify.weights.sketch import nearest, sketch
from verify.weights.stored import StoredWeight, Values


@dataclass(frozen=True)
class Found:
    """A tensor as it is in a stored weight, at its best.

    Attributes:
        weight: where.
        compared: its numbers there against the checkpoint's.
        rows: of the weight, outputs as rows, in the order of the tensor's.
        outputs: how many there are.
        in_rows: each row of the weight as it is stored makes one output, rather than each column.
        is_turned: outputs and inputs are swapped, against the way in which the weight is used.
        factor: what the tensor is multiplied by.
    """

    weight: StoredWeight
    compared: Compared
    rows: np.ndarray
    outputs: int
    in_rows: bool
    is_turned: bool
    factor: float

    @property
    def is_faithful(self) -> bool:
        """Whether these are the tensor's numbers, the right way round."""
        return self.compared.is_faithful and not self.is_turned


def fits(weight: StoredWeight, shape: tuple[int, int]) -> bool:
    """Whether a weight has room for a tensor of this shape, alone or among others; vectors are columns."""
    return any(rows >= shape[0] and columns == shape[1] for rows, columns in (weight.shape, weight.shape[::-1]))


def locate(tensor_OI: np.ndarray, weight: StoredWeight, factors: tuple[float, ...]) -> Found:
    """A tensor where it differs least from a weight that it fits into.

    Args:
        tensor_OI: the checkpoint's; a vector is one column.
        weight: one that it fits into.
        factors: what an exporter may have multiplied it by, besides 1.
    """
    stored, best = weight.read(), None
    for in_rows, is_turned in _ways_round(weight, tensor_OI.shape[1]):
        values = stored if in_rows else stored.transposed()
        for rows in _row_orders(tensor_OI, values):
            for factor in (1.0, *factors):
                compared = compare_values(tensor_OI, values, rows, factor)
                found = Found(weight, compared, rows, len(values.values_RC), in_rows, is_turned, factor)
                if found.is_faithful:
                    return found
                if best is None or _merit(found) > _merit(best):
                    best = found
    if best is None:
        raise ValueError(f"{weight.name}: a tensor of {tensor_OI.shape} does not fit into {weight.shape}")
    return best


def at_rows(found: Found, tensor_OI: np.ndarray, rows: np.ndarray) -> Found:
    """A tensor in other rows of the weight that it was looked for in."""
    stored = found.weight.read()
    values = stored if found.in_rows else stored.transposed()
    compared = compare_values(tensor_OI, values, rows)
    return replace(found, compared=compared, rows=rows, is_turned=False, factor=1.0)


def _merit(found: Found) -> tuple[bool, int, bool, float]:
    """More of the numbers first; rows that follow each other rather than any that happen to be a little nearer."""
    is_in_order = bool((np.diff(found.rows) == 1).all())
    return (
        found.compared.is_faithful,
        -found.compared.different,
        is_in_order,
        -np.nan_to_num(found.compared.error, nan=np.inf, posinf=np.inf),
    )


def _ways_round(weight: StoredWeight, inputs: int) -> Iterator[tuple[bool, bool]]:
    """Whether outputs are rows, the way round in which the weight is used first, and whether it is the other way."""
    rows, columns = weight.shape
    if columns == inputs and weight.outputs_in_rows is not False:
        yield True, False
    if rows == inputs and weight.outputs_in_rows is not True:
        yield False, False
    if columns == inputs and weight.outputs_in_rows is False:
        yield True, True
    if rows == inputs and weight.outputs_in_rows is True:
        yield False, True


def _row_orders(tensor_OI: np.ndarray, values: Values) -> Iterator[np.ndarray]:
    """Which rows of the weight may be those of the tensor, the likeliest first."""
    outputs, room = len(tensor_OI), len(values.values_RC)
    if room < outputs:
        return
    in_order = np.arange(outputs)
    if room == outputs:
        yield in_order
    if tensor_OI.shape[1] == 1:
        column, stored = tensor_OI[:, 0].astype(np.float64), values.values_RC[:, 0].astype(np.float64)
        if room > outputs:
            windows = np.lib.stride_tricks.sliding_window_view(stored, outputs)
            yield in_order + int(np.abs(windows - column).sum(axis=1).argmin())
        else:
            order = np.empty(outputs, np.int64)
            order[column.argsort(kind="stable")] = stored.argsort(kind="stable")
            yield order
        return
    rows, _ = nearest(sketch(tensor_OI), sketch(values.values_RC))
    offsets, counts = np.unique(rows - in_order, return_counts=True)
    offset = int(np.clip(offsets[counts.argmax()], 0, room - outputs))
    if room > outputs:
        yield in_order + offset
    if len(np.unique(rows)) == outputs:
        yield rows
