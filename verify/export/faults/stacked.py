"""Two mistakes of the catalogue in one export."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from onnx import TensorProto

from verify.export.faults.attention import (
    by_place_in_group,
    heads_in_order,
    mask_not_causal,
    padding_attended,
    scaled_attention,
    softcapped,
    tiled_heads,
    windowed,
)
from verify.export.faults.cache import swap_keys_and_values_given
from verify.export.faults.changes import with_theta, zeroed
from verify.export.faults.editing import (
    GraphEdit,
    changed,
    exchanged,
    norms_with_eps,
    on_scores,
    unrotated,
    with_attribute,
    with_frequencies,
)
from verify.export.faults.frozen import ATTENTION, both, edited, soft_cap, tables_of
from verify.export.faults.norm_mlp import gate_up_swapped, gated_by, gelu, norm_of_one_plus_weight, norm_with_eps
from verify.export.faults.rope import interleaved_rotation, no_rotation, other_rope, rounded_table
from verify.export.faults.writing import Fault, Module, Need, only_in, write_faulty


def _own(
    cause: str,
    beside: str,
    modules: Mapping[str, Module],
    layers: Collection[int] | None = None,
    *,
    needs: Collection[Need] = (),
    **more: Any,
) -> Fault:
    """Two mistakes in this project's own export; `layers` have them, but for those that are in all."""
    name = f"{cause} and {beside}" + ("" if layers is None else f", layers {', '.join(map(str, layers))}")
    where = None if layers is None else frozenset(layers)
    return Fault(name, cause, where, partial(write_faulty, modules=modules, **more), frozenset(needs), beside)


FAULTS: Sequence[Fault] = (
    _own("norm-eps", "rope-theta", {"rms_norm": norm_with_eps(1e-6), "rope_table": other_rope(rope_theta=1e5)}),
    _own(
        *("kv-heads-tiled", "mlp-gate-up-swapped"),
        {**only_in([2], "repeat_kv", tiled_heads), **only_in([4], "silu_gate", gate_up_swapped)},
        [2, 4],
    ),
    _own("rope-interleaved", "norm-eps", {"rotate": interleaved_rotation, "rms_norm": norm_with_eps(1e-3)}),
    _own("attention-scale", "activation", {"attend": scaled_attention(0.9), "silu_gate": gated_by(gelu)}),
    _own("sliding-window", "norm-eps", {"attention_mask": windowed(7), "rms_norm": norm_with_eps(1e-4)}),
    _own(
        *("rope-missing", "attention-scale"),
        {**only_in([1], "rotate", no_rotation), **only_in([4], "attend", scaled_attention(2.0))},
        [1, 4],
    ),
    _own(
        *("attention-softcap", "cache-key-value-swapped"),
        {"attend": softcapped(5.0)},
        needs=["cache"],
        edit=swap_keys_and_values_given(),
    ),
    _own(
        *("rope-scaling", "padding-unmasked"),
        {"rope_table": other_rope(rope_type="linear", factor=3.0), "attention_mask": padding_attended},
        needs=["padding"],
    ),
    _own(
        *("activation", "norm-eps"),
        {**only_in([3], "silu_gate", gated_by(gelu)), **only_in([3], "rms_norm", norm_with_eps(1e-3))},
        [3],
    ),
    _own(
        *("head-order", "mlp-gate-up-swapped"),
        {**only_in([1], "attend", heads_in_order(by_place_in_group)), "silu_gate": gate_up_swapped},
    ),
    _own("norm-weight-offset", "rope-missing", {"rms_norm": norm_of_one_plus_weight, "rotate": no_rotation}),
    _own(
        *("mask-not-causal", "rope-table-precision"),
        {"attention_mask": mask_not_causal, "rope_table": rounded_table(TensorProto.BFLOAT16)},
    ),
)


def frozen_pairs(exports: Path) -> Sequence[Fault]:
    """Two mistakes in the exports of other exporters, of those that are there."""
    pairs: Mapping[str, Sequence[tuple[str, str, frozenset[int] | None, GraphEdit, GraphEdit]]] = {
        "optimum": (
            ("norm-eps", "rope-theta", None, norms_with_eps(1e-6), with_frequencies(with_theta(5e5))),
            ("rope-missing", "weights-changed", frozenset({1, 4}), unrotated([1]), changed("v_proj", zeroed, [4])),
        ),
        "dynamo": (
            (
                *("attention-softcap", "mlp-gate-up-swapped", frozenset({2, 3})),
                *(on_scores(soft_cap(2.0), [2]), exchanged("gate_proj", "up_proj", [3])),
            ),
        ),
        "genai": (
            (
                *("rope-interleaved", "norm-eps", None),
                *(with_attribute(ATTENTION, "rotary_interleaved", 1), norms_with_eps(1e-4)),
            ),
            ("rope-theta", "attention-scale", None, tables_of(1e5), with_attribute(ATTENTION, "scale", 0.2)),
        ),
    }
    return [
        Fault(
            f"{exporter}: {cause} and {beside}",
            cause,
            layers,
            partial(edited, exports / exporter / "model.onnx", both(one, other)),
            beside=beside,
            source=exports / exporter / "model.onnx",
        )
        for exporter, rows in pairs.items()
        if (exports / exporter / "model.onnx").is_file()
        for cause, beside, layers, one, other in rows
    ]
