"""The catalogue of causes: one family a file, one function a cause.

A cause is a function of the evidence that yields counterfactuals: the reference as if that mistake were in it, once for
each value of its parameters that is worth trying. Its docstring is what `python -m verify explain` prints, in fixed
sections: a first line that says what is wrong, then "Seen:", "Why:", "Test:", "Fix:" and "Source:".
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from refengine.config import Config
from verify.naming.counterfactual import Counterfactual, Layers
from verify.truth.arithmetic import Arithmetic
from verify.weights.exported import ExportedCheckpoint


@dataclass(frozen=True)
class Evidence:
    """What is known of a candidate that is not equal, by which causes are pruned and their parameters found.

    Attributes:
        config: the checkpoint's.
        use_cache: the run to be explained was decoded with the cache.
        is_padded: it had rows of different lengths in one batch.
        longest: most positions of a row.
        batches: how many of them came one after another.
        suspects: sets of layers that the mistake may be in, None for all of them; the likeliest first.
        constants: numbers read from the export's graph, by what they are: "rms_norm_eps", "inv_freq", "scale", ...;
            "head_order", whose values each head of the traced attention has; "cache_sources", of which layer the keys
            or values are that another one gives, as `misplaced` finds them; "narrow_floats", if there are any.
        is_plain: the plain CPU, which computes what the graph says, gives the very run with nothing optimised.
        is_outside_layers: each layer is right by itself, and what is before or behind them is not.
        is_our_loop: the run was decoded by this project's own loop, which makes none of the mistakes of loops.
        own: the checkpoint as the export holds it; None where its weights could not be read.
    """

    config: Config
    use_cache: bool = False
    is_padded: bool = False
    longest: int = 1
    batches: int = 1
    suspects: tuple[Layers, ...] = (None,)
    constants: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    is_plain: bool = False
    is_outside_layers: bool = False
    is_our_loop: bool = True
    own: ExportedCheckpoint | None = None


@dataclass(frozen=True)
class Family:
    """Counterfactuals along one continuous parameter, of which the one that fits best is to be found.

    Attributes:
        make: the counterfactual of a value.
        low, high: the range of values, both above 0; searched on a logarithmic scale.
    """

    make: Callable[[float], Counterfactual]
    low: float
    high: float


@dataclass(frozen=True)
class Unit:
    """Arithmetic coarser than float32: no mistake to be reproduced, but noise of its own, which is the unit then.

    Attributes:
        cause: its name in the catalogue.
        parameters: as a report prints them.
        arithmetic: whose noise explains what a candidate gives, if it is no more and no less than that.
    """

    cause: str
    parameters: Mapping[str, Any]
    arithmetic: Arithmetic


Cause = Callable[[Evidence], Iterator[Counterfactual | Family | Unit]]
