"""A few numbers for each row of a matrix, by which rows are found again wherever an exporter has put them."""

from collections.abc import Iterator

import numpy as np

NUMBERS = 16  # for each row; chance makes no two rows of a matrix as alike as one and its own 4-bit rounding
PIECE = 2**24  # products of rows that are held at a time


def sketch(values_RC: np.ndarray) -> np.ndarray:
    """Random projections of every row, of unit length: the same for a multiple of a row, nearly so for its codes.

    Two matrices with as many columns are projected alike. A row that is zero or not finite has no direction: zeros.
    """
    rows, columns = values_RC.shape
    projection = np.random.default_rng(columns).standard_normal((columns, NUMBERS)).astype(np.float32)
    made = np.empty((rows, NUMBERS), np.float32)
    step = max(1, PIECE // max(1, columns))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, rows, step):
            made[start : start + step] = values_RC[start : start + step].astype(np.float32) @ projection
        length = np.linalg.norm(made, axis=1, keepdims=True)
    return np.divide(made, length, out=np.zeros_like(made), where=(length > 0) & np.isfinite(length))


def nearest(wanted: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of a sketch the row of another that is most alike, and how alike: 1 is the same direction."""
    found = [(product.argmax(axis=1), product.max(axis=1)) for product in _products(wanted, among)]
    rows, alike = zip(*found, strict=True)
    return np.concatenate(rows), np.concatenate(alike)


def _products(wanted: np.ndarray, among: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, PIECE // len(among))
    return (wanted[start : start + step] @ among.T for start in range(0, len(wanted), step))
