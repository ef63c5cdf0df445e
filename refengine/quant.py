"""The ways of storing a key-value cache, by name: each an exact model of what something that exists does."""

from collections.abc import Mapping, Sequence
from functools import partial

import ml_dtypes
import numpy as np

from refengine.calibration import calibrated
from refengine.codecs.ggml import Turned, ggml, ggml_ops
from refengine.codecs.huggingface import kivi, quantized_cache
from refengine.codecs.openvino import openvino, openvino_float16, openvino_turbo
from refengine.codecs.ours import integers, keys_by_channel
from refengine.codecs.static import Static
from refengine.errors import InputError
from refengine.ops import OPS, Ops
from refengine.scheme import FLOAT32, Scheme, both, stored_as
from refengine.tokens import left_padded
from refengine.weights import Weights

SCHEMES: Mapping[str, Scheme] = {
    "float64": stored_as(np.float64),
    "float32": FLOAT32,
    "float16": stored_as(np.float16),
    "bfloat16": stored_as(ml_dtypes.bfloat16),
    "fp8": both(Static("float8_e4m3fn", ((1.0,),))),  # vLLM's kv_cache_dtype="fp8", whose scales are 1 unless given
    "int8": integers(8),
    "int8-symmetric": integers(8, symmetric=True),
    "int4": integers(4),
    "int4-g32": integers(4, group_size=32),
    "int4-symmetric": integers(4, symmetric=True),
    "int4-channel": keys_by_channel(4, group_size=32, sinks=4),
    "ov-f16": openvino_float16(),
    "ov-u8": openvino(8, 8),
    "ov-u8-g32": openvino(8, 8, 32, 32),
    "ov-u8-channel": openvino(8, 8, by_channel=64),
    "ov-u8-u4": openvino(8, 4, value_group=32),
    "ov-u4": openvino(4, 4),
    "ov-u4-g32": openvino(4, 4, 32, 32),
    "ov-turbo-u4": openvino_turbo(4),
    "ov-turbo-u3": openvino_turbo(3),
    "ggml-q8_0": ggml("q8_0", "q8_0"),
    "ggml-q5_1": ggml("q5_1", "q5_1"),
    "ggml-q5_0": ggml("q5_0", "q5_0"),
    "ggml-q4_1": ggml("q4_1", "q4_1"),
    "ggml-q4_0": ggml("q4_0", "q4_0"),
    "ggml-q8_0-rotated": ggml("q8_0", "q8_0", rotated=True),
    "ggml-q5_1-rotated": ggml("q5_1", "q5_1", rotated=True),
    "ggml-q5_0-rotated": ggml("q5_0", "q5_0", rotated=True),
    "ggml-q4_1-rotated": ggml("q4_1", "q4_1", rotated=True),
    "ggml-q4_0-rotated": ggml("q4_0", "q4_0", rotated=True),
    "hf-quanto-4": quantized_cache("quanto", 4),
    "hf-quanto-2": quantized_cache("quanto", 2),
    "hf-hqq-4": quantized_cache("hqq", 4),
    "hf-hqq-2": quantized_cache("hqq", 2),
    "hf-hqq-4-axis1": quantized_cache("hqq", 4, axis_key=1, axis_value=1),
    "kivi-4": kivi(4),
    "kivi-2": kivi(2),
}

# Their scales are measured on a model and tokens like those that it will be fed; "ort" is GroupQueryAttention's.
CALIBRATED: Mapping[str, partial[Scheme]] = {
    "fp8-calibrated": partial(calibrated, numbers="float8_e4m3fn"),
    "ort-int8": partial(calibrated, numbers="int8"),
    "ort-int8-channel": partial(calibrated, numbers="int8", per_channel=True),
    "ort-int4": partial(calibrated, numbers="int4"),
    "ort-int4-channel": partial(calibrated, numbers="int4", per_channel=True),
}


# The same with scales of one, for those who ask for their bytes alone.
UNMEASURED: Mapping[str, Scheme] = {
    name: both(Static(measure.keywords["numbers"], ((1.0,),))) for name, measure in CALIBRATED.items()
}


def scheme_named(name: str) -> Scheme:
    """The scheme of that name. Raises InputError, which lists the names, when there is none."""
    if name not in SCHEMES:
        measured = ", whose scales are measured on a model's tokens" if name in CALIBRATED else ""
        raise InputError(f"KV cache: expected one of {', '.join(SCHEMES)}, found {name!r}{measured}")
    return SCHEMES[name]


def scheme_for(name: str, weights: Weights, prompts: Sequence[Sequence[int]]) -> Scheme:
    """The scheme of that name; if it is one of `CALIBRATED`, with scales measured on these prompts (token ids).

    Raises:
        InputError: there is none of that name; the text lists all.
        TokensError: a prompt that the model cannot be fed.
    """
    if name in CALIBRATED:
        return CALIBRATED[name](weights, *left_padded(prompts))
    if name not in SCHEMES:
        raise InputError(f"KV cache: expected one of {', '.join([*SCHEMES, *CALIBRATED])}, found {name!r}")
    return SCHEMES[name]


def ops_for(scheme: Scheme, ops: Ops = OPS) -> Ops:
    """These operators, but with the attention that goes with a scheme: ggml's quantises the query too."""
    return ggml_ops(scheme, ops) if isinstance(scheme.keys.codec, Turned) else ops
