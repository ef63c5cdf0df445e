"""Mistakes that no cause of the catalogue is: they have to come out unexplained, and rightly located."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from refengine.config import Config
from verify.export.faults.writing import Edit, Fault, Module, only_in, rename_output, write_faulty
from verify.export.graph import Scope, Value
from verify.export.modules import MODULES, Modules, RopeTable

NO_LAYER: frozenset[int] = frozenset()  # before the first, or behind the last


def shifted_mlp(at: Scope, x_BTD: Value, config: Config, modules: Modules) -> Value:
    """The MLP, and a constant more in every dimension of the residual stream."""
    return at("Add", MODULES.mlp(at, x_BTD, config, modules), at.constant("shift", np.full(config.hidden_size, 0.05)))


def no_mlp(at: Scope, x_BTD: Value, config: Config, modules: Modules) -> Value:
    """Nothing where the MLP ought to be."""
    return at("Mul", MODULES.mlp(at, x_BTD, config, modules), at.constant("nothing", 0.0))


def weaker_mlp(at: Scope, x_BTD: Value, config: Config, modules: Modules) -> Value:
    """Less of what the MLP gives."""
    return at("Mul", MODULES.mlp(at, x_BTD, config, modules), at.constant("less", 0.9))


def softmax_over_queries(
    at: Scope, q_BNTH: Value, k_BNSH: Value, v_BNSH: Value, bias_B1TS: Value, config: Config
) -> Value:
    """Weights that sum to 1 over the queries of a key."""
    scores_BNTS = at("MatMul", q_BNTH, at("Transpose", k_BNSH, perm=[0, 1, 3, 2]))
    scores_BNTS = at("Mul", scores_BNTS, at.constant("scale", config.head_dim**-0.5))
    weights_BNTS = at("Softmax", at("Add", scores_BNTS, bias_B1TS), axis=-2)
    return _beside(at, at("MatMul", weights_BNTS, v_BNSH), config)


def without_a_head(at: Scope, *arguments: Any) -> Value:
    """Attention whose second head gives nothing."""
    config: Config = arguments[-1]
    kept_I = np.repeat(np.arange(config.num_attention_heads) != 1, config.head_dim).astype(np.float32)
    return at("Mul", MODULES.attend(at, *arguments), at.constant("kept", kept_I))


def nearer_is_better(at: Scope, q_BNTH: Value, k_BNSH: Value, v_BNSH: Value, bias_B1TS: Value, config: Config) -> Value:
    """Scores with a bias that grows with the slot, as ALiBi has it."""
    zero, one = at.constant("zero", 0), at.constant("one", 1)
    slots = at("Range", zero, at("Squeeze", at("Shape", k_BNSH, start=2, end=3)), one)
    slope = at("Mul", at("Cast", slots, to=onnx.TensorProto.FLOAT), at.constant("slope", 0.05))
    return MODULES.attend(at, q_BNTH, k_BNSH, v_BNSH, at("Add", bias_B1TS, slope), config)


def values_of_other_heads(at: Scope, x_BKSH: Value, config: Config) -> Value:
    """Values of the key-value heads from the last to the first; keys as they are."""
    if "v_repeat" in at.path:
        x_BKSH = at("Gather", x_BKSH, at.constant("order", np.arange(config.num_key_value_heads)[::-1]), axis=1)
    return MODULES.repeat_kv(at, x_BKSH, config)


def keys_rotated_twice(at: Scope, x_BMTH: Value, table: RopeTable, head_dim: int) -> Value:
    """Keys at twice their angle."""
    turned_BMTH = MODULES.rotate(at, x_BMTH, table, head_dim)
    return MODULES.rotate(at / "again", turned_BMTH, table, head_dim) if "k_rope" in at.path else turned_BMTH


def rotated_backwards(at: Scope, x_BMTH: Value, table: RopeTable, head_dim: int) -> Value:
    """Every pair turns the other way."""
    cos, sin = table
    return MODULES.rotate(at, x_BMTH, (cos, at("Neg", sin)), head_dim)


def half_rotated(at: Scope, x_BMTH: Value, table: RopeTable, head_dim: int) -> Value:
    """Every other pair turns, and the rest stays as it is."""
    kept = np.tile(np.arange(head_dim // 2) % 2 == 0, 2)
    turned_BMTH = MODULES.rotate(at, x_BMTH, table, head_dim)
    kept_H, others_H = at.constant("turned", kept.astype(np.float32)), at.constant("left", 1 - kept.astype(np.float32))
    return at("Add", at("Mul", turned_BMTH, kept_H), at("Mul", x_BMTH, others_H))


def norm_of_deviations(at: Scope, x_BTD: Value, eps: float) -> Value:
    """LayerNorm: the mean is taken off first."""
    mean_BT1 = at("ReduceMean", x_BTD, at.constant("mean_axes", [-1]), keepdims=1)
    return MODULES.rms_norm(at, at("Sub", x_BTD, mean_BT1), eps)


def eps_outside_the_root(at: Scope, x_BTD: Value, eps: float) -> Value:
    """`x / (sqrt(mean(x**2)) + 0.01)`."""
    mean_BT1 = at("ReduceMean", at("Mul", x_BTD, x_BTD), at.constant("axes", [-1]), keepdims=1)
    root_BT1 = at("Add", at("Sqrt", mean_BT1), at.constant("beside", 0.01))
    return at("Mul", at("Div", x_BTD, root_BT1), at.weight())


def up_squared(at: Scope, gate_BTF: Value, up_BTF: Value) -> Value:
    """`silu(gate) * up**2`."""
    return MODULES.silu_gate(at, gate_BTF, at("Mul", up_BTF, up_BTF))


def steeper_silu(at: Scope, gate_BTF: Value, up_BTF: Value) -> Value:
    """`gate * sigmoid(1.3 * gate) * up`, which is no activation that has a name."""
    sigmoid_BTF = at("Sigmoid", at("Mul", gate_BTF, at.constant("steepness", 1.3)))
    return at("Mul", at("Mul", gate_BTF, sigmoid_BTF), up_BTF)


def some_channels_dropped(config: Config) -> np.ndarray:
    """What dropout does to channels where nobody has switched it off: a tenth is lost, and the others are larger."""
    kept_F = np.random.default_rng(0).random(config.intermediate_size) >= 0.1
    return (kept_F / 0.9).astype(np.float32)


def dropping_mlp(at: Scope, x_BTD: Value, config: Config, modules: Modules) -> Value:
    """An MLP some of whose channels are lost before its last projection."""
    gate_BTF = MODULES.linear(at / "gate_proj", x_BTD, config.mlp_bias)
    up_BTF = MODULES.linear(at / "up_proj", x_BTD, config.mlp_bias)
    h_BTF = MODULES.silu_gate(at / "activation", gate_BTF, up_BTF)
    h_BTF = (at / "dropout")("Mul", h_BTF, at.constant("kept", some_channels_dropped(config)))
    return MODULES.linear(at / "down_proj", h_BTF, config.mlp_bias)


def clipped_mlp(at: Scope, x_BTD: Value, config: Config, modules: Modules) -> Value:
    """The MLP, of which large values are cut off."""
    limit = [at.constant(name, value) for name, value in (("least", -0.2), ("most", 0.2))]
    return at("Clip", MODULES.mlp(at, x_BTD, config, modules), *limit)


def residual_dropped(layer: int, part: str) -> Edit:
    """Not added to what came in, but put in its place: `part` is "self_attn" or "mlp"."""

    def edit(model: onnx.ModelProto) -> None:
        (added,) = (node for node in model.graph.node if node.name == f"/model/layers.{layer}/{part}/residual/Add")
        added.op_type = "Identity"
        del added.input[0]

    return edit


def times(tensor: str, factor: float) -> Edit:
    """All values of a tensor times a factor."""

    def edit(model: onnx.ModelProto) -> None:
        rename_output(model, tensor, f"{tensor}_before")
        factor_name = f"{tensor}_factor"
        model.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), factor_name))
        made = next(n for n, node in enumerate(model.graph.node) if f"{tensor}_before" in node.output)
        node = helper.make_node("Mul", [f"{tensor}_before", factor_name], [tensor], f"{tensor}/times")
        for reader in model.graph.node:
            for place, name in enumerate(reader.input):
                if name == f"{tensor}_before":
                    reader.input[place] = tensor
        model.graph.node.insert(made + 1, node)

    return edit


def _beside(at: Scope, y_BNTH: Value, config: Config) -> Value:
    y_BTNH = at("Transpose", y_BNTH, perm=[0, 2, 1, 3])
    return at("Reshape", y_BTNH, at.constant("shape", [0, 0, config.num_attention_heads * config.head_dim]))


def _in(name: str, module: str, fault: Module, layer: int) -> Fault:
    written = partial(write_faulty, modules=only_in([layer], module, fault))
    return Fault(f"{name}, layer {layer}", None, frozenset({layer}), written)


def _everywhere(name: str, module: str, fault: Module) -> Fault:
    return Fault(name, None, None, partial(write_faulty, modules={module: fault}))


def _edited(name: str, edit: Edit, layers: frozenset[int]) -> Fault:
    return Fault(name, None, layers, partial(write_faulty, edit=edit))


FAULTS: Sequence[Fault] = (
    _in("a constant more in the residual stream", "mlp", shifted_mlp, 4),
    _in("no MLP", "mlp", no_mlp, 3),
    _in("a tenth less of the MLP", "mlp", weaker_mlp, 2),
    _in("MLP clipped", "mlp", clipped_mlp, 4),
    _in("softmax over queries", "attend", softmax_over_queries, 3),
    _in("a head lost", "attend", without_a_head, 2),
    _in("nearer is better", "attend", nearer_is_better, 4),
    _in("values of other heads", "repeat_kv", values_of_other_heads, 1),
    _in("keys rotated twice", "rotate", keys_rotated_twice, 4),
    _everywhere("rotated backwards", "rotate", rotated_backwards),
    _in("half of the pairs rotated", "rotate", half_rotated, 3),
    _everywhere("half of the pairs rotated", "rotate", half_rotated),
    _everywhere("norm of deviations", "rms_norm", norm_of_deviations),
    _in("norm of deviations", "rms_norm", norm_of_deviations, 2),
    _everywhere("eps outside the root", "rms_norm", eps_outside_the_root),
    _in("up squared", "silu_gate", up_squared, 2),
    _everywhere("steeper silu", "silu_gate", steeper_silu),
    _in("steeper silu", "silu_gate", steeper_silu, 4),
    _in("channels dropped", "mlp", dropping_mlp, 4),
    _edited("MLP in place of the residual stream, layer 3", residual_dropped(3, "mlp"), frozenset({3})),
    _edited("attention in place of the residual stream, layer 2", residual_dropped(2, "self_attn"), frozenset({2})),
    _edited("embedding times 3", times("/model/embed_tokens/Gather_output_0", 3.0), NO_LAYER),
    _edited("logits times 0.9", times("logits", 0.9), NO_LAYER),
)
