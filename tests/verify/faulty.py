"""Exports with one mistake in them, for tests of the verdict: seeded faults, and edits of finished graphs."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from verify.export.faults.attention import mask_not_causal, mask_of_row_0, scaled_attention, tiled_heads, windowed
from verify.export.faults.rope import interleaved_rotation, positions_by_slot_then_by_count, positions_of_row_0
from verify.export.faults.writing import (
    Edit,
    changed_weight,
    exchanged_layers,
    give_as,
    only_in,
    rename_output,
    write_faulty,
)

__all__ = [
    "changed_weight",
    "choose_at_position",
    "exchanged_layers",
    "give_a_short_present",
    "give_layers_in_order_of_text",
    "interleaved_rotation",
    "keep_last_logits",
    "mask_not_causal",
    "mask_of_row_0",
    "only_in",
    "positions_by_slot_then_by_count",
    "positions_of_row_0",
    "scaled_attention",
    "swap_keys_and_values_given",
    "take_two_rows",
    "tiled_heads",
    "windowed",
    "write_faulty",
]


def swap_keys_and_values_given(model: onnx.ModelProto) -> None:
    """Gives out keys as values and values as keys, having used them rightly."""
    layers = sum(output.name.endswith(".key") for output in model.graph.output)
    for layer in range(layers):
        give_as(
            model, {f"present.{layer}.key": f"present.{layer}.value", f"present.{layer}.value": f"present.{layer}.key"}
        )


def give_layers_in_order_of_text(model: onnx.ModelProto) -> None:
    """Gives out the cache of layer 2 under the name of layer 10, as a list of names sorted as text would."""
    layers = sum(output.name.endswith(".key") for output in model.graph.output)
    names = dict(enumerate(sorted(range(layers), key=str)))
    give_as(
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
        rename_output(model, "logits", "honest_logits")
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
    rename_output(model, "logits", "all_logits")
    ends = {"minus_one": -1, "far": 2**31, "tokens": 1}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([end]), name) for name, end in ends.items())
    model.graph.node.append(helper.make_node("Slice", ["all_logits", "minus_one", "far", "tokens"], ["logits"]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "last"


def take_two_rows(model: onnx.ModelProto) -> None:
    """Declares that a batch has two rows."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def give_a_short_present(model: onnx.ModelProto) -> None:
    """Gives the keys of the first layer without their oldest token, having used all of them."""
    rename_output(model, "present.0.key", "all_keys")
    ends = {"second": 1, "beyond": 2**31, "slots": 2}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([end]), name) for name, end in ends.items())
    model.graph.node.append(helper.make_node("Slice", ["all_keys", "second", "beyond", "slots"], ["present.0.key"]))
