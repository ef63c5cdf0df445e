"""Scales for a cache that needs them beforehand, measured on tokens like those that the model will be fed."""

from collections.abc import Callable

import numpy as np

from refengine.codecs.static import LARGEST, LEAST_SCALE, Numbers, given
from refengine.model import forward
from refengine.scheme import Scheme
from refengine.views import Vectors
from refengine.weights import Weights

Calibration = Callable[[Weights, np.ndarray, np.ndarray], Scheme]  # of a model, token_ids_BT and positions_BT


def calibrated(
    weights: Weights,
    token_ids_BT: np.ndarray,
    positions_BT: np.ndarray,
    *,
    numbers: Numbers,
    per_channel: bool = False,
) -> Scheme:
    """A scheme whose largest code stands, in each layer, for the largest key or value of these tokens.

    Args:
        weights: the model; it is run once, without a cache.
        token_ids_BT: tokens to measure; `positions_BT` as for `forward`, padding is not measured.
        numbers: what a code is.
        per_channel: a scale for each channel of each KV head, in place of one a layer. What is zero throughout gets 1.

    Raises:
        TokensError: ids or positions of the wrong shape, type or range.
    """
    there_BT = positions_BT >= 0
    scales: dict[str, list[np.ndarray]] = {"k_rope": [], "v_proj": []}

    def measure(name: str, array: Vectors) -> None:
        """Layers come in order."""
        if (point := name.rpartition(".")[2]) in scales:
            largest_KH = np.abs(np.asarray(array)[there_BT]).max(axis=0, initial=0)
            scale_X = (largest_KH if per_channel else largest_KH.max(keepdims=True)) / LARGEST[numbers]
            scales[point].append(np.where(scale_X < LEAST_SCALE, 1, scale_X))

    forward(weights, token_ids_BT, positions_BT, last=True, trace=measure)
    return given(weights.config, numbers, scales["k_rope"], scales["v_proj"])
