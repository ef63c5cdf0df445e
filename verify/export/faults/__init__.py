"""Exports with one mistake in them, by which the catalogue of causes is proved: one family a file."""

from collections.abc import Sequence

from verify.export.faults import attention, cache, norm_mlp, rope, weights
from verify.export.faults.writing import Fault

FAULTS: Sequence[Fault] = (*weights.FAULTS, *rope.FAULTS, *attention.FAULTS, *norm_mlp.FAULTS, *cache.FAULTS)
