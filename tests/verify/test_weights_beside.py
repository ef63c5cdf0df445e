"""Constants that stand beside a weight, in the same module, and are none."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from refengine.checkpoint import Checkpoint, open_checkpoint
from tests.checkpoints import TINY, write_checkpoint
from verify.export import export_decoder
from verify.inspection import inspect_weights

NORM = "model.layers.1.input_layernorm.weight"


def with_constant_added(checkpoint: Checkpoint, path: Path, number: float) -> onnx.ModelProto:
    """An export in which a norm adds a number to what it gives, as a vector."""
    export_decoder(checkpoint, path)
    model = onnx.load(path)
    nodes = list(model.graph.node)
    last = next(node for node in nodes if NORM in node.input)
    given = last.output[0]
    last.output[0] = "scaled"
    vector = np.full(TINY["hidden_size"], number, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(vector, "/model/layers.1/input_layernorm/constant"))
    added = helper.make_node(
        "Add", ["scaled", "/model/layers.1/input_layernorm/constant"], [given], name="/model/layers.1/input_layernorm/B"
    )
    del model.graph.node[:]
    model.graph.node.extend(each for node in nodes for each in ([node, added] if node is last else [node]))
    return model


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    return open_checkpoint(write_checkpoint(tmp_path / "checkpoint"))


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_a_vector_of_one_number_beside_a_norms_weight_is_not_taken_for_it(checkpoint, tmp_path, number):
    onnx.save(with_constant_added(checkpoint, tmp_path / "model.onnx", number), tmp_path / "model.onnx")
    report = inspect_weights(checkpoint, tmp_path / "model.onnx")
    assert {tensor.relation for tensor in report.tensors} == {"equal"}


def test_a_norms_weight_that_is_changed_is_what_is_shown_and_not_the_constant_beside_it(checkpoint, tmp_path):
    model = with_constant_added(checkpoint, tmp_path / "model.onnx", 0.0)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == NORM)
    weight.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(weight), NORM))
    onnx.save(model, tmp_path / "model.onnx")
    (changed,) = inspect_weights(checkpoint, tmp_path / "model.onnx").unfaithful
    assert (changed.name, changed.relation, changed.stored_in) == (NORM, "changed", NORM)


def test_a_norms_weight_that_was_lost_for_zeros_is_changed(checkpoint, tmp_path):
    export_decoder(checkpoint, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == NORM)
    weight.CopyFrom(numpy_helper.from_array(np.zeros(TINY["hidden_size"], np.float32), NORM))
    onnx.save(model, tmp_path / "model.onnx")
    assert [tensor.name for tensor in inspect_weights(checkpoint, tmp_path / "model.onnx").unfaithful] == [NORM]
