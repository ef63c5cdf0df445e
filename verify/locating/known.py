"""What a tensor inside a layer may be: the values that a layer comes to on the way, whoever wrote its graph.

Beside the trace points there are the steps between them, in the forms that exporters write them in. Each is known in
float64, and in the float32 of every equivalent order, so that what is measured against it is measured in its own noise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from refengine.config import Config
from refengine.ops import attention_mask
from refengine.rope import rope_inverse_frequencies
from verify.truth.noise import Noise, rms

# In which orders of its axes a value may be; splitting, joining and leaving out axes of one element follow by size.
LAYOUTS: Mapping[int, Sequence[tuple[int, ...]]] = {
    2: [(0, 1), (1, 0)],
    3: [(0, 1, 2), (1, 0, 2), (0, 2, 1)],
    4: [order for order in permutations(range(4)) if order[0] == 0],
}
UNSCALED = "scores before they are scaled"
SIDE_BY_SIDE = "queries, keys and values side by side"
STEP = 2.0**-22  # of a step's size: what some operations in float32 may be off
LOWEST = -1e4  # what is added to a score that is hidden is below, in any dtype


@dataclass(frozen=True)
class Value:
    """A value on the way.

    Attributes:
        point: the trace point that it is, or is a step to.
        is_point: it is the point itself.
        axes: its axes, as in the names of arrays.
        step: a name, where the step matters to somebody.
    """

    point: str
    is_point: bool
    axes: str
    array: np.ndarray
    step: str = ""


@dataclass(frozen=True)
class Known:
    """A value in float64, and how far honest arithmetic strays from it.

    `there` says where it counts, as an array of its shape, and the axis of positions is the one called T, or else S.
    """

    value: Value
    noise: Noise
    there: np.ndarray

    @classmethod
    def of(cls, value: Value, others: Sequence[np.ndarray], there: np.ndarray) -> "Known":
        """From the same value in every order."""
        axis = position_axis(value.axes)
        right = _at_positions(value.array, there, axis)
        errors = [_at_positions(other - value.array, there, axis) for other in others]
        if not value.is_point:
            # The orders take this step in one way, where exporters have several.
            errors = [np.maximum(error, STEP * right) for error in errors]
        return cls(value, Noise.of(errors, right[:, None]), there)

    def ratio(self, array: np.ndarray) -> float:
        """The noise ratio of an array, in the best order of axes, in units of its bound; 1 and below is honest."""
        return min((self._ratio(each) for each in self.layouts(array)), default=np.inf)

    def layouts(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """The array with this value's axes, in every order that it may have had them in."""
        shape = self.value.array.shape
        if array.size * shape[0] == self.value.array.size and shape[0] > 1:
            array = np.broadcast_to(array.reshape(-1), (shape[0], array.size))  # the same for every row
        if array.size != self.value.array.size:
            return
        seen = set()
        for order in LAYOUTS[len(shape)]:
            turned = tuple(shape[axis] for axis in order)
            kind = tuple(axis for axis in order if shape[axis] > 1)
            if kind not in seen:
                seen.add(kind)
                yield array.reshape(turned).transpose(np.argsort(order))

    def first_wrong_head(self, array_BTMH: np.ndarray) -> int | None:
        """Of an array with this value's axes; None where every head is right."""
        error_BTMH = np.where(self.there, array_BTMH - self.value.array, 0)
        count_M = self.there.sum(axis=(0, 1, 3))
        limit = self.noise.overall_bound * rms(self.noise.rms_P) * len(count_M) ** 0.5
        wrong = np.flatnonzero(~(np.sqrt(np.square(error_BTMH).sum(axis=(0, 1, 3)) / count_M) <= limit))
        return int(wrong[0]) if wrong.size else None

    def order_of_heads(self, array_BTNH: np.ndarray) -> tuple[int, ...] | None:
        """For each head of an array, the one of this value that it is; None where one is no head of it."""
        right_BTNH, there_BTN1 = self.value.array, self.there[..., :1]
        limit = self.noise.overall_bound * rms(self.noise.rms_P) * right_BTNH.shape[2] ** 0.5
        order = []
        for head in range(right_BTNH.shape[2]):
            error_BTNH = np.where(there_BTN1, array_BTNH[:, :, head, None] - right_BTNH, 0)
            error_N = np.sqrt(np.square(error_BTNH).sum(axis=(0, 1, 3)) / self.there[:, :, head].sum())
            if not error_N.min() <= limit:
                return None
            order.append(int(error_N.argmin()))
        return tuple(order)

    def _ratio(self, array: np.ndarray) -> float:
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.asarray(array, np.float64) - self.value.array
            error_P = _at_positions(error, self.there, position_axis(self.value.axes))
            ratio_P = error_P / self.noise.rms_P
            overall = rms(error_P) / rms(self.noise.rms_P) / self.noise.overall_bound
        worst = float(max(overall, ratio_P.max() / self.noise.position_bound))
        return np.inf if np.isnan(worst) else worst


def position_axis(axes: str) -> int:
    """The axis of positions."""
    return axes.index("T" if "T" in axes else "S")


def _at_positions(array: np.ndarray, there: np.ndarray, axis: int) -> np.ndarray:
    """Root mean squares at each position of each row that counts."""
    others = tuple(each for each in range(1, array.ndim) if each != axis)
    total_BP = np.square(np.where(there, array, 0)).sum(axis=others)
    count_BP = there.sum(axis=others)
    return np.sqrt(total_BP[count_BP > 0] / count_BP[count_BP > 0])


def where_there(axes: str, shape: tuple[int, ...], positions_BT: np.ndarray, positions_BS: np.ndarray) -> np.ndarray:
    """Where a value with these axes counts: not at padding, and of scores only where they are not hidden."""
    there = np.ones(shape, bool)
    for letter, positions in (("T", positions_BT), ("S", positions_BS)):
        if letter in axes:
            sizes = [1] * len(shape)
            axis = axes.index(letter)
            sizes[0], sizes[axis] = len(positions), shape[axis]  # of the past, the first slots
            there &= (positions[:, : shape[axis]] >= 0).reshape(sizes)
    return there


def values_of_norm(point: str, x_BTD: np.ndarray, weight_D: np.ndarray, eps: float, y_BTD: np.ndarray) -> list[Value]:
    """Of RMSNorm."""
    eps = x_BTD.dtype.type(eps)
    mean_BT1 = np.mean(np.square(x_BTD), axis=-1, keepdims=True)
    root_BT1 = np.sqrt(mean_BT1 + eps)
    steps = {"BTD": [np.square(x_BTD), x_BTD / root_BT1], "BT1": [mean_BT1, mean_BT1 + eps, root_BT1, 1 / root_BT1]}
    return [
        *(Value(point, False, axes, array) for axes, arrays in steps.items() for array in arrays),
        Value(point, True, "BTD", y_BTD),
    ]


def values_of_rotation(
    point: str, x_BTMH: np.ndarray, cos_BTP: np.ndarray, sin_BTP: np.ndarray, y_BTMH: np.ndarray
) -> list[Value]:
    """Of the rotary embedding: by halves, or of all of x and its halves exchanged."""
    cos_BT1P, sin_BT1P = cos_BTP[:, :, None], sin_BTP[:, :, None]
    cos_BT1H, sin_BT1H = (np.concatenate([each, each], axis=-1) for each in (cos_BT1P, sin_BT1P))
    first, second = np.split(x_BTMH, 2, axis=-1)
    turned_BTMH = np.concatenate([-second, first], axis=-1)
    halves = [first, second, -second, *(half * table for half in (first, second) for table in (cos_BT1P, sin_BT1P))]
    steps = [turned_BTMH, x_BTMH * cos_BT1H, turned_BTMH * sin_BT1H]
    return [
        *(Value(point, False, "BTMP", half) for half in halves),
        *(Value(point, False, "BTMH", step) for step in steps),
        Value(point, True, "BTMH", y_BTMH),
    ]


def values_of_table(config: Config, positions_BT: np.ndarray, cos_BTP: np.ndarray, sin_BTP: np.ndarray) -> list[Value]:
    """Of the rotary table: frequencies, angles, and cos and sin, once for each pair of dimensions or twice."""
    longest = config.max_position_embeddings
    inv_freq_P, _ = rope_inverse_frequencies(
        config.rope_parameters, config.head_dim, longest, int(positions_BT.max()) + 1
    )
    angles_BTP = (np.maximum(positions_BT, 0)[:, :, None].astype(cos_BTP.dtype)) * inv_freq_P.astype(cos_BTP.dtype)
    pairs = [angles_BTP, np.cos(angles_BTP), np.sin(angles_BTP), cos_BTP, sin_BTP]
    return [
        Value("rope", False, "BT", positions_BT.astype(cos_BTP.dtype)),
        Value("rope", False, "BTP", np.tile(inv_freq_P.astype(cos_BTP.dtype), (len(positions_BT), 1, 1))),
        *(Value("rope", False, "BTP", array) for array in pairs),
        *(Value("rope", False, "BTH", np.concatenate([array, array], axis=-1)) for array in pairs),
    ]


def values_of_attention(
    q_BTNH: np.ndarray, k_BKSH: np.ndarray, v_BKSH: np.ndarray, y_BTNH: np.ndarray, allowed_BTS: np.ndarray
) -> list[Value]:
    """Of attention: keys and values for each query head, scaled in front or behind, scores, probabilities."""
    H, groups = q_BTNH.shape[-1], q_BTNH.shape[2] // k_BKSH.shape[1]
    scale = q_BTNH.dtype.type(H**-0.5)
    k_BNSH, v_BNSH = (np.repeat(array, groups, axis=1) for array in (k_BKSH, v_BKSH))
    scores_BNTS = np.matmul(q_BTNH.transpose(0, 2, 1, 3), k_BNSH.swapaxes(-1, -2))
    hidden_B1TS = ~allowed_BTS[:, None]
    scaled_BNTS = np.where(hidden_B1TS, 0, scores_BNTS * scale)
    weights_BNTS = np.where(hidden_B1TS, 0, np.exp(scaled_BNTS - scaled_BNTS.max(axis=-1, keepdims=True)))
    weights_BNTS /= np.maximum(weights_BNTS.sum(axis=-1, keepdims=True), np.finfo(scale.dtype).tiny)
    root = np.sqrt(scale)
    return [
        *(Value("self_attn.attend", False, "BTNH", q_BTNH * factor) for factor in (scale, root)),
        *(Value("self_attn.attend", False, "BNSH", array) for array in (k_BNSH, v_BNSH, k_BNSH * root)),
        *(Value("self_attn.attend", False, "BKSH", array) for array in (k_BKSH * root, k_BKSH * scale)),
        Value("self_attn.attend", False, "BNTS?", scores_BNTS, UNSCALED),
        Value("self_attn.attend", False, "BNTS?", scaled_BNTS),
        Value("self_attn.attend", False, "BNTS", weights_BNTS),
        Value("self_attn.attend", True, "BTNH", y_BTNH),
    ]


def values_of_gate(gate_BTF: np.ndarray, up_BTF: np.ndarray, y_BTF: np.ndarray) -> list[Value]:
    """Of SwiGLU's gate."""
    with np.errstate(over="ignore"):
        sigmoid_BTF = 1 / (1 + np.exp(-gate_BTF))
    steps = [sigmoid_BTF, gate_BTF * sigmoid_BTF, sigmoid_BTF * up_BTF, gate_BTF * up_BTF]
    return [
        *(Value("mlp.activation", False, "BTF", step) for step in steps),
        Value("mlp.activation", True, "BTF", y_BTF),
    ]


def is_mask(array: np.ndarray, positions_BT: np.ndarray, positions_BS: np.ndarray, window: int | None) -> bool | None:
    """Whether an array hides what has to be hidden from queries; None where it is no mask of all of it."""
    allowed_BTS = attention_mask(positions_BT, positions_BS, window)
    if array.ndim == 4 and array.shape[1] > 1 and array.shape[2:] == allowed_BTS.shape[1:]:
        of_heads = [is_mask(array[:, head], positions_BT, positions_BS, window) for head in range(array.shape[1])]
        return None if None in of_heads else all(of_heads)
    if array.size * len(allowed_BTS) == allowed_BTS.size:
        array = np.broadcast_to(array.reshape(-1), (len(allowed_BTS), array.size))
    if array.size != allowed_BTS.size or array.dtype.kind not in "bf":
        return None
    shows_BTS = array.reshape(allowed_BTS.shape)
    slots_S = np.arange(positions_BS.shape[1])
    causal_TS = slots_S[-positions_BT.shape[1] :, None] >= slots_S
    if array.dtype.kind == "b" and any((shows_BTS == each).all() for each in (causal_TS, ~causal_TS, ~allowed_BTS)):
        return True  # a part of it, by slots
    if array.dtype.kind == "f":
        if ((shows_BTS > LOWEST) & (shows_BTS != 0)).any():
            return None
        shows_BTS = shows_BTS > LOWEST
    return bool((shows_BTS == allowed_BTS)[positions_BT >= 0].all())


def counts_slots(array: np.ndarray, tokens: int, slots: int) -> bool:
    """Whether these are the numbers of all slots, or of those of the new tokens: what exporters make masks of."""
    if array.dtype.kind != "i" or array.size not in (tokens, slots):
        return False
    return any(np.array_equal(array.reshape(-1), first + np.arange(array.size)) for first in (0, slots - tokens))
