"""Exports of small checkpoints compute what the reference computes, on ONNX Runtime's CPU and on OpenVINO."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine import Weights, generate
from refengine.tokens import left_padded
from refengine.trace import trace_points
from tests.exports import (
    CPU,
    NOISE_RATIO,
    OPENVINO,
    Exported,
    exported,
    noise_ratios,
    prompts,
    run_in_steps,
    session,
)
from verify.export.decoder import decoder_graph
from verify.export.files import weight_reader, write_model
from verify.export.graph import Scope
from verify.export.modules import MODULES

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FEATURES = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 6},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "window": {"model_type": "mistral", "sliding_window": 4},
    "no-window": {"model_type": "mistral", "sliding_window": None},
    "rope-theta": {"rope_theta": 500.0},
    "rope-linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "rope-llama3": {"rope_scaling": LLAMA3},
    "rope-yarn": {"rope_scaling": YARN},
    "rope-yarn-factor": {"rope_scaling": YARN | {"attention_factor": 1.7}},
    "rms-norm-eps": {"rms_norm_eps": 0.3},
    "bfloat16": {"dtype": ml_dtypes.bfloat16},
}
PROVIDERS = pytest.mark.parametrize("provider", [CPU, OPENVINO], ids=["ort-cpu", "ort-openvino"])


@pytest.fixture(scope="module", params=FEATURES.values(), ids=FEATURES.keys())
def featured(request, tmp_path_factory) -> Exported:
    """An export with a cache for each feature of a configuration."""
    return exported(tmp_path_factory.mktemp("featured"), **request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Exported:
    """An export with a cache of the default checkpoint."""
    return exported(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def plain_session(plain) -> ort.InferenceSession:
    """The plain export, loaded on the CPU provider."""
    return session(plain.path, CPU)


@PROVIDERS
def test_a_prompt_then_a_chunk_then_single_tokens_give_the_references_logits_and_cache(featured, provider):
    token_ids_BT, positions_BT = prompts(67)
    found = run_in_steps(session(featured.path, provider), token_ids_BT, positions_BT, steps=(7, 3, 1, 1, 1))
    ratios = noise_ratios(featured.checkpoint, token_ids_BT, positions_BT, found)
    assert len(ratios) == 1 + 2 * 3
    assert max(ratios.values()) < NOISE_RATIO, ratios


@PROVIDERS
@pytest.mark.parametrize("features", ["grouped-query", "window", "attention-bias"])
def test_without_a_cache_the_whole_sequence_gives_the_references_logits(tmp_path, features, provider):
    given = exported(tmp_path, cache=False, **FEATURES[features])
    token_ids_BT, positions_BT = prompts(67)
    found = run_in_steps(session(given.path, provider), token_ids_BT, positions_BT, steps=(13,))
    assert found.keys() == {"logits"}
    assert noise_ratios(given.checkpoint, token_ids_BT, positions_BT, found)["logits"] < NOISE_RATIO


@PROVIDERS
def test_greedy_decoding_through_the_cache_gives_the_references_tokens(plain, provider):
    prompt, steps = [3, 1, 4, 1, 5, 9, 2, 6], 12
    loaded, tokens = session(plain.path, provider), list(prompt)
    for _ in range(steps):
        row = np.array([tokens])
        split = (len(prompt), *[1] * (len(tokens) - len(prompt)))
        logits_BTV = run_in_steps(loaded, row, np.arange(len(tokens))[None], split)["logits"]
        tokens.append(int(logits_BTV[0, -1].argmax()))
    assert tokens[len(prompt) :] == generate(Weights.open(plain.checkpoint), [prompt], steps)[0]


# The prompt is of some tokens, since the noise of a single one is a poor unit.
@given(st.integers(4, 9), st.lists(st.integers(1, 6), max_size=4), st.integers(0, 5), st.integers(0, 9))
def test_any_chunking_and_padding_gives_the_logits_of_one_unpadded_pass(
    plain,
    plain_session,
    prompt,
    chunks,
    padding,
    seed,
):
    length = prompt + sum(chunks)
    tokens = np.random.default_rng(seed).integers(0, 67, length)
    token_ids_BT, positions_BT = left_padded([tokens, np.zeros(length + padding, int)])
    steps = (prompt + padding, *chunks)
    found = run_in_steps(plain_session, token_ids_BT, positions_BT, steps)["logits"][:1, padding:]
    alone = tokens[None], np.arange(length)[None]
    assert noise_ratios(plain.checkpoint, *alone, {"logits": found})["logits"] < NOISE_RATIO


@PROVIDERS
def test_a_row_that_is_all_padding_stays_finite(plain, provider):
    token_ids_BT, positions_BT = prompts(67)
    positions_BT[0] = -1
    found = run_in_steps(session(plain.path, provider), token_ids_BT, positions_BT, steps=(7, 6))
    assert all(np.isfinite(values).all() for values in found.values())
    ratios = noise_ratios(plain.checkpoint, token_ids_BT, positions_BT, found)
    assert max(ratios.values()) < NOISE_RATIO, ratios


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_the_openvino_provider_takes_every_node(tmp_path, cache):
    everything = {"model_type": "mistral", "sliding_window": 4, "tie_word_embeddings": True}
    given = exported(tmp_path, cache=cache, **everything)
    parts = session(given.path, OPENVINO).get_provider_graph_assignment_info()
    assert [part.ep_name for part in parts] == ["OpenVINOExecutionProvider"]


def test_inputs_and_outputs_are_called_typed_and_shaped_as_optimums(plain):
    graph = onnx.load(plain.path).graph
    total, cached = "past_sequence_length + sequence_length", ["batch_size", 2, "past_sequence_length", 10]
    kinds = [f"{layer}.{kind}" for layer in range(3) for kind in ("key", "value")]
    assert declared(graph.input) == {
        "input_ids": ("INT64", ["batch_size", "sequence_length"]),
        "attention_mask": ("INT64", ["batch_size", total]),
        "position_ids": ("INT64", ["batch_size", "sequence_length"]),
        **{f"past_key_values.{kind}": ("FLOAT", cached) for kind in kinds},
    }
    assert declared(graph.output) == {
        "logits": ("FLOAT", ["batch_size", "sequence_length", 67]),
        **{f"present.{kind}": ("FLOAT", ["batch_size", 2, total, 10]) for kind in kinds},
    }


def test_without_a_cache_there_is_no_past_and_no_present(tmp_path):
    graph = onnx.load(exported(tmp_path, cache=False).path).graph
    tokens = ("INT64", ["batch_size", "sequence_length"])
    assert declared(graph.input) == {"input_ids": tokens, "attention_mask": tokens, "position_ids": tokens}
    assert list(declared(graph.output)) == ["logits"]


def declared(values) -> dict[str, tuple[str, list[int | str]]]:
    """Type and dimensions of graph inputs or outputs, by name."""
    return {
        value.name: (
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def test_an_export_passes_the_checker_with_the_shapes_it_declares(featured):
    onnx.checker.check_model(featured.path, full_check=True)
    model = onnx.load(featured.path)
    assert (model.producer_name, model.ir_version) == ("verify", 8)
    assert {prop.key: prop.value for prop in model.metadata_props}["model_type"] in ("llama", "mistral")


def test_every_trace_point_of_the_reference_is_a_module_of_the_graph(plain):
    names = [node.name for node in onnx.load(plain.path).graph.node]
    modules = {name.rpartition("/")[0].removeprefix("/model").strip("/").replace("/", ".") for name in names}
    assert set(trace_points(3)) - modules == set()
    assert len(names) == len(set(names))


def tiled_kv(at: Scope, x_BKSH: str, config) -> str:
    """Key-value heads repeated in the wrong order: k0 k1 k0 k1 k0 k1."""
    return at("Concat", *[x_BKSH] * (config.num_attention_heads // config.num_key_value_heads), axis=1)


def unturned(at: Scope, x_BMTH: str, table, head_dim: int) -> str:
    """No rotary embedding."""
    return at("Identity", x_BMTH)


@pytest.mark.parametrize("other", [{"repeat_kv": tiled_kv}, {"rotate": unturned}], ids=["tiled", "no-rope"])
def test_an_export_with_one_module_replaced_is_told_from_the_clean_one(tmp_path, plain, other):
    graph = decoder_graph(plain.checkpoint.config, cache=True, modules=replace(MODULES, **other))
    write_model(graph, weight_reader(plain.checkpoint), tmp_path / "model.onnx")
    tokens = prompts(67)
    found = run_in_steps(session(tmp_path / "model.onnx", CPU), *tokens, (9, 4))
    assert noise_ratios(plain.checkpoint, *tokens, found)["logits"] > 1000 * NOISE_RATIO
