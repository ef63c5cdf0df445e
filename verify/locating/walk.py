"""The node at which a graph first leaves what it should compute: right values are followed until they end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from verify.locating.flow import Flow
from verify.locating.inside import Inside
from verify.locating.known import LAYOUTS, UNSCALED, Known, is_mask
from verify.locating.points import ATTENTIONS, BESIDE, MADE_OF

Status = Literal["right", "unknown", "no value"]


@dataclass(frozen=True)
class Guilty:
    """A node that makes something else out of what is right, and the trace point that comes out wrong.

    Attributes:
        place: of the node in the flow.
        point: as `refengine.trace` calls it, without the layer.
        heads: those that are wrong; empty where the point has none.
        inputs_are_right: every input with a value is known to be right.
    """

    place: int
    point: str
    heads: tuple[int, ...]
    inputs_are_right: bool


@dataclass(frozen=True)
class Walk:
    """The nodes of a part of a graph, and what they gave in one pass.

    Attributes:
        places: of the nodes, in order.
        ends: tensors that the part is there for, and the trace points that they are.
        arrays: what it gave.
        inside: what is right.
        window: of the attention.
        allowed: times its bound that a tensor may be from what it is taken for.
    """

    flow: Flow
    places: Sequence[int]
    ends: Mapping[str, str]
    arrays: Mapping[str, np.ndarray]
    inside: Inside
    window: int | None
    allowed: float

    def guilty(self) -> Guilty | None:
        """The first node whose result is wrong and whose inputs are not; None where there is none."""
        for place in self.places:
            node = self.flow.nodes[place]
            wrong = [name for name in node.outputs if name in self._wrong]
            if wrong and not set(node.inputs) & self._wrong:
                point = self._point(place)
                earlier = self._unknown_beside(place) if point in BESIDE else None
                earlier = self._idle(place) if earlier is None and node.operator == "Softmax" else earlier
                place, node = (place, node) if earlier is None else (earlier, self.flow.nodes[earlier])
                judged = [name for name in node.inputs if self._is_made_here(name) and self._status[name] != "no value"]
                are_right = all(self._status[name] == "right" for name in judged)
                return Guilty(place, point, self._heads(place, point), are_right)
        return None

    def _is_made_here(self, name: str) -> bool:
        return self.flow.maker.get(name) in self.places

    @cached_property
    def _matches(self) -> dict[str, list[Known]]:
        """What each tensor is, as far as that is known; of those with values alone."""
        found = {name: self._known(self.arrays[name]) for name in self._names if name in self.arrays}
        for name, point in self.ends.items():
            found[name] = [each for each in found.get(name, ()) if each.value.point == point]
        return found

    @cached_property
    def _names(self) -> list[str]:
        nodes = [self.flow.nodes[place] for place in self.places]
        made = [name for node in nodes for name in node.outputs if name]
        return list(dict.fromkeys([*(name for node in nodes for name in node.inputs if name), *made]))

    def _known(self, array: np.ndarray) -> list[Known]:
        if array.dtype.kind not in "fi" or not array.size:
            return []
        return [each for each in self.inside.known if each.ratio(array) <= self.allowed]

    @cached_property
    def _status(self) -> dict[str, Status]:
        found: dict[str, Status] = {}
        for name in self._names:
            array = self.arrays.get(name)
            if array is None or not self._has_value(array):
                found[name] = "no value"
            elif self._matches[name] or self._is_mask(array):
                found[name] = "right"
            else:
                found[name] = "unknown"
        return found

    def _has_value(self, array: np.ndarray) -> bool:
        """Whether it has something to say of tokens: no single number, and of whole numbers only one for each."""
        rows, tokens = self.inside.positions_BT.shape
        if array.dtype.kind == "b":
            return self._mask_of(array) is not None
        whole = array.dtype.kind == "i" and array.shape[-1:] == (tokens,) and array.size in (tokens, rows * tokens)
        return array.size > 1 and (array.dtype.kind == "f" or whole)

    def _is_mask(self, array: np.ndarray) -> bool:
        return self._mask_of(array) is True

    def _mask_of(self, array: np.ndarray) -> bool | None:
        return is_mask(array, self.inside.positions_BT, self.inside.positions_BS, self.window)

    @cached_property
    def _after_start(self) -> set[int]:
        """The nodes that the stream goes through; the others reckon what is needed beside it."""
        starts = [name for name, known in self._matches.items() if any(each.value.point == "input" for each in known)]
        return self.flow.after(starts)

    def _unknown_beside(self, place: int) -> int | None:
        """Of what is reckoned beside the stream and read on the way to a node: the first that is not known.

        What it makes may agree with something right: a mask where it hides nothing, a rotation by nothing.
        """
        before = self.flow.before([name for name in self.flow.nodes[place].inputs if name]) & set(self.places)
        on_the_way = [*(before & self._after_start), place]
        read = {name for one in on_the_way for name in self.flow.nodes[one].inputs}
        beside = [
            name
            for name in read
            if self._status.get(name) == "unknown" and self.flow.maker.get(name, place) not in self._after_start
        ]
        makers = sorted(self.flow.before(beside) & (set(self.places) - self._after_start))
        outputs = ((one, name) for one in makers for name in self.flow.nodes[one].outputs)
        return next((one for one, name in outputs if self._status.get(name) == "unknown"), None)

    def _idle(self, place: int) -> int | None:
        """Where scores are never scaled: the first node behind their product that leaves them as they are."""

        def unscaled(name: str) -> bool:
            return any(each.value.step == UNSCALED for each in self._matches.get(name, ()))

        back: int | None = None
        names = [name for name in self.flow.nodes[place].inputs if unscaled(name)]
        while names:
            maker = self.flow.maker.get(names[0])
            if maker is None:
                break
            names = [name for name in self.flow.nodes[maker].inputs if unscaled(name)]
            back = maker if names else back
        return back

    @cached_property
    def _wrong(self) -> set[str]:
        """Tensors that are not known, and from which something wrong follows."""
        here = set(self.places)
        wrong: set[str] = set()
        for place in reversed(self.places):
            for name in self.flow.nodes[place].outputs:
                if not name or self._status.get(name, "no value") != "unknown":
                    continue
                users = [self.flow.nodes[user] for user in self.flow.users.get(name, ()) if user in here]
                if name in self.ends or any(set(user.outputs) & wrong for user in users):
                    wrong.add(name)
        return wrong

    @cached_property
    def _reached(self) -> set[str]:
        """Trace points that some tensor is."""
        return {each.value.point for known in self._matches.values() for each in known if each.value.is_point}

    @cached_property
    def _passed(self) -> set[str]:
        """Trace points that are right, whether or not they are seen: those reached, and what they are made of."""
        wrong = {point for name, point in self.ends.items() if name in self._wrong}
        passed: set[str] = set()
        waiting = list(self._reached - wrong)
        while waiting:
            point = waiting.pop()
            if point not in passed and point not in wrong:
                passed.add(point)
                waiting += MADE_OF.get(point, ())
        return passed

    def _point(self, place: int) -> str:
        """The trace point that a node should have come to, or come nearer to."""
        node = self.flow.nodes[place]
        order = [point for point in MADE_OF if self.inside.point(point) is not None]
        if node.operator in ATTENTIONS:
            cached = [f"self_attn.{kind}_cache" for kind in "kv"]
            given = [name for name, _ in zip(cached, node.outputs[1:], strict=False)]
            unmade = [point for point in given if point not in self._passed]
            return {"self_attn.k_cache": "self_attn.k_rope"}.get(unmade[0], unmade[0]) if unmade else "self_attn.attend"
        given = [self.ends[name] for name in node.outputs if name in self.ends and name in self._wrong]
        if given and not any(name in self.ends and name not in self._wrong for name in node.outputs):
            return given[0]
        labels = self._labels(place)
        steps = [point for point, is_point in labels if not is_point and point in order]
        if steps:
            return max(steps, key=order.index)
        ends = {point for point, is_point in labels if is_point}
        after = [point for point in order if set(MADE_OF[point]) & ends and point not in self._passed]
        open_ones = [point for point in order if point not in self._passed]
        return next(iter([*after, *open_ones, *order[-1:]]))

    def _labels(self, place: int) -> set[tuple[str, bool]]:
        """What the inputs of a node are; where that says nothing, those of the nodes that read its result."""
        waiting, seen = [place], set()
        while waiting:
            now = waiting.pop(0)
            node = self.flow.nodes[now]
            labels = {
                (each.value.point, each.value.is_point)
                for name in node.inputs
                for each in self._matches.get(name, ())
                if each.value.point != "rope"
            }
            if labels:
                return labels
            seen.add(now)
            users = [user for name in node.outputs for user in self.flow.users.get(name, ()) if user in self.places]
            waiting += [user for user in users if user not in seen]
        return set()

    def is_right(self, name: str, array: np.ndarray) -> bool:
        """Whether an array would be right as this tensor."""
        return any(name not in self.ends or each.value.point == self.ends[name] for each in self._known(array))

    def _closest(self, place: int, point: str) -> tuple[str, np.ndarray] | None:
        """Of the wrong tensors behind a node the one most like a point, and its error with the point's axes."""
        known = self.inside.point(point)
        if known is None:
            return None
        after = {place} | (self.flow.after(self.flow.nodes[place].outputs) & set(self.places))
        names = [name for one in sorted(after) for name in self.flow.nodes[one].outputs if name in self._wrong]
        errors = [
            (name, np.where(known.there, each - known.value.array, 0))
            for name in names
            for each in known.layouts(self.arrays[name])
        ]
        return min(errors, key=lambda pair: float(np.square(pair[1]).sum()), default=None)

    def _heads(self, place: int, point: str) -> tuple[int, ...]:
        """The heads of a point that are wrong, where they are not all."""
        known, closest = self.inside.point(point), self._closest(place, point)
        if known is None or closest is None or len(known.value.axes) != 4:
            return ()
        axis = 2 if known.value.axes[1] == "T" else 1
        heads = known.value.array.shape[axis]
        unit = float(np.sqrt(np.mean(np.square(known.noise.rms_P))))
        ratios = np.sqrt(np.square(closest[1]).mean(axis=tuple(each for each in range(4) if each != axis))) / unit
        wrong = np.flatnonzero(~(ratios <= known.noise.overall_bound * heads**0.5)).tolist()
        return tuple(wrong) if len(wrong) < heads else ()

    def shown_by(self, guilty: Guilty) -> "Shown | None":
        """The nodes from what is right to where a mistake shows; None where no tensor is like the point."""
        known, closest = self.inside.point(guilty.point), self._closest(guilty.place, guilty.point)
        if known is None or closest is None:
            return None
        name, _ = closest
        right = {each for each, status in self._status.items() if status == "right" and each != name}
        places = sorted(self.flow.before([name], stop=right) & set(self.places))
        made = [each for place in places for each in self.flow.nodes[place].outputs if each]
        read = {each for place in places for each in self.flow.nodes[place].inputs} - set(made)
        fed = {each: self.arrays[each] for each in sorted(read) if each in self.arrays}
        given = self.arrays[name]
        closest_error = np.inf
        for order in LAYOUTS[known.value.array.ndim]:
            turned = known.value.array.transpose(order).reshape(given.shape)
            there = known.there.transpose(order).reshape(given.shape)
            error = float(np.square(np.where(there, given - turned, 0)).sum())
            if error < closest_error:
                closest_error, best = error, Shown(name, tuple(made), fed, turned, there)
        return best


@dataclass(frozen=True)
class Shown:
    """A few nodes in which a mistake shows.

    Attributes:
        name: of the tensor that is wrong.
        made: what the nodes make.
        fed: what they are fed.
        right: what the tensor should be, in float64, where `there` says so.
    """

    name: str
    made: tuple[str, ...]
    fed: Mapping[str, np.ndarray]
    right: np.ndarray
    there: np.ndarray
