"""The rotary embedding with one thing other than it should be: what the causes of that family are put together from."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from refengine.config import Config, RopeParameters
from refengine.ops import Ops
from refengine.rope import rope_inverse_frequencies
from verify.naming.counterfactual import Counterfactual, Fed, Layers
from verify.truth.noise import rope_table_in_its_dtype

Rotate = Callable[..., np.ndarray]
Positions = Callable[[np.ndarray], np.ndarray]
Table = tuple[np.ndarray, np.ndarray]

HEADS = (None, "queries", "keys")
SHORT_DTYPES: Mapping[str, type] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def with_rope(
    cause: str, parameters: Mapping[str, Any], layers: Layers, change: Callable[[RopeParameters], RopeParameters]
) -> Counterfactual:
    """Tables made with other settings."""

    def ops(right: Ops) -> Ops:
        return replace(right, rope_table=lambda rope, *where: right.rope_table(change(rope), *where))

    return Counterfactual(cause, parameters, layers, ops=ops)


def multiplied_tables(parameters: Mapping[str, Any], layers: Layers, factor: float) -> Counterfactual:
    """cos and sin times a factor, so that scores are multiplied by its square."""

    def ops(right: Ops) -> Ops:
        def rope_table(*where: Any) -> Table:
            cos_BTP, sin_BTP = right.rope_table(*where)
            by = cos_BTP.dtype.type(factor)
            return cos_BTP * by, sin_BTP * by

        return replace(right, rope_table=rope_table)

    return Counterfactual("rope-scaling", parameters, layers, ops=ops)


def at_positions(
    cause: str,
    parameters: Mapping[str, Any],
    layers: Layers,
    change: Positions,
    *,
    is_causal: bool = True,
    is_of_batches: bool = False,
) -> Counterfactual:
    """Tables made of other positions than those of the mask."""

    def ops(right: Ops) -> Ops:
        def rope_table(
            rope: RopeParameters, head_dim: int, longest: int, positions_BT: np.ndarray, dtype: np.dtype
        ) -> Table:
            return right.rope_table(rope, head_dim, longest, change(positions_BT), dtype)

        return replace(right, rope_table=rope_table)

    return Counterfactual(cause, parameters, layers, ops=ops, is_causal=is_causal, is_of_batches=is_of_batches)


def rounded_tables(parameters: Mapping[str, str], layers: Layers) -> Counterfactual:
    """Tables of which one thing is kept in 16 bits."""
    table = partial(_rounded_table, parameters["what"], SHORT_DTYPES[parameters["dtype"]])
    return Counterfactual(
        "rope-table-precision", parameters, layers, ops=lambda right: replace(right, rope_table=table)
    )


def _rounded_table(
    what: str,
    short: type,
    rope: RopeParameters,
    head_dim: int,
    longest: int,
    positions_BT: np.ndarray,
    dtype: np.dtype,
) -> Table:
    """cos and sin of angles in float32, as exporters compute them: which rounding takes depends on the last bit."""
    if what == "table":
        cos_BTP, sin_BTP = rope_table_in_its_dtype(rope, head_dim, longest, positions_BT, np.dtype(np.float32))
        return cos_BTP.astype(short).astype(dtype), sin_BTP.astype(short).astype(dtype)
    inv_freq_P, factor = rope_inverse_frequencies(rope, head_dim, longest, int(positions_BT.max()) + 1)
    if what == "inv_freq":
        angles_BTP = positions_BT[..., None].astype(np.float32) * inv_freq_P.astype(short).astype(np.float32)
    else:
        angles_BTP = (positions_BT[..., None].astype(short) * inv_freq_P.astype(short)).astype(np.float32)
    return (np.cos(angles_BTP) * factor).astype(dtype), (np.sin(angles_BTP) * factor).astype(dtype)


def turned(cause: str, config: Config, layers: Layers, turn: Callable[[Rotate], Rotate]) -> Iterator[Counterfactual]:
    """Heads rotated in another way: all of them, then queries or keys alone."""
    for heads in HEADS:

        def ops(right: Ops, heads: str | None = heads) -> Ops:
            return replace(right, rotate=_of_heads(config, heads, turn(right.rotate), right.rotate))

        yield Counterfactual(cause, {"of": heads} if heads else {}, layers, ops=ops)


def heads_shifted(cause: str, config: Config, layers: Layers, offset: int, heads: str) -> Counterfactual:
    """Queries or keys alone rotated for a position that is `offset` further on."""

    def ops(right: Ops) -> Ops:
        inv_freq_P, _ = rope_inverse_frequencies(
            config.rope_parameters, config.head_dim, config.max_position_embeddings, config.max_position_embeddings
        )
        cos_P, sin_P = np.cos(offset * inv_freq_P), np.sin(offset * inv_freq_P)

        def rotate(x_BTMH: np.ndarray, cos_BTP: np.ndarray, sin_BTP: np.ndarray) -> np.ndarray:
            # Computed in float64: two roundings more would be twice the noise.
            further_BTP = cos_BTP * cos_P - sin_BTP * sin_P, sin_BTP * cos_P + cos_BTP * sin_P
            return right.rotate(x_BTMH, *(table_BTP.astype(x_BTMH.dtype) for table_BTP in further_BTP))

        return replace(right, rotate=_of_heads(config, heads, rotate, right.rotate))

    return Counterfactual(cause, {"offset": offset, "of": heads}, layers, ops=ops)


def _of_heads(config: Config, heads: str | None, turn: Rotate, right: Rotate) -> Rotate:
    """The first of these rotations for some of the heads, the second for the others; keys come after queries."""
    if heads is None:
        return turn
    first, second = (turn, right) if heads == "queries" else (right, turn)

    def rotate(x_BTMH: np.ndarray, *table: np.ndarray) -> np.ndarray:
        queries_BTNH, keys_BTKH = np.split(x_BTMH, [config.num_attention_heads], axis=2)
        return np.concatenate([first(queries_BTNH, *table), second(keys_BTKH, *table)], axis=2)

    return rotate


def is_step(positions_BT: np.ndarray) -> bool:
    """Whether a pass has one new token after a past; a prompt of one token stands at position 0."""
    return positions_BT.shape[1] == 1 and int(positions_BT.max()) > 0


def later(change: Positions) -> Positions:
    """Other positions for the tokens that come one at a time."""
    return lambda positions_BT: change(positions_BT) if is_step(positions_BT) else positions_BT


def held_at_first(fed: Fed) -> Fed:
    """Every new token at the position of the first one."""
    return replace(fed, rope_positions_BT=fed.rope_positions_BT - max(0, fed.step - 1))


def as_row_0(positions_BT: np.ndarray) -> np.ndarray:
    """The positions of row 0 in every row; its padding is fed position 0."""
    return np.broadcast_to(np.maximum(positions_BT[:1], 0), positions_BT.shape)


def by_column(positions_BT: np.ndarray) -> np.ndarray:
    """Those of a prompt counted with its padding."""
    columns_BT = np.broadcast_to(np.arange(positions_BT.shape[1]), positions_BT.shape)
    return positions_BT if is_step(positions_BT) else columns_BT


def by_slot(positions_BT: np.ndarray) -> np.ndarray:
    """Those of a batch's longest row, which has no padding."""
    return np.full_like(positions_BT, positions_BT.max())


def said(rope: RopeParameters) -> dict[str, Any]:
    """Settings as a report prints them: those that are given, but for the base."""
    return {name: value for name, value in asdict(rope).items() if value is not None and name != "rope_theta"}
