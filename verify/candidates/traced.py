"""What a candidate's run shows of the inside of its graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from verify.drive import CandidateRun

LARGEST = 2**26  # elements of a tensor that is looked at


@dataclass(frozen=True)
class Pass:
    """One run of the graph: the positions of its tokens (-1 is padding), and the tensors looked at, by name."""

    positions_BT: np.ndarray
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Traced:
    """A candidate's run with more of its tensors given.

    Attributes:
        run: what it gave otherwise, which has to be what it gives untraced.
        passes: in order.
        providers: who ran a node, by its name; of nodes that were not fused away.
    """

    run: CandidateRun
    passes: Sequence[Pass]
    providers: Mapping[str, str]
