"""Arithmetic coarser than float32, which is no mistake to be reproduced: it has noise of its own.

What rounding does to a run depends on the order of every sum and on where a runtime fuses operators, so no rerun gives
a candidate's numbers back. Instead the unit changes: such a cause explains a run if the run is as far from the truth as
this arithmetic is, no further than its bound allows and no nearer than its most exact order comes. A mistake that
leaves only float32's own noise explains more than that, and goes before it.
"""

from collections.abc import Iterator

from verify.causes import Cause, Evidence, Unit
from verify.report.result import NoiseRatio
from verify.truth.arithmetic import ARITHMETICS, Arithmetic

BLOCKS = (32, 64, 128, 16)  # inputs that share a scale when they become int8

COMPRESSED = ("int8", "int4", "int2")  # how weights are stored whose inputs runtimes round


def arithmetic_float16(evidence: Evidence) -> Iterator[Unit]:
    """The runtime computes in float16.

    Seen: most tokens are right; logits are a thousand times the float32 noise off, everywhere alike.
    Why: the graph was converted to float16, or the runtime was asked for it, or it is its default.
    Test: the run is as far from the reference as float16 arithmetic is, measured in several equivalent orders; but not
        where the plain CPU gives the same run of a graph without narrow floats, nor where all layers are right.
    Fix: nothing where that is meant (--expect float16); else INFERENCE_PRECISION_HINT=f32, or a graph in float32.
    Source: transformers issue 27179.
    """
    if _may_be_narrow(evidence):
        yield Unit("arithmetic-float16", {}, ARITHMETICS["float16"])


def arithmetic_bfloat16(evidence: Evidence) -> Iterator[Unit]:
    """The runtime computes in bfloat16.

    Seen: many tokens are right; logits are ten thousand times the float32 noise off, everywhere alike.
    Why: OpenVINO takes bfloat16 by itself on a CPU that has it.
    Test: the run is as far from the reference as bfloat16 arithmetic is, measured in several equivalent orders; but not
        where the plain CPU gives the same run of a graph without narrow floats, nor where all layers are right.
    Fix: nothing where that is meant (--expect bfloat16); else INFERENCE_PRECISION_HINT=f32.
    Source: OpenVINO issue 24501.
    """
    if _may_be_narrow(evidence):
        yield Unit("arithmetic-bfloat16", {}, ARITHMETICS["bfloat16"])


def activations_quantized(evidence: Evidence) -> Iterator[Unit]:
    """Inputs of linear maps are rounded to int8.

    Seen: with compressed weights, even the reference on the export's own weights is thousands of times the noise away.
    Why: MatMulNBits with accuracy_level 4, or OpenVINO's dynamic quantisation, which is on by default.
    Test: the run is as far from the reference as arithmetic with such inputs is, with one scale for 32, 64, 128 or 16.
    Fix: nothing where that is meant (--expect int8-activations); else accuracy_level 0, or
        DYNAMIC_QUANTIZATION_GROUP_SIZE=0.
    Source: ONNX Runtime issue 29849.
    """
    if evidence.is_outside_layers or (evidence.own is not None and evidence.own.stored_as not in COMPRESSED):
        return
    for block in dict.fromkeys([*evidence.constants.get("int8_block", ()), *BLOCKS]):
        name = f"int8-activations by {block}"
        yield Unit("activations-quantized", {"group": block}, Arithmetic(name, block=block))


def _may_be_narrow(evidence: Evidence) -> bool:
    """Whether all may have been computed in less than float32: the plain CPU does so only where the graph says it."""
    is_asked_for = not evidence.is_plain or bool(evidence.constants.get("narrow_floats"))
    return is_asked_for and not evidence.is_outside_layers


def explains(noise: NoiseRatio) -> bool:
    """Whether a run is as noisy as an arithmetic, given its ratio in units of that arithmetic's noise."""
    return is_that_noise(noise.logits, noise.bound, noise.worst_position.ratio, noise.position_bound)


def is_that_noise(ratio: float, bound: float, worst: float, position_bound: float) -> bool:
    """The same, from the ratio over all positions and that at the worst one.

    Far less noise than that is something else: a runtime that rounds so often cannot be so exact.
    """
    return ratio <= bound and worst <= position_bound and ratio >= 1 / bound


CAUSES: tuple[Cause, ...] = (arithmetic_float16, arithmetic_bfloat16, activations_quantized)
