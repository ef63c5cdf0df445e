"""OpenVINO's IRs for tests: of an ONNX export, with a cache of either kind, and frozen ones with a mistake in them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13
from openvino._offline_transformations import apply_make_stateful_transformation

Nodes = Mapping[str, Any]
Edit = Callable[[Nodes], None]
PLANTED = "planted"  # what an edit calls the node that it adds


def converted(path: Path, directory: Path, *, stateful: bool) -> Path:
    """An IR of an ONNX export, which keeps its past to itself or is fed it."""
    model = openvino.convert_model(path)
    if stateful:
        _keep_past(model)
    return _saved(model, directory)


def _keep_past(model: Any) -> None:
    """As optimum-intel does it: rows are picked by `beam_idx`, and a past begins with no slot for as many rows."""
    rows = opset13.parameter([-1], np.int32, "beam_idx")
    rows.output(0).set_names({"beam_idx"})
    past = {port.get_any_name(): port for port in model.inputs if port.get_any_name().startswith("past")}
    for port in past.values():
        readers = port.get_target_inputs()
        picked = opset13.gather(port, rows, opset13.constant(0))
        for reader in readers:
            reader.replace_source_output(picked.output(0))
    model.add_parameters([rows])
    apply_make_stateful_transformation(model, {name: name.replace("past_key_values", "present") for name in past})
    batch = opset13.gather(opset13.shape_of(model.input("input_ids")), opset13.constant([0]), opset13.constant(0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.get_output_partial_shape(0)
            shape = [opset13.constant(np.array([each])) for each in (heads.get_length(), 0, size.get_length())]
            node.set_arguments([opset13.broadcast(opset13.constant(np.float32(0)), opset13.concat([batch, *shape], 0))])
    model.validate_nodes_and_infer_types()


def edited(source: Path, edit: Edit, directory: Path) -> Path:
    """An IR with an edit made in it."""
    model = openvino.Core().read_model(source)
    edit({node.get_friendly_name(): node for node in model.get_ordered_ops()})
    return _saved(model, directory)


def _saved(model: Any, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    openvino.save_model(model, directory / "openvino_model.xml", compress_to_fp16=False)
    return directory / "openvino_model.xml"


def planted(name: str, make: Callable[[Any], Any], only: str | None = None) -> Edit:
    """A node on the result of another one, in place of it for all that read it, or for those called `only`."""

    def edit(nodes: Nodes) -> None:
        given = nodes[name].output(0)
        readers = [port for port in given.get_target_inputs() if only in (None, port.get_node().get_friendly_name())]
        made = make(given)
        made.set_friendly_name(PLANTED)
        for reader in readers:
            reader.replace_source_output(made.output(0))

    return edit


def times(factor: float) -> Callable[[Any], Any]:
    """A product with a number."""
    return lambda given: opset13.multiply(given, opset13.constant(np.float32(factor)))


def fed_by(name: str, place: int, other: str) -> Edit:
    """An input that comes from another node."""
    return lambda nodes: nodes[name].input(place).replace_source_output(nodes[other].output(0))


def with_constant(name: str, place: int, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Another constant as an input of a node."""

    def edit(nodes: Nodes) -> None:
        port = nodes[name].input(place)
        source = port.get_source_output().get_node()
        while source.get_type_name() != "Constant":
            source = source.input_value(0).get_node()
        array = np.array(source.data)
        port.replace_source_output(opset13.constant(change(array).astype(array.dtype)).output(0))

    return edit
