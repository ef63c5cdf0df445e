"""Faults of the norms and of the MLP."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from verify.export.faults.writing import Fault, Module, everywhere_and_in_one, only_in, write_faulty
from verify.export.graph import Scope, Value
from verify.export.modules import MODULES

MIDDLE = 4


def norm_with_eps(eps: float) -> Module:
    """RMSNorm with another epsilon."""
    return lambda at, x_BTD, _: MODULES.rms_norm(at, x_BTD, eps)


def norm_with_eps_after_attention(eps: float) -> Module:
    """The same, in the norms before the MLP alone."""

    def rms_norm(at: Scope, x_BTD: Value, right: float) -> Value:
        return MODULES.rms_norm(at, x_BTD, eps if at.path.endswith("post_attention_layernorm") else right)

    return rms_norm


def last_norm_with_eps(eps: float) -> Module:
    """The same, in the norm behind the last layer alone."""
    return lambda at, x_BTD, right: MODULES.rms_norm(at, x_BTD, eps if at.path == "model/norm" else right)


def norm_of_one_plus_weight(at: Scope, x_BTD: Value, eps: float) -> Value:
    """RMSNorm times 1 + weight."""
    normed_BTD = MODULES.rms_norm(at, x_BTD, eps)
    square_BTD = at("Mul", x_BTD, x_BTD)
    mean_BT1 = at("ReduceMean", square_BTD, at.constant("axes", [-1]), keepdims=1)
    root_BT1 = at("Sqrt", at("Add", mean_BT1, at.constant("rms_norm_eps", eps)))
    return at("Add", normed_BTD, at("Div", x_BTD, root_BT1))


def gate_up_swapped(at: Scope, gate_BTF: Value, up_BTF: Value) -> Value:
    """silu of up, times gate."""
    return MODULES.silu_gate(at, up_BTF, gate_BTF)


def gated_by(activation: Callable[[Scope, Value], Value]) -> Module:
    """Another activation of the gate, times up."""
    return lambda at, gate_BTF, up_BTF: at("Mul", activation(at, gate_BTF), up_BTF)


def gelu(at: Scope, x: Value) -> Value:
    """`x * normal_cdf(x)`."""
    erf = at("Erf", at("Mul", x, at.constant("half_root", 0.5**0.5)))
    return at("Mul", at("Mul", x, at.constant("half", 0.5)), at("Add", erf, at.constant("one", 1.0)))


def gelu_tanh(at: Scope, x: Value) -> Value:
    """GELU by its approximation with tanh."""
    cube = at("Mul", at("Mul", x, at("Mul", x, x)), at.constant("cubic", 0.044715))
    tanh = at("Tanh", at("Mul", at("Add", x, cube), at.constant("root", float(np.sqrt(2 / np.pi)))))
    return at("Mul", at("Mul", x, at.constant("half", 0.5)), at("Add", tanh, at.constant("one", 1.0)))


def quick_gelu(at: Scope, x: Value) -> Value:
    """`x * sigmoid(1.702 * x)`."""
    return at("Mul", x, at("Sigmoid", at("Mul", x, at.constant("steepness", 1.702))))


def relu(at: Scope, x: Value) -> Value:
    """The larger of x and 0."""
    return at("Relu", x)


ACTIVATIONS: Sequence[tuple[str, Callable[[Scope, Value], Value]]] = (
    ("gelu", gelu),
    ("gelu with tanh", gelu_tanh),
    ("quick gelu", quick_gelu),
    ("relu", relu),
)

FAULTS: Sequence[Fault] = (
    *everywhere_and_in_one("eps 1e-6", "norm-eps", "rms_norm", norm_with_eps(1e-6), layer=MIDDLE),
    *everywhere_and_in_one("eps 3.3e-5", "norm-eps", "rms_norm", norm_with_eps(3.3e-5), layer=MIDDLE),
    Fault(
        f"eps 1e-3 after attention, layer {MIDDLE}",
        "norm-eps",
        frozenset({MIDDLE}),
        partial(write_faulty, modules=only_in([MIDDLE], "rms_norm", norm_with_eps_after_attention(1e-3))),
    ),
    Fault(
        "eps 1e-2 in the last norm",
        "norm-eps",
        frozenset({12}),
        partial(write_faulty, modules={"rms_norm": last_norm_with_eps(1e-2)}),
    ),
    *everywhere_and_in_one(
        *("norms times 1 + weight", "norm-weight-offset", "rms_norm", norm_of_one_plus_weight), layer=MIDDLE
    ),
    *everywhere_and_in_one(*("gate and up swapped", "mlp-gate-up-swapped", "silu_gate", gate_up_swapped), layer=MIDDLE),
    *(
        fault
        for name, activation in ACTIVATIONS
        for fault in everywhere_and_in_one(name, "activation", "silu_gate", gated_by(activation), layer=MIDDLE)
    ),
)
