"""A checkpoint's tensors found again in exports by their numbers, and every way in which they can be wrong."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import save_file

from refengine.checkpoint import Checkpoint, open_checkpoint
from tests.checkpoints import TINY, write_checkpoint
from verify.export import export_decoder
from verify.inspection import inspect_weights
from verify.report.weights import TensorRelation, WeightsReport

# Queries as wide as the hidden state: q_proj and o_proj are square.
SQUARE = {"num_attention_heads": 4, "num_key_value_heads": 2}
GATE_UP = [f"model.layers.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj")]
HEAD_DIM = TINY["head_dim"]
Q1, K1 = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


class Editable:
    """An export whose weights are changed, and looked at again; matrices are given (inputs, outputs) as it has them."""

    def __init__(self, checkpoint: Checkpoint, path: Path):
        self.checkpoint, self.path = checkpoint, path
        self.model = onnx.load(path)

    def weight(self, name: str) -> onnx.TensorProto:
        """The initializer that holds a tensor of the checkpoint."""
        return next(tensor for tensor in self.model.graph.initializer if tensor.name in (name, f"{name}.T"))

    def change(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Puts `change` of a weight in its place."""
        tensor = self.weight(name)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(self.read(name))), tensor.name))

    def read(self, name: str) -> np.ndarray:
        """A weight's numbers, copied."""
        return numpy_helper.to_array(self.weight(name)).copy()

    def strip_names(self) -> None:
        """Leaves nothing that tells what a weight is for."""
        new = {tensor.name: f"w{place}" for place, tensor in enumerate(self.model.graph.initializer)}
        for tensor in self.model.graph.initializer:
            tensor.name = new[tensor.name]
        for place, node in enumerate(self.model.graph.node):
            node.name = f"n{place}"
            for i, name in enumerate(node.input):
                node.input[i] = new.get(name, name)

    def inspect(self) -> WeightsReport:
        """What is found in it now."""
        onnx.save(self.model, self.path)
        return inspect_weights(self.checkpoint, self.path)

    def different(self) -> dict[str, TensorRelation]:
        """What is found and not equal."""
        return {tensor.name: tensor for tensor in self.inspect().tensors if tensor.relation != "equal"}


@pytest.fixture
def make(tmp_path) -> Callable[..., Editable]:
    """Makes a checkpoint and its export."""

    def made(**checkpoint: object) -> Editable:
        opened = open_checkpoint(write_checkpoint(tmp_path / "checkpoint", **checkpoint))
        export_decoder(opened, tmp_path / "model.onnx")
        return Editable(opened, tmp_path / "model.onnx")

    return made


def dealt(weight_IO: np.ndarray) -> np.ndarray:
    """Outputs of each head with the two numbers that are turned together side by side."""
    heads = weight_IO.reshape(len(weight_IO), -1, 2, HEAD_DIM // 2)
    return heads.swapaxes(2, 3).reshape(weight_IO.shape)


@pytest.mark.parametrize("tied", [False, True])
def test_biases_and_a_tied_head_are_found_too(make, tied):
    report = make(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied).inspect()
    assert report.counts == {"equal": 16 * TINY["num_hidden_layers"] + 3}
    assert {tensor.name for tensor in report.tensors} >= {"lm_head.weight", "model.layers.2.self_attn.o_proj.bias"}


def test_without_any_names_tensors_are_found_by_their_numbers(make):
    export = make(attention_bias=True)
    export.strip_names()
    assert export.different() == {}


def test_layers_that_are_swapped_are_changed_and_say_where_their_numbers_are(make):
    export = make()
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 2))
    a, b = export.read(first), export.read(second)
    export.change(first, lambda _: b)
    export.change(second, lambda _: a)
    different = export.different()
    assert {name: tensor.relation for name, tensor in different.items()} == {first: "changed", second: "changed"}
    assert f"its numbers are in {second}" in different[first].detail


def test_layers_that_are_wired_to_each_others_weights_are_changed(make):
    export = make()
    nodes = {node.name: node for node in export.model.graph.node}
    first, second = (nodes[f"/model/layers.{layer}/mlp/up_proj/MatMul"] for layer in (0, 2))
    first.input[1], second.input[1] = second.input[1], first.input[1]
    different = export.different()
    assert {tensor.relation for tensor in different.values()} == {"changed"}
    assert set(different) == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 2)}


def test_a_head_that_should_be_the_embedding_and_is_not_is_changed(make):
    export = make(tie_word_embeddings=True)
    head = next(node for node in export.model.graph.node if node.name == "/lm_head/MatMul")
    embedding_VD = export.read("model.embed_tokens.weight")
    export.model.graph.initializer.append(numpy_helper.from_array(2 * embedding_VD.T, "own"))
    head.input[1] = "own"
    (found,) = export.different().values()
    assert (found.name, found.relation, found.stored_in) == ("lm_head.weight", "changed", "own")
    assert found.error == pytest.approx(1)


def test_a_square_matrix_that_is_transposed_is_changed(make):
    export = make(**SQUARE)
    export.change(Q1, np.transpose)
    (found,) = export.different().values()
    assert (found.name, found.relation) == (Q1, "changed")
    assert "transposed" in found.detail


def test_rotary_pairs_dealt_out_in_queries_alone_are_permuted_and_not_faithful(make):
    export = make()
    export.change(Q1, dealt)
    report = export.inspect()
    (found,) = (tensor for tensor in report.tensors if tensor.relation != "equal")
    assert (found.name, found.relation, found.row_order) == (Q1, "permuted", "rotary pairs")
    assert not report.is_faithful


def test_rotary_pairs_dealt_out_in_queries_and_keys_alike_compute_the_same(make):
    export = make()
    export.change(Q1, dealt)
    export.change(K1, dealt)
    report = export.inspect()
    assert report.counts["permuted"] == 2
    assert report.is_faithful


def test_outputs_in_any_other_order_are_permuted(make):
    export = make()
    order = np.random.default_rng(1).permutation(TINY["intermediate_size"])
    name = "model.layers.0.mlp.gate_proj.weight"
    export.change(name, lambda weight_IO: weight_IO[:, order])
    (found,) = export.different().values()
    assert (found.name, found.relation, found.row_order) == (name, "permuted", "other")


@pytest.mark.parametrize("name", [Q1, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_one_number_that_is_off_by_a_unit_in_the_last_place_is_found(make, name):
    export = make()

    def nudge(weight: np.ndarray) -> np.ndarray:
        weight.flat[7] = np.nextafter(weight.flat[7], np.float32(np.inf))
        return weight

    export.change(name, nudge)
    (found,) = export.different().values()
    assert (found.name, found.relation, found.detail) == (name, "changed", "numbers that differ: 1")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_numbers_rounded_once_are_rounded_and_say_to_what(make, dtype):
    export = make()
    export.change(Q1, lambda weight: weight.astype(dtype).astype(np.float32))
    (found,) = export.different().values()
    assert (found.name, found.relation, found.dtype) == (Q1, "rounded", np.dtype(dtype).name)
    assert 0 < found.error < 2.0**-8


def test_numbers_cut_off_instead_of_rounded_are_changed(make):
    export = make()
    export.change(Q1, lambda weight: (weight.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
    assert [tensor.relation for tensor in export.different().values()] == ["changed"]


def test_a_checkpoint_of_float64_is_rounded_to_float32(make):
    assert make(dtype=np.float64).inspect().counts == {"rounded": 9 * TINY["num_hidden_layers"] + 3}


def test_float16_of_a_converter_that_lifts_small_numbers_is_rounded(make):
    export = make()
    tensor_OI = export.checkpoint.tensor(Q1)
    tensor_OI[0, :3] = (1e-9, -1e-9, 0)
    tensors = {name: export.checkpoint.tensor(name) for name in export.checkpoint.names}
    save_file(tensors | {Q1: tensor_OI}, export.checkpoint.path / "model.safetensors")
    export.checkpoint = open_checkpoint(export.checkpoint.path)
    half_OI = tensor_OI.astype(np.float16)
    half_OI[0, :2] = (1e-7, -1e-7)
    export.change(Q1, lambda _: half_OI.astype(np.float32).T)
    (found,) = export.different().values()
    assert (found.relation, found.dtype) == ("rounded", "float16")
    assert found.detail == "with its smallest numbers lifted to 1e-7"


@pytest.mark.parametrize("power", [-0.5, -0.25])
def test_the_scale_of_attention_folded_into_the_queries_is_said(make, power):
    export = make()
    export.change(Q1, lambda weight: weight * np.float32(HEAD_DIM**power))
    found = {tensor.name: tensor for tensor in export.inspect().tensors}[Q1]
    assert found.relation == "equal"
    assert "1/sqrt(head_dim)" in found.detail


def test_another_factor_is_a_change(make):
    export = make()
    export.change(Q1, lambda weight: weight * np.float32(0.5))
    assert [tensor.relation for tensor in export.different().values()] == ["changed"]


def test_a_tensor_that_is_nowhere_is_missing(make):
    export = make()
    export.model.graph.initializer.remove(export.weight(Q1))
    report = export.inspect()
    (found,) = (tensor for tensor in report.tensors if tensor.relation != "equal")
    assert found == TensorRelation(Q1, "missing")
    assert not report.is_faithful


def test_a_tensor_whose_numbers_serve_another_place_alone_is_missing_and_says_so(make):
    export = make()
    other = "model.layers.0.self_attn.q_proj.weight"
    numbers = export.read(Q1)
    export.model.graph.initializer.remove(export.weight(Q1))
    export.change(other, lambda _: numbers)
    different = export.different()
    assert {name: tensor.relation for name, tensor in different.items()} == {Q1: "missing", other: "changed"}
    assert f"in {other}" in different[Q1].detail


def test_without_names_a_tensor_that_is_nowhere_is_missing_too(make):
    export = make()
    export.model.graph.initializer.remove(export.weight(Q1))
    export.strip_names()
    assert export.different() == {Q1: TensorRelation(Q1, "missing")}


def fuse(export: Editable, fused_IO: np.ndarray) -> None:
    """Puts one matrix in the place of the gate, and takes that and the up projection away."""
    node = next(node for node in export.model.graph.node if node.name == "/model/layers.1/mlp/gate_proj/MatMul")
    node.name = "/model/layers.1/mlp/gate_up_proj/MatMul"
    for name in GATE_UP:
        export.model.graph.initializer.remove(export.weight(name))
    export.model.graph.initializer.append(numpy_helper.from_array(fused_IO, node.input[1]))


@pytest.mark.parametrize("stripped", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_projections_that_are_fused_are_found_in_their_parts(make, stripped, interleaved):
    export = make()
    gate, up = (export.read(name) for name in GATE_UP)
    fused = np.stack([gate, up], axis=2).reshape(len(gate), -1) if interleaved else np.concatenate([gate, up], axis=1)
    fuse(export, fused)
    if stripped:
        export.strip_names()
    report = export.inspect()
    found = {tensor.name: tensor for tensor in report.tensors}
    assert report.counts == {"equal": len(report.tensors)}
    width = TINY["intermediate_size"]
    expected = [f"outputs 0 to {2 * width - 2} of {2 * width}, among others'", f"outputs 1 to {2 * width - 1} of"]
    expected = expected if interleaved else [f"outputs 0 to {width - 1} of", f"outputs {width} to {2 * width - 1} of"]
    assert all(found[name].detail.startswith(text) for name, text in zip(GATE_UP, expected, strict=True))


def test_one_output_of_a_fused_projection_that_is_anothers_is_told_where_it_is(make):
    export = make()
    gate, up = (export.read(name) for name in GATE_UP)
    up[:, 3] = gate[:, 5]
    fuse(export, np.concatenate([gate, up], axis=1))
    (found,) = export.different().values()
    width = TINY["intermediate_size"]
    assert (found.name, found.relation) == (GATE_UP[1], "changed")
    assert found.detail == f"outputs {width} to {2 * width - 1} of {2 * width}; numbers that differ: {len(up)}"


@pytest.mark.parametrize(("lost", "damage"), [(0, np.zeros_like), (1, np.zeros_like), (1, lambda up: up[:, ::-1] * 3)])
def test_what_has_nothing_of_a_fused_projections_part_is_in_the_rows_that_are_left(make, lost, damage):
    export = make()
    parts = [export.read(name) for name in GATE_UP]
    parts[lost] = damage(parts[lost])
    fuse(export, np.concatenate(parts, axis=1))
    (found,) = export.different().values()
    width = TINY["intermediate_size"]
    assert (found.name, found.relation) == (GATE_UP[lost], "changed")
    assert found.detail.startswith(f"outputs {lost * width} to {lost * width + width - 1} of {2 * width}")
