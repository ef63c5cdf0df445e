"""A whole Llama as an ONNX graph, under optimum's input and output names."""

from onnx import TensorProto

from refengine.config import Config
from refengine.errors import InputError
from refengine.weights import EMBEDDING, expected_shapes
from verify.export.graph import Graph, Scope, Value
from verify.export.modules import MODULES, Modules, Past, RopeTable

BATCH, NEW, PAST = "batch_size", "sequence_length", "past_sequence_length"
ALL = f"{PAST} + {NEW}"


def decoder_graph(config: Config, *, cache: bool, modules: Modules = MODULES) -> Graph:
    """The graph of a model, which follows from its configuration alone; weights are declared, not read.

    Raises:
        InputError: the rotary frequencies depend on the length of the sequence (rope_type `dynamic`).

    Source: optimum-onnx 0.1.0 (text-generation and text-generation-with-past) for the inputs and outputs.
    """
    _refuse_dynamic(config)
    graph = Graph(dict(expected_shapes(config)), metadata={"model_type": config.model_type})
    model = graph.at("model")
    input_ids_BT = graph.input("input_ids", TensorProto.INT64, [BATCH, NEW])
    attention_mask_BS = graph.input("attention_mask", TensorProto.INT64, [BATCH, ALL if cache else NEW])
    position_ids_BT = graph.input("position_ids", TensorProto.INT64, [BATCH, NEW])
    graph.output("logits", TensorProto.FLOAT, [BATCH, NEW, config.vocab_size])
    table = modules.rope_table(model / "rotary_emb", config, position_ids_BT)
    mask = model / "attention_mask"
    bias_B1TS = modules.attention_mask(mask, input_ids_BT, attention_mask_BS, config.sliding_window)
    embed = model / "embed_tokens"
    x_BTD = embed("Gather", embed.weight(), input_ids_BT, axis=0)
    for index in range(config.num_hidden_layers):
        past = _past(graph, config, index) if cache else None
        x_BTD = _layer(model / f"layers.{index}", x_BTD, config, table, bias_B1TS, past, modules)
    x_BTD = modules.rms_norm(model / "norm", x_BTD, config.rms_norm_eps)
    _lm_head(graph, x_BTD, config)
    return graph


def _refuse_dynamic(config: Config) -> None:
    if config.rope_parameters.rope_type == "dynamic":
        raise InputError(
            "rope_type: found 'dynamic', whose frequencies follow the length of each run and cannot be "
            "written into an export; expected 'default', 'linear', 'llama3' or 'yarn'"
        )


def _past(graph: Graph, config: Config, index: int) -> Past:
    """Declares the cache inputs and outputs of one layer."""
    K, H = config.num_key_value_heads, config.head_dim
    names = (f"past_key_values.{index}.key", f"past_key_values.{index}.value")
    key, value = (graph.input(name, TensorProto.FLOAT, [BATCH, K, PAST, H]) for name in names)
    past = Past(key, value, f"present.{index}.key", f"present.{index}.value")
    for present in (past.present_key, past.present_value):
        graph.output(present, TensorProto.FLOAT, [BATCH, K, ALL, H])
    return past


def _layer(
    at: Scope,
    x_BTD: Value,
    config: Config,
    table: RopeTable,
    bias_B1TS: Value,
    past: Past | None,
    modules: Modules,
) -> Value:
    """One decoder layer: attention, then the MLP, each added to what came in."""
    h_BTD = modules.rms_norm(at / "input_layernorm", x_BTD, config.rms_norm_eps)
    h_BTD = modules.attention(at / "self_attn", h_BTD, config, table, bias_B1TS, past, modules)
    x_BTD = (at / "self_attn" / "residual")("Add", x_BTD, h_BTD)
    h_BTD = modules.rms_norm(at / "post_attention_layernorm", x_BTD, config.rms_norm_eps)
    h_BTD = modules.mlp(at / "mlp", h_BTD, config, modules)
    return (at / "mlp" / "residual")("Add", x_BTD, h_BTD)


def _lm_head(graph: Graph, x_BTD: Value, config: Config) -> None:
    """Logits. A tied head reads the embedding's own weight, which is stored once."""
    at = graph.at("lm_head")
    tied = config.tie_word_embeddings
    weight_DV = at("Transpose", EMBEDDING, perm=[1, 0]) if tied else at.weight(transposed=True)
    at("MatMul", x_BTD, weight_DV, output="logits")
