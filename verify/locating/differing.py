"""The node that a provider computes otherwise than the plain CPU does, on the very same inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from verify.contestant import Contestant
from verify.errors import NoVerdict
from verify.locating.flow import Flow, named
from verify.locating.insight import Insight
from verify.locating.ladder import PLAIN
from verify.truth.noise import rms

# Of a node's result: no rounding explains more, be it of what is multiplied, to 8 bits, or of all values, to bfloat16.
COARSE = 2.0**-5


@dataclass(frozen=True)
class Differing:
    """A node that gives something else than it does elsewhere on the same inputs.

    Attributes:
        node: its name in the graph, or where it has none that of what it gives.
        operator: of it.
        by: root mean square of the difference, in that of the result; infinite where one of both is not finite.
        others: who agree with each other on what is right, and not with the candidate.
    """

    node: str
    operator: str
    by: float
    others: tuple[str, ...]


def first_differing(
    contestant: Contestant,
    insight: Insight,
    flow: Flow,
    places: Sequence[int],
    arrays: Mapping[str, np.ndarray],
    is_right: Callable[[str, np.ndarray], bool],
) -> Differing | None:
    """The first of some nodes whose result is not what the plain CPU makes of the node's own inputs.

    Args:
        contestant: the candidate, open.
        insight: how it is looked into.
        flow: its graph.
        places: of the nodes, in order.
        arrays: what the candidate fed to them and what they gave.
        is_right: whether a tensor is right where it counts; what a node gives for padding alone is nobody's.

    Returns:
        None where all agree, or no two do, where its nodes cannot be run alone, and of a candidate on the plain CPU
        itself.
    """
    if contestant.runtime == PLAIN:
        return None
    made = [name for place in places for name in flow.nodes[place].outputs if name in arrays]
    try:
        again = contestant.apply(insight.replay_each, made, dict(arrays))
    except NoVerdict:
        return None
    for place in places:
        node = flow.nodes[place]
        given = [name for name in node.outputs if name in again]
        by = max((distance(arrays[name], again[name]) for name in given), default=0.0)
        if by <= COARSE or all(is_right(name, arrays[name]) for name in given):
            continue
        fed = {name: arrays[name] for name in node.inputs if name in arrays}
        found = contestant.apply(insight.replay, given, fed, given)
        agree = [
            who for who, each in found.items() if all(distance(each[name], again[name]) <= COARSE for name in given)
        ]
        if agree:
            return Differing(named(node), node.operator, by, tuple(agree))
    return None


def distance(array: np.ndarray, right: np.ndarray) -> float:
    """Root mean square of their difference in that of what is right; infinite where they cannot be compared."""
    if array.shape != right.shape:
        return float("inf")
    array, right = array.astype(np.float64), right.astype(np.float64)
    same = (array == right) | (np.isnan(array) & np.isnan(right))
    if not (np.isfinite(array) & np.isfinite(right))[~same].all():
        return float("inf")
    error = float(rms(np.where(same, 0.0, array) - np.where(same, 0.0, right)))
    return error / max(float(rms(right[np.isfinite(right)])), float(np.finfo(np.float64).tiny)) if error else 0.0
