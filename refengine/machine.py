"""How fast this machine computes and reads, measured with the products that a forward pass is made of."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MATMUL_SIDE = 1024  # 2.1 GFLOP a product, 4 MB a matrix
MATRIX_SHAPE = (8192, 8192)  # 256 MB in float32: more than the processor's caches hold
SECONDS = 0.5  # for each of the two measurements, after one product that does not count
FEWEST = 3


@dataclass(frozen=True)
class Machine:
    """What bounds a computation: `bandwidth` in bytes a second read from memory, `flops` in FLOPs a second."""

    bandwidth: float
    flops: float


def measure_machine() -> Machine:
    """Both rates of this machine as NumPy reaches them, in float32, with the threads that NumPy uses.

    Takes one to two seconds and 256 MB; other work on the machine lowers the figures.
    """
    return Machine(measure_bandwidth(), measure_flops())


def measure_bandwidth() -> float:
    """Bytes a second at which a matrix-vector product reads a matrix from memory, the best of several."""
    matrix_OI, vector_I = np.ones(MATRIX_SHAPE, np.float32), np.ones(MATRIX_SHAPE[1], np.float32)
    return matrix_OI.nbytes / _fastest(lambda: matrix_OI @ vector_I)


def measure_flops() -> float:
    """FLOPs a second of a product of two large matrices, a multiply-add counting two, the best of several."""
    square = np.ones((MATMUL_SIDE, MATMUL_SIDE), np.float32)
    return 2 * MATMUL_SIDE**3 / _fastest(lambda: square @ square)


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest run: what the machine can do, when other work leaves it alone."""
    run()  # wakes the threads, and touches the memory
    times: list[float] = []
    while len(times) < FEWEST or sum(times) < SECONDS:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)
