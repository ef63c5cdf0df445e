"""How an export with one mistake in it is written: this project's own, with a module, a weight or a name changed."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper

from refengine.checkpoint import Checkpoint
from verify.export.decoder import decoder_graph
from verify.export.files import ReadWeight, weight_reader, write_model
from verify.export.graph import Scope
from verify.export.modules import MODULES
from verify.naming.counterfactual import Layers

Module = Callable[..., Any]
Edit = Callable[[onnx.ModelProto], None]
Need = Literal["cache", "padding", "ten layers"]


@dataclass(frozen=True)
class Fault:
    """A mistake, and the export that has it.

    Attributes:
        name: of the fault: its cause, its parameters, its layers.
        cause: what it has to be named; None where no cause in the catalogue is right.
        layers: that have it; None: all of them, or none in particular.
        write: writes the export of a checkpoint to a path, and returns the path.
        needs: what shows it: "cache" steps with a past, "padding" rows of different lengths, "ten layers" more of them
            than have one digit.
        beside: what a second mistake in it has to be named.
        source: the right export that it is an edit of; None where it is this project's own.
    """

    name: str
    cause: str | None
    layers: Layers
    write: Callable[[Checkpoint, Path], Path]
    needs: frozenset[Need] = frozenset()
    beside: str | None = None
    source: Path | None = None


def write_faulty(
    checkpoint: Checkpoint,
    out: Path,
    *,
    cache: bool = True,
    config: Mapping[str, Any] | None = None,
    modules: Mapping[str, Module] | None = None,
    read: Callable[[ReadWeight], ReadWeight] | None = None,
    edit: Edit | None = None,
) -> Path:
    """Writes an export of `checkpoint` in which one thing is other than it should be; returns `out`.

    Args:
        checkpoint: what the export says it is of.
        out: the `.onnx` file.
        cache: whether it takes and gives a cache.
        config: fields of the configuration that differ.
        modules: functions of `MODULES` that differ.
        read: wraps the function that reads a weight.
        edit: changes the finished graph in place.
    """
    graph = decoder_graph(
        replace(checkpoint.config, **(config or {})), cache=cache, modules=replace(MODULES, **(modules or {}))
    )
    reader = weight_reader(checkpoint)
    write_model(graph, read(reader) if read else reader, out)
    if edit:
        model = onnx.load(out)
        edit(model)
        onnx.save(model, out)
    return out


def only_in(layers: Collection[int], name: str, fault: Module) -> dict[str, Module]:
    """The module `name` of `MODULES`, but `fault` in these layers."""
    paths, clean = {f"layers.{layer}" for layer in layers}, getattr(MODULES, name)

    def module(at: Scope, *arguments: Any) -> Any:
        return (fault if paths & set(at.path.split("/")) else clean)(at, *arguments)

    return {name: module}


def everywhere_and_in_one(
    name: str,
    cause: str | None,
    module: str,
    fault: Module,
    *,
    layer: int = 5,
    needs: Collection[Need] = (),
) -> tuple[Fault, Fault]:
    """A fault of a module in all layers, and the same in one of them."""
    alone = only_in([layer], module, fault)
    return (
        Fault(name, cause, None, partial(write_faulty, modules={module: fault}), frozenset(needs)),
        Fault(
            f"{name}, layer {layer}",
            cause,
            frozenset({layer}),
            partial(write_faulty, modules=alone),
            frozenset(needs),
        ),
    )


def changed_weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ReadWeight], ReadWeight]:
    """A reader that changes one weight, called by its name in the graph."""

    def wrap(read: ReadWeight) -> ReadWeight:
        return lambda asked: change(read(asked).copy()) if asked == name else read(asked)

    return wrap


def exchanged_layers(one: int, other: int) -> Callable[[ReadWeight], ReadWeight]:
    """A reader that mistakes two layers for each other."""
    first, second = f".layers.{one}.", f".layers.{other}."

    def wrap(read: ReadWeight) -> ReadWeight:
        def exchanged(name: str) -> np.ndarray:
            return read(name.replace(first, second) if first in name else name.replace(second, first))

        return exchanged

    return wrap


def give_as(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Outputs under other names: what was given as the key of `names` is given as its value."""
    for name in names:
        rename_output(model, name, f"{name}_inside")
    model.graph.node.extend(helper.make_node("Identity", [f"{name}_inside"], [given]) for name, given in names.items())


def rename_output(model: onnx.ModelProto, name: str, inside: str) -> None:
    """Calls a value of the graph `inside`, which leaves the output `name` for another node to give."""
    for node in model.graph.node:
        for values in (node.input, node.output):
            for place, value in enumerate(values):
                if value == name:
                    values[place] = inside
