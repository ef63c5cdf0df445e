"""ONNX's decoder operators computed with the engine's: adapters from a node's inputs to its outputs.

Nothing is computed here that the engine has an operator for. What it has none for is done in between, in one
line each: a soft cap, a mask that is added to the scores, rotary pairs that are interleaved. Low-precision
inputs are computed in float32, since that is the lowest precision the engine computes in.

Source: ONNX operators RMSNormalization-23, RotaryEmbedding-23, Attention-23 to 25.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from refengine import ops
from refengine.config import Config, RopeParameters
from refengine.kvcache import KVCache

Arrays = Mapping[str, np.ndarray]  # input or output name of the operator -> array
Attributes = Mapping[str, Any]


def run_node(node: onnx.NodeProto, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs that a node of one of these operators names, in order; `inputs` leaves out absent ones."""
    schema = onnx.defs.get_schema(node.op_type)
    given = iter(inputs)
    named = {
        formal.name: _computable(next(given)) for formal, name in zip(schema.inputs, node.input, strict=False) if name
    }
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    outputs = ADAPTERS[node.op_type](named, attributes)
    wanted = [formal.name for formal, name in zip(schema.outputs, node.output, strict=False) if name]
    return [outputs[name].astype(inputs[0].dtype) for name in wanted]


def _computable(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def rms_normalization(inputs: Arrays, attributes: Attributes) -> dict[str, np.ndarray]:
    """The axes from `axis` on are normalised together, so they are made one."""
    x, weight = inputs["X"], inputs["scale"]
    axis = attributes.get("axis", -1) % x.ndim
    flat = x.reshape(*x.shape[:axis], -1)
    return {"Y": ops.rms_norm(flat, weight.reshape(-1), attributes.get("epsilon", 1e-5)).reshape(x.shape)}


def rotary_embedding(inputs: Arrays, attributes: Attributes) -> dict[str, np.ndarray]:
    """Rotates `rotary_embedding_dim` dimensions; interleaved pairs become halves and then pairs again."""
    given = inputs["X"]
    x_BTMH = given.swapaxes(1, 2) if given.ndim == 4 else _split_heads(given, attributes["num_heads"])
    cos_BTP, sin_BTP = inputs["cos_cache"], inputs["sin_cache"]
    if "position_ids" in inputs:
        cos_BTP, sin_BTP = cos_BTP[inputs["position_ids"]], sin_BTP[inputs["position_ids"]]
    turned = attributes.get("rotary_embedding_dim", 0) or x_BTMH.shape[-1]
    order = np.arange(turned)
    if attributes.get("interleaved", 0):
        order = np.concatenate([order[0::2], order[1::2]])
    y_BTMH = x_BTMH.copy()
    y_BTMH[..., order] = ops.rotate(x_BTMH[..., order], cos_BTP, sin_BTP)
    return {"Y": y_BTMH.swapaxes(1, 2) if given.ndim == 4 else y_BTMH.reshape(given.shape)}


@dataclass(frozen=True)
class _Problem:
    """One attention as the engine takes it, and a mask to add to the scores, which it has no argument for."""

    q_BTNH: np.ndarray
    k_BKSH: np.ndarray
    v_BKSH: np.ndarray
    positions_BT: np.ndarray
    positions_BS: np.ndarray
    window: int | None
    mask_BNTS: np.ndarray | None


def attention(inputs: Arrays, attributes: Attributes) -> dict[str, np.ndarray]:
    """All outputs; `present_key` and `present_value` are what a KVCache holds after the past and the new.

    Everything goes through `ops.attend`, but for a soft cap and the scores as an output: those stand between
    the operators that `attend` is made of.
    """
    q_BTNH, k_BKSH, v_BKSH = _by_heads(inputs, attributes)
    query_size, value_size = q_BTNH.shape[-1], v_BKSH.shape[-1]
    scale = attributes.get("scale", query_size**-0.5)
    # A decoder has one head size. Zeros behind the shorter vectors change no product.
    size = max(query_size, value_size)
    q_BTNH, k_BKSH, v_BKSH = (_widened(array, size) for array in (q_BTNH, k_BKSH, v_BKSH))
    past = [_widened(inputs[name], size) for name in ("past_key", "past_value") if name in inputs]
    if past:
        k_BKSH, v_BKSH = _with_past(past[0], past[1], k_BKSH, v_BKSH)
    problem = _Problem(
        q_BTNH * q_BTNH.dtype.type(scale * size**0.5),  # the engine divides by sqrt(size) again
        k_BKSH,
        v_BKSH,
        *_positions(inputs, attributes, k_BKSH.shape[2], len(q_BTNH), q_BTNH.shape[1]),
        window=attributes["left_window_size"] + 1 if attributes.get("left_window_size", -1) >= 0 else None,
        mask_BNTS=_mask(inputs.get("attn_mask"), (*q_BTNH.shape[::2], q_BTNH.shape[1], k_BKSH.shape[2])),
    )
    outputs = {"present_key": k_BKSH[..., :query_size], "present_value": v_BKSH[..., :value_size]}
    if attributes.get("softcap", 0.0) or "qk_matmul_output_mode" in attributes:
        y_BTNH, outputs["qk_matmul_output"] = _attend_in_parts(problem, attributes)
    else:
        y_BTNH = _attend(problem)
        outputs["qk_matmul_output"] = _scores(problem)
    y_BTNH = y_BTNH[..., :value_size]
    three = inputs["Q"].ndim == 3
    return outputs | {"Y": y_BTNH.reshape(*y_BTNH.shape[:2], -1) if three else y_BTNH.swapaxes(1, 2)}


def _attend(problem: _Problem) -> np.ndarray:
    """`y_BTNH` from `ops.attend`, which masks by positions alone."""
    if problem.mask_BNTS is None:
        return ops.attend(
            problem.q_BTNH,
            problem.k_BKSH,
            problem.v_BKSH,
            problem.positions_BT,
            problem.positions_BS,
            problem.window,
        )
    # With a mask each query has keys of its own, so it becomes a batch row of its own; so does each head,
    # where heads have masks of their own. What is masked is padding there, at position -1.
    B, T, N, H = problem.q_BTNH.shape
    heads = N if (problem.mask_BNTS != problem.mask_BNTS[:, :1]).any() else 1
    b_R, t_R, n_R = (index.reshape(-1) for index in np.indices((B, T, heads)))
    mask_RS = problem.mask_BNTS[b_R, n_R, t_R]
    positions_RS = np.where(mask_RS > -np.inf, problem.positions_BS[b_R], -1)
    k_RKSH, v_RKSH, q_R1NH = problem.k_BKSH[b_R], problem.v_BKSH[b_R], problem.q_BTNH[b_R, t_R][:, None]
    if heads == N:
        group = N // problem.k_BKSH.shape[1]
        k_RKSH, v_RKSH = (array[np.arange(len(b_R)), n_R // group][:, None] for array in (k_RKSH, v_RKSH))
        q_R1NH = q_R1NH[np.arange(len(b_R)), :, n_R][:, :, None]
    # What a mask adds to a score is one more product: 1 in the query, and the mask in the key.
    wide = H + 1
    q_R1NH = _widened(q_R1NH * q_R1NH.dtype.type((wide / H) ** 0.5), wide)
    q_R1NH[..., H] = wide**0.5
    k_RKSH, v_RKSH = _widened(k_RKSH, wide), _widened(v_RKSH, wide)
    k_RKSH[..., H] = np.where(mask_RS > -np.inf, mask_RS, 0)[:, None]
    y_R1NH = ops.attend(q_R1NH, k_RKSH, v_RKSH, problem.positions_BT[b_R, t_R][:, None], positions_RS, problem.window)
    return y_R1NH[..., :H].reshape(B, T, N, H)


def _attend_in_parts(problem: _Problem, attributes: Attributes) -> tuple[np.ndarray, np.ndarray]:
    """`y_BTNH`, and the scores after the step that `qk_matmul_output_mode` names.

    The steps are 0 the product, 1 the soft cap, 2 the mask, 3 the softmax.
    """
    v_BKSH = problem.v_BKSH
    B, T, N, H = problem.q_BTNH.shape
    K, S = v_BKSH.shape[1:3]
    steps = [_scores(problem)]
    cap = attributes.get("softcap", 0.0)
    steps.append(cap * np.tanh(steps[0] / cap) if cap else steps[0])
    scores_BKRS = (steps[1] + (0 if problem.mask_BNTS is None else problem.mask_BNTS)).reshape(B, K, -1, S)
    ops.hide(scores_BKRS, ops.attention_mask(problem.positions_BT, problem.positions_BS, problem.window))
    steps.append(scores_BKRS.reshape(B, N, T, S).copy())
    precision = onnx.helper.tensor_dtype_to_np_dtype(attributes.get("softmax_precision", onnx.TensorProto.FLOAT))
    scores_BKRS = scores_BKRS.astype(precision)
    identity_BKSS = np.broadcast_to(np.eye(S, dtype=precision), (B, K, S, S))
    # The probabilities themselves are a weighted sum of the unit vectors.
    steps.append(ops.softmax_weighted_sum(scores_BKRS.copy(), identity_BKSS).reshape(B, N, T, S))
    y_BKRH = ops.softmax_weighted_sum(scores_BKRS, v_BKSH.astype(precision))
    return y_BKRH.reshape(B, N, T, H).swapaxes(1, 2), steps[attributes.get("qk_matmul_output_mode", 0)]


def _scores(problem: _Problem) -> np.ndarray:
    B, T, N, _ = problem.q_BTNH.shape
    return ops.scores(problem.q_BTNH, problem.k_BKSH).reshape(B, N, T, -1)


def _by_heads(inputs: Arrays, attributes: Attributes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`q_BTNH`, `k_BKSH` and `v_BKSH` from either layout of the operator."""
    q, k, v = inputs["Q"], inputs["K"], inputs["V"]
    if q.ndim == 4:
        return q.swapaxes(1, 2), k, v
    k, v = (_split_heads(array, attributes["kv_num_heads"]).swapaxes(1, 2) for array in (k, v))
    return _split_heads(q, attributes["q_num_heads"]), k, v


def _split_heads(x_BTI: np.ndarray, heads: int) -> np.ndarray:
    return x_BTI.reshape(*x_BTI.shape[:2], heads, -1)


def _widened(array: np.ndarray, size: int) -> np.ndarray:
    """With zeros behind, up to `size` along the last axis; always a copy."""
    wide = np.zeros((*array.shape[:-1], size), array.dtype)
    wide[..., : array.shape[-1]] = array
    return wide


def _positions(
    inputs: Arrays, attributes: Attributes, slots: int, rows: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """`positions_BT`, `positions_BS`: a key's is its slot; a query's follows what was there before it."""
    positions_BS = np.broadcast_to(np.arange(slots), (rows, slots))
    before_B = np.full(rows, inputs["past_key"].shape[2] if "past_key" in inputs else 0)
    if "nonpad_kv_seqlen" in inputs:
        positions_BS = np.where(positions_BS < inputs["nonpad_kv_seqlen"][:, None], positions_BS, -1)
        before_B = inputs["nonpad_kv_seqlen"] - tokens
    if not attributes.get("is_causal", 0):
        return np.full((rows, tokens), slots), positions_BS  # later than every key: sees them all
    return np.maximum(before_B[:, None] + np.arange(tokens), -1), positions_BS


def _mask(mask: np.ndarray | None, shape_BNTS: tuple[int, ...]) -> np.ndarray | None:
    """A mask of either kind and any rank as what is added to the scores: -inf where nothing may be seen."""
    if mask is None:
        return None
    if mask.dtype == np.bool_:
        mask = np.where(mask, np.float32(0), np.float32(-np.inf))
    full = np.full((*mask.shape[:-1], shape_BNTS[-1]), -np.inf, mask.dtype)
    full[..., : mask.shape[-1]] = mask
    return np.broadcast_to(full, shape_BNTS)


def _with_past(past_k: np.ndarray, past_v: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, heads, before, size = past_k.shape
    cache = KVCache(replace(ONE_LAYER, num_key_value_heads=heads, head_dim=size), rows)
    cache.update(0, past_k, past_v, np.broadcast_to(np.arange(before), (rows, before)))
    new_BT = np.broadcast_to(np.arange(before, before + k.shape[2]), (rows, k.shape[2]))
    k_BKSH, v_BKSH, _ = cache.update(0, k, v, new_BT)
    return k_BKSH, v_BKSH


ONE_LAYER = Config(
    model_type="llama",
    vocab_size=1,
    hidden_size=1,
    intermediate_size=1,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=1,
    rope_parameters=RopeParameters("default", 10000.0),
)

ADAPTERS: Mapping[str, Callable[[Arrays, Attributes], dict[str, np.ndarray]]] = {
    "RMSNormalization": rms_normalization,
    "RotaryEmbedding": rotary_embedding,
    "Attention": attention,
}
