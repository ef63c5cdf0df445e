"""Settings read back from graphs of every exporter, with the layers that they are of."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from refengine.checkpoint import open_checkpoint
from refengine.rope import rope_inverse_frequencies
from verify.candidates.graph_constants import graph_constants
from verify.causes import Evidence
from verify.causes.constants import Constant, misread, shortest

FIXTURES = Path(__file__).parents[2] / "fixtures"
FACTORS_OF_OPTIMUM = ("/model/rotary_emb/Constant_7", "/model/rotary_emb/Constant_8")
LLAMA, MISTRAL = (open_checkpoint(FIXTURES / name).config for name in ("tiny_llama", "tiny_mistral"))
FUSED = FIXTURES / "exports" / "genai" / "model.onnx"
EXPORTS = {
    "optimum/model.onnx": LLAMA,
    "optimum-no-past/model.onnx": LLAMA,
    "dynamo/model.onnx": LLAMA,
    "genai/model.onnx": LLAMA,
    "genai-int4/model.onnx": LLAMA,
    "optimum-intel/openvino_model.xml": LLAMA,
    "optimum-intel-int8/openvino_model.xml": LLAMA,
    "mistral-genai-window/model.onnx": MISTRAL,
    "mistral-community/onnx/model.onnx": MISTRAL,
    "mistral-legacy/decoder_model.onnx": MISTRAL,
    "mistral-legacy/decoder_model_merged.onnx": MISTRAL,
}


def edited(out: Path, edit: Callable[[onnx.NodeProto], None]) -> dict[str, tuple[Constant, ...]]:
    """What is read of an export with fused operators, each of which has been edited."""
    model = onnx.load(FUSED)
    for node in model.graph.node:
        edit(node)
    onnx.save(model, out)
    return graph_constants(out, LLAMA)


def set_attribute(node: onnx.NodeProto, **values: float) -> None:
    for attribute in node.attribute:
        if attribute.name in values:
            attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, values[attribute.name]))


def layers_of(constants: tuple[Constant, ...]) -> set[int]:
    return set().union(*(constant.layers or () for constant in constants))


@pytest.mark.parametrize("name", EXPORTS)
def test_every_setting_of_a_clean_export_is_the_checkpoints(name):
    config, found = EXPORTS[name], graph_constants(FIXTURES / "exports" / name, EXPORTS[name])
    longest, layers = config.max_position_embeddings, set(range(config.num_hidden_layers))
    inv_freq_P, _ = rope_inverse_frequencies(config.rope_parameters, config.head_dim, longest, longest)
    assert {shortest(constant.value) for constant in found["rms_norm_eps"]} == {config.rms_norm_eps}
    assert layers_of(found["rms_norm_eps"]) == layers | {config.num_hidden_layers}
    assert all(constant.value == pytest.approx(inv_freq_P, rel=1e-6) for constant in found["inv_freq"])
    assert {constant.value for constant in found["scale"]} == {config.head_dim**-0.5}
    assert {constant.value for constant in found.get("softcap", ())} <= {0.0}
    assert {constant.value for constant in found.get("do_rotary", ())} <= {True}
    assert {constant.value for constant in found.get("rotary_interleaved", ())} <= {False}
    assert layers_of(found["inv_freq"]) == layers_of(found["scale"]) == layers


@pytest.mark.parametrize("name", [name for name, config in EXPORTS.items() if config is MISTRAL])
def test_a_window_is_found_as_an_attribute_and_in_a_mask(name):
    windows = graph_constants(FIXTURES / "exports" / name, MISTRAL)["window"]
    assert {constant.value for constant in windows} == {MISTRAL.sliding_window}
    assert layers_of(windows) == set(range(MISTRAL.num_hidden_layers))


def test_the_length_of_a_rotary_table_is_found():
    assert {constant.value for constant in graph_constants(FUSED, LLAMA)["rope_table_length"]} == {512}


def test_one_fused_norm_is_told_from_all_others(tmp_path):
    def edit(node: onnx.NodeProto) -> None:
        if node.name.startswith("/model/layers.3/post_attention_layernorm"):
            set_attribute(node, epsilon=1e-3)

    constants = edited(tmp_path / "model.onnx", edit)["rms_norm_eps"]
    (wrong,) = (constant for constant in constants if shortest(constant.value) != LLAMA.rms_norm_eps)
    assert (shortest(wrong.value), wrong.layers, wrong.part) == (1e-3, {3}, "post_attention_layernorm")


def test_attributes_of_a_fused_attention_come_with_their_layer(tmp_path):
    def edit(node: onnx.NodeProto) -> None:
        if node.op_type == "GroupQueryAttention" and "layers.7" in node.name:
            set_attribute(node, scale=0.5, softcap=30.0, local_window_size=9, rotary_interleaved=1)

    found = edited(tmp_path / "model.onnx", edit)
    for name, value in {"scale": 0.5, "softcap": 30.0, "window": 9, "rotary_interleaved": True}.items():
        assert [constant.layers for constant in found[name] if constant.value == value] == [{7}], name


@pytest.mark.parametrize(
    ("found", "layers"),
    [({0, 1, 2}, {0, 1, 2}), (set(range(12)), None), (set(range(13)), None), (None, None)],
)
def test_a_value_of_all_layers_is_of_none_in_particular(found, layers):
    read = Constant(0.5, None if found is None else frozenset(found))
    evidence = Evidence(LLAMA, constants={"scale": (read, Constant(0.25, frozenset({3})))})
    assert list(misread(evidence, "scale", lambda value: value == 0.25)) == [(0.5, layers)]


@pytest.mark.parametrize(("exact", "short"), [(1e-5, 1e-5), (12345.6, 12345.6), (1 / 3, 0.33333334), (0.0, 0.0)])
def test_a_number_is_given_with_the_digits_that_float32_holds(exact, short):
    assert shortest(float(np.float32(exact))) == short


def test_a_setting_that_the_graph_does_not_have_is_not_misread():
    assert list(misread(Evidence(LLAMA), "scale", lambda value: False)) == []


@pytest.mark.parametrize("length", [16, 100])
def test_a_rotary_table_that_is_filled_up_with_its_last_row_ends_there(length, tmp_path):
    model = onnx.load(FUSED)
    for tensor in model.graph.initializer:
        if tensor.name in ("cos_cache", "sin_cache"):
            table_LP = onnx.numpy_helper.to_array(tensor).copy()
            table_LP[length:] = table_LP[length - 1]
            tensor.CopyFrom(onnx.numpy_helper.from_array(table_LP, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    clean, found = (graph_constants(path, LLAMA) for path in (FUSED, tmp_path / "model.onnx"))
    assert [constant.value for constant in found["rope_table_length"]] == [length]
    assert found["inv_freq"][0].value == pytest.approx(clean["inv_freq"][0].value, rel=1e-6)


@pytest.mark.parametrize("name", EXPORTS)
def test_cos_and_sin_of_a_clean_export_are_multiplied_by_nothing(name):
    found = graph_constants(FIXTURES / "exports" / name, EXPORTS[name])
    assert {constant.value for constant in found.get("attention_factor", ())} <= {1.0}


@pytest.mark.parametrize("exporter", ["genai", "optimum"])
def test_what_cos_and_sin_are_multiplied_by_is_found_in_tables_and_behind_them(exporter, tmp_path):
    model = onnx.load(FIXTURES / "exports" / exporter / "model.onnx")
    tables = [tensor for tensor in model.graph.initializer if tensor.name in ("cos_cache", "sin_cache")]
    factors = [node for node in model.graph.node if node.name in FACTORS_OF_OPTIMUM]
    for tensor in [*tables, *(node.attribute[0].t for node in factors)]:
        larger = onnx.numpy_helper.to_array(tensor) * np.float32(1.5)
        tensor.CopyFrom(onnx.numpy_helper.from_array(larger, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    found = graph_constants(tmp_path / "model.onnx", LLAMA)["attention_factor"]
    assert {constant.value for constant in found} == {1.5}
    assert layers_of(found) == set(range(LLAMA.num_hidden_layers))


@pytest.mark.parametrize(
    ("name", "has_any"),
    [
        ("optimum/model.onnx", False),
        ("genai-int4/model.onnx", False),
        ("genai-fp16/model.onnx", True),
        ("optimum-intel/openvino_model.xml", True),  # the runtime chooses
    ],
)
def test_floats_narrower_than_32_bits_are_told(name, has_any):
    assert ("narrow_floats" in graph_constants(FIXTURES / "exports" / name, EXPORTS.get(name, LLAMA))) == has_any


def test_a_cast_to_a_narrow_float_is_told(tmp_path):
    model = onnx.load(FIXTURES / "exports" / "optimum" / "model.onnx")
    given = model.graph.node[-1].output[0]
    cast = [("Cast", [given], ["narrow"], {"to": 10}), ("Cast", ["narrow"], ["wide"], {"to": 1})]
    model.graph.node.extend([onnx.helper.make_node(kind, *names, **to) for kind, *names, to in cast])
    onnx.save(model, tmp_path / "model.onnx")
    assert "narrow_floats" in graph_constants(tmp_path / "model.onnx", LLAMA)
