"""One-layer decoders made node by node, for exports that no exporter would write."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from refengine.config import Config
from tests.checkpoints import TINY

ONE_LAYER = Config.from_dict(TINY | {"num_hidden_layers": 1})
# ONNX Runtime's grouped-query attention wants a head size that is a multiple of 8.
GROUPED_QUERY = Config.from_dict(TINY | {"num_hidden_layers": 1, "head_dim": 8})
N, K, H = ONE_LAYER.num_attention_heads, ONE_LAYER.num_key_value_heads, ONE_LAYER.head_dim
V = ONE_LAYER.vocab_size


def repeating_decoder(path: Path, heads: int, kv_heads: int | str = K, dtype: int = TensorProto.FLOAT) -> Path:
    """Looks logits up by token; the cache gets zeros of `heads` heads, whatever `kv_heads` it declares."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["logits_of_tokens"], name="/lookup"),
        # Of no effect: an input that no node uses confuses the OpenVINO provider about the order of others.
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["mask"], ["any"], keepdims=0),
        helper.make_node("Mul", ["logits_of_tokens", "any"], ["logits"], name="/logits"),
        helper.make_node("Shape", ["input_ids"], ["b_t"]),
        helper.make_node("Slice", ["b_t", "zero", "one"], ["b"]),
        helper.make_node("Slice", ["b_t", "one", "two"], ["t"]),
        helper.make_node("Concat", ["b", "heads", "t", "size"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
    ]
    numbers = {"zero": 0, "one": 1, "two": 2, "heads": heads, "size": H}
    constants = {name: np.array([number], np.int64) for name, number in numbers.items()}
    constants["table"] = np.random.default_rng(0).standard_normal((V, V)).astype(np.float32)
    return _write(path, nodes, constants, ["b", kv_heads, "s", H], dtype)


def last_logits_decoder(path: Path) -> Path:
    """`repeating_decoder` with a head that keeps the logits of the last token alone."""
    model = onnx.load(repeating_decoder(path, heads=K))
    next(node for node in model.graph.node if node.name == "/logits").output[0] = "all_logits"
    ends = {"minus_one": -1, "far": 9999}
    slices = [numpy_helper.from_array(np.array([end]), name) for name, end in ends.items()]
    model.graph.initializer.extend(slices)
    model.graph.node.append(helper.make_node("Slice", ["all_logits", "minus_one", "far", "one"], ["logits"]))
    onnx.save(model, path)
    return path


def grouped_query_decoder(path: Path) -> Path:
    """Grouped-query attention as the model builder writes it, on vectors looked up by token, not rotated.

    It takes `position_ids` too, without effect: what keeps it from padding is the operator alone.
    """
    rng, size = np.random.default_rng(1), GROUPED_QUERY.head_dim
    widths = {"q": N * size, "k": K * size, "v": K * size}
    constants = {f"{kind}_of": rng.standard_normal((V, width)) for kind, width in widths.items()}
    constants["head"] = rng.standard_normal((N * size, V))
    constants = {name: array.astype(np.float32) for name, array in constants.items()}
    constants |= {"last_axis": np.array([1]), "one": np.array(1)}
    cache = ["past_key_values.0.key", "past_key_values.0.value"]
    nodes = [helper.make_node("Gather", [f"{kind}_of", "input_ids"], [kind]) for kind in "qkv"]
    nodes += [
        helper.make_node("ReduceSum", ["attention_mask", "last_axis"], ["counts"], keepdims=0),
        helper.make_node("Sub", ["counts", "one"], ["lengths"]),
        helper.make_node("Cast", ["lengths"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "one"], ["width"]),
        helper.make_node("Cast", ["width"], ["total_sequence_length"], to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention",
            ["q", "k", "v", *cache, "seqlens_k", "total_sequence_length"],
            ["y", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=N,
            kv_num_heads=K,
        ),
        helper.make_node("MatMul", ["y", "head"], ["logits_of_tokens"]),
        helper.make_node("Equal", ["position_ids", "position_ids"], ["true"]),
        helper.make_node("Cast", ["true"], ["ones"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["ones"], ["factor"], keepdims=0),
        helper.make_node("Mul", ["logits_of_tokens", "factor"], ["logits"]),
    ]
    tokens = ("input_ids", "attention_mask", "position_ids")
    return _write(path, nodes, constants, ["b", K, "s", size], TensorProto.FLOAT, tokens)


def _write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, np.ndarray],
    cache_shape: Sequence[int | str],
    cache_dtype: int,
    tokens: Sequence[str] = ("input_ids", "attention_mask"),
) -> Path:
    """A decoder around `nodes` that takes `tokens` and a cache."""
    value, kinds = helper.make_tensor_value_info, ("key", "value")
    inputs = [value(name, TensorProto.INT64, ["b", f"{name}_length"]) for name in tokens]
    inputs += [value(f"past_key_values.0.{kind}", cache_dtype, cache_shape) for kind in kinds]
    outputs = [value("logits", TensorProto.FLOAT, ["b", "kept", V])]
    outputs += [value(f"present.0.{kind}", cache_dtype, cache_shape) for kind in kinds]
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(list(nodes), "decoder", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path
