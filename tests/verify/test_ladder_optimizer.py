"""What ONNX Runtime's optimiser makes of a right export, wrongly: found by running the same graph without it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.verify.caused import diagnosed, diagnosis_of, small_model
from tests.verify.comparing import Compared
from tests.verify.faulty import only_in, write_faulty

LAYER = 1


def by_layer_norm(at, x_BTD, eps):
    """RMSNorm as the norm of [-x, x], whose mean is 0, taken away in the order that turns the signs back.

    ONNX Runtime 1.24 takes `mean - x` for `x - mean` when it makes one operator of a layer norm.
    """
    (size,) = at.graph.shapes[f"{at.path.replace('/', '.')}.weight"]
    both_BTD = at("Concat", at("Neg", x_BTD), x_BTD, axis=-1)
    mean_BT1 = at("ReduceMean", both_BTD, at.constant("mean_axes", [-1]), keepdims=1)
    centred_BTD = at("Sub", mean_BT1, both_BTD)
    square_BTD = at("Pow", centred_BTD, at.constant("exponent", 2.0))
    variance_BT1 = at("ReduceMean", square_BTD, at.constant("axes", [-1]), keepdims=1)
    root_BT1 = at("Sqrt", at("Add", variance_BT1, at.constant("rms_norm_eps", eps)))
    scaled_BTD = at("Mul", at("Div", centred_BTD, root_BT1), at.constant("ones", np.ones(2 * size)))
    whole_BTD = at("Add", scaled_BTD, at.constant("zeros", np.zeros(2 * size)))
    start, end, axis = at.constant("start", [0]), at.constant("end", [size]), at.constant("axis", [2])
    return at("Mul", at("Slice", whole_BTD, start, end, axis), at.weight())


def epsilon_first(at, x_BTD, eps):
    """RMSNorm with its sum the other way round, of which ONNX Runtime 1.24 does not find the epsilon: it takes 1e-5."""
    square_BTD = at("Pow", x_BTD, at.constant("exponent", 2.0))
    mean_BT1 = at("ReduceMean", square_BTD, at.constant("axes", [-1]), keepdims=1)
    root_BT1 = at("Sqrt", at("Add", at.constant("rms_norm_eps", eps), mean_BT1))
    return at("Mul", at("Div", x_BTD, root_BT1), at.weight())


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Compared:
    return small_model(tmp_path_factory.mktemp("model"), rms_norm_eps=1e-3)


@pytest.fixture(scope="module")
def misread(compared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("misread") / "model.onnx"
    return write_faulty(compared.checkpoint, out, modules=only_in([LAYER], "rms_norm", by_layer_norm))


def test_a_fusion_that_computes_something_else_is_named_with_its_level(compared, misread):
    found = diagnosed(compared, misread)
    assert (found.status, found.location.rung) == ("named", "optimizer")
    (cause,) = (cause for cause in found.causes if cause.status == "confirmed")
    assert (cause.name, cause.parameters) == ("graph-optimizer", {"level": "basic"})
    assert cause.noise_ratio.before > 1000 * cause.noise_ratio.after
    assert "graph_optimization_level" in cause.fix


def test_a_fault_that_disappears_where_it_is_looked_at_is_reported_as_such(compared, misread):
    found = diagnosed(compared, misread)
    assert (found.location.layer, found.location.node) == (LAYER, None)
    assert any("makes one operator of several nodes" in note for note in found.notes)


def test_what_the_optimiser_gets_wrong_is_cut_out_whole(compared, misread, tmp_path):
    diagnosis_of(compared, compared.open(misread), repro=tmp_path / "repro")
    script = [sys.executable, "repro.py"]
    done = subprocess.run(script, cwd=tmp_path / "repro", capture_output=True, text=True, check=True)
    assert float(done.stdout.split("largest error ")[1].split()[0]) > 0.1
    assert len(onnx.load(tmp_path / "repro" / "part.onnx").graph.node) < 50


def test_a_mistake_of_exports_that_only_the_optimiser_makes_is_what_it_acts_as(compared, tmp_path):
    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", modules={"rms_norm": epsilon_first})
    found = diagnosed(compared, path, seconds=20)
    named = [cause for cause in found.causes if cause.status != "ruled-out"]
    assert [cause.name for cause in named] == ["graph-optimizer"]
    assert named[0].parameters == {"level": "extended", "acts_as": "norm-eps (rms_norm_eps 1e-05)"}
