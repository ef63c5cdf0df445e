"""The unit of comparison: how far honest float32 arithmetic strays from float64, and how far a candidate may stray.

    noise_ratio = rms(candidate - reference64) / rms(reference32 - reference64)

A ratio near 1 is what any float32 implementation has. One float32 run is one draw of that noise, so `reference32`
stands for several: the reference in *equivalent orders*, the same mathematics rounded elsewhere, pooled. How far an
honest implementation may lie from the pool is not chosen but measured, on the same tokens: each order in turn is held
against the pool of the others, as a candidate is; and so, on a few of them, is the plainest sum of all, one product
after the other, as some kernels have it. The bound is the largest of those ratios, times two: a candidate may be less
accurate than the least accurate honest order by one bit, and no more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from refengine.config import RopeParameters
from refengine.ops import OPS, Ops, attention_mask
from refengine.rope import rope_inverse_frequencies
from refengine.weights import Linear

ONE_BIT = 2.0
ENOUGH_DRAWS = 64  # from 16 positions on, the four orders alone
SMALLEST = 1e-150  # keeps ratios of exact zeros finite, and its square is not zero yet
HALF_ULP = 2.0**-25  # a float32 result cannot be nearer than its own rounding: about this much of its size


@dataclass(frozen=True)
class Plain:
    """The error of the plainest sums at some positions, as `rms(..., axis=-1)` gives it."""

    error_P: np.ndarray
    at: slice | np.ndarray


@dataclass(frozen=True)
class Noise:
    """The float32 noise of one tensor, position by position, and how far a candidate's may go.

    Attributes:
        rms_P: the pooled root mean square of the orders' errors at each position.
        overall_bound: the largest honest noise ratio over all positions together.
        position_bound: the largest honest noise ratio at any one position.
    """

    rms_P: np.ndarray
    overall_bound: float
    position_bound: float

    @property
    def honest_P(self) -> np.ndarray:
        """The largest error at each position that is still honest."""
        return self.position_bound * self.rms_P

    @classmethod
    def of(
        cls,
        errors: Sequence[np.ndarray],
        reference64_PX: np.ndarray,
        units: Sequence[np.ndarray] | None = None,
        plain: "Plain | None" = None,
    ) -> "Noise":
        """From each equivalent order's error at each position, as `rms(..., axis=-1)` gives it.

        Args:
            errors: of what is held against the noise.
            reference64_PX: the truth; its size says what rounding alone is worth.
            units: errors of what the noise is measured on, where that is more than what is held against it.
            plain: the errors of the plainest sums at some of the positions; no part of the unit.
        """
        units = units or errors
        rounding_P = HALF_ULP * rms(reference64_PX, axis=-1) + SMALLEST

        def pooled(some: Sequence[np.ndarray]) -> np.ndarray:
            return np.maximum(rms(np.stack(some), axis=0), rounding_P)

        # Where every order is exact, one rounding more is still honest: a ratio of 1 is never too much.
        overall, position = [1.0], [1.0]
        for place, error_P in enumerate(errors):
            rms_P = pooled([*units[:place], *units[place + 1 :]])
            overall.append(float(rms(error_P) / rms(rms_P)))
            position.append(float((error_P / rms_P).max()))
        if plain is not None:
            rms_P = pooled(units)[plain.at]
            overall.append(float(rms(plain.error_P) / rms(rms_P)))
            position.append(float((plain.error_P / rms_P).max()))
        return cls(pooled(units), ONE_BIT * max(overall), ONE_BIT * max(position))


class Errors:
    """The errors of several orders at some trace points, added one order after the other.

    Args:
        right: trace point -> what is right at each position (the first axis).

    Attributes:
        largest: trace point -> the largest error of any one number at each position.
    """

    def __init__(self, right: Mapping[str, np.ndarray]):
        self._right = {name: value.reshape(len(value), -1) for name, value in right.items()}
        self._errors: dict[str, list[np.ndarray]] = {name: [] for name in right}
        self.largest = {name: np.zeros(len(value)) for name, value in right.items()}

    def add(self, found: Mapping[str, np.ndarray]) -> None:
        """What an order gives at these points."""
        for name, value in found.items():
            difference_PX = value.reshape(len(value), -1) - self._right[name]
            self._errors[name].append(rms(difference_PX, axis=-1))
            np.maximum(self.largest[name], np.abs(difference_PX).max(axis=-1), out=self.largest[name])

    def noise(self, plain: Mapping[str, Plain]) -> dict[str, Noise]:
        """The noise at each point, with the errors of the plainest sums where there are any."""
        return {name: Noise.of(self._errors[name], value, plain=plain.get(name)) for name, value in self._right.items()}


def rms(x: np.ndarray, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Root of the mean square over `axis` (everything by default), in float64."""
    return np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=axis))


def linear_in_two_halves(x_BTI: np.ndarray, proj: Linear) -> np.ndarray:
    """`x @ weight.T + bias`, the sum over the inputs taken in two parts, as a runtime with two threads may."""
    half = x_BTI.shape[-1] // 2
    y_BTO = x_BTI[..., :half] @ proj.weight_OI[:, :half].T
    y_BTO += x_BTI[..., half:] @ proj.weight_OI[:, half:].T
    return y_BTO if proj.bias_O is None else y_BTO + proj.bias_O


def linear_in_blocks(x_BTI: np.ndarray, proj: Linear) -> np.ndarray:
    """`x @ weight.T + bias`, summed one cache-sized block of inputs after the other, the last block first."""
    y_BTO = np.zeros((*x_BTI.shape[:-1], len(proj.weight_OI)), x_BTI.dtype)
    for start in reversed(range(0, x_BTI.shape[-1], 256)):
        y_BTO += x_BTI[..., start : start + 256] @ proj.weight_OI[:, start : start + 256].T
    return y_BTO if proj.bias_O is None else y_BTO + proj.bias_O


def linear_shuffled(seed: int, x_BTI: np.ndarray, proj: Linear) -> np.ndarray:
    """`x @ weight.T + bias`, the inputs summed in an order drawn from `seed`."""
    order_I = np.random.default_rng(seed).permutation(x_BTI.shape[-1])
    y_BTO = x_BTI[..., order_I] @ proj.weight_OI[:, order_I].T
    return y_BTO if proj.bias_O is None else y_BTO + proj.bias_O


def as_it_is(x: np.ndarray) -> np.ndarray:
    """No rounding of what an operator has on its way, but that of its dtype."""
    return x


def linear_one_by_one(x_BTI: np.ndarray, proj: Linear) -> np.ndarray:
    """`x @ weight.T + bias`, one product added after the other: nothing honest sums less exactly, or is slower here."""
    x_IR = np.ascontiguousarray(x_BTI.reshape(-1, x_BTI.shape[-1]).T)
    weight_IO = np.ascontiguousarray(proj.weight_OI.T)
    y_RO = np.zeros((x_IR.shape[1], weight_IO.shape[1]), x_BTI.dtype)
    for x_R, weight_O in zip(x_IR, weight_IO, strict=True):
        y_RO += x_R[:, None] * weight_O
    y_BTO = y_RO.reshape(*x_BTI.shape[:-1], -1)
    return y_BTO if proj.bias_O is None else y_BTO + proj.bias_O


def rms_norm_scaled_first(
    x_BTD: np.ndarray, weight_D: np.ndarray, eps: float, rounded: Callable[[np.ndarray], np.ndarray] = as_it_is
) -> np.ndarray:
    """RMSNorm as exporters write it: a plain sum of squares, a reciprocal, and the weight as the left factor."""
    mean_square_BT1 = np.mean(np.square(x_BTD), axis=-1, keepdims=True)
    return weight_D * rounded(x_BTD * (1 / np.sqrt(mean_square_BT1 + x_BTD.dtype.type(eps))))


def rope_table_in_its_dtype(
    rope: RopeParameters,
    head_dim: int,
    max_position_embeddings: int,
    positions_BT: np.ndarray,
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin with the angles rounded to `dtype`, as every exporter computes them; matters at long positions."""
    rows = [_angles(rope, head_dim, max_position_embeddings, positions_T, dtype) for positions_T in positions_BT]
    angles_BTP = np.stack([angles_TP for angles_TP, _ in rows])
    factor = dtype.type(rows[0][1])
    return np.cos(angles_BTP) * factor, np.sin(angles_BTP) * factor


def _angles(
    rope: RopeParameters, head_dim: int, max_position_embeddings: int, positions_T: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, float]:
    length = int(positions_T.max()) + 1
    inv_freq_P, factor = rope_inverse_frequencies(rope, head_dim, max_position_embeddings, length)
    return positions_T[:, None].astype(dtype) * inv_freq_P.astype(dtype), factor


def rotate_by_products(
    x_BTMH: np.ndarray,
    cos_BTP: np.ndarray,
    sin_BTP: np.ndarray,
    rounded: Callable[[np.ndarray], np.ndarray] = as_it_is,
) -> np.ndarray:
    """Rotary embedding as exporters write it: all of x times cos, and x with its halves exchanged times sin."""
    cos_BT1H, sin_BT1H = (np.concatenate([each, each], axis=-1)[:, :, None] for each in (cos_BTP, sin_BTP))
    first_BTMP, second_BTMP = np.split(x_BTMH, 2, axis=-1)
    exchanged_BTMH = np.concatenate([-second_BTMP, first_BTMP], axis=-1)
    return rounded(x_BTMH * cos_BT1H) + rounded(exchanged_BTMH * sin_BT1H)


def attend_with_probabilities(
    q_BTNH: np.ndarray,
    k_BKSH: np.ndarray,
    v_BKSH: np.ndarray,
    positions_BT: np.ndarray,
    positions_BS: np.ndarray,
    window: int | None,
    rounded: Callable[[np.ndarray], np.ndarray] = as_it_is,
) -> np.ndarray:
    """Attention as it is written down: scores scaled after the product, probabilities normalised before the values."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores_BKGTS = (q_BKGTH @ k_BKSH[:, :, None].swapaxes(-1, -2)) / np.sqrt(q_BTNH.dtype.type(H))
    allowed_B11TS = attention_mask(positions_BT, positions_BS, window)[:, None, None]
    lowest = np.finfo(scores_BKGTS.dtype).min
    scores_BKGTS = np.where(allowed_B11TS, scores_BKGTS, lowest)
    weights_BKGTS = np.exp(scores_BKGTS - scores_BKGTS.max(axis=-1, keepdims=True)) * allowed_B11TS
    weights_BKGTS /= np.maximum(weights_BKGTS.sum(axis=-1, keepdims=True), np.finfo(scores_BKGTS.dtype).tiny)
    return (rounded(weights_BKGTS) @ v_BKSH[:, :, None]).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def silu_gate_by_sigmoid(
    gate_BTF: np.ndarray, up_BTF: np.ndarray, rounded: Callable[[np.ndarray], np.ndarray] = as_it_is
) -> np.ndarray:
    """SwiGLU's gate with the sigmoid rounded first."""
    with np.errstate(over="ignore"):
        return rounded(gate_BTF * (1 / (1 + np.exp(-gate_BTF)))) * up_BTF


EQUIVALENT_ORDERS: Mapping[str, Ops] = {
    "the reference's own": OPS,
    "as exporters write it": replace(
        OPS,
        rms_norm=rms_norm_scaled_first,
        rope_table=rope_table_in_its_dtype,
        attend=attend_with_probabilities,
        silu_gate=silu_gate_by_sigmoid,
    ),
    "sums in two halves": replace(OPS, linear=linear_in_two_halves, rope_table=rope_table_in_its_dtype),
    "sums in blocks": replace(
        OPS,
        linear=linear_in_blocks,
        rope_table=rope_table_in_its_dtype,
        attend=attend_with_probabilities,
    ),
}


PLAINEST = replace(EQUIVALENT_ORDERS["as exporters write it"], linear=linear_one_by_one)
PLAIN_POSITIONS = 16  # on which it is tried: it takes as long as hundreds of them in any other order


def orders_for(positions: int) -> dict[str, Ops]:
    """The equivalent orders for so many positions: at least four, and more where there are few positions.

    The errors of one position's logits move together, so a position in one order is one draw of the noise, and the
    spread of a handful of draws says little. Sums in shuffled orders make up for it.
    """
    orders = dict(EQUIVALENT_ORDERS)
    written = EQUIVALENT_ORDERS["as exporters write it"]
    for seed in range(len(orders), -(-ENOUGH_DRAWS // positions)):
        orders[f"sums shuffled, seed {seed}"] = replace(written, linear=partial(linear_shuffled, seed))
    return orders
