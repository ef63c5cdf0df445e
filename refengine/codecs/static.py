"""Codes whose scales are given before the first token comes, and never change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import ml_dtypes
import numpy as np

from refengine.codecs.codec import Codec, check_finite, scores_in_blocks, sums_in_blocks
from refengine.codecs.packing import pack_nibbles, unpack_nibbles
from refengine.config import Config
from refengine.errors import InputError
from refengine.scheme import Scheme, Storage
from refengine.slots import Arrays

Numbers = Literal["int8", "int4", "float8_e4m3fn"]
LARGEST: Mapping[Numbers, float] = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}
# With these, float32 holds the inverse of a scale and the largest code times a scale.
LEAST_SCALE, GREATEST_SCALE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max) / 512


@dataclass(frozen=True)
class Static(Codec):
    """Symmetric codes: `x = code * scale`. What is further out than the largest code becomes the largest.

    The scales belong to the model, as its weights do, and are not counted among the bytes of the cache.

    Attributes:
        numbers: what a code is; "int4" are packed two a byte.
        scales: of each layer, or one entry for all layers; an entry is one scale ("per tensor"), or one for each
            channel of each KV head, heads first ("per channel").

    Raises:
        InputError: a scale that is zero, negative, not finite, or of which float32 has no inverse.
    """

    numbers: Numbers
    scales: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for layer, scales in enumerate(self.scales):
            for scale in scales:
                if not LEAST_SCALE <= scale <= GREATEST_SCALE:
                    raise InputError(
                        f"KV cache scales, layer {layer}: expected numbers from {LEAST_SCALE:.1e} to "
                        f"{GREATEST_SCALE:.1e}, found {scale}"
                    )

    def for_layer(self, layer: int) -> "Static":
        """With this layer's scales. Raises InputError when there are none."""
        if len(self.scales) == 1:
            return self
        if layer >= len(self.scales):
            raise InputError(
                f"KV cache scales, layer {layer}: expected some, found those of {len(self.scales)} layers; "
                "they are another model's"
            )
        return replace(self, scales=(self.scales[layer],))

    def empty(self, rows: int, heads: int, head_dim: int) -> Arrays:
        """One array, of codes."""
        (scales,) = self.scales
        if len(scales) not in (1, heads * head_dim):
            raise InputError(
                f"KV cache scales: expected one a layer, or {heads * head_dim} for the {heads} KV heads of {head_dim} "
                f"channels, found {len(scales)}; they are another model's"
            )
        if self.numbers == "int4" and head_dim % 2:
            raise InputError(f"KV cache: expected an even head_dim to pack 4-bit codes two a byte, found {head_dim}")
        return self.encode(np.empty((rows, heads, 0, head_dim), np.float32))

    def encode(self, x_BKTH: np.ndarray) -> Arrays:
        """The codes: integers are rounded after a product with the scale's inverse, floats after a division.

        Source: ONNX Runtime, onnxruntime/core/mlas/lib/qkv_quant.cpp, 1.31.1; vLLM,
        csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh (`scaled_vec_conversion`).
        """
        check_finite(x_BKTH)
        scale_K1H, largest = self._scale_K1H(x_BKTH.shape[1]), LARGEST[self.numbers]
        with np.errstate(over="ignore"):  # what is too large for float32 is so for the codes
            x_BKTH = x_BKTH.astype(np.float32, copy=False)
            if self.numbers == "float8_e4m3fn":
                return (np.clip(x_BKTH / scale_K1H, -largest, largest).astype(ml_dtypes.float8_e4m3fn),)
            codes_BKTH = np.rint(x_BKTH * (np.float32(1) / scale_K1H))
        codes_BKTH = np.clip(codes_BKTH, -largest - 1, largest)
        return (codes_BKTH.astype(np.int8) if self.numbers == "int8" else pack_nibbles(codes_BKTH + 8),)

    def decode(self, arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        """Code times scale, in float32."""
        codes_BKTH = self._codes(arrays[0], np.dtype(np.float32))
        return (codes_BKTH * self._scale_K1H(codes_BKTH.shape[1])).astype(dtype, copy=False)

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Bytes of the codes."""
        return tokens * head_dim // 2 if self.numbers == "int4" else tokens * head_dim

    def scores(self, q_BKRH: np.ndarray, arrays: Arrays) -> np.ndarray:
        """The query is scaled in place of the keys."""
        scaled_BKRH = q_BKRH * self._scale_K1H(q_BKRH.shape[1]).astype(q_BKRH.dtype, copy=False)
        return scores_in_blocks(scaled_BKRH, arrays, lambda part: self._codes(part[0], q_BKRH.dtype))

    def weighted_sum(self, p_BKRT: np.ndarray, arrays: Arrays) -> np.ndarray:
        """The sum is scaled in place of the values."""
        sums_BKRH = sums_in_blocks(p_BKRT, arrays, lambda part: self._codes(part[0], p_BKRT.dtype))
        return sums_BKRH * self._scale_K1H(p_BKRT.shape[1]).astype(p_BKRT.dtype, copy=False)

    def _codes(self, stored: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """As numbers, in a float dtype."""
        if self.numbers == "int8":
            return stored.astype(dtype)
        if self.numbers == "int4":
            return unpack_nibbles(stored).astype(dtype) - dtype.type(8)
        return self._float8_values.astype(dtype, copy=False).take(stored.view(np.uint8))

    @cached_property
    def _float8_values(self) -> np.ndarray:
        """What each byte stands for: looking it up is ten times as fast as the cast."""
        return np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

    @cached_property
    def _scale_X(self) -> np.ndarray:
        (scales,) = self.scales
        return np.array(scales, np.float32)

    def _scale_K1H(self, heads: int) -> np.ndarray:
        """Axes of length 1 where one scale is for all."""
        return self._scale_X.reshape(heads if len(self._scale_X) > 1 else 1, 1, -1)


def given(
    config: Config,
    numbers: Numbers,
    key_scales: Sequence[np.typing.ArrayLike],
    value_scales: Sequence[np.typing.ArrayLike],
) -> Scheme:
    """A scheme with these scales; every pass reads what is stored, its own tokens too.

    Args:
        key_scales: of each layer, one number ("per tensor"), or one for each channel of each KV head, heads first ("per
            channel"), in any shape. Likewise `value_scales`.

    Raises:
        InputError: a layer has none or a wrong number of them, or one is zero, negative or not finite.
    """
    keys, values = _side(config, numbers, "key", key_scales), _side(config, numbers, "value", value_scales)
    return Scheme(Storage(keys), Storage(values))


def _side(config: Config, numbers: Numbers, kind: str, scales_of_layers: Sequence[np.typing.ArrayLike]) -> Static:
    if len(scales_of_layers) != config.num_hidden_layers:
        found = len(scales_of_layers)
        missing = f"; layer {found} has none" if found < config.num_hidden_layers else ""
        raise InputError(
            f"KV cache, {kind} scales: expected those of {config.num_hidden_layers} layers, found {found}{missing}"
        )
    scales = tuple(tuple(np.asarray(scales, np.float64).ravel().tolist()) for scales in scales_of_layers)
    channels = config.num_key_value_heads * config.head_dim
    for layer, found in enumerate(map(len, scales)):
        if found not in (1, channels):
            raise InputError(
                f"KV cache, {kind} scales of layer {layer}: expected one, or {channels} for the "
                f"{config.num_key_value_heads} KV heads of {config.head_dim} channels, found {found}"
            )
    return Static(numbers, scales)
