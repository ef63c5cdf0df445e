"""A node that a provider computes wrongly: found by running it alone, on its own inputs, elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto

from refengine.rope import rope_inverse_frequencies
from tests.verify.caused import diagnosed, diagnosis_of, small_model
from tests.verify.comparing import Compared
from tests.verify.faulty import only_in, write_faulty
from verify.export.modules import MODULES
from verify.report.diagnosis import cause_in_words

pytestmark = pytest.mark.slow

POINT = 30  # binary places


def fixed_point_table(at, config, position_ids_BT):
    """The rotary table of positions that are held in int64 with a binary point, which OpenVINO computes in int32."""
    longest = config.max_position_embeddings
    inv_freq_P, factor = rope_inverse_frequencies(config.rope_parameters, config.head_dim, longest, longest)
    fixed_BT = at("Mul", position_ids_BT, at.constant("point", 2**POINT))
    positions_BT = at("Mul", at("Cast", fixed_BT, to=TensorProto.FLOAT), at.constant("unit", 2.0**-POINT))
    positions_B1T1 = at("Unsqueeze", positions_BT, at.constant("axes", [1, 3]))
    angles_B1TP = at("Mul", positions_B1T1, at.constant("inv_freq", inv_freq_P))
    angles_B1TH = at("Concat", angles_B1TP, angles_B1TP, axis=-1)
    attention_factor = at.constant("attention_factor", factor)
    cos_B1TH = at("Mul", at("Cos", angles_B1TH), attention_factor)
    return cos_B1TH, at("Mul", at("Sin", angles_B1TH), attention_factor)


def wrapped_table(at, config, position_ids_BT):
    """The rotary table of positions after a turn of 2**31 in int64, of which OpenVINO leaves nothing but 0."""
    turn = at.constant("turn", 2**31)
    positions_BT = at("Mod", at("Add", position_ids_BT, turn), turn)
    return MODULES.rope_table(at, config, positions_BT)


def by_a_denormal(at, gate_BTF, up_BTF):
    """SwiGLU's gate, its sigmoid divided by a number whose reciprocal, which OpenVINO multiplies by, is infinite."""
    hundredth_BTF = at("Mul", at("Sigmoid", gate_BTF), at.constant("hundredth", 0.01))
    raised_BTF = at("Div", hundredth_BTF, at.constant("least", 1e-39))
    sigmoid_BTF = at("Mul", raised_BTF, at.constant("back", 1e-37))
    return at("Mul", at("Mul", gate_BTF, sigmoid_BTF), up_BTF)


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Compared:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wide(compared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wide") / "model.onnx"
    return write_faulty(compared.checkpoint, out, modules={"rope_table": fixed_point_table})


def test_the_plain_cpu_has_it_right(compared, wide):
    assert {cell.verdict for cell in compared.cells(wide).values()} == {"equal"}


def test_a_node_that_a_provider_has_wrong_is_named_with_who_has_it_right(compared, wide):
    found = diagnosed(compared, wide, "ort-openvino")
    assert (found.status, found.location.rung) == ("named", "provider")
    (cause,) = (cause for cause in found.causes if cause.status == "confirmed")
    assert cause.name == "runtime-kernel"
    assert cause.parameters["node"] == "/model/rotary_emb/Mul"
    assert (cause.parameters["operator"], cause.parameters["provider"]) == ("Mul", "OpenVINOExecutionProvider")
    assert cause.parameters["right_on"] == "onnx, CPUExecutionProvider"
    assert found.location.node == "/model/rotary_emb/Mul (Mul, OpenVINOExecutionProvider)"
    assert "from what onnx and CPUExecutionProvider make of the same inputs" in found.location.detail
    assert "run without it, what is left is" in cause_in_words(found)


def test_a_node_that_openvino_itself_has_wrong_is_named_too(compared, wide):
    found = diagnosed(compared, wide, "openvino", INFERENCE_PRECISION_HINT="f32")
    (cause,) = (cause for cause in found.causes if cause.status == "confirmed")
    assert (cause.name, cause.parameters["node"]) == ("runtime-kernel", "/model/rotary_emb/Mul")
    assert cause.parameters["right_on"] == "OpenVINO's reference"


def test_what_is_cut_out_is_run_by_who_has_it_wrong(compared, wide, tmp_path):
    diagnosis_of(compared, compared.open(wide, "ort-openvino"), repro=tmp_path / "repro")
    script = [sys.executable, "repro.py"]
    done = subprocess.run(script, cwd=tmp_path / "repro", capture_output=True, text=True, check=True)
    assert float(done.stdout.split("largest error ")[1].split()[0]) > 0.1


def test_a_node_that_gives_what_is_not_finite_is_named_too(compared, tmp_path):
    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", modules=only_in([1], "silu_gate", by_a_denormal))
    assert {cell.verdict for cell in compared.cells(path).values()} == {"equal"}
    found = diagnosed(compared, path, "ort-openvino")
    assert (found.status, found.location.rung, found.location.layer) == ("named", "provider", 1)
    assert [(cause.name, cause.parameters["operator"]) for cause in found.causes] == [("runtime-kernel", "Div")]
    assert found.location.node == "/model/layers.1/mlp/activation/Div (Div, OpenVINOExecutionProvider)"
    assert "NaN or infinite" in found.notes[0]


def test_what_a_wrong_node_comes_to_is_said_where_the_catalogue_has_it(compared, tmp_path):
    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", modules={"rope_table": wrapped_table})
    assert {cell.verdict for cell in compared.cells(path).values()} == {"equal"}
    found = diagnosed(compared, path, "ort-openvino", seconds=30)
    (cause,) = (cause for cause in found.causes if cause.status != "ruled-out")
    assert (cause.name, cause.parameters["operator"]) == ("runtime-kernel", "Add")
    assert cause.parameters["acts_as"] == "rope-missing"
