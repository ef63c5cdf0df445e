"""Where a candidate's keys and values leave the noise: taps that a run with a cache gives for nothing."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from verify.drive import CandidateRun
from verify.naming.counterfactual import Layers
from verify.truth.noise import rms
from verify.truth.reference import Measured, ReferenceRun

Suspects = tuple[Layers, ...]


@dataclass(frozen=True)
class Tap:
    """A value of one layer, held against the reference's.

    Attributes:
        point: as `refengine.trace` calls it.
        layer: it belongs to.
        ratio: noise ratio over all positions.
        is_beyond: whether it has left the noise, over all positions or at one of them.
        row, position: the first that has left it, the earliest position of any row; the worst one where none has.
        heads: those that have left it; all of them, as a rule.
    """

    point: str
    layer: int
    ratio: float
    is_beyond: bool
    row: int
    position: int
    heads: tuple[int, ...]


def free_taps(run: CandidateRun, reference: ReferenceRun, head_dim: int) -> tuple[Tap, ...]:
    """Keys and values of every layer, in the order in which they are computed; empty where the run gives none.

    A cache that holds more or fewer positions than were fed is left out: which are which is not known.
    """
    return tuple(
        _tap(point, run.caches[point], reference.caches[point], reference.lengths, head_dim)
        for point in sorted(run.caches, key=lambda point: (layer_of(point), point))
        if [len(row) for row in run.caches[point]] == list(reference.lengths)
    )


def suspects(run: CandidateRun, reference: ReferenceRun) -> Suspects:
    """Sets of layers that a mistake may be in, the likeliest first; None is all of them.

    A mistake in layer i first shows in the keys and values of layer i + 1, unless it is in what makes those of layer i
    itself; what is wrong in all layers shows as early as one mistake can.
    """
    layers = len(reference.caches) // 2
    taps = free_taps(run, reference, head_dim=1)
    if not taps:
        return (None, *_singles(range(layers)))
    wrong = {(tap.layer, tap.point[-len("k_cache")]) for tap in taps if tap.is_beyond}
    if not wrong:
        return (frozenset({layers - 1}), None)
    first = min(layer for layer, _ in wrong)
    kinds = {kind for layer, kind in wrong if layer == first}
    carried_on = first + 1 == layers or any(layer == first + 1 for layer, _ in wrong)
    here, before = (first,), (first - 1,) if first else ()
    if kinds == {"k"} or not carried_on:
        singles, in_all = (*here, *before) if len(kinds) > 1 else here, first == 0
    elif kinds == {"v"}:
        singles, in_all = (*here, *before), first == 0
    else:
        singles, in_all = (*before, *here), first <= 1
    found = _singles(singles)
    return (None, *found) if in_all else (*found, None)


def misplaced(run: CandidateRun, reference: ReferenceRun) -> tuple[tuple[str, int, int], ...]:
    """Keys and values that are another layer's in the prompts, where whoever hands them on leaves them right.

    Returns:
        "k_cache" or "v_cache", the layer that gives them, and the layer whose they are.
    """
    prompt_P = np.concatenate(
        [np.arange(length) < len(prompt) for length, prompt in zip(reference.lengths, reference.prompts, strict=True)]
    )

    def is_that_of(given_PX: np.ndarray, point: str) -> bool:
        right = reference.caches[point]
        error_P = rms(given_PX[prompt_P] - right.value64_PX[prompt_P], axis=-1)
        return bool((error_P <= right.noise.honest_P[prompt_P]).all())

    found = []
    for tap in free_taps(run, reference, head_dim=1):
        given_PX, kind = np.concatenate(run.caches[tap.point]), tap.point.rpartition(".")[2]
        if not tap.is_beyond or is_that_of(given_PX, tap.point):
            continue
        others = (point for point in reference.caches if point.endswith(kind) and is_that_of(given_PX, point))
        found += [(kind, tap.layer, layer_of(point)) for point in itertools.islice(others, 1)]
    return tuple(found)


def layer_of(point: str) -> int:
    """The layer that "layers.3.self_attn.k_cache" is in."""
    return int(point.split(".")[1])


def _singles(layers: Iterable[int]) -> list[frozenset[int]]:
    return [frozenset({layer}) for layer in layers]


def _tap(point: str, rows: Sequence[np.ndarray], reference: Measured, lengths: Sequence[int], head_dim: int) -> Tap:
    error_PX = np.concatenate(rows) - reference.value64_PX
    unit_P, noise = reference.noise.rms_P, reference.noise
    ratio_P = rms(error_PX, axis=-1) / unit_P
    ratio = float(rms(rms(error_PX, axis=-1)) / rms(unit_P))
    # Negated, so that NaN is beyond any bound.
    beyond_P = ~(ratio_P <= noise.position_bound)
    row_P = np.repeat(np.arange(len(lengths)), lengths)
    position_P = np.concatenate([np.arange(length) for length in lengths])
    there = np.flatnonzero(beyond_P)
    first = int(there[position_P[there].argmin()]) if there.size else int(ratio_P.argmax())
    error_PKH = error_PX.reshape(len(error_PX), -1, head_dim)
    heads = error_PKH.shape[1]
    # All of the noise may be that of one head.
    bound = noise.overall_bound * heads**0.5
    ratio_K = rms(error_PKH, axis=(0, 2)) / rms(unit_P)
    return Tap(
        point,
        layer_of(point),
        ratio,
        bool(there.size) or not ratio <= noise.overall_bound,
        int(row_P[first]),
        int(position_P[first]),
        tuple(np.flatnonzero(~(ratio_K <= bound)).tolist()),
    )
