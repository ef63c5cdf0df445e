"""The numbers in an export's graph that are a model's settings: found by what computes with them, never by a name.

An operator's layer is known by how many norms come before it on the way from the tokens: two are in each layer, and one
comes last. What comes before all norms, as masks and rotary tables do, is of the layers that make use of it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from refengine.config import Config
from verify.candidates.operators import Operator, Operators, operators_of
from verify.candidates.scores import FURTHEST, scores_into
from verify.causes.constants import Constant
from verify.causes.norm_mlp import NORMS

SUMS = ("ReduceMean", "ReduceSum", "ReduceSumSquare")
ORDERS: Mapping[str, int] = {"Less": 0, "Greater": 0, "LessOrEqual": 1, "GreaterOrEqual": 1}
LARGEST_EPS, LONGEST_WINDOW = 0.1, 10**7
TABLE_ROWS = 4  # that a table of cos or sin has at least


def graph_constants(path: Path, config: Config) -> dict[str, tuple[Constant, ...]]:
    """What an export's graph says of the model's settings, by what it is.

    Args:
        path: an `.onnx` file, or an IR's `.xml`.
        config: the checkpoint's, whose sizes tell what a number belongs to.

    Returns:
        `rms_norm_eps`; `inv_freq`, the head_dim / 2 rotary frequencies, read or computed back from tables;
        `attention_factor` of cos and sin; `rope_table_length`;
        `rotary_interleaved`; `do_rotary`; `scale` of scores; `softcap`, 0 for none; `window`, in
        which age < window; `narrow_floats`, where it may have any. What is not found is left out.

    Raises:
        InputError: the export cannot be read.
        RuntimeMissing: the `onnx` package is not installed.
    """
    found: dict[str, dict[Constant, None]] = defaultdict(dict)
    for operators in operators_of(path):
        graph = _Graph(operators, config)
        for name, read in READERS.items():
            # What a damaged graph divides by zero is no setting.
            found[name].update(dict.fromkeys(each for each in read(graph) if np.isfinite(each.value).all()))
    return {name: tuple(constants) for name, constants in found.items() if constants}


@dataclass(frozen=True)
class _Graph:
    """A graph, and which layer each of its operators is of."""

    operators: Operators
    config: Config

    @cached_property
    def eps(self) -> Mapping[int, float]:
        """The epsilon of each operator that adds one, fused norms among them."""
        found = {}
        for place, operator in enumerate(self.operators.listed):
            if "Normalization" in operator.kind and "epsilon" in operator.attributes:
                found[place] = operator.attributes["epsilon"]
            elif operator.kind == "Add" and (pair := self.operators.operand(operator)):
                number, other = pair
                if 0 <= number <= LARGEST_EPS and self.is_mean(other):
                    found[place] = number
        return found

    def is_mean(self, name: str) -> bool:
        """Whether a value is a sum or mean along an axis, perhaps divided by a number."""
        maker = self.operators.maker(name)
        for _ in range(FURTHEST):
            pair = self.operators.operand(maker) if maker and maker.kind in ("Mul", "Div") else None
            if maker is None or (maker.kind != "Cast" and not pair):
                break
            maker = self.operators.maker(pair[1] if pair else maker.inputs[0])
        return maker is not None and maker.kind in SUMS

    @cached_property
    def norms_before(self) -> list[int]:
        """How many norms are on the way to each operator."""
        after: dict[str, int] = {}
        before = []
        for place, operator in enumerate(self.operators.listed):
            before.append(max((after.get(name, 0) for name in operator.inputs), default=0))
            after |= dict.fromkeys(operator.outputs, before[-1] + (place in self.eps))
        return before

    @cached_property
    def used_in(self) -> list[frozenset[int]]:
        """The layers of each operator; of one that comes before all norms, those that its results go to."""
        layers = [frozenset[int]()] * len(self.operators.listed)
        for place in reversed(range(len(layers))):
            before, operator = self.norms_before[place], self.operators.listed[place]
            if before:
                layers[place] = frozenset({(before - 1) // 2})
            else:
                users = (user for name in operator.outputs for user in self.operators.users.get(name, ()))
                layers[place] = frozenset().union(*(layers[user] for user in users))
        return layers

    def constant(self, value: object, place: int) -> Constant:
        """A value that the operator at this place has."""
        return Constant(value, self.used_in[place] or None, node=self.operators.listed[place].name)

    def of_kind(self, is_kind: Callable[[str], bool]) -> Iterator[tuple[int, Operator]]:
        """Operators of a kind, and their places."""
        return ((place, each) for place, each in enumerate(self.operators.listed) if is_kind(each.kind))


def _eps(graph: _Graph) -> Iterator[Constant]:
    for place, eps in graph.eps.items():
        layer, which = divmod(graph.norms_before[place], len(NORMS))
        part = NORMS[which] if layer < graph.config.num_hidden_layers else "norm"
        yield Constant(eps, frozenset({layer}), part, graph.operators.listed[place].name)


def _inv_freq(graph: _Graph) -> Iterator[Constant]:
    """Frequencies from which angles are made, and those of tables of cos and sin."""
    operators, pairs = graph.operators, graph.config.head_dim // 2
    for place, operator in graph.of_kind(lambda kind: kind == "Cos"):
        for name in _behind(operators, operator):
            if prod(operators.shapes.get(name, ())) in (pairs, 2 * pairs):
                numbers = operators.read(name).reshape(-1)[:pairs].astype(np.float64)
                if (numbers > 0).all() and (np.diff(numbers) < 0).all():
                    yield graph.constant(tuple(numbers.tolist()), place)
    for layers, cos_LP, sin_LP in _tables(graph):
        yield Constant(tuple(_frequencies(cos_LP, sin_LP).tolist()), layers)


def _attention_factor(graph: _Graph) -> Iterator[Constant]:
    """What cos is multiplied by, and what tables of it begin with."""
    operators = graph.operators
    for place, operator in graph.of_kind(lambda kind: kind == "Cos"):
        for user in (user for name in operator.outputs for user in operators.users.get(name, ())):
            pair = operators.operand(operators.listed[user]) if operators.listed[user].kind == "Mul" else None
            if pair:
                yield graph.constant(pair[0], place)
    for layers, cos_LP, _ in _tables(graph):
        yield Constant(float(cos_LP[0, 0]), layers)


def _table_length(graph: _Graph) -> Iterator[Constant]:
    for layers, cos_LP, _ in _tables(graph):
        yield Constant(len(cos_LP), layers)
    for place, operator in graph.of_kind(lambda kind: kind == "Cos"):
        for name in _behind(graph.operators, operator):
            maker = graph.operators.maker(name)
            pair = graph.operators.operand(maker) if maker and maker.kind in ("Min", "Mod") else None
            if maker and pair and pair[0] >= 1:
                yield graph.constant(int(pair[0]) + (maker.kind == "Min"), place)


def _behind(operators: Operators, operator: Operator) -> list[str]:
    """Names of everything that a value is made of."""
    waiting = list(operator.inputs)
    seen = dict.fromkeys(waiting)
    while waiting:
        maker = operators.maker(waiting.pop())
        new = [name for name in (maker.inputs if maker else ()) if name not in seen]
        seen |= dict.fromkeys(new)
        waiting += new
    return list(seen)


def _tables(graph: _Graph) -> Iterator[tuple[frozenset[int] | None, np.ndarray, np.ndarray]]:
    """Constants of cos and sin by position, and the layers that make use of them."""
    operators, pairs = graph.operators, graph.config.head_dim // 2
    sizes = {name: tuple(size for size in shape if size != 1) for name, shape in operators.shapes.items()}
    tables: dict[float, list[tuple[frozenset[int], np.ndarray]]] = {1.0: [], 0.0: []}
    for name, shape in sizes.items():
        if len(shape) == 2 and shape[0] >= TABLE_ROWS and shape[1] in (pairs, 2 * pairs) and operators.users.get(name):
            table_LP = operators.read(name).reshape(shape)[:, :pairs]
            for start, group in tables.items():
                if table_LP.dtype.kind in "fV" and _begins_with(table_LP, start):
                    layers = frozenset[int]().union(*(graph.used_in[user] for user in operators.users[name]))
                    group.append((layers, table_LP.astype(np.float64)))
    for layers, cos_LP in tables[1.0]:
        same = [sin_LP for others, sin_LP in tables[0.0] if (others, sin_LP.shape) == (layers, cos_LP.shape)]
        if same:
            length = _before_it_stands_still(cos_LP)
            yield layers or None, cos_LP[:length], same[0][:length]


def _before_it_stands_still(table_LP: np.ndarray) -> int:
    """The length of a table without the copies of its last row that may fill it up."""
    copies_L = (table_LP == table_LP[-1]).all(axis=1)
    return len(table_LP) - int(np.argmin(copies_L[::-1])) + 1


def _begins_with(table_LP: np.ndarray, start: float) -> bool:
    """Whether position 0 has this cos or sin, times an attention factor, and position 1 something between."""
    first_P, second_P = table_LP[0].astype(np.float64), table_LP[1].astype(np.float64)
    if start:
        return bool((first_P == first_P[0]).all() and first_P[0] > 0 and abs(second_P[0]) < first_P[0])
    return bool((first_P == 0).all() and second_P[0] > 0)


def _frequencies(cos_LP: np.ndarray, sin_LP: np.ndarray) -> np.ndarray:
    """Radians a position: position 1 gives them roughly, and each position twice as far twice as well."""
    inv_freq_P = np.arctan2(sin_LP[1], cos_LP[1])
    position = 2
    while position < len(cos_LP):
        off_P = np.arctan2(sin_LP[position], cos_LP[position]) - position * inv_freq_P
        inv_freq_P += (np.remainder(off_P + np.pi, 2 * np.pi) - np.pi) / position
        position *= 2
    return inv_freq_P


def _switch(*names: str) -> Callable[[_Graph], Iterator[Constant]]:
    """A reader of attributes that are on or off, whatever operator has them."""

    def read(graph: _Graph) -> Iterator[Constant]:
        for place, operator in enumerate(graph.operators.listed):
            for name in names:
                if name in operator.attributes:
                    yield graph.constant(bool(operator.attributes[name]), place)

    return read


def _scale(graph: _Graph) -> Iterator[Constant]:
    usual = graph.config.head_dim**-0.5
    for place, operator in graph.of_kind(lambda kind: "Attention" in kind):
        given = operator.attributes.get("scale") or 0.0
        if operator.kind == "ScaledDotProductAttention" and len(operator.inputs) > 4:
            given = graph.operators.number(operator.inputs[4]) or 0.0
        yield graph.constant(given or usual, place)
    for place, scale, _ in _scores(graph):
        yield graph.constant(scale, place)


def _softcap(graph: _Graph) -> Iterator[Constant]:
    for place, operator in graph.of_kind(lambda kind: "Attention" in kind):
        if "softcap" in operator.attributes:
            yield graph.constant(operator.attributes["softcap"], place)
    for place, _, cap in _scores(graph):
        yield graph.constant(cap, place)


def _scores(graph: _Graph) -> Iterator[tuple[int, float, float]]:
    """Of each softmax: its place, what products of queries and keys are multiplied by, and their cap or 0."""
    for place, operator in graph.of_kind(lambda kind: kind == "Softmax"):
        if found := scores_into(graph.operators, operator):
            yield place, *found


def _windows(graph: _Graph) -> Iterator[Constant]:
    """Windows of attention operators, and whole numbers that ages or positions are compared with in masks."""
    operators = graph.operators
    for place, operator in graph.of_kind(lambda kind: "Attention" in kind):
        if operator.attributes.get("local_window_size", -1) > 0:
            yield graph.constant(int(operator.attributes["local_window_size"]), place)
    for place, operator in graph.of_kind(lambda kind: kind in ORDERS):
        beside = [
            maker for name in operator.inputs if (maker := operators.maker(name)) and maker.kind in ("Sub", "Add")
        ]
        for each in (operator, *beside):
            number = abs(pair[0]) if (pair := operators.operand(each)) else 0.0
            if 1 < number < LONGEST_WINDOW and number == int(number) and graph.used_in[place]:
                yield graph.constant(int(number) + (ORDERS[operator.kind] if each is operator else 0), place)


def _narrow_floats(graph: _Graph) -> Iterator[Constant]:
    if graph.operators.has_narrow_floats:
        yield Constant(True)


READERS: Mapping[str, Callable[[_Graph], Iterator[Constant]]] = {
    "rms_norm_eps": _eps,
    "inv_freq": _inv_freq,
    "attention_factor": _attention_factor,
    "rope_table_length": _table_length,
    "rotary_interleaved": _switch("rotary_interleaved", "interleaved"),
    "do_rotary": _switch("do_rotary"),
    "scale": _scale,
    "softcap": _softcap,
    "window": _windows,
    "narrow_floats": _narrow_floats,
}
