"""What the nodes of a part were meant to make, told by what they are fed and by what is not there yet."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from verify.locating.flow import Flow
from verify.locating.inside import Inside
from verify.locating.known import Known
from verify.locating.points import AROUND, ATTENTIONS, MADE_OF


@dataclass(frozen=True)
class Meaning:
    """The nodes of a part, and what their tensors are.

    Attributes:
        places: of the nodes, in order.
        ends: tensors that the part is there for, and the trace points that they are.
        arrays: what they gave.
        inside: what is right.
        matches: what each tensor is, as far as that is known.
        wrong: tensors that are not right.
    """

    flow: Flow
    places: Sequence[int]
    ends: Mapping[str, str]
    arrays: Mapping[str, np.ndarray]
    inside: Inside
    matches: Mapping[str, Sequence[Known]]
    wrong: Collection[str]

    def point(self, place: int) -> str:
        """The trace point that a node should have come to, or come nearer to."""
        node = self.flow.nodes[place]
        if node.operator in ATTENTIONS:
            cached = [f"self_attn.{kind}_cache" for kind in "kv"]
            given = [name for name, _ in zip(cached, node.outputs[1:], strict=False)]
            unmade = [point for point in given if point not in self._passed]
            return {"self_attn.k_cache": "self_attn.k_rope"}.get(unmade[0], unmade[0]) if unmade else "self_attn.attend"
        labels = self._labels(place)
        there = {point for point, is_point in labels if is_point}
        meant = self._meant(place, labels, there)
        # What comes between is left out: rotation, say, where scores are made of queries as they were projected.
        between = [point for point in MADE_OF[meant] if point not in self._passed and point not in AROUND]
        return next((point for point in between if there & set(MADE_OF.get(point, ()))), meant)

    def _meant(self, place: int, labels: Collection[tuple[str, bool]], there: Collection[str]) -> str:
        """The trace point that the nodes around a node speak of."""
        node = self.flow.nodes[place]
        given = [self.ends[name] for name in node.outputs if name in self.ends and name in self.wrong]
        if given and not any(name in self.ends and name not in self.wrong for name in node.outputs):
            return given[0]
        order = [point for point in MADE_OF if self.inside.point(point) is not None]
        steps = [point for point, is_point in labels if not is_point and point in order]
        if steps:
            return max(steps, key=order.index)
        after = [point for point in order if set(MADE_OF[point]) & set(there) and point not in self._passed]
        after.sort(key=lambda point: self._distance(place, point))
        open_ones = [point for point in order if point not in self._passed]
        return next(iter([*after, *open_ones, *order[-1:]]))

    def _distance(self, place: int, point: str) -> float:
        """How far what a node gives is from a point, if it may be that by its size."""
        known = self.inside.point(point)
        given = [self.arrays[name] for name in self.flow.nodes[place].outputs if name in self.arrays]
        layouts = [] if known is None else [(known, each) for array in given for each in known.layouts(array)]
        errors = [np.where(known.there, each - known.value.array, 0) for known, each in layouts]
        return min((float(np.square(error).sum()) for error in errors), default=np.inf)

    @cached_property
    def _passed(self) -> set[str]:
        """Trace points that are right, whether or not they are seen: those reached, and what they are made of."""
        reached = {each.value.point for known in self.matches.values() for each in known if each.value.is_point}
        wrong = {point for name, point in self.ends.items() if name in self.wrong}
        passed: set[str] = set()
        waiting = list(reached - wrong)
        while waiting:
            point = waiting.pop()
            if point not in passed and point not in wrong:
                passed.add(point)
                waiting += MADE_OF.get(point, ())
        return passed

    def _labels(self, place: int) -> set[tuple[str, bool]]:
        """What the inputs of a node are; where that says nothing, those of the nodes that read its result."""
        waiting, seen = [place], set()
        while waiting:
            now = waiting.pop(0)
            node = self.flow.nodes[now]
            labels = {
                (each.value.point, each.value.is_point)
                for name in node.inputs
                for each in self.matches.get(name, ())
                if each.value.point not in AROUND
            }
            if labels:
                return labels
            seen.add(now)
            users = [user for name in node.outputs for user in self.flow.users.get(name, ()) if user in self.places]
            waiting += [user for user in users if user not in seen]
        return set()
