"""Floats that were rounded to codes of a few bits and are kept as floats: their numbers stand on a grid."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

BLOCKS = (32, 64, 128)  # numbers of a row that may share a step
FEWEST = 16  # numbers of a group: of fewer, any may be equally spaced
MULTIPLES = (1, 2, 3, 4)  # of the step, that the smallest distance of two numbers may be
NEAR = 1e-2  # steps that a number may be off its place: the product of a code and a scale is rounded
CODES: Mapping[str, int] = {"int2": 4, "int4": 16, "int8": 256}

Pair = tuple[np.ndarray, np.ndarray]


def rounded_to_codes(pieces: Iterable[Pair]) -> str | None:
    """What a matrix was rounded to: "int8 by output, kept as floats", ...; None where it was not rounded so.

    The numbers of a group are so many steps apart, each is within half a step of the exact one, and there are fewer
    different ones: what was on a grid before is not rounded by being scaled. A group is a row, a block of one, a
    column, or the whole piece.

    Args:
        pieces: some rows of the checkpoint's matrix, and of the export's, outputs first; in float64.
    """
    levels: dict[str, int] = {}
    for number, (exact_RC, values_RC) in enumerate(pieces):
        here = {
            name: found
            for name, groups in _groups(exact_RC, values_RC)
            if (found := _levels(groups)) is not None and _merges(groups)
        }
        levels = {name: max(most, levels.get(name, 0)) for name, most in here.items() if not number or name in levels}
        if not levels:
            return None
    return next((_named(name, most) for name, most in levels.items()), None)


def _named(group: str, levels: int) -> str:
    return f"{next(code for code, most in CODES.items() if levels <= most)} {group}, kept as floats"


def _groups(exact_RC: np.ndarray, values_RC: np.ndarray) -> Iterator[tuple[str, list[Pair]]]:
    """By what numbers may share a step, the most of them first: matrices whose rows are the groups."""
    yield "by one scale", [(exact_RC.reshape(1, -1), values_RC.reshape(1, -1))]
    yield "by output", [(exact_RC, values_RC)]
    yield "by input", [(exact_RC.T, values_RC.T)]
    columns = exact_RC.shape[1]
    for block in BLOCKS:
        if block < columns:
            starts = range(0, columns, block)  # the last block of a row may be shorter
            cuts = [slice(start, start + block) for start in starts]
            yield f"by {block} inputs", [(exact_RC[:, cut], values_RC[:, cut]) for cut in cuts]


def _levels(groups: Iterable[Pair]) -> int | None:
    """How many codes the finest group needs; None where one is not on a grid."""
    found = [_levels_of(exact_GN, values_GN) for exact_GN, values_GN in groups]
    known = [levels for levels in found if levels is not None]
    return max(known, default=None) if len(known) == len(found) else None


def _merges(groups: Iterable[Pair]) -> bool:
    """Whether numbers that were different have become the same."""
    return any(_different(values_GN) < _different(exact_GN) for exact_GN, values_GN in groups)


def _different(array_GN: np.ndarray) -> int:
    """How many different numbers the groups have, all together."""
    return len(array_GN) + int(np.count_nonzero(np.diff(np.sort(array_GN, axis=1), axis=1)))


def _levels_of(exact_GN: np.ndarray, values_GN: np.ndarray) -> int | None:
    """How many codes the finest row needs; None where numbers are not equally spaced, or too far off."""
    if values_GN.shape[1] < FEWEST or not np.isfinite(values_GN).all():
        return None
    sorted_GN = np.sort(values_GN, axis=1)
    spread_G1 = sorted_GN[:, -1:] - sorted_GN[:, :1]
    gaps_GN = np.diff(sorted_GN, axis=1)
    smallest_G1 = np.where(gaps_GN > 1e-6 * spread_G1, gaps_GN, np.inf).min(axis=1, keepdims=True)
    off_G = np.abs(values_GN - exact_GN).max(axis=1)
    levels_G = np.where((spread_G1[:, 0] == 0) & (off_G == 0), 1, 0)  # one number is no grid, but may be right
    for multiple in MULTIPLES:
        step_G1 = smallest_G1 / multiple
        codes_GN = (values_GN - sorted_GN[:, :1]) / step_G1
        fits_G = (np.abs(codes_GN - np.rint(codes_GN)) <= NEAR).all(axis=1) & (spread_G1[:, 0] > 0)
        fits_G &= (off_G <= step_G1[:, 0] * (0.5 + NEAR)) & (codes_GN.max(axis=1) < max(CODES.values()))
        levels_G = np.where(fits_G & (levels_G == 0), np.rint(codes_GN.max(axis=1)).astype(int) + 1, levels_G)
    return int(levels_G.max()) if levels_G.all() else None
