"""Exports with one mistake in them: this project's own, with a module, a weight or a name changed."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from refengine.checkpoint import Checkpoint
from refengine.config import Config
from verify.export.decoder import decoder_graph
from verify.export.files import ReadWeight, weight_reader, write_model
from verify.export.graph import Scope
from verify.export.modules import MODULES, RopeTable

Edit = Callable[[onnx.ModelProto], None]


def write_faulty(
    checkpoint: Checkpoint,
    out: Path,
    *,
    cache: bool = True,
    config: Mapping[str, Any] | None = None,
    modules: Mapping[str, Callable[..., Any]] | None = None,
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


def only_in(layers: Collection[int], name: str, fault: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The module `name` of `MODULES`, but `fault` in these layers."""
    paths, clean = {f"layers.{layer}" for layer in layers}, getattr(MODULES, name)

    def module(at: Scope, *arguments: Any) -> Any:
        return (fault if paths & set(at.path.split("/")) else clean)(at, *arguments)

    return {name: module}


def scaled_attention(factor: float) -> Callable[..., str]:
    """Attention with scores of another scale."""

    def attend(at: Scope, q_BNTH: str, *others: Any) -> str:
        return MODULES.attend(at, at("Mul", q_BNTH, at.constant("factor", factor)), *others)

    return attend


def interleaved_rotation(at: Scope, x_BMTH: str, table: RopeTable, head_dim: int) -> str:
    """Rotary embedding in the paper's pairing: dimension 2p turns with 2p + 1."""
    halves = np.arange(head_dim).reshape(-1, 2).T.ravel()
    x_BMTH = at("Gather", x_BMTH, at.constant("halves", halves), axis=3)
    turned_BMTH = MODULES.rotate(at, x_BMTH, table, head_dim)
    return at("Gather", turned_BMTH, at.constant("pairs", np.argsort(halves)), axis=3)


def windowed(window: int) -> Callable[..., str]:
    """A mask with a sliding window, whatever the configuration says."""
    return lambda at, ids, mask, _: MODULES.attention_mask(at, ids, mask, window)


def mask_not_causal(at: Scope, input_ids_BT: str, attention_mask_BS: str, window: int | None) -> str:
    """A mask of the padding alone: tokens see those after them."""
    kept_BS = at("Cast", attention_mask_BS, to=TensorProto.BOOL)
    kept_B11S = at("Unsqueeze", kept_BS, at.constant("axes", [1, 2]))
    return at("Where", kept_B11S, at.constant("allowed", 0.0), at.constant("masked", -1e38))


def tiled_heads(at: Scope, x_BKSH: str, config: Config) -> str:
    """Key-value heads repeated in the wrong order: k0 k1 k0 k1 k0 k1."""
    return at("Concat", *[x_BKSH] * (config.num_attention_heads // config.num_key_value_heads), axis=1)


def positions_by_slot_then_by_count(at: Scope, config: Config, position_ids_BT: str) -> RopeTable:
    """A prompt's positions are its columns, padding or not; those of later tokens count what is no padding."""
    one, first = at.constant("one", 1), at.constant("zero", 0)
    new = at("Gather", at("Shape", position_ids_BT), one)
    columns_1T = at("Unsqueeze", at("Range", first, new, one), at.constant("axes", [0]))
    counts_B1 = at("ReduceSum", "attention_mask", at.constant("axes", [1]), keepdims=1)
    positions_BT = at("Where", at("Equal", new, one), at("Sub", counts_B1, one), columns_1T)
    return MODULES.rope_table(at, config, positions_BT)


def positions_of_row_0(at: Scope, config: Config, position_ids_BT: str) -> RopeTable:
    """Every row turns by the positions of row 0."""
    return MODULES.rope_table(at, config, at("Gather", position_ids_BT, at.constant("row_0", [0]), axis=0))


def mask_of_row_0(at: Scope, input_ids_BT: str, attention_mask_BS: str, window: int | None) -> str:
    """Every row sees the slots that row 0 may see."""
    mask_1S = at("Gather", attention_mask_BS, at.constant("row_0", [0]), axis=0)
    return MODULES.attention_mask(at, input_ids_BT, mask_1S, window)


def swap_keys_and_values_given(model: onnx.ModelProto) -> None:
    """Gives out keys as values and values as keys, having used them rightly."""
    layers = sum(output.name.endswith(".key") for output in model.graph.output)
    for layer in range(layers):
        _give_as(
            model, {f"present.{layer}.key": f"present.{layer}.value", f"present.{layer}.value": f"present.{layer}.key"}
        )


def give_layers_in_order_of_text(model: onnx.ModelProto) -> None:
    """Gives out the cache of layer 2 under the name of layer 10, as a list of names sorted as text would."""
    layers = sum(output.name.endswith(".key") for output in model.graph.output)
    names = dict(enumerate(sorted(range(layers), key=str)))
    _give_as(
        model,
        {
            f"present.{layer}.{kind}": f"present.{name}.{kind}"
            for layer, name in names.items()
            for kind in ("key", "value")
        },
    )


def choose_at_position(position: int, token: int) -> Edit:
    """Adds so much to one token's logit at one position that it is chosen there."""

    def edit(model: onnx.ModelProto) -> None:
        vocab_size = model.graph.output[0].type.tensor_type.shape.dim[2].dim_value
        raised = np.where(np.arange(vocab_size) == token, 1e3, 0).astype(np.float32)
        _rename_output(model, "logits", "honest_logits")
        constants = {"chosen_position": np.array(position), "raised": raised, "last_axis": np.array([-1])}
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
        model.graph.node.extend(
            [
                helper.make_node("Equal", ["position_ids", "chosen_position"], ["is_there"]),
                helper.make_node("Cast", ["is_there"], ["there"], to=TensorProto.FLOAT),
                helper.make_node("Unsqueeze", ["there", "last_axis"], ["there_BT1"]),
                helper.make_node("Mul", ["there_BT1", "raised"], ["more"]),
                helper.make_node("Add", ["honest_logits", "more"], ["logits"]),
            ]
        )

    return edit


def keep_last_logits(model: onnx.ModelProto) -> None:
    """Gives the logits of the last token alone, as exports made for generation do."""
    _rename_output(model, "logits", "all_logits")
    ends = {"minus_one": -1, "far": 2**31, "tokens": 1}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([end]), name) for name, end in ends.items())
    model.graph.node.append(helper.make_node("Slice", ["all_logits", "minus_one", "far", "tokens"], ["logits"]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "last"


def take_two_rows(model: onnx.ModelProto) -> None:
    """Declares that a batch has two rows."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


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


def _give_as(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Outputs under other names: what was given as the key of `names` is given as its value."""
    for name in names:
        _rename_output(model, name, f"{name}_inside")
    model.graph.node.extend(helper.make_node("Identity", [f"{name}_inside"], [given]) for name, given in names.items())


def _rename_output(model: onnx.ModelProto, name: str, inside: str) -> None:
    """Calls a value of the graph `inside`, which leaves the output `name` for another node to give."""
    for node in model.graph.node:
        for values in (node.input, node.output):
            for place, value in enumerate(values):
                if value == name:
                    values[place] = inside
