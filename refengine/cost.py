"""What a pass of the model costs, on paper: FLOPs of each part, bytes moved, and bytes held, from a `Config` alone.

What a cache saves: the projections, the rotation and the scores of past tokens, which would be the same again; and
their MLP too, since past tokens are not fed again, so that what passes between blocks shrinks from the sequence to one
token. What it does not save: every weight is still read at each step, and so is the whole cache; and the scores of the
new token with every past one are still computed.

How FLOPs are counted: each result of an add, subtract, multiply, divide, negation, exp or square root is one, so that a
multiply-add is two; comparisons, copies, masking and look-ups are none. Left out is the rotary table, cos and sin of
H / 2 angles a token once a pass. What is counted is what the engine computes, padding included: it attends a block of
`QUERY_BLOCK` queries at a time to the keys from the oldest to the newest that any of the block may see. So the causal
upper half (later keys) is left out for the blocks, and counted within the block on the diagonal, where it is masked.

How bytes are counted: each array once a pass, as if the processor's caches kept it for as long as the pass uses it.
What lives within a block (projections, scores, the MLP's inner values) is not counted. Both make the bytes, and the
time that follows from them, the least possible and not a forecast.
"""

import math
from dataclasses import astuple, dataclass

import numpy as np

from refengine.config import Config
from refengine.errors import InputError
from refengine.machine import Machine
from refengine.ops import QUERY_BLOCK
from refengine.scheme import FLOAT32, Scheme
from refengine.weights import expected_shapes


@dataclass(frozen=True)
class Flops:
    """FLOPs of each part of a pass, over all layers. A bias counts with its projection.

    Attributes:
        rope: rotating queries and keys.
        scores: scaling the queries, and their products with the keys.
        softmax: subtracting the highest, exp, the sum, and dividing by it (once, after the weighted sum).
        weighted_sum: the probabilities' products with the values.
        activation: silu(gate) * up.
        residual: adding attention and MLP to what came in.
        norms: the two of each layer on every token, the last one on the last token alone.
        lm_head: on the last token alone, as generation needs it.
    """

    q_proj: int
    k_proj: int
    v_proj: int
    rope: int
    scores: int
    softmax: int
    weighted_sum: int
    o_proj: int
    gate_proj: int
    up_proj: int
    activation: int
    down_proj: int
    residual: int
    norms: int
    lm_head: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(astuple(self))


@dataclass(frozen=True)
class Bytes:
    """Bytes that a pass moves.

    Attributes:
        weights: every layer, the last norm, the head, and the rows of the embedding that are looked up. A tied
            embedding is read whole, as the head; another is not.
        cache_read: keys and values attended to, as they are stored; the new ones are read back too.
        cache_written: the new keys and values. A scheme that codes tokens in groups may write more.
        activations: what the embedding hands to the first block, each block to the next, and the last one on.
    """

    weights: int
    cache_read: int
    cache_written: int
    activations: int

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(astuple(self))


@dataclass(frozen=True)
class PassCost:
    """What one pass costs.

    Attributes:
        scored: pairs of query and key, of one head and row, whose score is computed.
        visible: those of them that the query may see; the others are masked.
    """

    flops: Flops
    nbytes: Bytes
    scored: int
    visible: int

    def seconds(self, machine: Machine) -> float:
        """The least time, by the roofline: computing and reading overlap, and the slower of them decides.

        Source: Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785.
        """
        return max(self.flops.total / machine.flops, self.nbytes.total / machine.bandwidth)

    def is_memory_bound(self, machine: Machine) -> bool:
        """Whether it is reading that decides."""
        return self.nbytes.total / machine.bandwidth > self.flops.total / machine.flops


@dataclass(frozen=True)
class GenerationCost:
    """A batch's prefill of S tokens each, and one decode step at sequence length S (the new token is the S-th).

    Without a cache both feed the whole sequence, so they are the same pass.

    Attributes:
        weights_nbytes: of all weights as held.
        cache_nbytes: of the cache after the pass.
    """

    prefill_cached: PassCost
    prefill_uncached: PassCost
    decode_cached: PassCost
    decode_uncached: PassCost
    weights_nbytes: int
    cache_nbytes: int


def generation_cost(
    config: Config,
    batch_size: int,
    sequence_length: int,
    scheme: Scheme = FLOAT32,
    dtype: np.typing.DTypeLike = np.float32,
) -> GenerationCost:
    """What generation costs, phase by phase, with a cache and without.

    Args:
        config: the model.
        batch_size: rows, all of the same length.
        sequence_length: tokens of each row, S.
        scheme: how the cache is stored.
        dtype: of the weights and of the computation.

    Raises:
        InputError: there is no row, no token, or more tokens than the model has positions.
    """
    uncached = pass_cost(config, batch_size, sequence_length, dtype=dtype)
    return GenerationCost(
        prefill_cached=pass_cost(config, batch_size, sequence_length, scheme=scheme, dtype=dtype),
        prefill_uncached=uncached,
        decode_cached=pass_cost(config, batch_size, 1, sequence_length - 1, scheme=scheme, dtype=dtype),
        decode_uncached=uncached,
        weights_nbytes=weights_nbytes(config, dtype),
        cache_nbytes=cache_nbytes(config, batch_size, kept_slots(config, sequence_length), scheme),
    )


def pass_cost(
    config: Config,
    batch_size: int,
    new_tokens: int,
    past_tokens: int = 0,
    scheme: Scheme | None = None,
    dtype: np.typing.DTypeLike = np.float32,
) -> PassCost:
    """What one pass costs that computes the logits of the last token alone.

    Args:
        config: the model.
        batch_size: rows, all alike.
        new_tokens: tokens fed to each row, T.
        past_tokens: tokens that the cache has seen before them; 0 without a cache.
        scheme: how the cache is stored; None is no cache.
        dtype: of the weights and of the computation.

    Raises:
        InputError: there is no row, no token, more tokens than the model has positions, or a past without a cache.
    """
    _check(config, batch_size, new_tokens, past_tokens, scheme)
    tokens, slots = batch_size * new_tokens, kept_slots(config, past_tokens) + new_tokens
    passed_on = tokens * config.hidden_size * np.dtype(dtype).itemsize
    embedding = config.vocab_size * config.hidden_size * np.dtype(dtype).itemsize
    read_whole = weights_nbytes(config, dtype) - (0 if config.tie_word_embeddings else embedding)
    scored = scored_pairs(new_tokens, past_tokens, config.sliding_window)
    return PassCost(
        flops=_flops(config, batch_size, new_tokens, scored),
        nbytes=Bytes(
            weights=read_whole + passed_on,
            cache_read=cache_nbytes(config, batch_size, slots, scheme) if scheme else 0,
            cache_written=cache_nbytes(config, batch_size, new_tokens, scheme) if scheme else 0,
            activations=(config.num_hidden_layers + 1) * passed_on,
        ),
        scored=scored,
        visible=visible_pairs(new_tokens, past_tokens, config.sliding_window),
    )


def _flops(config: Config, batch_size: int, new_tokens: int, scored: int) -> Flops:
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    of_layers, pairs = L * batch_size * new_tokens, L * batch_size * N * scored
    bias, mlp_bias = int(config.attention_bias), int(config.mlp_bias)
    norm = 4 * D + 3  # the sum of squares; mean, epsilon and root; a division and a product for each dimension
    return Flops(
        q_proj=of_layers * N * H * (2 * D + bias),
        k_proj=of_layers * K * H * (2 * D + bias),
        v_proj=of_layers * K * H * (2 * D + bias),
        rope=of_layers * (N + K) * 3 * H,
        scores=pairs * 2 * H + of_layers * N * H,
        softmax=pairs * 3 + of_layers * N * H,
        weighted_sum=pairs * 2 * H,
        o_proj=of_layers * D * (2 * N * H + bias),
        gate_proj=of_layers * F * (2 * D + mlp_bias),
        up_proj=of_layers * F * (2 * D + mlp_bias),
        activation=of_layers * F * 5,
        down_proj=of_layers * D * (2 * F + mlp_bias),
        residual=of_layers * D * 2,
        norms=of_layers * 2 * norm + batch_size * norm,
        lm_head=batch_size * 2 * D * V,
    )


def scored_pairs(new_tokens: int, past_tokens: int, window: int | None) -> int:
    """Pairs of query and key, of one head and row, whose score the engine computes; see the top of this file."""

    def span(start: int, stop: int) -> int:
        """Keys that some query of this block may see."""
        return stop if window is None else stop - max(start - window + 1, 0)

    whole, rest = divmod(new_tokens, QUERY_BLOCK)
    # The blocks that still see the first key: their spans grow by a block each; those of the others are alike.
    growing = whole if window is None else min(whole, max(-((past_tokens - window) // QUERY_BLOCK), 0))
    keys = growing * past_tokens + QUERY_BLOCK * growing * (growing + 1) // 2
    if growing < whole:
        last = past_tokens + whole * QUERY_BLOCK
        keys += (whole - growing) * span(last - QUERY_BLOCK, last)
    stop = past_tokens + new_tokens
    return QUERY_BLOCK * keys + (rest * span(stop - rest, stop) if rest else 0)


def visible_pairs(new_tokens: int, past_tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it may see: itself, and what came before it within the window."""

    def seen_by_first(tokens: int) -> int:
        ramp = tokens if window is None else min(tokens, window)  # each of these sees one more than the one before
        return ramp * (ramp + 1) // 2 + (tokens - ramp) * ramp

    return seen_by_first(past_tokens + new_tokens) - seen_by_first(past_tokens)


def kept_slots(config: Config, tokens: int) -> int:
    """Slots that a cache holds after so many tokens; the next token sees itself and `sliding_window - 1` others."""
    return tokens if config.sliding_window is None else min(tokens, config.sliding_window - 1)


def cache_nbytes(config: Config, batch_size: int, slots: int, scheme: Scheme) -> int:
    """Bytes of a cache's keys and values, scales included; capacity to spare is not counted.

    Without scales: 2 x layers x rows x KV heads x slots x head_dim x bytes. What a scheme keeps as it came is float32.
    """
    shape = slots, config.num_key_value_heads, config.head_dim
    return config.num_hidden_layers * batch_size * (scheme.keys.nbytes(*shape) + scheme.values.nbytes(*shape))


def weights_nbytes(config: Config, dtype: np.typing.DTypeLike = np.float32) -> int:
    """Bytes of all weights in `dtype`; a tied head is the embedding and counts once."""
    return sum(math.prod(shape) for _, shape in expected_shapes(config)) * np.dtype(dtype).itemsize


def _check(config: Config, batch_size: int, new_tokens: int, past_tokens: int, scheme: Scheme | None) -> None:
    if batch_size < 1:
        raise InputError(f"batch size: expected at least 1 row, found {batch_size}")
    if new_tokens < 1:
        raise InputError(f"sequence length: expected at least 1 token, found {new_tokens}")
    if past_tokens < 0 or (past_tokens and scheme is None):
        raise InputError(f"past tokens: expected 0, or with a cache more than that, found {past_tokens}")
    if new_tokens + past_tokens > config.max_position_embeddings:
        raise InputError(
            f"sequence length: expected at most max_position_embeddings {config.max_position_embeddings}, found "
            f"{new_tokens + past_tokens}"
        )
