"""ONNX files read without running them: what they are, and with a runtime, who runs what."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from refengine.checkpoint import open_checkpoint
from tests.checkpoints import TINY, write_checkpoint
from verify.candidates.onnx_file import describe, find_onnx
from verify.candidates.onnx_graph import WeightTotal
from verify.export import export_decoder
from verify.inspection import inspect
from verify.interface import check_same_model

FIXTURES = Path(__file__).parents[2] / "fixtures"
HEADS, KV_HEADS, HEAD_DIM = TINY["num_attention_heads"], TINY["num_key_value_heads"], TINY["head_dim"]
LAYERS = TINY["num_hidden_layers"]
MATMUL = helper.make_node("MatMul", ["x", "weight"], ["y"])
WEIGHT = np.zeros((60, 40), np.float32)


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    export_decoder(open_checkpoint(write_checkpoint(directory / "checkpoint")), directory / "model.onnx")
    return directory / "model.onnx"


def linear_model(path: Path, *nodes: onnx.NodeProto, weight: np.ndarray = WEIGHT) -> Path:
    """A file with a linear layer in it, and nothing else."""
    value = helper.make_tensor_value_info
    inputs, outputs = [value("x", TensorProto.FLOAT, ["t", 60])], [value("y", TensorProto.FLOAT, ["t", 40])]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, [numpy_helper.from_array(weight, "weight")])
    onnx.save(helper.make_model(graph, producer_name="hand", producer_version="1.0"), path)
    return path


def test_an_export_says_what_it_is(export):
    found = inspect(export)
    assert (found.why_not, found.runtime, found.settings) == (None, None, None)
    assert (len(found.interface.layers), found.interface.has_cache) == (LAYERS, True)
    sizes = (found.query_heads, found.interface.kv_heads, found.interface.head_dim)
    assert sizes == (HEADS, KV_HEADS, HEAD_DIM)
    model = onnx.load(export)
    assert found.file.opsets == {"ai.onnx": model.opset_import[0].version}
    assert (found.file.ir_version, found.file.exporter) == (model.ir_version, model.producer_name)


def test_operators_are_counted_the_most_frequent_first(export):
    operators = describe(export).operators
    assert operators["Softmax"] == LAYERS
    assert list(operators.values()) == sorted(operators.values(), reverse=True)
    assert sum(operators.values()) == len(onnx.load(export).graph.node)


def test_weights_are_counted_by_dtype_the_largest_first(export):
    initializers = onnx.load(export).graph.initializer
    stored = [tensor for tensor in initializers if tensor.data_type == TensorProto.FLOAT]
    floats = [numpy_helper.to_array(tensor) for tensor in stored]
    (dtype, total), *_ = describe(export).weights.items()
    assert dtype == "float32"
    assert total == WeightTotal(len(floats), sum(a.size for a in floats), sum(a.nbytes for a in floats))


def test_four_bit_weights_take_half_a_byte(tmp_path):
    path = linear_model(tmp_path / "m.onnx", MATMUL)
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("codes", TensorProto.UINT4, [5, 3], bytes(8), raw=True))
    onnx.save(model, path)
    assert describe(path).weights == {"float32": WeightTotal(1, 2400, 9600), "uint4": WeightTotal(1, 15, 8)}


def test_weights_and_operators_inside_branches_and_functions_are_counted(tmp_path):
    inner = numpy_helper.from_array(np.ones(3, np.float16), "inner")
    given = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    add = helper.make_node("Add", ["x", "inner"], ["b"])
    branch = helper.make_graph([add], "branch", [], [given], [inner])
    choose = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    square = helper.make_node("Mul", ["a", "a"], ["r"])
    function = helper.make_function("local", "Square", ["a"], ["r"], [square], [helper.make_opsetid("", 18)])
    graph = helper.make_graph([choose], "g", [], [])
    onnx.save(helper.make_model(graph, functions=[function]), tmp_path / "m.onnx")
    file = describe(tmp_path / "m.onnx")
    assert file.operators == {"Add": 2, "If": 1, "Mul": 1}
    assert file.weights == {"float16": WeightTotal(2, 6, 12)}


O_PROJ = {  # layout -> the weight as stored, and the nodes that multiply by it
    "matmul": (WEIGHT, [helper.make_node("MatMul", ["x", "weight"], ["y"], name="/layers.0/o_proj/MatMul")]),
    "gemm": (WEIGHT, [helper.make_node("Gemm", ["x", "weight"], ["y"], name="/layers.0/o_proj/Gemm")]),
    "gemm, transposed": (
        WEIGHT.T,
        [
            helper.make_node("Gemm", ["x", "weight"], ["y"], name="/o_proj/Gemm", transB=1),
        ],
    ),
    "transposed before": (
        WEIGHT.T,
        [
            helper.make_node("Transpose", ["weight"], ["turned"]),
            helper.make_node("MatMul", ["x", "turned"], ["y"], name="/o_proj/MatMul"),
        ],
    ),
    "four bits": (
        np.zeros((40, 2, 16), np.uint8),
        [
            helper.make_node("MatMulNBits", ["x", "weight"], ["y"], name="/o_proj", domain="com.microsoft", K=60),
        ],
    ),
}


@pytest.mark.parametrize("layout", sorted(O_PROJ))
def test_query_heads_are_read_from_o_proj_in_every_layout(tmp_path, layout):
    weight, nodes = O_PROJ[layout]
    file = describe(linear_model(tmp_path / "m.onnx", *nodes, weight=np.ascontiguousarray(weight)))
    assert [file.query_heads(head_dim) for head_dim in (HEAD_DIM, None, 7)] == [HEADS, None, None]


def test_query_heads_are_read_from_an_attention_operator(tmp_path):
    attention = helper.make_node("GroupQueryAttention", ["x"], ["y"], domain="com.microsoft", num_heads=9)
    file = describe(linear_model(tmp_path / "m.onnx", attention))
    assert file.query_heads(None) == 9
    assert file.operators == {"com.microsoft.GroupQueryAttention": 1}


def test_the_exporter_is_named_as_the_file_names_it(tmp_path):
    assert describe(linear_model(tmp_path / "m.onnx", MATMUL)).exporter == "hand 1.0"


def test_a_model_that_is_no_decoder_is_inspected_and_says_why_not(tmp_path):
    found = inspect(linear_model(tmp_path / "m.onnx", MATMUL))
    assert found.interface is None
    assert found.why_not.startswith("x: this input is not known")


@pytest.mark.parametrize(
    ("runtime", "provider"),
    [
        ("ort-cpu", "CPUExecutionProvider"),
        ("ort-openvino", "OpenVINOExecutionProvider"),
    ],
)
def test_with_a_runtime_it_says_who_runs_what(export, runtime, provider):
    found = inspect(export, runtime)
    nodes = {name: said["nodes"] for name, said in found.settings.effective["providers"].items()}
    assert max(nodes, key=nodes.__getitem__) == provider
    assert found.settings.effective["providers"][provider]["operators"]["MatMul"] >= LAYERS


def test_the_fingerprint_covers_the_graph_and_its_external_files(export, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load(export), path, save_as_external_data=True, location="weights.data", size_threshold=0)
    file = describe(path)
    both = path.read_bytes() + (tmp_path / "weights.data").read_bytes()
    assert file.external_files == (tmp_path / "weights.data",)
    assert file.sha256 == hashlib.sha256(both).hexdigest()
    assert file.weights == describe(export).weights


@pytest.mark.parametrize("place", ["model.onnx", "onnx/model.onnx", "decoder.onnx"])
def test_a_directory_means_the_model_in_its_usual_place(export, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    shutil.copy(export, tmp_path / place)
    assert find_onnx(tmp_path) == tmp_path / place


def test_genai_config_names_the_decoder(export, tmp_path):
    for name in ("model.onnx", "text.onnx"):
        shutil.copy(export, tmp_path / name)
    named = {"model": {"decoder": {"filename": "text.onnx"}}}
    (tmp_path / "genai_config.json").write_text(json.dumps(named))
    assert find_onnx(tmp_path) == tmp_path / "text.onnx"


@pytest.mark.parametrize(
    ("exporter", "says"),
    [
        ("optimum", "pytorch"),
        ("dynamo", "pytorch"),
        ("genai", "onnxruntime-genai"),
    ],
)
def test_exports_by_real_exporters_are_recognised_as_the_embedded_model(exporter, says):
    config = open_checkpoint(FIXTURES / "tiny_llama").config
    found = inspect(FIXTURES / "exports" / exporter)
    assert found.file.exporter.startswith(says)
    assert found.query_heads == config.num_attention_heads
    check_same_model(found.interface, config)
    resolved = found.interface.resolved(config)
    sizes = (len(resolved.layers), resolved.kv_heads, resolved.head_dim, resolved.vocab_size)
    assert sizes == (config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.vocab_size)
