"""Mistakes in the norms and in the MLP."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import cycle

import numpy as np

from refengine.ops import Ops
from verify.causes import Cause, Evidence, Family
from verify.causes.constants import is_close, misread, shortest
from verify.naming.counterfactual import Counterfactual, Layers

USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
NORMS = ("input_layernorm", "post_attention_layernorm")  # of a layer, in the order in which it has them
ERF_STEPS, ERF_END = 4096, 6  # of the table, a unit and on either side: beyond it erf is 1 in float64


def norm_eps(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """RMSNorm adds another epsilon than the checkpoint's rms_norm_eps.

    Seen: every token may be right; logits are a hundred times the float32 noise off, most at tokens of low variance.
    Why: exporters and converters fall back to a default, 1e-6 for 1e-5 or the other way round.
    Test: the reference with that rms_norm_eps, in all norms, in those of one layer, or in one of the two; the value is
        read from the graph, or solved for.
    Fix: write rms_norm_eps of config.json into every norm of the export.
    Source: llama.cpp #2373 and #2384.
    """
    right_eps = evidence.config.rms_norm_eps

    def with_eps(layers: Layers, norm: str | None, eps: float) -> Counterfactual:
        parameters = {"rms_norm_eps": eps} | ({"norm": norm} if norm else {})
        return Counterfactual("norm-eps", parameters, layers, ops=partial(_norm_with_eps, eps, norm))

    for norm in (None, *NORMS):
        for eps, layers in misread(evidence, "rms_norm_eps", lambda read: is_close(read, right_eps), norm):
            yield with_eps(layers, norm, shortest(eps))
    for layers in evidence.suspects:
        for norm in (None,) if layers is None else (None, *NORMS):
            for eps in USUAL_EPS:
                if not is_close(eps, right_eps):
                    yield with_eps(layers, norm, eps)
            yield Family(partial(with_eps, layers, norm), 1e-12, 1.0)


def _norm_with_eps(eps: float, norm: str | None, right: Ops) -> Ops:
    """Norms with another epsilon; those of a layer come in turn, and operators are made anew for each layer."""
    in_turn = cycle(NORMS)

    def rms_norm(x_BTD: np.ndarray, weight_D: np.ndarray, right_eps: float) -> np.ndarray:
        is_wrong = norm in (None, next(in_turn))
        return right.rms_norm(x_BTD, weight_D, eps if is_wrong else right_eps)

    return replace(right, rms_norm=rms_norm)


def norm_weight_offset(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """RMSNorm multiplies by 1 + weight where the weight alone is right.

    Seen: wrong from the first token on, everywhere.
    Why: Gemma stores its norms as what is added to 1; its code was taken for a Llama, or its conversion was.
    Test: the reference with 1 added to the weights of norms, in all of them, in those of one layer, or in one of the
        two; or taken from them.
    Fix: use the norm of the checkpoint's own family.
    Source: transformers' GemmaRMSNorm.
    """

    for layers in evidence.suspects:
        for norm in (None,) if layers is None else (None, *NORMS):
            for offset in (1, -1):
                parameters = {"offset": offset} | ({"norm": norm} if norm else {})
                ops = partial(_norm_with_offset, offset, norm)
                yield Counterfactual("norm-weight-offset", parameters, layers, ops=ops)


def _norm_with_offset(offset: int, norm: str | None, right: Ops) -> Ops:
    """Norms with other weights; those of a layer come in turn, and operators are made anew for each layer."""
    in_turn = cycle(NORMS)

    def rms_norm(x_BTD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
        is_wrong = norm in (None, next(in_turn))
        return right.rms_norm(x_BTD, weight_D + weight_D.dtype.type(offset * is_wrong), eps)

    return replace(right, rms_norm=rms_norm)


def mlp_gate_up_swapped(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The MLP's gate and up projections are exchanged: silu is taken of up.

    Seen: wrong from the first token on; keys and values of the first layer are right.
    Why: a fused gate_up weight was split in the other order, or the two were matched by position.
    Test: the reference with gate and up exchanged, in all layers or in one.
    Fix: map mlp.gate_proj and mlp.up_proj by name.
    Source: the fused gate_up_proj of onnxruntime-genai's model builder and of Hugging Face's Phi-3.
    """

    def ops(right: Ops) -> Ops:
        return replace(right, silu_gate=lambda gate_BTF, up_BTF: right.silu_gate(up_BTF, gate_BTF))

    for layers in evidence.suspects:
        yield Counterfactual("mlp-gate-up-swapped", layers=layers, ops=ops)


def activation(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The MLP's activation is another one than silu.

    Seen: wrong from the first token on; keys and values of the first layer are right.
    Why: hidden_act was not read, and a default of another family was taken.
    Test: the reference with gelu (exact, or with tanh), quick-gelu, relu (or its square), mish, hard-swish, tanh,
        sigmoid or none in silu's place.
    Fix: export with hidden_act of config.json.
    Source: torch.nn.functional.gelu for the forms; transformers' ACT2FN for the names.
    """

    def ops(function: Callable[[np.ndarray], np.ndarray], right: Ops) -> Ops:
        return replace(right, silu_gate=lambda gate_BTF, up_BTF: function(gate_BTF) * up_BTF)

    for layers in evidence.suspects:
        for name, function in ACTIVATIONS.items():
            yield Counterfactual("activation", {"hidden_act": name}, layers, ops=partial(ops, function))


def _gelu(x: np.ndarray) -> np.ndarray:
    """`x * normal_cdf(x)`. Source: arXiv 1606.08415, section 2."""
    return (0.5 * x * (1 + _erf(x / math.sqrt(2)))).astype(x.dtype)


def _erf(x: np.ndarray) -> np.ndarray:
    """erf in float64, which NumPy has not: a table, and from its nearest entry three terms of the Taylor series."""
    x = np.clip(x.astype(np.float64), -ERF_END, ERF_END)
    place = np.rint(x * ERF_STEPS).astype(np.intp)
    near = place / ERF_STEPS
    off = x - near
    slope = 2 / math.sqrt(math.pi) * np.exp(-near * near)
    return _erf_table()[place + ERF_STEPS * ERF_END] + slope * off * (
        1 - off * (near - off * (2 * near * near - 1) / 3)
    )


@cache
def _erf_table() -> np.ndarray:
    ends = ERF_STEPS * ERF_END
    return np.array([math.erf(place / ERF_STEPS) for place in range(-ends, ends + 1)])


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Source: arXiv 1606.08415, section 2."""
    root, cubic = (x.dtype.type(number) for number in (math.sqrt(2 / math.pi), 0.044715))
    return x.dtype.type(0.5) * x * (1 + np.tanh(root * (x + cubic * x * x * x)))


def _quick_gelu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x.dtype.type(1.702) * x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp overflows to inf for very negative x, and 1 / inf is the right 0
        return 1 / (1 + np.exp(-x))


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def _relu2(x: np.ndarray) -> np.ndarray:
    """Source: arXiv 2109.08668."""
    return np.square(np.maximum(x, 0))


def _mish(x: np.ndarray) -> np.ndarray:
    """`x * tanh(softplus(x))`. Source: arXiv 1908.08681."""
    return x * np.tanh(np.logaddexp(x, x.dtype.type(0)))


def _hard_swish(x: np.ndarray) -> np.ndarray:
    """Source: arXiv 1905.02244, section 5.2."""
    return x * np.clip(x / 6 + x.dtype.type(0.5), 0, 1)


def _linear(x: np.ndarray) -> np.ndarray:
    return x


ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "relu2": _relu2,
    "mish": _mish,
    "hard_swish": _hard_swish,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "linear": _linear,
}

CAUSES: Sequence[Cause] = (norm_eps, norm_weight_offset, activation, mlp_gate_up_swapped)
