"""Where a mistake is: the layer, the trace point and the node, on exports of this project and of other exporters."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from refengine.checkpoint import open_checkpoint
from refengine.tokenizer import encode_prompt, load_tokenizer
from tests.verify.comparing import Compared
from tests.verify.faulty import (
    changed_weight,
    interleaved_rotation,
    only_in,
    scaled_attention,
    swap_keys_and_values_given,
    tiled_heads,
    write_faulty,
)
from tests.verify.seen import Seen
from verify.candidates.cut_onnx import replay
from verify.candidates.trace_onnx import read_onnx, trace_onnx
from verify.export.modules import MODULES
from verify.locate import blamed, ladder, suspects, write_repro

FIXTURES = Path(__file__).parents[2] / "fixtures"
LAYER, STEPS = 5, 4
TEXTS = ("If the expression is true, the first value is returned", "Return")


@pytest.fixture(scope="module")
def compared() -> Compared:
    """Two rows of different lengths."""
    tokenizer = load_tokenizer(FIXTURES / "tiny_llama")
    prompts = [encode_prompt(tokenizer, text, chat=False) for text in TEXTS]
    return Compared(open_checkpoint(FIXTURES / "tiny_llama"), prompts, STEPS)


def other_eps(at, x_BTD, eps):
    return MODULES.rms_norm(at, x_BTD, 1e-3)


def gate_for_up(at, gate_BTF, up_BTF):
    return MODULES.silu_gate(at, up_BTF, gate_BTF)


V_PROJ = f"model.layers.{LAYER}.self_attn.v_proj.weight.T"
FAULTS = {
    "eps": ({"modules": only_in([LAYER], "rms_norm", other_eps)}, "input_layernorm", "input_layernorm/Add"),
    "pairs": ({"modules": only_in([LAYER], "rotate", interleaved_rotation)}, "self_attn.q_rope", "q_rope/Gather"),
    "gate": ({"modules": only_in([LAYER], "silu_gate", gate_for_up)}, "mlp.activation", "activation/Sigmoid"),
    "heads": ({"modules": only_in([LAYER], "repeat_kv", tiled_heads)}, "self_attn.attend", "k_repeat/Concat"),
    "scale": ({"modules": only_in([LAYER], "attend", scaled_attention(1.1))}, "self_attn.attend", "attend/Mul"),
    "weight": ({"read": changed_weight(V_PROJ, lambda weight: weight * 1.01)}, "self_attn.v_proj", "v_proj/MatMul"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_in_one_layer_is_found_in_its_node(compared, tmp_path, name):
    how, point, node = FAULTS[name]
    located = Seen(compared, write_faulty(compared.checkpoint, tmp_path / "model.onnx", **how)).located()
    assert located.layers == (LAYER,)
    assert located.suspects[0] == {LAYER}
    assert located.first is not None
    assert (located.first.layer, located.first.point, located.first.phase) == (LAYER, point, "prefill")
    assert located.first.node == f"/model/layers.{LAYER}/{node}" or located.first.node.endswith(node)
    assert located.first.provider == "CPUExecutionProvider"
    assert located.first.heads == ((1, 4) if name == "heads" else ())  # k0 k1 k0 k1 k0 k1 for k0 k0 k0 k1 k1 k1
    assert not located.vanishes


def test_a_mistake_in_all_layers_is_found_in_the_first_and_in_all(compared, tmp_path):
    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", config={"rms_norm_eps": 3e-6})
    located = Seen(compared, path).located()
    assert located.layers == tuple(range(compared.checkpoint.config.num_hidden_layers))
    assert located.suspects[0] is None
    assert (located.first.layer, located.first.operator) == (0, "Add")


def test_a_cache_given_under_other_names_is_found_in_what_gives_it(compared, tmp_path):
    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", edit=swap_keys_and_values_given)
    located = Seen(compared, path).located()
    assert located.first.node in ("present.0.key", "present.0.value")
    assert located.first.point.endswith("_cache")


def test_a_wrong_head_is_behind_the_last_layer(compared, tmp_path):
    read = changed_weight("lm_head.weight.T", lambda weight: weight * 1.01)
    located = Seen(compared, write_faulty(compared.checkpoint, tmp_path / "model.onnx", read=read)).located()
    assert (located.first.layer, located.first.point, located.layers) == (None, "lm_head", ())


def planted(source: Path, name: str, out: Path) -> Path:
    """A graph in which the result of one node is a hundredth larger."""
    model = onnx.load(source)
    place, node = next((place, node) for place, node in enumerate(model.graph.node) if node.name == name)
    given = node.output[0]
    node.output[0] = "inside"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1.01, np.float32), "factor"))
    model.graph.node.insert(place + 1, helper.make_node("Mul", ["inside", "factor"], [given], name="planted"))
    onnx.save(model, out)
    return out


@pytest.mark.parametrize(
    ("exporter", "node"),
    [
        ("optimum", "/model/layers.5/self_attn/Reshape_1"),
        ("dynamo", "node_cat_47"),
        ("genai", "/model/layers.5/attn/qkv_proj/MatMul"),
        ("genai", "/model/layers.5/attn/GroupQueryAttention"),
        ("optimum-no-past", "/model/layers.5/mlp/act_fn/Sigmoid"),
    ],
)
def test_a_node_planted_in_a_graph_of_any_exporter_is_found(compared, tmp_path, exporter, node):
    path = planted(FIXTURES / "exports" / exporter / "model.onnx", node, tmp_path / "model.onnx")
    located = Seen(compared, path).located()
    assert (located.first.layer, located.first.node, located.layers) == (LAYER, "planted", (LAYER,))


@pytest.mark.parametrize("exporter", ["dynamo", "genai"])
def test_nothing_is_found_in_an_export_that_is_right(compared, exporter):
    located = Seen(compared, FIXTURES / "exports" / exporter / "model.onnx").located()
    assert (located.first, located.layers) == (None, ())
    assert "no part of the model is wrong by itself" in located.notes


def test_keys_and_values_alone_tell_the_layer(compared, tmp_path):
    for name, layers in {"eps": {4, 5}, "pairs": {5}, "gate": {5, 6}, "weight": {5, 4}}.items():
        path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", **FAULTS[name][0])
        found = suspects(Seen(compared, path).run, compared.reference)
        assert found[-1] is None
        assert {layer for layers in found[:-1] for layer in layers} == layers


def test_what_is_cut_out_shows_the_mistake_with_onnxruntime_and_numpy_alone(compared, tmp_path):
    seen = Seen(compared, write_faulty(compared.checkpoint, tmp_path / "model.onnx", **FAULTS["eps"][0]))
    located = seen.located()
    write_repro(seen.candidate, located.shown, tmp_path / "repro", "CPUExecutionProvider")
    assert len(onnx.load(tmp_path / "repro" / "part.onnx").graph.node) < 10
    done = subprocess.run(
        [sys.executable, "repro.py"], cwd=tmp_path / "repro", capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split("largest error ")[1].split()[0]) > 1e-4


def test_an_export_that_is_wrong_by_itself_stands_on_its_own_rung(compared, tmp_path):
    seen = Seen(compared, write_faulty(compared.checkpoint, tmp_path / "model.onnx", **FAULTS["eps"][0]))
    assert blamed(ladder(seen.candidate, seen.run, compared.reference, seen.passes)) == "export"


def test_a_precision_asked_of_a_provider_stands_on_its_own_rung(compared):
    bfloat16 = {"load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}}'}
    seen = Seen(compared, FIXTURES / "exports" / "optimum" / "model.onnx", "ort-openvino", **bfloat16)
    rungs = ladder(seen.candidate, seen.run, compared.reference, seen.passes)
    assert [rung.name for rung in rungs] == ["tokens", "export", "optimizer", "provider", "precision"]
    assert blamed(rungs) == "precision"


def test_a_node_alone_gives_what_it_gave_in_its_graph(compared):
    seen = Seen(compared, FIXTURES / "exports" / "optimum" / "model.onnx")
    candidate = compared.open(FIXTURES / "exports" / "optimum" / "model.onnx")
    node = next(node for node in read_onnx(candidate).nodes if node.name == "/model/layers.5/mlp/Mul")
    tokens = seen.compared.reference.tokens
    traced = trace_onnx(candidate, compared.prompts, [(0, 1)], tokens, True, [*node.inputs, *node.outputs])
    arrays = traced.passes[0].arrays
    again = replay(candidate, node.outputs, {name: arrays[name] for name in node.inputs}, node.outputs)
    assert again.keys() == {"onnx", "CPUExecutionProvider"}
    for given in again.values():
        np.testing.assert_allclose(given[node.outputs[0]], arrays[node.outputs[0]], rtol=1e-6)
