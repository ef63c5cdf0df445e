"""Schemes of this engine's own: the default choice for int8 and int4."""

import numpy as np

from refengine.codecs.affine import Affine
from refengine.codecs.fits import outward, outward_symmetric
from refengine.errors import InputError
from refengine.histories import Flow
from refengine.scheme import Scheme, Storage, both


def integers(bits: int, group_size: int | None = None, symmetric: bool = False) -> Scheme:
    """Integers of 4 or 8 bits: each token and KV head has its own scales, one for each `group_size` along head_dim."""
    return both(_integers(bits, group_size, symmetric))


def keys_by_channel(
    bits: int, group_size: int | None = None, tokens: int = 32, residual: int = 32, sinks: int = 0
) -> Scheme:
    """Keys in groups of `tokens` for each channel, since some of their channels are far larger than others; values by
    token. The newest tokens wait in float until `residual` of them are coded together, the first `sinks` stay float.

    Source: arXiv 2402.02750 (KIVI) for the two axes and the residual; arXiv 2309.17453 for the sinks.

    Raises:
        InputError: `tokens` does not divide `residual`.
    """
    if residual < 1 or residual % tokens:
        raise InputError(f"KV cache: expected a residual that is a multiple of {tokens} tokens, found {residual}")
    flow = Flow(sinks, residual, "full")
    keys = Affine(outward, bits, tokens=tokens, zero="offset", params=np.float16)
    return Scheme(Storage(keys, flow), Storage(_integers(bits, group_size, symmetric=False), flow))


def _integers(bits: int, group_size: int | None, symmetric: bool) -> Affine:
    if symmetric:
        return Affine(outward_symmetric, bits, group_size, zero="none", params=np.float16)
    return Affine(outward, bits, group_size, zero="offset", params=np.float16)
