"""What the stateful attention of OpenVINO's CPU plugin does to its cache."""

from dataclasses import dataclass

import numpy as np

from refengine.codecs.affine import Affine
from refengine.codecs.codec import Float
from refengine.codecs.fits import openvino_by_channel, openvino_by_token
from refengine.codecs.turbo import Turbo
from refengine.errors import InputError
from refengine.scheme import Scheme, Storage, both
from refengine.slots import Arrays

RAW_FROM = 2  # tokens of a first pass; one alone is attended to by the code for decoding, which reads the cache


@dataclass(frozen=True)
class ByChannel(Affine):
    """Keys by channel, in the groups of tokens that the plugin accepts."""

    def empty(self, rows: int, heads: int, head_dim: int) -> Arrays:
        """Codes, scales and zeros."""
        if self.tokens == 1 or head_dim % self.tokens:
            raise InputError(
                "KV cache: OpenVINO's keys by channel: expected groups of at least 2 tokens whose number divides "
                f"head_dim {head_dim}, found {self.tokens}"
            )
        return super().empty(rows, heads, head_dim)


def openvino(
    key_bits: int, value_bits: int, key_group: int | None = None, value_group: int | None = None, by_channel: int = 0
) -> Scheme:
    """KEY_CACHE_PRECISION and VALUE_CACHE_PRECISION u8, the plugin's default, or u4.

    Args:
        key_group: KEY_CACHE_GROUP_SIZE; None is its default, the head size. Likewise `value_group`.
        by_channel: KEY_CACHE_QUANT_MODE=BY_CHANNEL with groups of so many tokens, for which KEY_CACHE_GROUP_SIZE then
            stands; 0 is by token.

    Raises:
        InputError: other bits, a number of tokens that is not 2, 4, 8, ... 256, or 4 bits in groups of odd size.
    """
    if not {key_bits, value_bits} <= {4, 8}:
        raise InputError(f"KV cache: OpenVINO's codes: expected 4 or 8 bits, found {key_bits} and {value_bits}")
    for bits, group in ((key_bits, key_group), (value_bits, value_group)):
        if bits == 4 and group and group % 2:
            raise InputError(f"KV cache: OpenVINO's codes of 4 bits: expected an even group size, found {group}")
    keys = Affine(openvino_by_token, key_bits, key_group, high_first=True)
    if by_channel:
        keys = ByChannel(openvino_by_channel, key_bits, tokens=by_channel, high_first=True)
    values = Affine(openvino_by_token, value_bits, value_group, high_first=True)
    return Scheme(Storage(keys), Storage(values), first_pass_raw=RAW_FROM)


def openvino_float16() -> Scheme:
    """KV_CACHE_PRECISION f16, which optimum-intel writes into its exports of float weights."""
    return both(Float(np.float16), first_pass_raw=RAW_FROM)


def openvino_turbo(bits: int) -> Scheme:
    """KEY_CACHE_QUANT_ALG and VALUE_CACHE_QUANT_ALG TURBO, with u4 or u3 as precisions."""
    return both(Turbo(bits), first_pass_raw=RAW_FROM)
