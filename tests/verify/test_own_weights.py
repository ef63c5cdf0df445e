"""Exports whose weights are rounded: what that costs, and whether anything else is wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from refengine.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.verify.commands import verify
from tests.verify.comparing import Compared, Here, Notes
from tests.verify.conftest import TEXTS, TINY_LLAMA
from tests.verify.faulty import write_faulty
from verify.candidates.files import describe_candidate
from verify.compare import Comparison
from verify.expect import expected
from verify.own_weights import notes_on_int8, notes_on_weights, read_weights
from verify.report.result import Cell, Exported, Model, Report
from verify.report.weights_verdict import cause_in_weights
from verify.request import Request

FROZEN = Path(__file__).parents[2] / "fixtures" / "exports"
COMMUNITY = FROZEN / "mistral-community" / "onnx"
IN_FLOAT32 = {"EXECUTION_MODE_HINT": "ACCURACY"}  # of OpenVINO, which rounds inputs of products otherwise
TENSOR = "model.layers.3.mlp.down_proj.weight"

Edit = Callable[[onnx.ModelProto], None]


def in_float32(model: onnx.ModelProto) -> None:
    """Lets products be computed in float32, where the model builder asks for inputs rounded to int8."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0


def other_epsilon(model: onnx.ModelProto) -> None:
    """A tenth of the epsilon in every norm."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f /= 10


def a_damaged_block(model: onnx.ModelProto) -> None:
    """Twice the scale of one block of 32 weights."""
    (scales,) = (
        one
        for one in model.graph.initializer
        if "layers.3" in one.name and "down_proj" in one.name and "scale" in one.name
    )
    values = numpy_helper.to_array(scales).copy()
    values.flat[5] *= 2
    scales.CopyFrom(numpy_helper.from_array(values, scales.name))


@pytest.fixture
def int4(tmp_path) -> Callable[..., Path]:
    """The model builder's int4 export, edited."""

    def edited(*edits: Edit) -> Path:
        model = onnx.load(FROZEN / "genai-int4" / "model.onnx")
        for edit in edits:
            edit(model)
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return edited


def held(compared: Compared, path: Path, expect: str, runtime: str = "ort-cpu", **options: str) -> tuple[Cell, Report]:
    """The cell of a cached run held against an expectation, and a report of it."""
    file, expectation = describe_candidate(path), expected(expect)
    own, notes = read_weights(compared.checkpoint, file)
    request = Request(compared.prompts, compared.max_new_tokens, ("on",), expectation=expectation)
    comparison = Comparison(compared.checkpoint, request, Notes(), compared.reference, own)
    candidate = compared.open(file.path, runtime, options)
    (cell,) = comparison.cells(Here(candidate))
    notes += notes_on_weights(own, expectation) + notes_on_int8(candidate, expectation)
    weights = replace(own.report, cost=comparison.references.cost_of_weights())
    model, export = Model("tiny", "llama", "0" * 64), Exported(str(path), file.exporter, "0" * 64)
    return cell, Report(model, export, len(compared.prompts), 8, (cell,), tuple(notes), weights=weights)


def test_an_export_that_is_rounded_and_nothing_else_is_right_on_its_own_weights(alone, int4):
    cell, report = held(alone, int4(in_float32), "float32")
    assert cell.verdict in ("drift", "mismatch")
    assert cell.noise_ratio.logits > 10_000
    assert (cell.also.weights, cell.also.verdict, cell.also.tokens.equal) == ("export", "equal", 8)
    assert cell.also.noise_ratio.logits < cell.also.noise_ratio.bound < 10
    assert (cell.explained_by, report.diagnosis) == ("int4-weights", "named")


@pytest.mark.parametrize("expect", ["int4-weights", "int2-weights", "auto"])
def test_where_rounded_weights_are_expected_the_verdict_is_on_them(alone, int4, expect):
    cell, report = held(alone, int4(in_float32), expect)
    assert cell.verdict == "equal"
    assert (cell.also.weights, cell.also.verdict == "equal") == ("checkpoint", False)
    assert cell.also.noise_ratio.logits > 10_000
    assert cell.expect == (expect if expect != "auto" else "int4-weights")
    assert report.notes == ()


def test_weights_that_are_coarser_than_expected_are_held_against_the_checkpoints(alone, int4):
    cell, report = held(alone, int4(in_float32), "int8-weights")
    assert cell.verdict in ("drift", "mismatch")
    assert (cell.also.weights, cell.also.verdict, cell.explained_by) == ("export", "equal", "int4-weights")
    assert report.notes == ("its weights are int4, more coarsely rounded than int8",)


def test_inputs_that_are_rounded_to_int8_are_named_and_auto_takes_them_for_what_they_are(alone, int4):
    cell, report = held(alone, int4(), "int4-weights")
    assert cell.verdict != "equal"
    assert cell.noise_ratio.logits > 100
    assert cell.explained_by == "int4-weights+int8-activations"
    (note,) = report.notes
    assert note.startswith(
        "ort-cpu: inputs of products are rounded to int8 in blocks of 32 (the graph's accuracy_level 4"
    )
    cell, report = held(alone, int4(), "auto")
    assert (cell.verdict, cell.expect, report.notes) == ("equal", "int4-weights+int8-activations", ())


@pytest.mark.parametrize("expect", ["int4-weights", "auto"])
def test_a_fault_on_top_of_rounded_weights_is_found(alone, int4, expect):
    cell, report = held(alone, int4(in_float32, other_epsilon), expect)
    assert cell.verdict in ("drift", "mismatch")
    assert cell.noise_ratio.logits > 3 * cell.noise_ratio.bound
    assert cell.explained_by is None
    assert cause_in_weights(report) is None


def test_a_fault_shows_under_inputs_that_are_rounded_to_int8_too(alone, int4):
    def half_as_large(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "scale":
                    attribute.f /= 2

    cell, _ = held(alone, int4(half_as_large), "auto")
    assert cell.verdict in ("drift", "mismatch")


@pytest.mark.parametrize("expect", ["int4-weights", "auto"])
def test_codes_that_are_no_rounding_of_the_checkpoints_are_no_excuse(alone, int4, expect):
    cell, report = held(alone, int4(in_float32, a_damaged_block), expect)
    assert cell.verdict in ("drift", "mismatch")
    assert (cell.also.weights, cell.also.verdict) == ("export", "equal")
    assert [tensor.name for tensor in report.weights.unfaithful] == [TENSOR]
    assert cause_in_weights(report) == f"the export's weights are not the checkpoint's: {TENSOR}"
    assert any(TENSOR in note for note in report.notes)


@pytest.mark.parametrize("expect", ["float32", "int4-weights", "auto"])
def test_an_export_with_the_checkpoints_own_weights_is_held_against_them_once(alone, clean, expect):
    cell, report = held(alone, clean, expect)
    assert (cell.verdict, cell.also) == ("equal", None)
    assert (report.weights.stored_as, report.weights.cost, report.notes) == ("float32", None, ())


def test_weights_rounded_to_bfloat16_are_told_from_computing_in_it(tmp_path):
    compared = Compared(open_checkpoint(write_checkpoint(tmp_path / "checkpoint")), [[3, 1, 4, 1, 5, 9, 2, 6]], 8)

    def rounded(read):
        return lambda name: read(name).astype(ml_dtypes.bfloat16).astype(np.float32)

    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", read=rounded)
    cell, _ = held(compared, path, "float32")
    assert (cell.verdict, cell.also.verdict, cell.explained_by) == ("drift", "equal", "bfloat16-weights")
    cell, report = held(compared, path, "bfloat16-weights")
    assert (cell.verdict, cell.also.verdict, report.weights.stored_as) == ("equal", "drift", "bfloat16")
    cell, _ = held(compared, path, "float16-weights")
    assert cell.verdict == "drift"


def test_int8_weights_in_openvino_are_right_on_themselves_where_it_computes_in_float32(alone):
    cell, report = held(alone, FROZEN / "optimum-intel-int8", "int8-weights", "openvino", **IN_FLOAT32)
    assert (cell.verdict, cell.also.verdict, report.weights.stored_as) == ("equal", "drift", "int8")


def test_what_openvino_does_by_default_is_named_and_is_what_auto_takes_it_for(alone):
    path = FROZEN / "optimum-intel-int8"
    cell, report = held(alone, path, "int8-weights", "openvino", INFERENCE_PRECISION_HINT="f32")
    assert cell.verdict == "drift"
    assert any("DYNAMIC_QUANTIZATION_GROUP_SIZE=0 turns it off" in note for note in report.notes)
    cell, _ = held(alone, path, "auto", "openvino", INFERENCE_PRECISION_HINT="f32")
    assert (cell.verdict, cell.expect) == ("equal", "int8-weights+int8-activations+ov-u8")


def test_weights_that_are_not_finite_are_no_reason_to_fail(alone, int4):
    def infinite(model: onnx.ModelProto) -> None:
        (scales,) = (
            one
            for one in model.graph.initializer
            if "layers.3" in one.name and "down_proj" in one.name and "scale" in one.name
        )
        values = numpy_helper.to_array(scales).copy()
        values.flat[5] = np.inf
        scales.CopyFrom(numpy_helper.from_array(values, scales.name))

    cell, report = held(alone, int4(in_float32, infinite), "int4-weights")
    assert (cell.verdict == "equal", cell.also, report.weights.cost) == (False, None, None)


def test_weights_that_cannot_be_read_back_are_said_to_be_so(tiny, tmp_path):
    node = helper.make_node("MatMulFpQ4", ["x"], ["y"], "odd", domain="com.microsoft")
    x, y = (helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y])), tmp_path / "model.onnx")
    own, (note,) = read_weights(tiny, describe_candidate(tmp_path))
    assert own is None
    assert "weights of MatMulFpQ4 cannot be read back" in note


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("model_q4.onnx", "int4-weights"),
        ("model_q4f16.onnx", "int4-weights+float16"),
        ("model_bnb4.onnx", "int4-weights"),
    ],
)
def test_community_exports_in_four_bits_are_right_for_what_they_say_they_are(file, named):
    mistral = open_checkpoint(FROZEN.parent / "tiny_mistral")
    compared = Compared(mistral, [list(range(40, 60))], 6)  # longer than the window
    cell, report = held(compared, COMMUNITY / file, "auto")
    assert (cell.verdict, cell.expect, report.notes) == ("equal", named, ())
    assert cell.also.noise_ratio.logits > 10 * cell.also.noise_ratio.bound


def test_the_command_reports_both_judgements_and_what_rounding_costs(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS[:2]), encoding="utf-8")
    quick = ("--runtime", "ort-cpu", "--cache", "on", "--max-new-tokens", 4, "--prompts", prompts)
    done = verify(
        "compare", TINY_LLAMA, FROZEN / "genai-int4", *quick, "--expect", "auto", "--json", tmp_path / "r.json"
    )
    assert done.code == 0
    assert done.first_lines[0].startswith("equal: all 8 tokens of 1 run are what the export's own weights give")
    text = " ".join(done.out.split())
    assert "26 equal, 85 quantised; the coarsest are int4; in exact arithmetic they change" in text
    assert "ort-cpu, cache on: on the checkpoint's weights: " in text
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    (cell,) = report["cells"]
    assert (cell["verdict"], cell["expect"]) == ("equal", "int4-weights+int8-activations")
    assert cell["also"]["weights"] == "checkpoint"
    cost = report["weights"]["cost"]
    assert cost["tokens"] == 8
    assert 0 < cost["divergence"] <= cost["largest_divergence"] < 5
    assert cost["own_perplexity"] > 1
