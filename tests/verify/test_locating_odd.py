"""Graphs that are hard to read: without names, with functions of their own, or with branches in a layer."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from tests.verify.caused import small_model
from tests.verify.comparing import Compared, Here
from tests.verify.faulty import only_in, write_faulty
from tests.verify.seen import Seen
from verify.errors import NoVerdict
from verify.export.modules import MODULES
from verify.locate import said_of_trace

LAYER = 1


class Fragile(Here):
    """A candidate whose process ends as soon as it is asked for what is inside an activation."""

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        names = [name for argument in arguments if isinstance(argument, list) for name in argument]
        if any("mlp/activation/" in str(name) for name in names):
            raise NoVerdict("its process was ended by signal 11 (SIGSEGV)")
        return super().apply(function, *arguments)


def gate_for_up(at, gate_BTF, up_BTF):
    return MODULES.silu_gate(at, up_BTF, gate_BTF)


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Compared:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def faulty(compared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("faulty") / "model.onnx"
    return write_faulty(compared.checkpoint, out, modules=only_in([LAYER], "silu_gate", gate_for_up))


def hashed(name: str) -> str:
    return name and hashlib.sha256(name.encode()).hexdigest()[:12]


def without_names(model: onnx.ModelProto) -> None:
    """Nodes without a name, and tensors whose names say nothing, but for those that are fed and given."""
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        node.name = ""
        for names in (node.input, node.output):
            names[:] = [name if name in kept else hashed(name) for name in names]
    for tensor in model.graph.initializer:
        tensor.name = hashed(tensor.name)


def as_functions(model: onnx.ModelProto) -> None:
    """Each layer a function of the model's own domain, as exporters write modules that they keep."""
    nodes = list(model.graph.node)
    borders = {value.name for value in model.graph.output}
    del model.graph.node[:]
    model.opset_import.append(helper.make_opsetid("modules", 1))
    for number in range(3):
        path = f"/model/layers.{number}/"
        inside = [node for node in nodes if node.name.startswith(path)]
        made = {name for node in inside for name in node.output}
        others = [node for node in nodes if not node.name.startswith(path)]
        inputs = list(dict.fromkeys(name for node in inside for name in node.input if name not in made))
        read = {name for node in others for name in node.input}
        outputs = [name for node in inside for name in node.output if name in read or name in borders]
        opset = [helper.make_opsetid("", 18)]
        model.functions.append(helper.make_function("modules", f"Layer{number}", inputs, outputs, inside, opset))
        place = nodes.index(inside[0])
        called = helper.make_node(f"Layer{number}", inputs, outputs, name=f"layer {number}", domain="modules")
        nodes = [node for node in [*nodes[:place], called, *nodes[place:]] if node not in inside]
    model.graph.node.extend(nodes)


def test_nodes_without_names_are_known_by_what_they_give(compared, faulty, tmp_path):
    model = onnx.load(faulty)
    node = next(each for each in model.graph.node if each.name == f"/model/layers.{LAYER}/mlp/activation/Sigmoid")
    without_names(model)
    onnx.save(model, tmp_path / "model.onnx")
    first = Seen(compared, tmp_path / "model.onnx").located().first
    assert (first.layer, first.point, first.node) == (LAYER, "mlp.activation", node.output[0])
    assert (first.operator, first.provider) == ("Sigmoid", "CPUExecutionProvider")


def test_a_run_that_is_another_when_it_is_traced_is_said_to_be_so(compared, faulty, tmp_path):
    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", config={"rms_norm_eps": 1e-3})
    one, other = Seen(compared, faulty).run, Seen(compared, path).run
    assert said_of_trace(one, one, compared.reference, (0, 1)) == ()
    (said,) = said_of_trace(one, other, compared.reference, (0, 1))
    assert said.startswith("with the residual stream among its results the run is another one")


def test_a_part_that_cannot_be_looked_into_is_the_place_and_why_is_said(compared, faulty):
    seen = Seen(compared, faulty)
    seen.candidate = Fragile(compared.open(faulty))
    located = seen.located()
    first = located.first
    assert (first.layer, first.node, located.shown) == (LAYER, None, None)
    assert first.point.startswith("mlp")
    why = "its process was ended by signal 11 (SIGSEGV)"
    assert first.untraced == why
    assert located.notes == (f"the inside of this part could not be looked at: {why}",)


def test_functions_of_a_model_are_looked_into(compared, faulty, tmp_path):
    model = onnx.load(faulty)
    as_functions(model)
    onnx.save(model, tmp_path / "model.onnx")
    first = Seen(compared, tmp_path / "model.onnx").located().first
    assert (first.layer, first.point, first.operator) == (LAYER, "mlp.activation", "Sigmoid")


def test_a_node_with_branches_is_looked_at_from_outside(compared, faulty, tmp_path):
    """The mistake is in both branches of a choice that the graph makes by what it is fed."""
    model = onnx.load(faulty)
    activation = f"/model/layers.{LAYER}/mlp/activation/"
    nodes = list(model.graph.node)
    inside = [node for node in nodes if node.name.startswith(activation)]
    result = inside[-1].output[0]
    branches = {}
    for name in ("then_branch", "else_branch"):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in inside]
        for node in copies:
            for names in (node.input, node.output):
                made = {made for each in inside for made in each.output}
                names[:] = [f"{name}/{each}" if each in made else each for each in names]
        branches[name] = helper.make_graph(copies, name, [], [onnx.ValueInfoProto(name=f"{name}/{result}")])
    chosen = [
        helper.make_node("Size", ["input_ids"], ["size"]),
        helper.make_node("Cast", ["size"], ["chosen"], to=onnx.TensorProto.BOOL),
        helper.make_node("If", ["chosen"], [result], name="the choice", **branches),
    ]
    place = nodes.index(inside[0])
    del model.graph.node[:]
    model.graph.node.extend(node for node in [*nodes[:place], *chosen, *nodes[place:]] if node not in inside)
    onnx.save(model, tmp_path / "model.onnx")
    first = Seen(compared, tmp_path / "model.onnx").located().first
    assert (first.layer, first.point, first.node) == (LAYER, "mlp.activation", "the choice")
