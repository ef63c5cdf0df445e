"""Small integers packed into bytes."""

import numpy as np


def pack_nibbles(codes: np.ndarray, high_first: bool = False) -> np.ndarray:
    """Two codes of 0 to 15 a byte, neighbours on the last axis: the even one in the low half unless `high_first`."""
    even, odd = codes[..., 0::2].astype(np.uint8), codes[..., 1::2].astype(np.uint8)
    return (even << 4 | odd) if high_first else (even | odd << 4)


def unpack_nibbles(packed: np.ndarray, high_first: bool = False) -> np.ndarray:
    """What `pack_nibbles` packed, as uint8."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., int(high_first) :: 2] = packed & 15
    codes[..., int(not high_first) :: 2] = packed >> 4
    return codes
