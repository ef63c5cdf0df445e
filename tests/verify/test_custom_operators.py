"""Graphs with operators of somebody's own, which no runtime here has."""

import json
from pathlib import Path

import onnx
import pytest
from onnx import helper

from tests.verify.commands import Small, verify

PLACE = "/model/layers.1/mlp/activation/Sigmoid"


@pytest.fixture(scope="module")
def foreign(small: Small, tmp_path_factory) -> Path:
    """The small model's export with an operator of another domain in layer 1."""
    model = onnx.load(small.export)
    node = next(node for node in model.graph.node if node.name == PLACE)
    node.domain, node.op_type = "my.company", "FancySigmoid"
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    path = tmp_path_factory.mktemp("foreign") / "model.onnx"
    onnx.save(model, path)
    return path


def test_a_runtime_without_the_operator_gives_no_verdict_and_the_operator_is_named(small, foreign):
    done = small.compare("--runtime", "openvino", "--json", "-", candidate=foreign)
    assert done.code == 3
    report = json.loads(done.out)
    assert (report["verdict"], report["diagnosis"], report["location"]) == ("no-verdict", "none", None)
    reasons = {cell["runtime"]: cell["reason"] for cell in report["cells"]}
    assert "my.company:FancySigmoid" in reasons["ort-cpu"]
    assert "my.company.FancySigmoid" in reasons["openvino"]
    assert not any("\n" in reason or "Traceback" in reason for reason in reasons.values())


def test_what_is_in_the_file_can_be_shown_without_running_it(small, foreign):
    done = verify("inspect", foreign)
    assert (done.code, done.err) == (0, "")
    assert "my.company.FancySigmoid 1" in " ".join(done.out.split())


def test_its_weights_are_found_without_running_it(small, foreign):
    done = verify("inspect", small.checkpoint, foreign, "--json", "-")
    assert done.code == 0
    assert {tensor["relation"] for tensor in json.loads(done.out)["tensors"]} == {"equal"}
