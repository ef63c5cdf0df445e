"""The diagnosis of a run that is equal to what its own settings and weights say, though not to what was asked for."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from verify.causes.pages import fix
from verify.compare import Explained
from verify.expect import AND, Expectation
from verify.report.result import CauseFound, Diagnosis, Location, Residual
from verify.truth.arithmetic import Arithmetic

Named = tuple[str, Mapping[str, Any]]  # a cause, and its parameters


def named_by_settings(explained: Explained, stored_as: str | None) -> Diagnosis:
    """Names what the settings say beyond what was asked for; held against that, nothing else is wrong.

    Args:
        explained: the run.
        stored_as: how the export has its weights; None where they are the checkpoint's.
    """
    residual = Residual(explained.before, explained.after)
    rung = "weights" if _adds_weights(explained) else "cache" if _adds_scheme(explained) else "precision"
    causes = tuple(
        CauseFound(name, parameters, None, residual, "confirmed", fix(name))
        for name, parameters in _named(explained, stored_as)
    )
    return Diagnosis("named", causes, Location(rung=rung))


def _named(explained: Explained, stored_as: str | None) -> Iterator[Named]:
    if _adds_weights(explained):
        yield "weights-rounded", {"stored_as": stored_as}
    if explained.said.arithmetic != explained.asked.arithmetic:
        yield from _arithmetic(explained.said.arithmetic)
    if _adds_scheme(explained):
        yield "cache-quantized", {"scheme": _scheme_name(explained.said)}


def _arithmetic(arithmetic: Arithmetic) -> Iterator[Named]:
    if arithmetic.dtype is not np.float32:
        yield f"arithmetic-{np.dtype(arithmetic.dtype).name}", {}
    if arithmetic.float16_attention:
        yield "arithmetic-float16", {"where": "attention"}
    if arithmetic.block is not None:
        yield "activations-quantized", {"group": arithmetic.block}
    if arithmetic.together:
        yield "activations-quantized", {"group": "all that is fed together"}


def _adds_weights(explained: Explained) -> bool:
    return explained.said.own_weights and not explained.asked.own_weights


def _adds_scheme(explained: Explained) -> bool:
    return explained.said.scheme not in (None, explained.asked.scheme)


def _scheme_name(said: Expectation) -> str:
    return said.name.rpartition(AND)[2]
