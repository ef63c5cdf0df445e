"""The Walsh-Hadamard transform: sums and differences of all coordinates, which spread what a few of them have."""

import numpy as np


def butterflies(x_XH: np.ndarray) -> np.ndarray:
    """The last axis, a power of two, times Sylvester's matrix of ones and minus ones; neighbours are summed first."""
    shape, width = x_XH.shape, 1
    while width < shape[-1]:
        pairs = x_XH.reshape(*shape[:-1], shape[-1] // (2 * width), 2, width)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x_XH = np.stack([first + second, first - second], axis=-2)
        width *= 2
    return x_XH.reshape(shape)
