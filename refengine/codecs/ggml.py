"""What llama.cpp does with a quantised cache on a CPU: ggml's blocks of 32, a rotation, and a query in blocks too."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from refengine import ops
from refengine.codecs.affine import Affine
from refengine.codecs.codec import Codec
from refengine.codecs.fits import float16_nearest, ggml_lowest, ggml_q8, ggml_symmetric
from refengine.codecs.hadamard import butterflies
from refengine.codecs.packing import pack_blocks, unpack_blocks
from refengine.errors import InputError
from refengine.ops import OPS, Ops
from refengine.scheme import Scheme, Storage
from refengine.slots import Arrays
from refengine.views import Coded, View

BLOCK = 32
LEAST_ROTATION = 64


@dataclass(frozen=True)
class Blocks(Affine):
    """Codes of 4 or 5 bits in blocks of 32, packed as ggml packs them."""

    def __post_init__(self) -> None:
        """Affine's own packing has no 5 bits; this one has."""

    def _packed(self, codes: np.ndarray) -> np.ndarray:
        return pack_blocks(codes, self.bits)

    def _unpacked(self, stored: np.ndarray) -> np.ndarray:
        return unpack_blocks(stored, self.bits)


TYPES: Mapping[str, Affine] = {
    "q8_0": Affine(ggml_q8, 8, BLOCK, zero="none", params=np.float16),
    "q4_0": Blocks(ggml_symmetric, 4, BLOCK, zero="none", params=np.float16),
    "q4_1": Blocks(ggml_lowest, 4, BLOCK, zero="offset", params=np.float16),
    "q5_0": Blocks(ggml_symmetric, 5, BLOCK, zero="none", params=np.float16),
    "q5_1": Blocks(ggml_lowest, 5, BLOCK, zero="offset", params=np.float16),
}


def hadamard(x_XH: np.ndarray, size: int) -> np.ndarray:
    """Neighbours on the last axis, `size` of them at a time, times the orthonormal Sylvester matrix: its own inverse.

    Source: llama.cpp, ggml/src/ggml-cpu/ops.cpp, ggml_compute_forward_fwht, 2026-11, whose order of sums this is.
    """
    one = x_XH.dtype.type(1)
    blocks_XJR = x_XH.reshape(*x_XH.shape[:-1], x_XH.shape[-1] // size, size)
    return butterflies(blocks_XJR * (one / np.sqrt(one * size))).reshape(x_XH.shape)


def interleaved(x_XH: np.ndarray) -> np.ndarray:
    """The two dimensions that rotary embedding turns together, p and p + P, become neighbours.

    Source: llama.cpp, conversion/llama.py, permute: so are the rows of q_proj and k_proj of a Llama stored in a GGUF
    file, and the keys computed from them.
    """
    return x_XH.reshape(*x_XH.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x_XH.shape)


def halves(x_XH: np.ndarray) -> np.ndarray:
    """Undoes `interleaved`."""
    return x_XH.reshape(*x_XH.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x_XH.shape)


@dataclass(frozen=True)
class Turned(Codec):
    """Another codec for vectors that are reordered and rotated first, which products with them do not feel.

    Attributes:
        interleave: reorder as `interleaved` does.
        rotation: neighbours that are then rotated together; 1: none, 0: the largest power of two that divides head_dim.
    """

    codec: Affine
    interleave: bool
    rotation: int

    def turned(self, x_XH: np.ndarray) -> np.ndarray:
        """Reordered, then rotated."""
        return self._rotated(interleaved(x_XH) if self.interleave else x_XH)

    def back(self, x_XH: np.ndarray) -> np.ndarray:
        """Undoes `turned`."""
        x_XH = self._rotated(x_XH)
        return halves(x_XH) if self.interleave else x_XH

    def _rotated(self, x_XH: np.ndarray) -> np.ndarray:
        head_dim = x_XH.shape[-1]
        return hadamard(x_XH, self.rotation or head_dim & -head_dim)

    def empty(self, rows: int, heads: int, head_dim: int) -> Arrays:
        """The other codec's."""
        if self.rotation != 1 and head_dim % LEAST_ROTATION:
            raise InputError(
                f"KV cache: expected a multiple of {LEAST_ROTATION} as head_dim to rotate, found {head_dim}"
            )
        return self.codec.empty(rows, heads, head_dim)

    def encode(self, x_BKTH: np.ndarray) -> Arrays:
        """Turned in float32."""
        return self.codec.encode(self.turned(x_BKTH.astype(np.float32, copy=False)))

    def decode(self, arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        """Turned back in float32."""
        return self.back(self.codec.decode(arrays, np.dtype(np.float32))).astype(dtype, copy=False)

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """The other codec's."""
        return self.codec.nbytes(tokens, head_dim)

    def scores(self, q_BKRH: np.ndarray, arrays: Arrays) -> np.ndarray:
        """The query is turned, and not the keys back."""
        return self.codec.scores(self.turned(q_BKRH), arrays)

    def weighted_sum(self, p_BKRT: np.ndarray, arrays: Arrays) -> np.ndarray:
        """The sum is turned back, not each value."""
        return self.back(self.codec.weighted_sum(p_BKRT, arrays))


def ggml(keys: str, values: str, rotated: bool = False) -> Scheme:
    """A cache of llama.cpp, 2026-11, with `--cache-type-k` and `--cache-type-v`: names in `TYPES`.

    Blocks of keys hold the dimensions in llama.cpp's order, which is not that of Hugging Face checkpoints.
    Codes are those of ggml's reference and of the package gguf. With AVX, ggml divides 127 by the largest magnitude of
    a q8_0 block and rounds halves to even: about one code in a million is then another one, its neighbour. Attention to
    this cache has a quantised query: see `ggml_ops`.

    Args:
        rotated: llama.cpp rotates where 64 divides head_dim, unless LLAMA_ATTN_ROT_DISABLE=1 is set: keys by the
            largest power of two that divides head_dim, values by 64. Other sizes are then refused.

    Raises:
        InputError: there is no such type.
    """
    for name in (keys, values):
        if name not in TYPES:
            raise InputError(f"KV cache: expected one of ggml's types {', '.join(TYPES)}, found {name!r}")
    key_codec = Turned(TYPES[keys], interleave=True, rotation=0 if rotated else 1)
    value_codec = Turned(TYPES[values], interleave=False, rotation=LEAST_ROTATION) if rotated else TYPES[values]
    return Scheme(Storage(key_codec), Storage(value_codec))


def ggml_ops(scheme: Scheme, others: Ops = OPS) -> Ops:
    """The operators with which ggml's CPU backend reads a cache of this scheme: its attention, and these others.

    Raises:
        InputError: the scheme is not one that `ggml` returns.
    """
    keys = scheme.keys.codec
    if not isinstance(keys, Turned):
        raise InputError("KV cache: expected one of ggml's schemes, whose queries are quantised, found another one")
    return replace(others, attend=QuantisedQuery(keys).attend)


@dataclass(frozen=True)
class QuantisedQuery:
    """Attention whose query is quantised to q8_0, or to q8_1 where the key type has a lowest value.

    A key of such a type adds its lowest value times the sum of the query; q8_1 stores that sum too, rounded to float16.

    Source: llama.cpp, ggml/src/ggml-cpu/ops.cpp, ggml_compute_forward_flash_attn_ext_f16_one_chunk, and
    ggml/src/ggml-cpu/quants.c, ggml_vec_dot_q4_1_q8_1, 2026-11.
    """

    keys: Turned

    def attend(
        self,
        q_BTNH: np.ndarray,
        k_BKSH: np.ndarray,
        v_BKSH: np.ndarray,
        positions_BT: np.ndarray,
        positions_BS: np.ndarray,
        window: int | None,
    ) -> np.ndarray:
        """`refengine.ops.attend` with these scores."""
        return ops.attend(q_BTNH, k_BKSH, v_BKSH, positions_BT, positions_BS, window, self.scores)

    def scores(self, q_BTNH: np.ndarray, k_BKSH: np.ndarray) -> np.ndarray:
        """`refengine.ops.scores` of what is left of the query."""
        turned_BTNH = self.keys.turned(q_BTNH)
        arrays = TYPES["q8_0"].encode(turned_BTNH)
        scores_BKRS = ops.scores(self.keys.back(TYPES["q8_0"].decode(arrays, q_BTNH.dtype)), k_BKSH)
        if isinstance(k_BKSH, View) and self.keys.codec.zero == "offset":
            # Divided by the root of its own last axis there, which is 32 times shorter than head_dim.
            missing_BTNJ = _missing_sum(turned_BTNH, arrays) * BLOCK**-0.5
            scores_BKRS += ops.scores(missing_BTNJ.astype(q_BTNH.dtype), _lowest(k_BKSH))
        return scores_BKRS


def _missing_sum(q_BTNH: np.ndarray, arrays: Arrays) -> np.ndarray:
    """`missing_BTNJ`: what the stored sum of each block has, and the sum of its decoded query has not."""
    codes_BTNH, scale_BTNJ = arrays
    blocks = *scale_BTNJ.shape, BLOCK
    sum_BTNJ = codes_BTNH.reshape(blocks).sum(axis=-1, dtype=np.float32)
    step_BTNJ = np.abs(q_BTNH.astype(np.float32).reshape(blocks)).max(axis=-1) / np.float32(127)
    return float16_nearest(step_BTNJ * sum_BTNJ) - scale_BTNJ.astype(np.float32) * sum_BTNJ


def _lowest(k_BKSH: View) -> np.ndarray:
    """`lowest_BKSJ` of each block."""
    coded = [piece for piece in k_BKSH.pieces if isinstance(piece, Coded)]
    return np.concatenate([piece.arrays[2][:, :, piece.start : piece.stop] for piece in coded], axis=2)
