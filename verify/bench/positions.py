"""Time per token against its position, with a cache and without, on the reference engine."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from refengine.checkpoint import open_checkpoint
from refengine.weights import Weights
from verify.bench.decoding import Pass, reference_pass
from verify.bench.strategies import strategies_of_all
from verify.report.bench import Curve

LONGEST = 512  # tokens of the sequence, or as many as a shorter model has
POINTS = 16  # of each curve, after its first token
WINDOW = 8  # steps up to each point that its figure with a cache is the median of
ROUNDS = 3


def prepare_curves(model: Path) -> Callable[[], list[Curve]]:
    """Opens a checkpoint; each call of what it returns measures both curves, taking turns, in medians of all rounds."""
    return partial(curves, Weights.open(open_checkpoint(model)), LONGEST)


def curves(weights: Weights, longest: int) -> list[Curve]:
    """Seconds for the token at each of some positions up to `longest`: without a cache, then with one."""
    length = min(longest, weights.config.max_position_embeddings)
    token_ids_1T = np.random.default_rng(0).integers(0, weights.config.vocab_size, (1, length))
    points = np.unique(np.linspace(1, length, POINTS + 1).round().astype(int)).tolist()
    rounds = [_round(weights, token_ids_1T, points) for _ in range(ROUNDS)]
    return [
        Curve(name, tuple(points), tuple(statistics.median(seconds) for seconds in zip(*found, strict=True)))
        for name, found in zip(("without cache", "with cache"), zip(*rounds, strict=True), strict=True)
    ]


def _round(weights: Weights, token_ids_1T: np.ndarray, points: list[int]) -> tuple[list[float], list[float]]:
    """Decodes given tokens once, and at each point feeds all of them again without the cache."""
    whole, step = (reference_pass(weights, strategy) for strategy in strategies_of_all(batch_size=1)[:2])
    _seconds(whole, token_ids_1T, 0, 1)  # wakes the threads
    uncached, cached = [], []
    for before, point in pairwise([0, *points]):
        steps = [_seconds(step, token_ids_1T, position, position + 1) for position in range(before, point)]
        cached.append(statistics.median(steps[-WINDOW:]))
        uncached.append(_seconds(whole, token_ids_1T, 0, point))
    return uncached, cached


def _seconds(run: Pass, token_ids_1T: np.ndarray, start: int, stop: int) -> float:
    began = time.perf_counter()
    run(token_ids_1T[:, start:stop], np.arange(start, stop)[None])
    return time.perf_counter() - began
