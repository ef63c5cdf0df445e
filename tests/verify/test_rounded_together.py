"""Exports that round all inputs of a product to uint8 with one scale: honest ones are equal in that unit alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import helper, numpy_helper

from refengine.checkpoint import open_checkpoint
from tests.verify.comparing import Compared, Here, Notes
from verify.candidates.files import describe_candidate
from verify.candidates.ort_session import session_of
from verify.compare import Comparison
from verify.expect import expected, joined
from verify.own_weights import read_weights
from verify.report.result import Cell
from verify.request import Request, notes_on, request_for
from verify.truth.arithmetic import ARITHMETICS, Arithmetic, quantised_together

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "fixtures"
COMMUNITY = FIXTURES / "exports" / "mistral-community" / "onnx"
PROMPTS = [list(range(40, 60)), [200, 31, 7]]  # the first is longer than the window
NEW_TOKENS = 4
NAME = "uint8-activations"
IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
MISTRAL = Compared(open_checkpoint(FIXTURES / "tiny_mistral"), PROMPTS, NEW_TOKENS)
BRIEF = Compared(MISTRAL.checkpoint, PROMPTS[:1], 2)  # for runtimes that take long over every new length


def cells(path: Path, expect: str, runtime: str = "ort-cpu", modes=("off", "on"), **options: str) -> dict[str, Cell]:
    """By cache mode; with what `compare` does of the export's own weights."""
    of = MISTRAL if runtime == "ort-cpu" else BRIEF
    own, _ = read_weights(of.checkpoint, describe_candidate(path))
    request = Request(of.prompts, of.max_new_tokens, modes, expectation=expected(expect))
    comparison = Comparison(of.checkpoint, request, Notes(), of.reference, own)
    return {cell.cache: cell for cell in comparison.cells(Here(of.open(path, runtime, options)))}


def edited(directory: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of the frozen export, changed."""
    model = onnx.load(COMMUNITY / "model_quantized.onnx")
    edit(model)
    onnx.save(model, directory / "model.onnx")
    return directory / "model.onnx"


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
        elements=st.integers(-(10**6), 10**6).map(lambda thousandths: np.float32(thousandths / 1000)),
    )
)
def test_uint8_is_what_the_operator_makes_of_each_row(x_BTI):
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"])
    back = helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"])
    x, y = (helper.make_tensor_value_info(name, 1, [1, *x_BTI.shape[1:]]) for name in "xy")
    graph = helper.make_graph([node, back], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    session = session_of(model.SerializeToString())
    right_BTI = np.concatenate([session.run(None, {"x": x_TI[None]})[0] for x_TI in x_BTI])
    np.testing.assert_array_equal(quantised_together(x_BTI), right_BTI)


@pytest.mark.parametrize(
    ("file", "runtime", "options", "modes"),
    [
        ("model_quantized.onnx", "ort-cpu", {}, ("off", "on")),
        ("model_uint8.onnx", "ort-cpu", {}, ("on",)),
        ("model_quantized.onnx", "ort-openvino", {}, ("on",)),
        ("model_quantized.onnx", "openvino", IN_FLOAT32, ("on",)),
    ],
    ids=["int8-ort-cpu", "uint8-ort-cpu", "int8-ort-openvino", "int8-openvino"],
)
def test_an_honest_one_is_equal_for_what_it_says_it_is(file, runtime, options, modes):
    for cell in cells(COMMUNITY / file, "auto", runtime, modes, **options).values():
        assert (cell.verdict, cell.expect) == ("equal", f"int8-weights+{NAME}")
        assert 0.9 < cell.noise_ratio.logits < 1.1
        assert cell.noise_ratio.cache_beyond == ()
        assert (cell.also.weights, cell.also.verdict == "equal") == ("checkpoint", False)


def test_on_top_of_bfloat16_it_is_equal_to_both():
    candidate = MISTRAL.open(COMMUNITY / "model_quantized.onnx", "openvino", {"INFERENCE_PRECISION_HINT": "bf16"})
    if candidate.settings.effective["INFERENCE_PRECISION_HINT"] != "bf16":
        pytest.skip("OpenVINO has no bfloat16 on this processor")
    assert candidate.expectation == joined(expected("bfloat16"), expected(NAME))
    bfloat16 = {"INFERENCE_PRECISION_HINT": "bf16"}
    (cell,) = cells(COMMUNITY / "model_quantized.onnx", "auto", "openvino", ("on",), **bfloat16).values()
    assert cell.verdict == "equal"


@pytest.mark.parametrize("expect", ["float32", "int8-weights"])
def test_held_against_anything_else_it_is_not_and_what_it_says_explains_it(expect):
    for cell in cells(COMMUNITY / "model_quantized.onnx", expect).values():
        assert cell.verdict in ("drift", "mismatch")
        assert cell.noise_ratio.logits > 1000
        assert cell.explained_by == f"int8-weights+{NAME}"


def wider_window(model: onnx.ModelProto) -> None:
    """The window of the mask, which is all that is compared with it, becomes longer than any sequence here."""
    window = MISTRAL.checkpoint.config.sliding_window
    found = 0
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.t.data_type == onnx.TensorProto.INT64:
                numbers = numpy_helper.to_array(attribute.t)
                if numbers.size == 1 and abs(int(numbers.ravel()[0])) == window:
                    attribute.t.CopyFrom(numpy_helper.from_array(numbers * 100, attribute.t.name))
                    found += 1
    assert found


def no_rotation(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in ("Cos", "Sin"):
            node.op_type = "Cos"


def another_base(model: onnx.ModelProto) -> None:
    """Of the frequencies: 9000 for 10 000."""
    pairs = MISTRAL.checkpoint.config.head_dim // 2
    (tensor,) = (
        attribute.t
        for node in model.graph.node
        for attribute in node.attribute
        if node.op_type == "Constant" and attribute.t.data_type == 1 and np.prod(attribute.t.dims) == pairs
    )
    frequencies = numpy_helper.to_array(tensor) ** np.float32(np.log(9000) / np.log(10000))
    tensor.CopyFrom(numpy_helper.from_array(frequencies, tensor.name))


@pytest.mark.parametrize("fault", [wider_window, no_rotation], ids=lambda fault: fault.__name__)
def test_a_fault_on_top_of_it_is_found(tmp_path, fault):
    for cell in cells(edited(tmp_path, fault), "auto").values():
        assert cell.verdict in ("drift", "mismatch")
        assert cell.noise_ratio.logits > cell.noise_ratio.bound
        assert cell.explained_by is None


def test_a_fault_that_the_logits_hide_shows_in_the_keys(tmp_path):
    (cell,) = cells(edited(tmp_path, another_base), "auto", modes=("on",)).values()
    assert cell.noise_ratio.has_logits_within
    assert "layers.0.self_attn.k_cache" in cell.noise_ratio.cache_beyond
    assert (cell.verdict, cell.explained_by) == ("drift", None)


def test_prompts_are_run_one_by_one_and_the_report_says_why():
    candidate = MISTRAL.open(COMMUNITY / "model_quantized.onnx")
    request = Request(PROMPTS, NEW_TOKENS, batching="continuous")
    assert (request_for(candidate, request).batching, request_for(candidate, request).most_rows) == ("static", 1)
    (why,) = [note for note in notes_on(candidate, request) if "one by one" in note]
    assert why == "ort-cpu: all that it is fed together shares a scale, so its prompts were run one by one"


def test_what_is_asked_for_is_named_where_it_is_not_expected():
    candidate = MISTRAL.open(COMMUNITY / "model_quantized.onnx")
    notes = notes_on(candidate, Request(PROMPTS, NEW_TOKENS, expectation=expected("int8-weights")))
    assert any("rounded to uint8 with one scale for all that is fed together" in note for note in notes)
    assert not any("uint8" in note for note in notes_on(candidate, Request(PROMPTS, 2, expectation=expected(NAME))))


def test_a_graph_that_rounds_some_products_alone_is_said_to_be_so(tmp_path):
    def some_in_float(model: onnx.ModelProto) -> None:
        """The first three products take what they took, in float32."""
        named = {tensor.name for tensor in model.graph.initializer}
        for number, node in enumerate([one for one in model.graph.node if one.op_type == "MatMulInteger"][:3]):
            assert node.input[1] in named
            rounded = f"codes in float {number}"
            place = list(model.graph.node).index(node)
            model.graph.node.insert(place, helper.make_node("Cast", [node.input[0]], [rounded], to=1))
            weight = f"weight in float {number}"
            size = next(one.dims for one in model.graph.initializer if one.name == node.input[1])
            model.graph.initializer.append(numpy_helper.from_array(np.zeros(tuple(size), np.float32), weight))
            node.op_type = "MatMul"
            node.input[:] = [rounded, weight]

    file = describe_candidate(edited(tmp_path, some_in_float))
    assert not file.rounds_together
    _, notes = read_weights(MISTRAL.checkpoint, file)
    assert any("no --expect stands for that" in note for note in notes)


def test_it_is_one_of_the_ways_to_round_inputs_of_products():
    assert expected(f"{NAME}+bfloat16").arithmetic == replace(ARITHMETICS["bfloat16"], together=True)
    assert expected(NAME).without_cache.arithmetic == Arithmetic("", together=True, anew=True)
    assert expected(f"{NAME}+ov-u8").without_cache.arithmetic.anew
