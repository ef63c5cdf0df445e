"""A mistake that a runtime makes of an export that is right: named after the rung of the ladder on which it stands."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from verify.locate import Located, Rung, blamed
from verify.report.diagnosis import cause_in_a_phrase
from verify.report.result import CauseFound, Diagnosis, Residual

OPTIMIZER, KERNEL = "graph-optimizer", "runtime-kernel"
# Ways of saving that a runtime has by right: they explain what a provider gives, and no node of it is wrong.
BY_RIGHT = ("arithmetic-", "activations-quantized", "cache-quantized", "weights-rounded")
EXPLAINED = 1 / 3  # of the ratio: what the rung before may leave of it, as of any cause


def with_runtime_fault(found: Diagnosis, located: Located, rungs: Sequence[Rung], bound: float) -> Diagnosis:
    """The diagnosis with the runtime's mistake as its cause, where the ladder proves that there is one.

    The export is right on the plain CPU, unoptimised; with one thing more it is wrong, and gives just what the
    candidate gives. Of an optimiser that is all there is to know. Of a provider it has to be known which node: one that
    the plain CPU computes otherwise on the same inputs. What the catalogue has for a mistake in exports may describe
    what the runtime does, but it is not in this export.

    Args:
        found: what the catalogue's causes explain.
        located: where it goes wrong.
        rungs: of the ladder.
        bound: noise ratio up to which two runs are the same.
    """
    explaining = [cause for cause in found.causes if cause.status != "ruled-out"]
    rung, before = _proven(rungs, bound)
    if rung is None or before is None or any(cause.name.startswith(BY_RIGHT) for cause in explaining):
        return found
    parameters = _of_optimizer(rung) if rung.name == "optimizer" else _of_kernel(located)
    if parameters is None:
        return found
    if explaining:
        parameters = {**parameters, "acts_as": " or ".join(map(cause_in_a_phrase, explaining))}
    name = OPTIMIZER if rung.name == "optimizer" else KERNEL
    cause = CauseFound(name, parameters, None, Residual(rung.ratio or 0.0, before), "confirmed")
    ruled_out = [each for each in found.causes if each.status == "ruled-out"]
    return replace(found, status="named", causes=(cause, *ruled_out))


def _proven(rungs: Sequence[Rung], bound: float) -> tuple[Rung | None, float | None]:
    """The rung of the optimiser or the provider, where it is the whole mistake, and the noise ratio on the one before.

    The rung before has to leave little of it, and this one has to be what the candidate does.
    """
    place = next((place for place, rung in enumerate(rungs) if rung.is_wrong), None)
    if place is None or blamed(rungs) not in ("optimizer", "provider"):
        return None, None
    rung, before = rungs[place], rungs[place - 1].ratio
    if rung.ratio is None or rung.distance is None or before is None:
        return None, None
    # What is not finite is as far from right as can be, and no further from itself than NaN is.
    is_whole = rung.distance <= bound or not math.isfinite(rung.ratio)
    return (rung, before) if is_whole and not before > EXPLAINED * rung.ratio else (None, None)


def _of_optimizer(rung: Rung) -> Mapping[str, Any]:
    return {"level": rung.level}


def _of_kernel(located: Located) -> Mapping[str, Any] | None:
    """The node that is wrong on right inputs, and who has it right; None where none is known."""
    first = located.first
    if first is None or located.vanishes:
        return None
    if first.differs is not None:
        differs = first.differs
        return {
            "node": differs.node,
            "operator": differs.operator,
            "provider": first.provider,
            "off_by": differs.by,
            "right_on": ", ".join(differs.others),
        }
    if first.replays:
        node = {"node": first.node, "operator": first.operator, "provider": first.provider}
        return {**node, "right_on": ", ".join(first.replays)}
    return None
