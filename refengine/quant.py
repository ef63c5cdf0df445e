"""The ways of storing a key-value cache, by name: each an exact model of what something that exists does."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from refengine.codecs.openvino import openvino
from refengine.codecs.ours import integers, keys_by_channel
from refengine.errors import InputError
from refengine.scheme import FLOAT32, Scheme, stored_as

SCHEMES: Mapping[str, Scheme] = {
    "float64": stored_as(np.float64),
    "float32": FLOAT32,
    "float16": stored_as(np.float16),
    "bfloat16": stored_as(ml_dtypes.bfloat16),
    "int8": integers(8),
    "int8-symmetric": integers(8, symmetric=True),
    "int4": integers(4),
    "int4-g32": integers(4, group_size=32),
    "int4-symmetric": integers(4, symmetric=True),
    "int4-channel": keys_by_channel(4, group_size=32, sinks=4),
    "ov-u8": openvino(8, 8),
    "ov-u8-g32": openvino(8, 8, 32, 32),
    "ov-u8-channel": openvino(8, 8, by_channel=64),
    "ov-u8-u4": openvino(8, 4, value_group=32),
    "ov-u4": openvino(4, 4),
    "ov-u4-g32": openvino(4, 4, 32, 32),
}


def scheme_named(name: str) -> Scheme:
    """The scheme of that name. Raises InputError, which lists the names, when there is none."""
    if name not in SCHEMES:
        raise InputError(f"KV cache: expected one of {', '.join(SCHEMES)}, found {name!r}")
    return SCHEMES[name]
