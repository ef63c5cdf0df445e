"""Arithmetic other than float32, as data: the weights and operators of a forward pass, rounded where runtimes round.

The truth stays the reference in float64. What such an arithmetic costs is measured as the noise of float32 is: the
reference in equivalent orders, each of them rounded like this. Of a narrow float nearly all noise is made by rounding
what goes from one operator to the next, which another order of summing hardly changes; so the orders differ in *where*
they round too, as runtimes do that fuse operators and runtimes that do not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, cycle
from typing import Any

import ml_dtypes
import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.ops import Ops
from refengine.weights import Layer, Linear, Weights
from verify.truth.float16_attention import attending_in_float16
from verify.truth.noise import (
    PLAINEST,
    as_it_is,
    attend_with_probabilities,
    orders_for,
    rms_norm_scaled_first,
    rotate_by_products,
    silu_gate_by_sigmoid,
)
from verify.truth.opened import open_weights

INT8_MAX = 127  # symmetric: -128 is not used
UINT8_MAX = 255
Rounding = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Arithmetic:
    """How a runtime computes.

    Attributes:
        name: as `--expect` takes it.
        dtype: of weights, and of what goes from one operator to the next. Products are summed in float32, an operator
            is float32 inside, and neither logits nor the weights of norms are rounded.
        block: so many inputs of a linear map become int8 with one scale; None: none do.
        float16_attention: attention multiplies in float16, as llama.cpp's does with its usual cache.
        together: all inputs of a linear map that are fed together become uint8 with one scale, so that what a token
            gives depends on those in the same pass. Rows are then read one by one, every new token in its own pass.
        anew: in these passes each new token comes with the whole row before it, as it does without a cache.

    Source: of `dtype` the execution graph of openvino 2026.4.1 on a CPU that has bfloat16, of `block` the same with
    DYNAMIC_QUANTIZATION_GROUP_SIZE, and MatMulNBits with accuracy_level 4 in onnxruntime 1.24; of `together`
    DynamicQuantizeLinear, which onnxruntime.quantization.quantize_dynamic puts before each product.
    """

    name: str = field(compare=False)
    dtype: type = np.float32
    block: int | None = None
    float16_attention: bool = False
    together: bool = False
    anew: bool = False

    @property
    def without_cache(self) -> "Arithmetic":
        """Of a run that reads whole rows at every step."""
        return replace(self, anew=True) if self.together else self

    def weights(self, checkpoint: Checkpoint) -> Weights:
        """The checkpoint's, in float32 arrays.

        What is added to the residual stream is an array of the narrow dtype, as that is: so the sums of the forward
        pass are rounded where they are stored, by NumPy.
        """
        if self.dtype is np.float32:
            return open_weights(checkpoint, np.float32)
        weights = Weights.open(checkpoint, np.float32, resident=False)  # no layer is there twice
        layers = [self._layer(layer) for layer in weights.layers()]
        head = [self._linear(piece, as_it_is) for piece in weights.head()]
        return replace(
            weights,
            embed=lambda token_ids: self._narrowed(weights.embed(token_ids)),
            layers=lambda: layers,
            head=lambda: head,
        )

    def orders(self, positions: int) -> dict[str, Ops]:
        """The equivalent orders for so many positions, for `weights`.

        Of a narrow float, each has other operators in steps whose results are rounded too.
        """
        orders = {name: self._quantising(ops) for name, ops in orders_for(positions).items()}
        if self.float16_attention:
            orders = attending_in_float16(orders)
        if self.dtype is np.float32:
            return orders
        in_steps: dict[str, Any] = {
            "rms_norm": partial(rms_norm_scaled_first, rounded=self._rounded),
            "silu_gate": partial(silu_gate_by_sigmoid, rounded=self._rounded),
            "attend": partial(attend_with_probabilities, rounded=self._rounded),
            "rotate": partial(rotate_by_products, rounded=self._rounded),
        }
        # Fewest first: the less two orders have in common, the less their errors do.
        subsets = [some for size in range(len(in_steps) + 1) for some in combinations(in_steps, size)]
        return {
            f"{name}; {' and '.join(some) or 'no operator'} in steps": self._between(
                replace(ops, **{each: in_steps[each] for each in some})
            )
            for (name, ops), some in zip(orders.items(), cycle(subsets), strict=False)
        }

    @property
    def plainest(self) -> Ops | None:
        """The least exact sums; None where a coarser arithmetic makes nearly all of the noise."""
        return PLAINEST if self == FLOAT32 else None

    def _quantising(self, ops: Ops) -> Ops:
        """These operators, of which the linear maps take int8 or uint8."""
        block = self.block
        if self.together:
            return replace(ops, linear=lambda x_BTI, proj: ops.linear(quantised_together(x_BTI), proj))
        if block is None:
            return ops
        return replace(ops, linear=lambda x_BTI, proj: ops.linear(quantised(x_BTI, block), proj))

    def _between(self, ops: Ops) -> Ops:
        """These operators, with rounded results."""

        def rounding(operator: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
            return lambda *arguments: self._rounded(operator(*arguments))

        return replace(
            ops,
            linear=lambda x_BTI, proj: proj.result(ops.linear(x_BTI, proj)),
            rms_norm=lambda x_BTD, *others: self._rounded(ops.rms_norm(x_BTD.astype(np.float32), *others)),
            rotate=rounding(ops.rotate),
            attend=rounding(ops.attend),
            silu_gate=rounding(ops.silu_gate),
        )

    def _layer(self, layer: Layer) -> Layer:
        return replace(
            layer,
            qkv_proj=self._linear(layer.qkv_proj, self._rounded),
            o_proj=self._linear(layer.o_proj, self._narrowed),
            gate_up_proj=self._linear(layer.gate_up_proj, self._rounded),
            down_proj=self._linear(layer.down_proj, self._narrowed),
        )

    def _linear(self, proj: Linear, result: Rounding) -> Linear:
        return _Narrow(self._rounded(proj.weight_OI), proj.bias_O, result)

    def _narrowed(self, x: np.ndarray) -> np.ndarray:
        """In the narrow dtype; what is beyond its range becomes infinite, as in a runtime."""
        with np.errstate(over="ignore"):
            return x.astype(self.dtype)

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        """Values of the narrow dtype, in float32."""
        return self._narrowed(x).astype(np.float32)


@dataclass(frozen=True)
class _Narrow(Linear):
    """A linear map whose weights are rounded, and what becomes of its result."""

    result: Rounding = as_it_is


FLOAT32 = Arithmetic("float32")
ARITHMETICS: Mapping[str, Arithmetic] = {
    each.name: each
    for each in (
        Arithmetic("float16", np.float16),
        Arithmetic("bfloat16", ml_dtypes.bfloat16),
        Arithmetic("int8-activations", block=32),
        Arithmetic("uint8-activations", together=True),
        Arithmetic("float16-attention", float16_attention=True),
    )
}


def quantised(x_BTI: np.ndarray, block: int) -> np.ndarray:
    """What x is after it was int8: symmetric, a scale for each `block` along the last axis, the last may be shorter.

    Source: onnxruntime 1.24, mlas, QuantizeARow_CompInt8.
    """
    inputs = x_BTI.shape[-1]
    block = min(block, inputs)
    padded_BTI = np.pad(x_BTI, [(0, 0)] * (x_BTI.ndim - 1) + [(0, -inputs % block)])
    x_BTNJ = padded_BTI.reshape(*x_BTI.shape[:-1], -1, block)
    scale_BTN1 = np.abs(x_BTNJ).max(axis=-1, keepdims=True) / x_BTI.dtype.type(INT8_MAX)
    codes_BTNJ = np.rint(x_BTNJ / np.where(scale_BTN1 == 0, 1, scale_BTN1))
    return (codes_BTNJ * scale_BTN1).reshape(padded_BTI.shape)[..., :inputs]


def quantised_together(x_BTI: np.ndarray) -> np.ndarray:
    """What x is after it was uint8, with one scale and zero point for all of a row; zero stays zero.

    Source: ONNX 1.20, DynamicQuantizeLinear.
    """
    lowest_B11 = np.minimum(x_BTI.min(axis=(1, 2), keepdims=True), 0)
    scale_B11 = (np.maximum(x_BTI.max(axis=(1, 2), keepdims=True), 0) - lowest_B11) / x_BTI.dtype.type(UINT8_MAX)
    scale_B11 = np.where(scale_B11 == 0, x_BTI.dtype.type(1), scale_B11)
    zero_B11 = np.clip(np.rint(-lowest_B11 / scale_B11), 0, UINT8_MAX)
    codes_BTI = np.clip(np.rint(x_BTI / scale_B11) + zero_B11, 0, UINT8_MAX)
    return (codes_BTI - zero_B11) * scale_B11
