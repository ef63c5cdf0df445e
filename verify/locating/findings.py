"""What a walk through a part of a graph finds."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Guilty:
    """A node that makes something else out of what is right, and the trace point that comes out wrong.

    Attributes:
        place: of the node in the flow.
        point: as `refengine.trace` calls it, without the layer.
        heads: those that are wrong; empty where the point has none.
        inputs_are_right: every input with a value is known to be right.
        order: whose values each head has, where heads have but changed places; empty else.
    """

    place: int
    point: str
    heads: tuple[int, ...]
    inputs_are_right: bool
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shown:
    """A few nodes in which a mistake shows.

    Attributes:
        name: of the tensor that is wrong.
        made: what the nodes make.
        fed: what they are fed.
        right: what the tensor should be, in float64, where `there` says so.
    """

    name: str
    made: tuple[str, ...]
    fed: Mapping[str, np.ndarray]
    right: np.ndarray
    there: np.ndarray
