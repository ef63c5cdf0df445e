"""A cache of chosen layers, or of chosen key-value heads of layers; the keys and values of the rest are computed again.

The logits are those of a full cache. What is saved is memory: of each layer, the share of its heads that is not kept.
What it costs is time. To compute a layer's past keys and values again takes the hidden states of all past tokens at
that layer, and these take every layer below it. So the whole sequence is fed again, at every pass, through every layer
up to and including the last one that is not kept whole; only from there on the new tokens alone.

Hence the choice that is worth making: leave out the lowest layers, and keep all those above. What is kept of a layer
below one that is not kept saves hardly anything: its past queries, attention and MLP are computed all the same, and it
only reads what was kept in place of the new keys and values, which come out of the same product as the queries.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from refengine.config import Config
from refengine.errors import CacheError, InputError
from refengine.kvcache import KVCache
from refengine.model import block
from refengine.ops import OPS, Ops
from refengine.scheme import stored_as
from refengine.tokens import check_tokens
from refengine.trace import no_trace
from refengine.views import Vectors
from refengine.weights import Weights


class PartialCache:
    """Keys and values of the chosen heads of each layer, and the tokens fed so far, from which to compute the rest.

    Layers that are fed the new tokens alone hold no more than the model's sliding window; the others hold everything,
    since their past queries are asked again and see further back.

    Args:
        config: of the model.
        batch_size: rows.
        kept_heads: for each layer, the key-value heads to keep: all, some or none of them. See `whole_layers`.
        dtype: what keys and values are stored in; the weights' dtype loses nothing.

    Raises:
        InputError: not one entry for each layer, or heads that a layer does not have.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        kept_heads: Sequence[Collection[int]],
        dtype: np.typing.DTypeLike = np.float32,
    ):
        L, K = config.num_hidden_layers, config.num_key_value_heads
        if len(kept_heads) != L or not all(set(heads) <= set(range(K)) for heads in kept_heads):
            raise InputError(
                f"kept_heads: expected key-value heads from 0 to {K - 1} for each of {L} layers, "
                f"found {[sorted(heads) for heads in kept_heads]}"
            )
        self.config = config
        self.kept_heads = tuple(sorted(set(heads)) for heads in kept_heads)
        incomplete = [layer for layer, heads in enumerate(self.kept_heads) if len(heads) < K]
        self.layers_fed_again = max(incomplete, default=-1) + 1  # from the first one: they see the whole sequence
        self._kept = [
            KVCache(
                replace(config, num_hidden_layers=1, num_key_value_heads=len(heads)),
                batch_size,
                stored_as(dtype),
                None if layer < self.layers_fed_again else config.sliding_window,
            )
            for layer, heads in enumerate(self.kept_heads)
        ]
        self._token_ids_BS = np.empty((batch_size, 0), np.int64)
        self._positions_BS = np.empty((batch_size, 0), np.int64)
        self._new = 0  # columns of this pass
        self._next_layer = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the kept keys and values. The tokens and positions fed so far, 16 bytes each, come on top."""
        return sum(kept.nbytes for kept in self._kept)

    def begin(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Notes the tokens of a pass; returns what to feed: all so far, or the new ones if nothing is computed again.

        Raises:
            CacheError: another number of rows, or the pass before this one was broken off.
        """
        if self._next_layer:
            raise CacheError(f"cache: a pass was broken off before layer {self._next_layer}; it cannot be used")
        if len(token_ids_BT) != len(self._token_ids_BS):
            raise CacheError(f"cache: expected {len(self._token_ids_BS)} rows, found {len(token_ids_BT)}")
        self._new = token_ids_BT.shape[1]
        if not self.layers_fed_again:
            return token_ids_BT, positions_BT
        self._token_ids_BS = np.concatenate([self._token_ids_BS, token_ids_BT], axis=1)
        self._positions_BS = np.concatenate([self._positions_BS, positions_BT], axis=1)
        return self._token_ids_BS, self._positions_BS

    def update(
        self, layer: int, k_BKTH: np.ndarray, v_BKTH: np.ndarray, positions_BT: np.ndarray
    ) -> tuple[Vectors, Vectors, np.ndarray]:
        """Adds the new tokens of the kept heads; returns what to attend to, past tokens of these heads from the cache.

        Args:
            layer: they come in order.
            k_BKTH: of what the layer was fed: every token so far, or the new ones.
            v_BKTH: likewise.
            positions_BT: likewise.
        """
        if layer != self._next_layer:
            raise CacheError(f"cache: expected layer {self._next_layer} of this pass, found layer {layer}")
        self._next_layer = (layer + 1) % self.config.num_hidden_layers
        heads = self.kept_heads[layer]
        if not heads:
            return k_BKTH, v_BKTH, positions_BT
        new = slice(positions_BT.shape[1] - self._new, None)
        kept = self._kept[layer].update(0, k_BKTH[:, heads, new], v_BKTH[:, heads, new], positions_BT[:, new])
        if len(heads) == self.config.num_key_value_heads:
            return kept
        k_BKSH, v_BKSH = k_BKTH.copy(), v_BKTH.copy()
        k_BKSH[:, heads], v_BKSH[:, heads] = kept[:2]
        return k_BKSH, v_BKSH, positions_BT


def whole_layers(config: Config, layers: Collection[int]) -> list[range]:
    """The `kept_heads` that keep every head of these layers, and none of the others."""
    if not set(layers) <= set(range(config.num_hidden_layers)):
        raise InputError(f"layers: expected 0 to {config.num_hidden_layers - 1}, found {sorted(layers)}")
    return [range(config.num_key_value_heads if layer in layers else 0) for layer in range(config.num_hidden_layers)]


def forward_partly_cached(
    weights: Weights,
    token_ids_BT: np.ndarray,
    positions_BT: np.ndarray,
    cache: PartialCache,
    *,
    last: bool = False,
    ops: Ops = OPS,
) -> np.ndarray:
    """Logits of the new tokens, as `refengine.model.forward` gives them with a full cache.

    With `rope_type` "dynamic" beyond the trained length, keys turn with the sequence's length: what is kept then keeps
    its old turn, as in any cache, and what is computed again does not.

    Args:
        weights: of the whole model.
        token_ids_BT: the new tokens.
        positions_BT: their positions; -1 is padding.
        cache: what earlier calls left.
        last: compute the logits of the last column alone.
        ops: the operators.

    Returns:
        `logits_BTV`, with T = 1 when `last`.

    Raises:
        TokensError: ids or positions of the wrong shape, type or range.
        CacheError: the cache has another number of rows, or was left in the middle of a pass.
    """
    config, new = weights.config, slice(-token_ids_BT.shape[1], None)
    check_tokens(token_ids_BT, positions_BT, config.vocab_size)
    token_ids_BS, positions_BS = cache.begin(token_ids_BT, positions_BT)
    rope = ops.rope_table(
        config.rope_parameters, config.head_dim, config.max_position_embeddings, positions_BS, weights.dtype
    )
    x_BSD = weights.embed(token_ids_BS)
    for index, layer in enumerate(weights.layers()):
        if index == cache.layers_fed_again:
            x_BSD, positions_BS, rope = x_BSD[:, new], positions_BS[:, new], (rope[0][:, new], rope[1][:, new])
        x_BSD = block(config, layer, index, x_BSD, positions_BS, rope, cache, ops, no_trace)
    x_BTD = ops.rms_norm(x_BSD[:, -1:] if last else x_BSD[:, new], weights.norm_D, config.rms_norm_eps)
    return np.concatenate([ops.linear(x_BTD, piece) for piece in weights.head()], axis=-1)
