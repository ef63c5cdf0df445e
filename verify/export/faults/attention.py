"""Faults of attention: its heads, its scale, its mask."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from refengine.config import Config
from verify.export.faults.writing import Fault, Module, everywhere_and_in_one
from verify.export.graph import Scope, Value
from verify.export.modules import MASKED, MODULES, RopeTable

MIDDLE = 6
Heads = Callable[[Config], np.ndarray]  # an order of num_attention_heads heads


def tiled_heads(at: Scope, x_BKSH: Value, config: Config) -> Value:
    """Key-value heads repeated in the wrong order: k0 k1 k0 k1 k0 k1."""
    return at("Concat", *[x_BKSH] * (config.num_attention_heads // config.num_key_value_heads), axis=1)


def heads_in_order(order: Heads) -> Module:
    """Attention that gives o_proj its heads in another order."""

    def attend(at: Scope, *arguments: Any) -> Value:
        config: Config = arguments[-1]
        y_BTI = MODULES.attend(at, *arguments)
        y_BTNH = at("Reshape", y_BTI, at.constant("heads", [0, 0, config.num_attention_heads, config.head_dim]))
        y_BTNH = at("Gather", y_BTNH, at.constant("order", order(config)), axis=2)
        return at("Reshape", y_BTNH, at.constant("beside", [0, 0, config.num_attention_heads * config.head_dim]))

    return attend


def by_place_in_group(config: Config) -> np.ndarray:
    """The first heads of all groups, then the second ones: what tiling would have been right for."""
    return np.arange(config.num_attention_heads).reshape(config.num_key_value_heads, -1).T.ravel()


def last_first(config: Config) -> np.ndarray:
    """Heads from the last to the first."""
    return np.arange(config.num_attention_heads)[::-1]


def scaled_attention(factor: float) -> Module:
    """Attention with scores of another scale."""

    def attend(at: Scope, q_BNTH: Value, *others: Any) -> Value:
        return MODULES.attend(at, at("Mul", q_BNTH, at.constant("factor", factor)), *others)

    return attend


def attention_with_scale(scale: Callable[[Config], float]) -> Module:
    """Attention whose one factor on the scores is another one."""

    def attend(at: Scope, q_BNTH: Value, k_BNSH: Value, v_BNSH: Value, bias_B1TS: Value, config: Config) -> Value:
        scores_BNTS = at("MatMul", q_BNTH, at("Transpose", k_BNSH, perm=[0, 1, 3, 2]))
        scores_BNTS = at("Mul", scores_BNTS, at.constant("scale", scale(config)))
        return _weighted_sum(at, scores_BNTS, v_BNSH, bias_B1TS, config)

    return attend


def softcapped(cap: float) -> Module:
    """Attention whose scores cannot leave -cap to cap."""

    def attend(at: Scope, q_BNTH: Value, k_BNSH: Value, v_BNSH: Value, bias_B1TS: Value, config: Config) -> Value:
        scores_BNTS = at("MatMul", q_BNTH, at("Transpose", k_BNSH, perm=[0, 1, 3, 2]))
        scores_BNTS = at("Mul", scores_BNTS, at.constant("scale", config.head_dim**-0.5))
        limit = at.constant("softcap", cap)
        scores_BNTS = at("Mul", at("Tanh", at("Div", scores_BNTS, limit)), limit)
        return _weighted_sum(at, scores_BNTS, v_BNSH, bias_B1TS, config)

    return attend


def _weighted_sum(at: Scope, scores_BNTS: Value, v_BNSH: Value, bias_B1TS: Value, config: Config) -> Value:
    weights_BNTS = at("Softmax", at("Add", scores_BNTS, bias_B1TS), axis=-1)
    y_BTNH = at("Transpose", at("MatMul", weights_BNTS, v_BNSH), perm=[0, 2, 1, 3])
    return at("Reshape", y_BTNH, at.constant("shape", [0, 0, config.num_attention_heads * config.head_dim]))


def mask_not_causal(at: Scope, input_ids_BT: Value, attention_mask_BS: Value, window: int | None) -> Value:
    """A mask of the padding alone: tokens see those after them."""
    kept_BS = at("Cast", attention_mask_BS, to=TensorProto.BOOL)
    return _as_bias(at, at("Unsqueeze", kept_BS, at.constant("axes", [1, 2])))


def aligned_top_left(at: Scope, input_ids_BT: Value, attention_mask_BS: Value, window: int | None) -> Value:
    """A causal mask that counts queries from 0 although there is a past: new token t sees slots 0 to t."""
    zero, one = at.constant("zero", 0), at.constant("one", 1)
    new = at("Gather", at("Shape", input_ids_BT), one)
    slots = at("Gather", at("Shape", attention_mask_BS), one)
    queries_T1 = at("Unsqueeze", at("Range", zero, new, one), at.constant("axes", [1]))
    causal_TS = at("GreaterOrEqual", queries_T1, at("Range", zero, slots, one))
    kept_BS = at("Cast", attention_mask_BS, to=TensorProto.BOOL)
    return _as_bias(at, at("And", at("Unsqueeze", kept_BS, at.constant("axes", [1, 2])), causal_TS))


def padding_attended(at: Scope, input_ids_BT: Value, attention_mask_BS: Value, window: int | None) -> Value:
    """A causal mask that takes padding for tokens."""
    ones_BS = at("Add", at("Sub", attention_mask_BS, attention_mask_BS), at.constant("kept", 1))
    return MODULES.attention_mask(at, input_ids_BT, ones_BS, window)


def windowed(window: int | None) -> Module:
    """A mask with this sliding window, whatever the configuration says."""
    return lambda at, ids, mask, _: MODULES.attention_mask(at, ids, mask, window)


def mask_of_row_0(at: Scope, input_ids_BT: Value, attention_mask_BS: Value, window: int | None) -> Value:
    """Every row sees the slots that row 0 may see."""
    mask_1S = at("Gather", attention_mask_BS, at.constant("row_0", [0]), axis=0)
    return MODULES.attention_mask(at, input_ids_BT, mask_1S, window)


def in_a_layer(mask: Module) -> Module:
    """Attention with a mask of its own."""

    def attention(at: Scope, x_BTD: Value, config: Config, table: RopeTable, _: Value, *others: Any) -> Value:
        bias_B1TS = mask(at / "mask", "input_ids", "attention_mask", config.sliding_window)
        return MODULES.attention(at, x_BTD, config, table, bias_B1TS, *others)

    return attention


def _as_bias(at: Scope, allowed_B1TS: Value) -> Value:
    return at("Where", allowed_B1TS, at.constant("allowed", 0.0), at.constant("masked", MASKED))


def _of_mask(name: str, cause: str, mask: Module, **needs: Any) -> tuple[Fault, Fault]:
    """A fault of the mask of all layers, and of one layer's own."""
    everywhere, _ = everywhere_and_in_one(name, cause, "attention_mask", mask, **needs)
    _, alone = everywhere_and_in_one(name, cause, "attention", in_a_layer(mask), layer=MIDDLE, **needs)
    return everywhere, alone


FAULTS: Sequence[Fault] = (
    *everywhere_and_in_one("KV heads tiled", "kv-heads-tiled", "repeat_kv", tiled_heads, layer=MIDDLE),
    *everywhere_and_in_one(
        *("heads by place in group", "head-order", "attend", heads_in_order(by_place_in_group)), layer=MIDDLE
    ),
    *everywhere_and_in_one("heads last first", "head-order", "attend", heads_in_order(last_first), layer=MIDDLE),
    *everywhere_and_in_one(
        *("scores not scaled", "attention-scale", "attend", attention_with_scale(lambda config: 1.0)), layer=MIDDLE
    ),
    *everywhere_and_in_one(*("scores scaled by 0.9", "attention-scale", "attend", scaled_attention(0.9)), layer=MIDDLE),
    *everywhere_and_in_one("soft cap of 5", "attention-softcap", "attend", softcapped(5.0), layer=MIDDLE),
    *_of_mask("mask not causal", "mask-not-causal", mask_not_causal),
    *_of_mask("mask aligned top left", "mask-causal-alignment", aligned_top_left, needs=("cache",)),
    *_of_mask("window of 7", "sliding-window", windowed(7)),
    *_of_mask("padding attended", "padding-unmasked", padding_attended, needs=("padding",)),
)
