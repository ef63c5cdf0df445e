"""What an export holds in the place of each of a checkpoint's tensors.

A weight's place is where it is used, as far as the names of operators tell; what it holds is decided by its numbers,
never by a name or an order. Numbers that are not in their place are looked for everywhere else.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.weights import EMBEDDING, HEAD, expected_shapes
from verify.report.weights import RowOrder, TensorRelation
from verify.weights.locate import Found, at_rows, fits, locate
from verify.weights.places import places
from verify.weights.sketch import nearest, sketch
from verify.weights.stored import StoredWeight

PROBES = 8  # rows of a tensor that are looked for when nothing tells where it is


@dataclass(frozen=True)
class Matched:
    """A tensor of the checkpoint: what became of it, and where it is in the export; None when missing."""

    relation: TensorRelation
    found: Found | None


def match(checkpoint: Checkpoint, weights: Sequence[StoredWeight]) -> tuple[Matched, ...]:
    """What became of every tensor that the configuration names, and of a tied head that has a place of its own.

    Raises:
        CheckpointError: the checkpoint lacks a tensor.
    """
    search = _Search(checkpoint, weights)
    shapes = dict(expected_shapes(checkpoint.config))
    if HEAD not in shapes and search.at_home(HEAD, shapes[EMBEDDING]):
        shapes[HEAD] = shapes[EMBEDDING]
    found = {name: search.matched(name, shape) for name, shape in shapes.items()}
    return tuple(search.in_what_is_left(name, shapes[name], found) for name in found)


@dataclass(frozen=True)
class _Search:
    """A checkpoint and all weights of an export."""

    checkpoint: Checkpoint
    weights: Sequence[StoredWeight]

    @cached_property
    def _by_place(self) -> Mapping[str | None, list[StoredWeight]]:
        """By the module that they serve; None for those of which that is not known."""
        found: dict[str | None, list[StoredWeight]] = defaultdict(list)
        for weight in self.weights:
            for module in places(weight.used_by, weight.name) or (None,):
                found[module].append(weight)
        return found

    def at_home(self, name: str, shape: tuple[int, ...]) -> list[StoredWeight]:
        """The weights in a tensor's place that it fits into: vectors for a vector, matrices for a matrix."""
        there = self._by_place.get(name.rpartition(".")[0], [])
        return [
            weight for weight in there if fits(weight, _as_matrix(shape)) and (1 in weight.shape) == (len(shape) == 1)
        ]

    def matched(self, name: str, shape: tuple[int, ...]) -> Matched:
        """What became of one tensor; the worst of it where several weights serve its place."""
        tensor_OI = self._tensor(name, shape)
        factors, head_dim = self._factors(name), self.checkpoint.config.head_dim
        found = [locate(tensor_OI, weight, factors) for weight in self.at_home(name, shape)]
        if found:
            # A vector of one number beside others in the same place is a constant of the graph.
            told = [one for one in found if one.is_faithful or not _is_one_number(one.weight)]
            worst = min(told or found, key=lambda one: (one.is_faithful, -one.compared.error))
            if worst.is_faithful:
                return Matched(_described(name, worst, head_dim), worst)
            elsewhere = self._elsewhere(tensor_OI, self.weights, factors)
            where = f"its numbers are in {elsewhere.weight.name}" if elsewhere and elsewhere.is_faithful else ""
            return Matched(_described(name, worst, head_dim, where), worst)
        likeliest = self._elsewhere(tensor_OI, self._by_place.get(None, []), factors)
        # A weight of zeros would be off by 1: what is further off than that has nothing of the tensor.
        if likeliest is not None and (likeliest.is_faithful or likeliest.compared.error < 1):
            return Matched(_described(name, likeliest, head_dim), likeliest)
        misplaced = self._elsewhere(tensor_OI, self.weights, factors)
        where = f"its numbers are in {misplaced.weight.name} alone" if misplaced and misplaced.is_faithful else ""
        return Matched(TensorRelation(name, "missing", detail=where), None)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        tied = name == HEAD and name not in self.checkpoint.names
        return self.checkpoint.tensor(EMBEDDING if tied else name).reshape(_as_matrix(shape))

    def in_what_is_left(self, name: str, shape: tuple[int, ...], others: Mapping[str, Matched]) -> Matched:
        """A tensor of whose numbers a fused weight has none, in the rows that hold no other tensor."""
        matched = others[name]
        found = matched.found
        if found is None or found.is_faithful or found.outputs == len(found.rows):
            return matched
        left = np.setdiff1d(np.arange(found.outputs), _rows_of_others(found, others.values()))
        if len(left) != len(found.rows) or np.array_equal(np.sort(found.rows), left):
            return matched
        there = at_rows(found, self._tensor(name, shape), left)
        return Matched(_described(name, there, self.checkpoint.config.head_dim), there)

    def _factors(self, name: str) -> tuple[float, ...]:
        """1/sqrt(head_dim) may be in the queries or in the keys, or half of it in each."""
        if "q_proj" not in name and "k_proj" not in name:
            return ()
        return self.checkpoint.config.head_dim**-0.5, self.checkpoint.config.head_dim**-0.25

    def _elsewhere(
        self, tensor_OI: np.ndarray, weights: Sequence[StoredWeight], factors: tuple[float, ...]
    ) -> Found | None:
        """The tensor in the weight that holds the likeliest rows; None when it fits into none."""
        able = [weight for weight in weights if fits(weight, tensor_OI.shape)]
        if tensor_OI.shape[1] == 1:
            found = (locate(tensor_OI, weight, factors) for weight in able if 1 in weight.shape)
            return min(found, key=lambda one: (not one.is_faithful, one.compared.error), default=None)
        probes = sketch(tensor_OI[np.linspace(0, len(tensor_OI) - 1, PROBES).astype(int)])
        likeness = [
            max(float(nearest(probes, rows)[1].mean()) for rows in self._sketches[weight.name, tensor_OI.shape[1]])
            for weight in able
        ]
        return locate(tensor_OI, able[int(np.argmax(likeness))], factors) if able else None

    @cached_property
    def _sketches(self) -> dict[tuple[str, int], list[np.ndarray]]:
        """Of every matrix, both ways round: by its name and its columns."""
        made: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
        for weight in self.weights:
            if 1 in weight.shape:
                continue
            values_RC = weight.read().values_RC
            for way_round in (values_RC, values_RC.T):
                made[weight.name, way_round.shape[1]].append(sketch(way_round))
        return made


def _rows_of_others(found: Found, others: Iterable[Matched]) -> np.ndarray:
    """Of the same weight, the same way round, where tensors are that are as they should be."""
    there = [each.found for each in others if each.found is not None and each.found.is_faithful]
    same = [each.rows for each in there if (each.weight.name, each.in_rows) == (found.weight.name, found.in_rows)]
    return np.concatenate([np.empty(0, np.int64), *same])


def _is_one_number(weight: StoredWeight) -> bool:
    """Whether a weight is a vector of numbers that are all the same."""
    return 1 in weight.shape and bool(np.ptp(weight.read().values_RC.astype(np.float64)) == 0)


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A matrix as it is, a vector as one column."""
    return shape[0], shape[1] if len(shape) == 2 else 1


def _described(name: str, found: Found, head_dim: int, where: str = "") -> TensorRelation:
    compared, weight = found.compared, found.weight
    relation = compared.relation if found.is_faithful else "changed"
    details = list(_details(found, len(found.rows))) + [where] * bool(where)
    row_order = None
    if found.is_faithful and (np.diff(found.rows) < 0).any():
        details.insert(0, f"else {relation}")
        relation, row_order = "permuted", _row_order(found.rows, head_dim)
        details.insert(0, "rotary pairs side by side" if row_order == "rotary pairs" else "rows in another order")
    return TensorRelation(
        name,
        relation,
        weight.name,
        (compared.rounded_to or weight.dtype).partition(" ")[0],
        weight.bits,
        weight.block,
        compared.error,
        row_order,
        "; ".join(details),
    )


def _details(found: Found, outputs: int) -> Iterator[str]:
    """What is to say of a tensor besides its relation."""
    compared = found.compared
    if outputs < found.outputs:
        first, last = int(found.rows.min()), int(found.rows.max())
        among = "" if last - first + 1 == outputs else ", among others'"
        yield f"outputs {first} to {last} of {found.outputs}{among}"
    if found.is_turned and compared.is_faithful:
        yield "transposed: outputs and inputs are swapped"
    if found.factor != 1:
        yield f"times {found.factor:.6g}, of the attention's 1/sqrt(head_dim)"
    if compared.rounded_to and " " in compared.rounded_to:
        yield compared.rounded_to.partition(" ")[2]
    if compared.different and found.weight.bits:
        yield (f"numbers more than half a step off: {compared.different}, the worst {compared.worst_steps:.3g} steps")
    elif compared.relation == "changed":
        yield f"numbers that differ: {compared.different}"


def _row_order(rows: np.ndarray, head_dim: int) -> RowOrder:
    """Rows of heads whose two halves were dealt out in turn are "rotary pairs"."""
    if len(rows) % head_dim:
        return "other"
    dealt = np.arange(len(rows)).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    return "rotary pairs" if np.array_equal(rows - rows.min(), dealt) else "other"
