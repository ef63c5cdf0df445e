"""An export's own weights, as a checkpoint: what it would compute if they were all that differs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.weights import EMBEDDING, HEAD, expected_shapes
from verify.expect import WEIGHTS
from verify.report.weights import ExportedWeights, counted, unfaithful
from verify.weights.locate import Found
from verify.weights.match import Matched
from verify.weights.stored import StoredWeight


class ExportedCheckpoint:
    """Every tensor of a checkpoint as an export holds it: dequantised, in the checkpoint's layout and order.

    One weight of the export is held at a time, so that the parts of a fused one, and the rows of an embedding, are cut
    out of one reading. A tensor that is not the checkpoint's is taken as the export uses it; one that the export has
    no place for is the checkpoint's.

    Args:
        checkpoint: what was exported.
        path: the export.
        matched: where each tensor is in it.

    Attributes:
        checkpoint: what was exported.
        is_faithful: every tensor is the checkpoint's, as exactly as the dtype or the bits that store it allow.
        stored_as: the coarsest of what holds its tensors, of `WEIGHTS`; "float32" where float32 could do no better.
        borrowed: the tensors that the export has no place for.
    """

    def __init__(self, checkpoint: Checkpoint, path: Path, matched: Sequence[Matched]):
        wrong = {tensor.name for tensor in unfaithful([each.relation for each in matched])}
        # What is wrong tells nothing of a factor; the same module of another layer does.
        usual = {
            _module(each.relation.name): each.found.factor
            for each in matched
            if each.found and each.relation.name not in wrong
        }
        places = {
            name: _place(each.found, usual.get(_module(name), 1.0) if name in wrong else None)
            for each in matched
            if each.found and (name := each.relation.name)
        }
        self.path = path
        self.files = (*checkpoint.files, path)
        self.matched = tuple(matched)
        self.is_faithful = not wrong
        self.stored_as = max((_storage(each) for each in matched), key=WEIGHTS.index, default=WEIGHTS[0])
        self.checkpoint = checkpoint
        self._places = {name: place for name, place in places.items() if place is not None}
        self._last: tuple[StoredWeight, np.ndarray] | None = None
        self.config = replace(checkpoint.config, tie_word_embeddings=self._is_tied)
        self._shapes = dict(expected_shapes(self.config))
        self.names = frozenset(self._shapes)
        self.borrowed = tuple(sorted(self.names - self._places.keys()))

    @property
    def _is_tied(self) -> bool:
        """Whether head and embedding are one weight: an export may quantise one of them alone."""
        head, embedding = self._places.get(HEAD), self._places.get(EMBEDDING)
        one = head is None or (embedding is not None and head.weight is embedding.weight)
        return self.checkpoint.config.tie_word_embeddings and one

    @property
    def permutes_heads(self) -> bool:
        """Whether rows of a q_proj or k_proj are in another order."""
        permuted = [each.relation.name for each in self.matched if each.relation.relation == "permuted"]
        return any(_module(name) in ("q_proj", "k_proj") for name in permuted)

    @property
    def is_exact(self) -> bool:
        """Whether every tensor is the checkpoint's, in float32 at least."""
        return self.is_faithful and self.stored_as == WEIGHTS[0]

    @property
    def report(self) -> ExportedWeights:
        """What there is to say of them, but for what they cost."""
        tensors = [each.relation for each in self.matched]
        return ExportedWeights(self.stored_as, counted(tensors), unfaithful(tensors), self.borrowed)

    def without_damage(self) -> "ExportedCheckpoint":
        """The same with the checkpoint's own tensors wherever the export's are others, and not but rounded."""
        wrong = {tensor.name for tensor in self.report.unfaithful}
        kept = [each for each in self.matched if each.relation.name not in wrong]
        return ExportedCheckpoint(self.checkpoint, self.path, kept)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._shapes[name]

    def tensor(self, name: str) -> np.ndarray:
        """The whole tensor, in the float dtype it is stored in; float32 where codes are stored."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of the tensor."""
        place = self._places.get(name)
        if place is None:
            return self.checkpoint.rows(name, start, stop)
        if self._last is None or self._last[0] is not place.weight:
            self._last = None  # before the next is read
            self._last = place.weight, place.weight.read().values_RC
        values_OI, order = self._last[1] if place.in_rows else self._last[1].T, place.rows[start:stop]
        follow_each_other = bool((np.diff(order) == 1).all())
        taken = values_OI[order[0] : order[-1] + 1] if follow_each_other else values_OI[order]
        if place.factor != 1:
            taken = taken.astype(np.float64) / place.factor
        return taken.reshape(-1, *self.shape(name)[1:])


@dataclass(frozen=True)
class _Place:
    """Which rows, or columns, of a weight are a tensor's, times a factor."""

    weight: StoredWeight
    in_rows: bool
    rows: np.ndarray
    factor: float


def _place(found: Found, wrong_times: float | None) -> _Place | None:
    """A tensor where it is, with its rows in order; of what is wrong, the rows as the export uses them.

    None where those have another shape than the tensor.

    Args:
        wrong_times: what multiplies a tensor that is wrong; None of one that is right.
    """
    weight = found.weight
    factor = found.factor if wrong_times is None else wrong_times
    if not found.is_turned:
        return _Place(weight, found.in_rows, found.rows if wrong_times is None else np.sort(found.rows), factor)
    if weight.shape[0] != weight.shape[1]:
        return None
    return _Place(weight, not found.in_rows, np.arange(weight.shape[0]), factor)


def _module(name: str) -> str:
    """What a tensor is in any layer: "q_proj"."""
    return name.split(".")[-2]


def _storage(matched: Matched) -> str:
    """What holds a tensor, of `WEIGHTS`; "float32" where every number is the checkpoint's, or none is there."""
    relation, found = matched.relation, matched.found
    if found is None or found.compared.relation == "equal":
        return WEIGHTS[0]
    if relation.bits is not None:
        return f"int{min(relation.bits, 8)}"
    return str(relation.dtype) if relation.dtype in WEIGHTS else WEIGHTS[0]
