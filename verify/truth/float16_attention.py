"""Attention that multiplies in float16, as llama.cpp does with the cache that it has by default."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from refengine.ops import Ops
from verify.truth.noise import attend_with_probabilities


def attending_in_float16(orders: Mapping[str, Ops]) -> dict[str, Ops]:
    """These orders, but for attention: query, keys, values and probabilities are rounded; every other one is fused.

    Source: llama.cpp, ggml/src/ggml-cpu/ggml-cpu.c, ggml_compute_forward_mul_mat, 2026-11: one side of a product is
    rounded to the type of the other, which in attention is that of the cache; ops.cpp beside it,
    ggml_compute_forward_flash_attn_ext_f16_one_chunk: a fused attention adds up values in float16.
    """
    return {
        f"{name}; attention {'fused' if fused else 'in steps'}": replace(ops, attend=partial(_attend, fused))
        for fused, (name, ops) in zip(cycle((False, True)), orders.items(), strict=False)
    }


def _attend(fused: bool, q_BTNH: np.ndarray, k_BKSH: np.ndarray, v_BKSH: np.ndarray, *others: Any) -> np.ndarray:
    values: Any = _OneByOne(_in_float16(v_BKSH)) if fused else _in_float16(v_BKSH)
    attend = partial(attend_with_probabilities, rounded=_in_float16)
    return attend(_in_float16(q_BTNH), _in_float16(k_BKSH), values, *others)


@dataclass(frozen=True)
class _OneByOne:
    """Vectors `x_XSH` that a product from the left adds up in float16, one after the other."""

    x: np.ndarray
    __array_ufunc__ = None  # so that NumPy leaves the product to `__rmatmul__`

    def __getitem__(self, index: Any) -> "_OneByOne":
        return _OneByOne(self.x[index])

    def __rmatmul__(self, weights_XTS: np.ndarray) -> np.ndarray:
        y_XTH = np.zeros(())
        for slot in range(weights_XTS.shape[-1]):
            y_XTH = _in_float16(y_XTH + weights_XTS[..., slot, None] * self.x[..., slot, None, :])
        return y_XTH


def _in_float16(x: np.ndarray) -> np.ndarray:
    """Values of float16, in float32; of a view of codes, of what it decodes to."""
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float16).astype(np.float32)
