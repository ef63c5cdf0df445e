"""Prompts on which mistakes that explain a run alike differ, if there are any."""

from collections.abc import Iterator, Sequence

import numpy as np

from refengine.config import Config
from refengine.tokens import Rows
from refengine.weights import Weights
from verify.naming.as_if import Passes, run_as_if
from verify.naming.counterfactual import Mistakes
from verify.prompts import probes
from verify.truth.noise import EQUIVALENT_ORDERS, rms

APART = 10.0  # times the noise of either: float32 in another order of sums
NEW_TOKENS = 4  # after each probe
LONGER = 4  # times as long as the usual long probe, where there is room
SUMS = EQUIVALENT_ORDERS["sums in two halves"]


def telling_probe(weights: Weights, one: Mistakes, other: Mistakes, *, use_cache: bool) -> str | None:
    """The first probe on which the reference with one of two sets of mistakes is not that with the other, in words.

    Args:
        weights: in float32.
        one, other: that explain the same run.
        use_cache: the run was decoded with the cache.

    Returns:
        None where no probe tells them apart.
    """
    for name, passes in _probes(weights.config, use_cache):
        (one_PV, noisy_PV), other_PV = _twice(weights, passes, one), _once(weights, passes, other)
        there_P = np.isfinite(one_PV).all(axis=-1) & np.isfinite(other_PV).all(axis=-1)
        noise_P = np.maximum(rms((noisy_PV - one_PV)[there_P], axis=-1), np.finfo(np.float32).tiny)
        if (rms((other_PV - one_PV)[there_P], axis=-1) > APART * noise_P).any():
            return name
    return None


def _probes(config: Config, use_cache: bool) -> Iterator[tuple[str, Passes]]:
    """From what is short to what is long, then what shows padding, then what one batch leaves to the next."""
    room = config.max_position_embeddings - NEW_TOKENS
    long, short = probes(config, NEW_TOKENS)
    random = np.random.default_rng(1)
    longer = random.integers(0, config.vocab_size, min(LONGER * len(long), room)).tolist()
    tokens = random.integers(0, config.vocab_size, (3, NEW_TOKENS)).tolist()

    def passes(prompts: Rows, batches: Sequence[Sequence[int]]) -> Passes:
        return Passes(prompts, tokens[: len(prompts)], batches, use_cache)

    yield f"a prompt of {len(short)} tokens", passes([short], [(0,)])
    yield f"a prompt of {len(long)} tokens", passes([long], [(0,)])
    if len(longer) > len(long):
        yield f"a prompt of {len(longer)} tokens", passes([longer], [(0,)])
    padded = f"prompts of {len(long)} and {len(short)} tokens"
    yield f"{padded} in one batch", passes([long, short], [(0, 1)])
    yield f"{padded}, one after the other", passes([long, short], [(0,), (1,)])


def _once(weights: Weights, passes: Passes, mistakes: Mistakes) -> np.ndarray:
    return np.concatenate(run_as_if(weights, passes, mistakes)).astype(np.float64)


def _twice(weights: Weights, passes: Passes, mistakes: Mistakes) -> tuple[np.ndarray, np.ndarray]:
    """In the reference's own order of sums, and in another one."""
    again = run_as_if(weights, passes, mistakes, SUMS)
    return _once(weights, passes, mistakes), np.concatenate(again).astype(np.float64)
