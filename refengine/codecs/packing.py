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


def pack_quarters(codes: np.ndarray) -> np.ndarray:
    """Four codes of 0 to 3 a byte, neighbours on the last axis, the first in the lowest bits."""
    first, second, third, fourth = (codes[..., i::4].astype(np.uint8) for i in range(4))
    return first | second << 2 | third << 4 | fourth << 6


def unpack_quarters(packed: np.ndarray) -> np.ndarray:
    """What `pack_quarters` packed, as uint8."""
    codes = np.empty((*packed.shape[:-1], 4 * packed.shape[-1]), np.uint8)
    for i in range(4):
        codes[..., i::4] = packed >> 2 * i & 3
    return codes


def pack_blocks(codes: np.ndarray, bits: int) -> np.ndarray:
    """Blocks of 32 codes of 4 or 5 bits on the last axis, each in 16 or 20 bytes, as ggml packs them.

    Behind the fifth bits, in the order of the codes, come the low nibbles: codes 0 to 15 have the low halves of the
    bytes and 16 to 31 the high ones. Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c, 2026-11.
    """
    codes_X32 = codes.astype(np.uint8).reshape(*codes.shape[:-1], codes.shape[-1] // 32, 32)
    packed_X16 = codes_X32[..., :16] & 15 | codes_X32[..., 16:] << 4
    fifths_X4 = np.packbits(codes_X32 >> 4, axis=-1, bitorder="little")[..., : 4 * (bits - 4)]
    return np.concatenate([fifths_X4, packed_X16], axis=-1).reshape(*codes.shape[:-1], codes.shape[-1] * bits // 8)


def unpack_blocks(packed: np.ndarray, bits: int) -> np.ndarray:
    """What `pack_blocks` packed, as uint8."""
    bytes_XP = packed.reshape(*packed.shape[:-1], packed.shape[-1] // (4 * bits), 4 * bits)
    packed_X16 = bytes_XP[..., -16:]
    codes_X32 = np.concatenate([packed_X16 & 15, packed_X16 >> 4], axis=-1)
    if bits == 5:
        codes_X32 |= np.unpackbits(bytes_XP[..., :4], axis=-1, bitorder="little") << 4
    return codes_X32.reshape(*packed.shape[:-1], packed.shape[-1] * 8 // bits)


def pack_threes(codes: np.ndarray) -> np.ndarray:
    """Eight codes of 0 to 7 in three bytes, neighbours on the last axis, the first in the lowest bits."""
    *shape, n = codes.shape
    shifted = codes.reshape(*shape, n // 8, 8).astype("<u4") << np.arange(0, 24, 3, dtype=np.uint32)
    words = np.bitwise_or.reduce(shifted, axis=-1, keepdims=True)
    return words.view(np.uint8)[..., :3].reshape(*shape, n // 8 * 3)


def unpack_threes(packed: np.ndarray) -> np.ndarray:
    """What `pack_threes` packed, as uint8."""
    *shape, n = packed.shape
    words = np.zeros((*shape, n // 3, 4), np.uint8)
    words[..., :3] = packed.reshape(*shape, n // 3, 3)
    codes = words.view("<u4") >> np.arange(0, 24, 3, dtype=np.uint32) & 7
    return codes.astype(np.uint8).reshape(*shape, n // 3 * 8)
