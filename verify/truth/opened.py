"""The weights of a checkpoint that is to be run a few times: kept in memory, unless they are too many."""

import math

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.weights import Weights, expected_shapes

MOST_KEPT = 4e9  # bytes: a model of a billion parameters is read anew by every pass, beside the candidate's own copy


def open_weights(checkpoint: Checkpoint, dtype: np.typing.DTypeLike) -> Weights:
    """The checkpoint's weights cast to `dtype`; as `Weights.open` raises."""
    numbers = sum(math.prod(shape) for _, shape in expected_shapes(checkpoint.config))
    return Weights.open(checkpoint, dtype, resident=numbers * np.dtype(dtype).itemsize <= MOST_KEPT)
