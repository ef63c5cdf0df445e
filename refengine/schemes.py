"""The kinds of cache storage by the names that commands take."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from refengine.errors import InputError
from refengine.kvcache import FLOAT32, Float, Scheme

SCHEMES: Mapping[str, Scheme] = {
    "float64": Float(np.float64),
    "float32": FLOAT32,
    "float16": Float(np.float16),
    "bfloat16": Float(ml_dtypes.bfloat16),
}


def scheme_named(name: str) -> Scheme:
    """The scheme of that name. Raises InputError, which lists the names, when there is none."""
    if name not in SCHEMES:
        raise InputError(f"KV cache: expected one of {', '.join(SCHEMES)}, found {name!r}")
    return SCHEMES[name]
