"""What the grouped-query attention of ONNX Runtime does to a quantised cache."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from refengine.codecs.static import given
from refengine.config import Config
from refengine.scheme import Scheme


def onnxruntime(
    config: Config,
    bits: Literal[8, 4],
    key_scales: Sequence[np.typing.ArrayLike],
    value_scales: Sequence[np.typing.ArrayLike],
) -> Scheme:
    """`com.microsoft.GroupQueryAttention` with a `kv_cache_bit_width`: a prefill too attends to what is stored.

    Args:
        bits: `kv_cache_bit_width`.
        key_scales: of each layer the input `k_scale`, of which shape is of no matter: one number (`k_quant_type`
            PER_TENSOR), or one for each channel of each KV head (PER_CHANNEL). Likewise `value_scales` and `v_scale`.

    Raises:
        InputError: a layer has none or a wrong number of them, or one is zero, negative or not finite.

    Source: ONNX Runtime, onnxruntime/core/mlas/lib/qkv_quant.cpp, 1.31.1 (the operator has it from 1.27 on).
    """
    return given(config, "int8" if bits == 8 else "int4", key_scales, value_scales)
