"""Mistakes of a runtime, which no counterfactual makes: they are found by running the same graph in other ways."""

from collections.abc import Iterator

from verify.causes import Cause, Evidence
from verify.naming.counterfactual import Counterfactual


def graph_optimizer(evidence: Evidence) -> Iterator[Counterfactual]:
    """The graph is right as it stands, and wrong once the runtime has optimised it.

    Seen: with ORT_DISABLE_ALL the run is equal, with the default level it is not; traced, it may be right again.
    Why: a fusion replaces a pattern by an operator that computes something else, or for other shapes.
    Test: the same export on the plain CPU with optimisation off, then level by level; "acts_as" is what it comes to.
    Fix: turn that level off (graph_optimization_level), and report the graph that --repro writes.
    Source: ONNX Runtime issue 17689.
    """
    return iter(())


def runtime_kernel(evidence: Evidence) -> Iterator[Counterfactual]:
    """One operator of the runtime gives wrong results for right inputs.

    Seen: the export is right on the plain CPU and wrong on its provider, one node of it on the very same inputs.
    Why: a kernel that is wrong for some shapes, types, lengths or processors.
    Test: each node alone on the inputs that it had, on the plain CPU and in ONNX's ReferenceEvaluator.
    Fix: another provider or version of the runtime; report the node that --repro writes.
    Source: ONNX Runtime issues 29739 and 20521.
    """
    return iter(())


CAUSES: tuple[Cause, ...] = (graph_optimizer, runtime_kernel)
