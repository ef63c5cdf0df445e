"""The modules of a Llama as ONNX nodes, in the decomposition that exporters of PyTorch models give.

Each function writes one module into the graph and returns the name of its result. `Modules` is the namespace
through which they call each other: another export is `replace(MODULES, repeat_kv=...)`, not a switch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
from onnx import TensorProto

from refengine.config import Config
from refengine.rope import rope_inverse_frequencies
from verify.export.graph import Scope, Value

# Added to a masked score: the lowest bfloat16. The lowest float32 would be rounded to -inf by a runtime that
# computes in bfloat16, and a row with nothing allowed (padding) would become NaN.
MASKED = float(ml_dtypes.finfo(ml_dtypes.bfloat16).min)

RopeTable = tuple[Value, Value]  # cos_B1TH and sin_B1TH


def linear(at: Scope, x_BTI: Value, biased: bool) -> Value:
    """`x @ weight.T + bias`; the weight is stored transposed, so that no runtime has to."""
    y_BTO = at("MatMul", x_BTI, at.weight(transposed=True))
    return at("Add", y_BTO, at.weight("bias")) if biased else y_BTO


def rms_norm(at: Scope, x_BTD: Value, eps: float) -> Value:
    """`x / sqrt(mean(x**2) + eps) * weight`, the mean over the last axis."""
    square_BTD = at("Pow", x_BTD, at.constant("exponent", 2.0))
    mean_BT1 = at("ReduceMean", square_BTD, at.constant("axes", [-1]), keepdims=1)
    root_BT1 = at("Sqrt", at("Add", mean_BT1, at.constant("rms_norm_eps", eps)))
    return at("Mul", at("Div", x_BTD, root_BT1), at.weight())


def rope_table(at: Scope, config: Config, position_ids_BT: Value) -> RopeTable:
    """`cos_B1TH` and `sin_B1TH`: both halves of the last axis hold the same P angles, computed in float32."""
    longest = config.max_position_embeddings
    inv_freq_P, factor = rope_inverse_frequencies(config.rope_parameters, config.head_dim, longest, longest)
    positions_BT = at("Cast", position_ids_BT, to=TensorProto.FLOAT)
    positions_B1T1 = at("Unsqueeze", positions_BT, at.constant("axes", [1, 3]))
    angles_B1TP = at("Mul", positions_B1T1, at.constant("inv_freq", inv_freq_P))
    angles_B1TH = at("Concat", angles_B1TP, angles_B1TP, axis=-1)
    attention_factor = at.constant("attention_factor", factor)
    cos_B1TH = at("Mul", at("Cos", angles_B1TH), attention_factor)
    sin_B1TH = at("Mul", at("Sin", angles_B1TH), attention_factor)
    return cos_B1TH, sin_B1TH


def rotate(at: Scope, x_BMTH: Value, table: RopeTable, head_dim: int) -> Value:
    """Rotary embedding: dimension p turns with dimension p + P, the pairing of Hugging Face checkpoints."""
    cos_B1TH, sin_B1TH = table
    start, half = at.constant("start", [0]), at.constant("half", [head_dim // 2])
    end, axis = at.constant("end", [head_dim]), at.constant("axis", [3])
    first_BMTP = at("Slice", x_BMTH, start, half, axis)
    second_BMTP = at("Slice", x_BMTH, half, end, axis)
    turned_BMTH = at("Concat", at("Neg", second_BMTP), first_BMTP, axis=-1)
    return at("Add", at("Mul", x_BMTH, cos_B1TH), at("Mul", turned_BMTH, sin_B1TH))


def attention_mask(at: Scope, input_ids_BT: Value, attention_mask_BS: Value, window: int | None) -> Value:
    """`bias_B1TS`, added to scores: 0 where query t may see slot s, a very low number where it may not.

    The new tokens are the last T of the S slots, so query t stands in slot S - T + t, past or no past. It
    sees its own slot and those before it; with a window, only the `window - 1` before it (age < window); none
    whose mask is 0. Ages are counted in slots: padding in front leaves them as they are.
    """
    zero, one = at.constant("zero", 0), at.constant("one", 1)
    # Scalars by Gather: ONNX Runtime's OpenVINO provider leaves a Reshape to a scalar to the CPU.
    new = at("Gather", at("Shape", input_ids_BT), one)
    slots = at("Gather", at("Shape", attention_mask_BS), one)
    key_slots_S = at("Range", zero, slots, one)
    query_slots_T = at("Range", at("Sub", slots, new), slots, one)
    query_slots_T1 = at("Unsqueeze", query_slots_T, at.constant("axes", [1]))
    age_TS = at("Sub", query_slots_T1, key_slots_S)
    allowed_TS = at("GreaterOrEqual", age_TS, zero)
    if window is not None:
        allowed_TS = at("And", allowed_TS, at("Less", age_TS, at.constant("sliding_window", window)))
    kept_BS = at("Cast", attention_mask_BS, to=TensorProto.BOOL)
    kept_B11S = at("Unsqueeze", kept_BS, at.constant("axes", [1, 2]))
    allowed_B1TS = at("And", kept_B11S, allowed_TS)
    return at("Where", allowed_B1TS, at.constant("allowed", 0.0), at.constant("masked", MASKED))


def split_heads(at: Scope, x_BTI: Value, heads: int, head_dim: int) -> Value:
    """`x_BMTH`: the last axis as heads, which move in front of the tokens."""
    x_BTMH = at("Reshape", x_BTI, at.constant("shape", [0, 0, heads, head_dim]))
    return at("Transpose", x_BTMH, perm=[0, 2, 1, 3])


def repeat_kv(at: Scope, x_BKSH: Value, config: Config) -> Value:
    """`x_BNSH`: each head G times in place (k0 k0 k0 k1 k1 k1), so that query head n meets head n // G."""
    groups = config.num_attention_heads // config.num_key_value_heads
    if groups == 1:
        return x_BKSH
    x_BK1SH = at("Unsqueeze", x_BKSH, at.constant("axes", [2]))
    x_BKGSH = at("Expand", x_BK1SH, at.constant("groups", [1, 1, groups, 1, 1]))
    return at("Reshape", x_BKGSH, at.constant("shape", [0, config.num_attention_heads, -1, config.head_dim]))


def attend(at: Scope, q_BNTH: Value, k_BNSH: Value, v_BNSH: Value, bias_B1TS: Value, config: Config) -> Value:
    """`softmax(q @ k.T / sqrt(H) + bias) @ v`, as `y_BTI` with the heads side by side."""
    scores_BNTS = at("MatMul", q_BNTH, at("Transpose", k_BNSH, perm=[0, 1, 3, 2]))
    scores_BNTS = at("Mul", scores_BNTS, at.constant("scale", config.head_dim**-0.5))
    weights_BNTS = at("Softmax", at("Add", scores_BNTS, bias_B1TS), axis=-1)
    y_BTNH = at("Transpose", at("MatMul", weights_BNTS, v_BNSH), perm=[0, 2, 1, 3])
    return at("Reshape", y_BTNH, at.constant("shape", [0, 0, config.num_attention_heads * config.head_dim]))


@dataclass(frozen=True)
class Past:
    """One layer's cache in the graph: the inputs it is read from, and the names of the outputs it goes to."""

    key_BKSH: Value
    value_BKSH: Value
    present_key: Value
    present_value: Value


def attention(
    at: Scope,
    x_BTD: Value,
    config: Config,
    table: RopeTable,
    bias_B1TS: Value,
    past: Past | None,
    modules: "Modules",
) -> Value:
    """Grouped-query attention of one layer. The cache holds rotated keys, and key-value heads un-repeated."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (at / proj for proj in ("q_proj", "k_proj", "v_proj"))
    q_BNTH = split_heads(q, modules.linear(q, x_BTD, config.attention_bias), N, H)
    k_BKSH = split_heads(k, modules.linear(k, x_BTD, config.attention_bias), K, H)
    v_BKSH = split_heads(v, modules.linear(v, x_BTD, config.attention_bias), K, H)
    q_BNTH = modules.rotate(at / "q_rope", q_BNTH, table, H)
    k_BKSH = modules.rotate(at / "k_rope", k_BKSH, table, H)
    if past is not None:
        k_BKSH = (at / "k_cache")("Concat", past.key_BKSH, k_BKSH, axis=2, output=past.present_key)
        v_BKSH = (at / "v_cache")("Concat", past.value_BKSH, v_BKSH, axis=2, output=past.present_value)
    k_BNSH = modules.repeat_kv(at / "k_repeat", k_BKSH, config)
    v_BNSH = modules.repeat_kv(at / "v_repeat", v_BKSH, config)
    y_BTI = modules.attend(at / "attend", q_BNTH, k_BNSH, v_BNSH, bias_B1TS, config)
    return modules.linear(at / "o_proj", y_BTI, config.attention_bias)


def silu_gate(at: Scope, gate_BTF: Value, up_BTF: Value) -> Value:
    """SwiGLU's gate: `gate * sigmoid(gate) * up`."""
    silu_BTF = at("Mul", gate_BTF, at("Sigmoid", gate_BTF))
    return at("Mul", silu_BTF, up_BTF)


def mlp(at: Scope, x_BTD: Value, config: Config, modules: "Modules") -> Value:
    """`down(silu(gate(x)) * up(x))`."""
    gate_BTF = modules.linear(at / "gate_proj", x_BTD, config.mlp_bias)
    up_BTF = modules.linear(at / "up_proj", x_BTD, config.mlp_bias)
    h_BTF = modules.silu_gate(at / "activation", gate_BTF, up_BTF)
    return modules.linear(at / "down_proj", h_BTF, config.mlp_bias)


@dataclass(frozen=True)
class Modules:
    """What a decoder is put together from."""

    linear: Callable[[Scope, Value, bool], Value] = linear
    rms_norm: Callable[[Scope, Value, float], Value] = rms_norm
    rope_table: Callable[[Scope, Config, Value], RopeTable] = rope_table
    rotate: Callable[[Scope, Value, RopeTable, int], Value] = rotate
    attention_mask: Callable[[Scope, Value, Value, int | None], Value] = attention_mask
    repeat_kv: Callable[[Scope, Value, Config], Value] = repeat_kv
    attend: Callable[[Scope, Value, Value, Value, Value, Config], Value] = attend
    attention: Callable[..., Value] = attention
    silu_gate: Callable[[Scope, Value, Value], Value] = silu_gate
    mlp: Callable[..., Value] = mlp


MODULES = Modules()
