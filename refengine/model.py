"""The whole forward pass of a Llama-family model, as pure functions on NumPy arrays.

An array's name ends in its axes (the letters of `jax.nn.dot_product_attention`):

    B batch rows   T new tokens   S cached tokens, these T included   D hidden_size         V vocab_size
    N num_attention_heads   K num_key_value_heads   G = N // K        H head_dim   P = H // 2   F intermediate_size

Every array of tokens travels with its absolute positions, and -1 marks padding. Causality, left padding, ragged rows,
sliding windows and what a cache has dropped all follow from positions: there is no mask to pass, and none to get wrong.
"""

import numpy as np

from refengine.config import Config
from refengine.kvcache import NO_CACHE, Cache
from refengine.ops import OPS, Ops
from refengine.tokens import check_tokens
from refengine.trace import Trace, no_trace
from refengine.weights import Layer, Weights


def forward(
    weights: Weights,
    token_ids_BT: np.ndarray,
    positions_BT: np.ndarray,
    cache: Cache = NO_CACHE,
    *,
    last: bool = False,
    ops: Ops = OPS,
    trace: Trace = no_trace,
) -> np.ndarray:
    """Logits of every token, or of the last column only.

    Args:
        weights: the model; their dtype is the dtype of the computation.
        token_ids_BT: integers in [0, vocab_size), at padding too.
        positions_BT: absolute positions from 0; -1 is padding, whose logits mean nothing.
        cache: what earlier calls left; this call's keys and values are added to it.
        last: compute the logits of the last column alone.
        ops: the operators.
        trace: called with the name and value of every point of `refengine.trace`.

    Returns:
        `logits_BTV`, with T = 1 when `last`.

    Raises:
        TokensError: ids or positions of the wrong shape, type or range.
    """
    config = weights.config
    check_tokens(token_ids_BT, positions_BT, config.vocab_size)
    rope = ops.rope_table(
        config.rope_parameters, config.head_dim, config.max_position_embeddings, positions_BT, weights.dtype
    )
    x_BTD = weights.embed(token_ids_BT)
    trace("embed_tokens", x_BTD)
    for index, layer in enumerate(weights.layers()):
        x_BTD = block(config, layer, index, x_BTD, positions_BT, rope, cache, ops, trace)
    x_BTD = ops.rms_norm(x_BTD[:, -1:] if last else x_BTD, weights.norm_D, config.rms_norm_eps)
    trace("norm", x_BTD)
    pieces = [ops.linear(x_BTD, piece) for piece in weights.head()]
    logits_BTV = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
    trace("lm_head", logits_BTV)
    return logits_BTV


def block(
    config: Config,
    layer: Layer,
    index: int,
    x_BTD: np.ndarray,
    positions_BT: np.ndarray,
    rope: tuple[np.ndarray, np.ndarray],
    cache: Cache,
    ops: Ops,
    trace: Trace,
) -> np.ndarray:
    """Decoder layer `index` alone: attention, then the MLP, each added to what came in."""
    eps, at = config.rms_norm_eps, f"layers.{index}."
    h_BTD = ops.rms_norm(x_BTD, layer.input_layernorm_D, eps)
    trace(at + "input_layernorm", h_BTD)
    x_BTD = x_BTD + attention(config, layer, index, h_BTD, positions_BT, rope, cache, ops, trace)
    trace(at + "self_attn.residual", x_BTD)
    h_BTD = ops.rms_norm(x_BTD, layer.post_attention_layernorm_D, eps)
    trace(at + "post_attention_layernorm", h_BTD)
    x_BTD = x_BTD + mlp(config, layer, at, h_BTD, ops, trace)
    trace(at + "mlp.residual", x_BTD)
    return x_BTD


def attention(
    config: Config,
    layer: Layer,
    index: int,
    h_BTD: np.ndarray,
    positions_BT: np.ndarray,
    rope: tuple[np.ndarray, np.ndarray],
    cache: Cache,
    ops: Ops,
    trace: Trace,
) -> np.ndarray:
    """Self-attention of a layer: projections, rotation, the cache, `attend`, and o_proj."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    at = f"layers.{index}.self_attn."
    B, T, _ = h_BTD.shape
    heads_BTMH = ops.linear(h_BTD, layer.qkv_proj).reshape(B, T, N + 2 * K, H)
    trace(at + "q_proj", heads_BTMH[:, :, :N])
    trace(at + "k_proj", heads_BTMH[:, :, N : N + K])
    trace(at + "v_proj", heads_BTMH[:, :, N + K :])
    rotated_BTMH = ops.rotate(heads_BTMH[:, :, : N + K], *rope)
    q_BTNH, k_BTKH, v_BTKH = rotated_BTMH[:, :, :N], rotated_BTMH[:, :, N:], heads_BTMH[:, :, N + K :]
    trace(at + "q_rope", q_BTNH)
    trace(at + "k_rope", k_BTKH)
    k_BKSH, v_BKSH, positions_BS = cache.update(index, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), positions_BT)
    trace(at + "k_cache", k_BKSH)
    trace(at + "v_cache", v_BKSH)
    y_BTNH = ops.attend(q_BTNH, k_BKSH, v_BKSH, positions_BT, positions_BS, config.sliding_window)
    trace(at + "attend", y_BTNH)
    y_BTD = ops.linear(y_BTNH.reshape(B, T, N * H), layer.o_proj)
    trace(at + "o_proj", y_BTD)
    return y_BTD


def mlp(config: Config, layer: Layer, at: str, h_BTD: np.ndarray, ops: Ops, trace: Trace) -> np.ndarray:
    """SwiGLU: gate and up side by side, then down."""
    gate_up_BTF = ops.linear(h_BTD, layer.gate_up_proj)
    gate_BTF, up_BTF = gate_up_BTF[..., : config.intermediate_size], gate_up_BTF[..., config.intermediate_size :]
    trace(at + "mlp.gate_proj", gate_BTF)
    trace(at + "mlp.up_proj", up_BTF)
    h_BTF = ops.silu_gate(gate_BTF, up_BTF)
    trace(at + "mlp.activation", h_BTF)
    y_BTD = ops.linear(h_BTF, layer.down_proj)
    trace(at + "mlp.down_proj", y_BTD)
    return y_BTD
