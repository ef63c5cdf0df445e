"""What the stateful attention of OpenVINO's CPU plugin does to its cache."""

from refengine.codecs.affine import Affine
from refengine.codecs.fits import openvino_by_channel, openvino_by_token
from refengine.scheme import Scheme, Storage


def openvino(
    key_bits: int, value_bits: int, key_group: int | None = None, value_group: int | None = None, by_channel: int = 0
) -> Scheme:
    """The stateful attention of OpenVINO's CPU plugin: KEY_CACHE_PRECISION and VALUE_CACHE_PRECISION u8 or u4.

    Args:
        key_group: KEY_CACHE_GROUP_SIZE; None is its default, the head size. Likewise `value_group`.
        by_channel: KEY_CACHE_QUANT_MODE=BY_CHANNEL with groups of so many tokens; 0 is by token.
    """
    keys = _by_token(key_bits, key_group)
    if by_channel:
        keys = Affine(openvino_by_channel, key_bits, tokens=by_channel, high_first=True)
    return Scheme(Storage(keys), Storage(_by_token(value_bits, value_group)), first_pass_raw=True)


def _by_token(bits: int, group_size: int | None) -> Affine:
    return Affine(openvino_by_token, bits, group_size, high_first=True)
