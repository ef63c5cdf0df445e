"""Faults of the rotary embedding and of positions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto

from refengine.config import Config
from verify.export.faults.writing import Fault, Module, everywhere_and_in_one, write_faulty
from verify.export.graph import Scope, Value
from verify.export.modules import MODULES, RopeTable

MIDDLE = 5


def interleaved_rotation(at: Scope, x_BMTH: Value, table: RopeTable, head_dim: int) -> Value:
    """Rotary embedding in the paper's pairing: dimension 2p turns with 2p + 1."""
    halves = np.arange(head_dim).reshape(-1, 2).T.ravel()
    x_BMTH = at("Gather", x_BMTH, at.constant("halves", halves), axis=3)
    turned_BMTH = MODULES.rotate(at, x_BMTH, table, head_dim)
    return at("Gather", turned_BMTH, at.constant("pairs", np.argsort(halves)), axis=3)


def no_rotation(at: Scope, x_BMTH: Value, table: RopeTable, head_dim: int) -> Value:
    """Heads as they are projected."""
    return at("Identity", x_BMTH)


def other_rope(**settings: Any) -> Module:
    """A table made with other rotary settings than the configuration's."""

    def table(at: Scope, config: Config, position_ids_BT: Value) -> RopeTable:
        other = replace(config, rope_parameters=replace(config.rope_parameters, **settings))
        return MODULES.rope_table(at, other, position_ids_BT)

    return table


def rounded_table(dtype: int) -> Module:
    """A table kept in 16 bits, of that ONNX element type."""

    def table(at: Scope, config: Config, position_ids_BT: Value) -> RopeTable:
        cos, sin = (at("Cast", each, to=dtype) for each in MODULES.rope_table(at, config, position_ids_BT))
        return at("Cast", cos, to=TensorProto.FLOAT), at("Cast", sin, to=TensorProto.FLOAT)

    return table


def _of_positions(change: Callable[[Scope, Value], Value]) -> Module:
    """A table of other positions than those that are fed."""

    def table(at: Scope, config: Config, position_ids_BT: Value) -> RopeTable:
        return MODULES.rope_table(at, config, change(at, position_ids_BT))

    return table


def short_table(length: int) -> Module:
    """A table that ends after so many positions, of which the last stands for all later ones."""
    return _of_positions(lambda at, ids_BT: at("Min", ids_BT, at.constant("last", length - 1)))


def wrapped_table(length: int) -> Module:
    """A table that begins anew after so many positions."""
    return _of_positions(lambda at, ids_BT: at("Mod", ids_BT, at.constant("length", length)))


def later_positions(change: Callable[[Scope, Value], Value]) -> Module:
    """A table in which the tokens that come one at a time have other positions."""

    def changed(at: Scope, ids_BT: Value) -> Value:
        new = at("Gather", at("Shape", ids_BT), at.constant("axis", 1))
        return at("Where", at("Equal", new, at.constant("alone", 1)), change(at, ids_BT), ids_BT)

    return _of_positions(changed)


def offset_later(offset: int) -> Module:
    """New tokens stand so many positions further on."""
    return later_positions(lambda at, ids_BT: at("Add", ids_BT, at.constant("offset", offset)))


def restarted_later() -> Module:
    """Each new token stands at position 0."""
    return later_positions(lambda at, ids_BT: at("Sub", ids_BT, ids_BT))


def positions_by_slot_then_by_count(at: Scope, config: Config, position_ids_BT: Value) -> RopeTable:
    """A prompt's positions are its columns, padding or not; those of later tokens count what is no padding."""
    one, first = at.constant("one", 1), at.constant("zero", 0)
    new = at("Gather", at("Shape", position_ids_BT), one)
    columns_1T = at("Unsqueeze", at("Range", first, new, one), at.constant("axes", [0]))
    counts_B1 = at("ReduceSum", "attention_mask", at.constant("axes", [1]), keepdims=1)
    positions_BT = at("Where", at("Equal", new, one), at("Sub", counts_B1, one), columns_1T)
    return MODULES.rope_table(at, config, positions_BT)


def positions_by_count_then_by_slot(at: Scope, config: Config, position_ids_BT: Value) -> RopeTable:
    """A prompt's positions are right; those of later tokens are the length of the past, padding or not."""
    slots = at("Gather", at("Shape", "attention_mask"), at.constant("axis", 1))
    last_BT = at("Add", at("Sub", position_ids_BT, position_ids_BT), at("Sub", slots, at.constant("one", 1)))
    return later_positions(lambda *_: last_BT)(at, config, position_ids_BT)


def positions_of_row_0(at: Scope, config: Config, position_ids_BT: Value) -> RopeTable:
    """Every row turns by the positions of row 0."""
    return MODULES.rope_table(at, config, at("Gather", position_ids_BT, at.constant("row_0", [0]), axis=0))


def in_a_layer(table: Module) -> Module:
    """Attention with a rotary table of its own."""

    def attention(at: Scope, x_BTD: Value, config: Config, _: RopeTable, *others: Any) -> Value:
        return MODULES.attention(at, x_BTD, config, table(at / "rotary_emb", config, "position_ids"), *others)

    return attention


def _faults(name: str, cause: str, table: Module, **needs: Any) -> tuple[Fault, Fault]:
    """A fault of the table of all layers, and of one layer's own."""
    everywhere, _ = everywhere_and_in_one(name, cause, "rope_table", table, **needs)
    _, alone = everywhere_and_in_one(name, cause, "attention", in_a_layer(table), layer=MIDDLE, **needs)
    return everywhere, alone


def _everywhere(name: str, cause: str, table: Module, *needs: Any) -> Fault:
    return Fault(name, cause, None, partial(write_faulty, modules={"rope_table": table}), frozenset(needs))


FAULTS: Sequence[Fault] = (
    *everywhere_and_in_one("rope interleaved", "rope-interleaved", "rotate", interleaved_rotation, layer=MIDDLE),
    *everywhere_and_in_one("no rope", "rope-missing", "rotate", no_rotation, layer=MIDDLE),
    *_faults("rope theta 100000", "rope-theta", other_rope(rope_theta=1e5)),
    *_faults("rope theta 12345.6", "rope-theta", other_rope(rope_theta=12345.6)),
    *_faults("rope scaled linearly by 3", "rope-scaling", other_rope(rope_type="linear", factor=3.0)),
    _everywhere(
        "rope scaled as llama3 by 8",
        "rope-scaling",
        other_rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    *_faults("rope table in float16", "rope-table-precision", rounded_table(TensorProto.FLOAT16)),
    *_faults("rope table in bfloat16", "rope-table-precision", rounded_table(TensorProto.BFLOAT16)),
    *_faults("rope table of 16 positions", "rope-table-short", short_table(16)),
    _everywhere("rope table of 16 positions, over and over", "rope-table-short", wrapped_table(16)),
    *_faults("new tokens one position late", "position-offset", offset_later(1), needs=("cache",)),
    _everywhere("new tokens at position 0", "position-offset", restarted_later(), "cache"),
    *_faults(
        *("positions of prompts by column", "positions-ignore-padding", positions_by_slot_then_by_count),
        needs=("cache", "padding"),
    ),
    *_faults(
        *("positions of new tokens by slot", "positions-ignore-padding", positions_by_count_then_by_slot),
        needs=("cache", "padding"),
    ),
)
