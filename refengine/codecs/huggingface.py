"""The `QuantizedCache` of transformers with its quanto and hqq backends, and KIVI, which it was made after."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refengine.codecs.affine import Affine
from refengine.codecs.codec import Codec
from refengine.codecs.fits import hqq_groups, kivi_groups, quanto_groups
from refengine.errors import CacheError, InputError
from refengine.histories import Flow
from refengine.scheme import Scheme, Storage
from refengine.slots import Arrays
from refengine.views import Vectors


@dataclass(frozen=True)
class Across(Codec):
    """Groups that lie across tokens and heads, so that no token can be decoded without all that were coded with it.

    Attributes:
        codec: of the groups, each as if it were one token.
        by_channel: a group is one channel of consecutive tokens, heads one after the other. If not, the tensor is cut
            into `group_size` parts, and the first values of all of them are a group, then the second ones.
    """

    codec: Affine
    by_channel: bool
    tokens = 1 << 62  # one slot holds them all

    def empty(self, rows: int, heads: int, head_dim: int) -> Arrays:
        """No token in no slot."""
        arrays = self.codec.empty(rows, heads, head_dim)
        return tuple(array[:, :, :, None] for array in arrays)

    def encode(self, x_BKTH: np.ndarray) -> Arrays:
        """One slot, in which codes and scales have the order of their groups, whatever their shape says.

        Raises CacheError also when the groups do not come out even.
        """
        if self.by_channel and (vectors := x_BKTH[..., 0].size) % self._group:
            raise CacheError(
                f"cache: expected heads times tokens to be a multiple of the group size {self._group}, as groups by "
                f"channel go through all heads, found {vectors}; transformers raises a ValueError here"
            )
        coded = self.codec.encode(self._grouped(x_BKTH))
        return tuple(array.reshape(*x_BKTH.shape[:2], 1, x_BKTH.shape[2], -1) for array in coded)

    def decode(self, arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        """All tokens of the slot."""
        B, K, _, T, _ = arrays[0].shape
        coded = tuple(array.reshape(1, 1, arrays[1].size, -1) for array in arrays)
        groups_11XG = self.codec.decode(coded, dtype)
        x_BKTH_shape = B, K, T, groups_11XG.size // (B * K * T)
        width = self._width(x_BKTH_shape[3], groups_11XG.size)
        return groups_11XG.reshape(-1, width, self._group).swapaxes(1, 2).reshape(x_BKTH_shape)

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """There are as many groups as if each were of one token."""
        return self.codec.nbytes(tokens, head_dim)

    def view(self, arrays: Arrays, tokens: int, head_dim: int, dtype: np.dtype) -> Vectors:
        """Decoded, as transformers does each time."""
        if not tokens:
            return np.empty((*arrays[0].shape[:2], 0, head_dim), dtype)
        return self.decode(arrays, dtype)[:, :, :tokens]

    def _grouped(self, x_BKTH: np.ndarray) -> np.ndarray:
        width = self._width(x_BKTH.shape[3], x_BKTH.size)
        return x_BKTH.reshape(-1, self._group, width).swapaxes(1, 2).reshape(1, 1, -1, self._group)

    def _width(self, head_dim: int, size: int) -> int:
        """Groups that are interleaved."""
        return head_dim if self.by_channel else size // self._group

    @property
    def _group(self) -> int:
        return self.codec.group_size or 1


def quantized_cache(
    backend: Literal["quanto", "hqq"],
    bits: int,
    axis_key: int = 0,
    axis_value: int = 0,
    group_size: int = 64,
    residual_length: int = 128,
    newest_counts: int | None = None,
) -> Scheme:
    """`transformers.QuantizedCache` in float32, with the defaults of its 5.23. The prompt is coded at once, and attends
    to itself as it came; later tokens wait, and when enough do, the whole cache is decoded and coded again.

    Rows are coded each for itself, where transformers has groups across them: results are the same for one row, and,
    with groups of one token (quanto's axis 0), for rows without padding. Where group_size does not divide head_dim
    transformers lets groups go on in the next token; that is refused here. It packs codes of different groups into a
    byte, here they are neighbours.

    Args:
        axis_key, axis_value: quanto 0 and hqq 1: neighbours of one token. quanto -1: by channel. hqq 0: strided.
        newest_counts: None for transformers 5; 1 for 4.57, which takes every pass for one token when it decides whether
            enough wait.

    Source: transformers 5.23.0 and 4.57.6, cache_utils.py, QuantizedLayer.update.

    Raises:
        InputError: no such backend, bits, or axis; or a residual that is too short to wait.
    """
    if bits not in {"quanto": (2, 4), "hqq": (2, 4, 8)}.get(backend, ()):
        raise InputError(
            f"KV cache: expected quanto with 2 or 4 bits, or hqq with 2, 4 or 8, found {backend} with {bits}"
        )
    if residual_length < 2:
        raise InputError(f"KV cache: expected a residual length of 2 or more, found {residual_length}")
    flow = Flow(residual=residual_length, leaving="again", newest_counts=newest_counts)
    keys, values = (Storage(_codec(backend, bits, axis, group_size), flow) for axis in (axis_key, axis_value))
    return Scheme(keys, values, first_pass_raw=True)


def _codec(backend: str, bits: int, axis: int, group_size: int) -> Codec:
    one_token, across = (0, -1) if backend == "quanto" else (1, 0)
    if axis not in (one_token, across):
        raise InputError(f"KV cache: expected axis {one_token} or {across} of {backend}, found {axis}")
    groups = (
        Affine(quanto_groups, bits, group_size, zero="offset")
        if backend == "quanto"
        else Affine(hqq_groups, bits, group_size)
    )
    return groups if axis == one_token else Across(groups, by_channel=backend == "quanto")


def kivi(bits: int, group_size: int = 32, residual: int = 128) -> Scheme:
    """KIVI: keys by channel, `residual` tokens at a time, so that fewer than these wait; values by token, all but the
    newest `residual`. The prompt attends to itself as it came.

    Codes and scales are those of its float16; what waits is kept in the dtype of the computation, as everything else.

    Source: arXiv 2402.02750; github.com/jy-yuan/KIVI, models/llama_kivi.py and quant/new_pack.py.

    Raises:
        InputError: `group_size` does not divide `residual`, or is no power of two.
    """
    if residual < 1 or residual % group_size:
        raise InputError(f"KV cache: expected a residual that is a multiple of {group_size} tokens, found {residual}")
    keys = Affine(kivi_groups, bits, tokens=group_size, zero="offset", params=np.float16)
    values = Affine(kivi_groups, bits, group_size, zero="offset", params=np.float16)
    return Scheme(
        Storage(keys, Flow(residual=residual)),
        Storage(values, Flow(residual=residual, leaving="oldest")),
        first_pass_raw=True,
    )
