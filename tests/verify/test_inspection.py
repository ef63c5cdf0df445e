"""ONNX files read without running them: what they are, and what is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError
from tests.checkpoints import TINY, write_checkpoint
from verify.candidates.onnx_file import WeightTotal, find_onnx, describe
from verify.export import export_decoder
from verify.inspection import inspect

HEADS, KV_HEADS, HEAD_DIM = TINY["num_attention_heads"], TINY["num_key_value_heads"], TINY["head_dim"]
ELSEWHERE = [
    "/etc/passwd",
    "../outside.data",
    "folder/../../outside.data",
    "C:\\outside.data",
    "..\\outside.data",
    "\\\\host\\share",
    "",
]


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    export_decoder(open_checkpoint(write_checkpoint(directory / "checkpoint")), directory / "model.onnx")
    return directory / "model.onnx"


@pytest.fixture
def external(export, tmp_path) -> Path:
    """The same export with its weights in a file beside it."""
    model = onnx.load(export)
    onnx.save(
        model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.data", size_threshold=0
    )
    return tmp_path / "model.onnx"


def rewrite(path: Path, key: str, value: str) -> str:
    """Changes one entry of the first external tensor's description; returns the tensor's name."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    entries = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
    del tensor.external_data[:]
    for name, text in entries.items():
        tensor.external_data.add(key=name, value=text)
    onnx.save(model, path)
    return tensor.name


def linear_model(
    path: Path, node: onnx.NodeProto, weight: np.ndarray | None, *others: onnx.NodeProto
) -> Path:
    """A file with a linear layer in it, and nothing else."""
    graph = helper.make_graph(
        [*others, node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 60])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", 40])],
        [] if weight is None else [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, producer_name="hand", producer_version="1.0"), path)
    return path


def test_an_export_says_what_it_is(export):
    found = inspect(export)
    assert (found.file.opsets["ai.onnx"], found.file.ir_version) >= (18, 8)
    assert found.why_not is None
    assert (len(found.interface.layers), found.interface.has_cache) == (TINY["num_hidden_layers"], True)
    assert (found.query_heads, found.interface.kv_heads, found.interface.head_dim) == (
        HEADS,
        KV_HEADS,
        HEAD_DIM,
    )
    assert found.file.operators["Softmax"] == TINY["num_hidden_layers"]
    assert list(found.file.operators.values()) == sorted(found.file.operators.values(), reverse=True)
    assert next(iter(found.file.weights)) == "float32"
    assert (found.runtime, found.settings) == (None, None)


def test_its_weights_are_counted_by_dtype(export):
    initializers = onnx.load(export).graph.initializer
    floats = [
        numpy_helper.to_array(tensor) for tensor in initializers if tensor.data_type == TensorProto.FLOAT
    ]
    assert describe(export).weights["float32"] == WeightTotal(
        len(floats), sum(a.size for a in floats), sum(a.nbytes for a in floats)
    )


def test_four_bit_weights_take_half_a_byte(tmp_path):
    model = linear_model(
        tmp_path / "m.onnx", helper.make_node("MatMul", ["x", "weight"], ["y"]), np.ones((60, 40), np.float32)
    )
    stored = onnx.load(model)
    stored.graph.initializer.append(
        helper.make_tensor("codes", TensorProto.UINT4, [5, 3], bytes(8), raw=True)
    )
    onnx.save(stored, model)
    assert describe(model).weights == {"float32": WeightTotal(1, 2400, 9600), "uint4": WeightTotal(1, 15, 8)}


def test_weights_and_operators_inside_branches_and_functions_are_counted(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("Add", ["x", "inner"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(3, np.float16), "inner")],
    )
    choose = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    function = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["r"],
        [helper.make_node("Mul", ["a", "a"], ["r"])],
        [helper.make_opsetid("", 18)],
    )
    graph = helper.make_graph([choose], "g", [], [])
    onnx.save(helper.make_model(graph, functions=[function]), tmp_path / "m.onnx")
    file = describe(tmp_path / "m.onnx")
    assert file.operators == {"Add": 2, "If": 1, "Mul": 1}
    assert file.weights == {"float16": WeightTotal(2, 6, 12)}


@pytest.mark.parametrize("layout", ["matmul", "gemm", "gemm-transposed", "transpose", "four-bit"])
def test_query_heads_are_read_from_o_proj_in_every_layout(tmp_path, layout):
    weight, others = np.zeros((60, 40), np.float32), []
    if layout == "matmul":
        node = helper.make_node(
            "MatMul", ["x", "weight"], ["y"], name="/model/layers.0/self_attn/o_proj/MatMul"
        )
    elif layout == "gemm":
        node = helper.make_node("Gemm", ["x", "weight"], ["y"], name="/model/layers.0/self_attn/o_proj/Gemm")
    elif layout == "gemm-transposed":
        weight, node = (
            weight.T,
            helper.make_node("Gemm", ["x", "weight"], ["y"], name="/o_proj/Gemm", transB=1),
        )
    elif layout == "transpose":
        weight, others = weight.T, [helper.make_node("Transpose", ["weight"], ["weight_t"])]
        node = helper.make_node("MatMul", ["x", "weight_t"], ["y"], name="/o_proj/MatMul")
    else:
        node = helper.make_node(
            "MatMulNBits",
            ["x", "weight"],
            ["y"],
            name="/o_proj/MatMul_Q4",
            domain="com.microsoft",
            K=60,
            N=40,
            bits=4,
            block_size=32,
        )
        weight = np.zeros((40, 2, 16), np.uint8)
    file = describe(linear_model(tmp_path / "m.onnx", node, np.ascontiguousarray(weight), *others))
    assert file.query_heads(HEAD_DIM) == HEADS
    assert file.query_heads(None) is None
    assert file.query_heads(7) is None


def test_query_heads_are_read_from_an_attention_operator(tmp_path):
    node = helper.make_node(
        "GroupQueryAttention", ["x"], ["y"], domain="com.microsoft", num_heads=9, kv_num_heads=3
    )
    file = describe(linear_model(tmp_path / "m.onnx", node, None))
    assert file.query_heads(None) == 9
    assert file.operators == {"com.microsoft.GroupQueryAttention": 1}


def test_the_exporter_is_named_as_the_file_names_it(tmp_path, export):
    path = linear_model(
        tmp_path / "m.onnx",
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
        np.zeros((60, 40), np.float32),
    )
    assert describe(path).exporter == "hand 1.0"
    assert describe(export).exporter == onnx.load(export).producer_name


def test_a_model_that_is_no_decoder_is_inspected_and_says_why_not(tmp_path):
    path = linear_model(
        tmp_path / "m.onnx",
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
        np.zeros((60, 40), np.float32),
    )
    found = inspect(path)
    assert found.interface is None
    assert found.why_not.startswith("x: this input is not known")


@pytest.mark.parametrize("runtime", ["ort-cpu", "ort-openvino"])
def test_with_a_runtime_it_says_who_runs_what(export, runtime):
    found = inspect(export, runtime)
    providers = found.settings.effective["providers"]
    by_provider = {provider: said["nodes"] for provider, said in providers.items()}
    expected = "CPUExecutionProvider" if runtime == "ort-cpu" else "OpenVINOExecutionProvider"
    assert max(by_provider, key=by_provider.__getitem__) == expected
    assert providers[expected]["operators"]["MatMul"] >= TINY["num_hidden_layers"]


def test_the_hash_covers_the_graph_and_its_external_files(external):
    file = describe(external)
    both = external.read_bytes() + (external.parent / "weights.data").read_bytes()
    assert file.external_files == (external.parent / "weights.data",)
    assert file.sha256 == hashlib.sha256(both).hexdigest()


@pytest.mark.parametrize("place", ["model.onnx", "onnx/model.onnx", "decoder.onnx"])
def test_a_directory_means_the_model_in_its_usual_place(export, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    shutil.copy(export, tmp_path / place)
    assert find_onnx(tmp_path) == tmp_path / place


def test_genai_config_names_the_decoder(export, tmp_path):
    for name in ("model.onnx", "text.onnx"):
        shutil.copy(export, tmp_path / name)
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": "text.onnx"}}}))
    assert find_onnx(tmp_path) == tmp_path / "text.onnx"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            '{"model": {"decoder": {"filename": "gone.onnx"}}}',
            "gone.onnx: no such file, although genai_config.json names it",
        ),
        ('{"model": {"decoder": {"filename": "../model.onnx"}}}', "leaves the model's directory"),
        ('{"model": []}', "expected model.decoder.filename"),
        ("{", "expected model.decoder.filename"),
    ],
)
def test_a_genai_config_that_names_no_usable_file_is_refused(tmp_path, config, message):
    (tmp_path / "genai_config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        find_onnx(tmp_path)


def test_a_directory_with_several_models_asks_for_one(export, tmp_path):
    for name in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
        shutil.copy(export, tmp_path / name)
    with pytest.raises(
        InputError, match="found decoder_model.onnx, decoder_with_past_model.onnx and no model.onnx"
    ):
        find_onnx(tmp_path)


def test_what_is_no_onnx_file_is_refused(tmp_path):
    (tmp_path / "model.xml").write_text("<net/>")
    for path, message in (
        (tmp_path / "gone.onnx", "no such file"),
        (tmp_path / "model.xml", "expected an .onnx file"),
        (tmp_path, "no model.onnx"),
    ):
        with pytest.raises(InputError, match=message):
            describe(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00garbage" * 9, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"],
)
def test_a_file_that_holds_no_model_is_refused(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match="model.onnx: (not a whole ONNX file|expected an ONNX model)"):
        describe(tmp_path / "model.onnx")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_an_input_error_or_a_reading_and_nothing_else(external, data):
    content = bytearray(external.read_bytes())  # without the weights, so that damage falls on the graph
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8), label="places"):
        content[place] = data.draw(st.integers(0, 255))
    damaged = external.parent / "damaged.onnx"
    damaged.write_bytes(
        content[: data.draw(st.sampled_from([len(content)] * 3 + [len(content) // 2]), label="end")]
    )
    try:
        inspect(damaged)
    except InputError as error:
        assert str(error).startswith(str(external.parent))  # the line names the file


@pytest.mark.parametrize("location", ELSEWHERE)
def test_external_data_outside_the_directory_are_refused(external, location):
    name = rewrite(external, "location", location)
    with pytest.raises(InputError, match="leaves the model's directory") as caught:
        describe(external)
    assert name in str(caught.value)


def test_external_data_that_are_missing_are_named(external):
    (external.parent / "weights.data").unlink()
    with pytest.raises(InputError, match="weights.data: no such file, although model.onnx keeps the weights"):
        describe(external)


def test_external_data_that_are_cut_short_are_named(external):
    data = external.parent / "weights.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match="weights.data: expected at least .* cut short"):
        describe(external)


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "-8"), ("offset", "many"), ("length", "3"), ("length", "99999999"), ("offset", "99999999")],
)
def test_external_data_that_are_described_wrongly_are_refused(external, key, value):
    rewrite(external, key, value)
    with pytest.raises(InputError, match="external data of|cut short"):
        describe(external)
