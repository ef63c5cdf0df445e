"""The node at which a graph first leaves what it should compute: right values are followed until they end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from verify.locating.findings import Guilty, Shown
from verify.locating.flow import COUNTING, OF_SIZES, SHAPING, Flow
from verify.locating.inside import Inside
from verify.locating.known import LAYOUTS, SIDE_BY_SIDE, UNSCALED, Known, counts_slots, is_mask
from verify.locating.meaning import Meaning
from verify.locating.points import ADDED, BESIDE, NORMS

Status = Literal["right", "unknown", "no value"]


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
        for place in self._in_question:
            node = self.flow.nodes[place]
            wrong = [name for name in node.outputs if name in self._wrong]
            if wrong and not set(node.inputs) & self._wrong:
                point = self._of_projections(place, self._meaning.point(place))
                earlier = self._unknown_beside(place) if point in BESIDE else None
                earlier = self._idle(place) if earlier is None else earlier
                earlier = self._miscounted(place) if earlier is None else earlier
                place, node = (place, node) if earlier is None else (earlier, self.flow.nodes[earlier])
                judged = [name for name in node.inputs if self._is_made_here(name) and self._status[name] != "no value"]
                are_right = all(self._status[name] == "right" for name in judged)
                return Guilty(place, point, self._heads(place, point), are_right, self._order(place))
        return None

    @cached_property
    def _in_question(self) -> list[int]:
        """The nodes in order. An MLP reads nothing beside the stream: what is not behind it is of a layer behind."""
        is_mlp = all(point.startswith("mlp.") for point in self.ends.values())
        return sorted(self.places, key=lambda place: (is_mlp and place not in self._after_start, place))

    def _of_projections(self, place: int, point: str) -> str:
        """Where queries, keys and values come side by side: the first of them that is wrong."""
        queries, keys = (self.inside.point(f"self_attn.{name}_proj") for name in "qk")
        whole = next((each for each in self.inside.known if each.value.step == SIDE_BY_SIDE), None)
        if point != "self_attn.q_proj" or queries is None or keys is None or whole is None:
            return point
        wrong = [name for name in self.flow.nodes[place].outputs if name in self._wrong]
        given = (each for name in wrong for each in whole.layouts(self.arrays[name]))
        first = max((whole.first_wrong_head(each) or 0 for each in given), default=0)
        heads, kv_heads = queries.value.array.shape[2], keys.value.array.shape[2]
        return point if first < heads else f"self_attn.{'k' if first < heads + kv_heads else 'v'}_proj"

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
            if array is None or not self._has_value(name, array):
                found[name] = "no value"
            elif self._matches[name] or self._is_mask(array) or self._counts_slots(array):
                found[name] = "right"
            else:
                found[name] = "unknown"
        return found

    def _has_value(self, name: str, array: np.ndarray) -> bool:
        """Whether it has something to say of tokens: no single number, and of whole numbers only one for each."""
        rows, tokens = self.inside.positions_BT.shape
        if array.dtype.kind == "b":
            return self._mask_of(array) is not None
        whole = array.dtype.kind == "i" and array.shape[-1:] == (tokens,) and array.size in (tokens, rows * tokens)
        return array.size > 1 and (array.dtype.kind == "f" or (whole and name not in self.flow.sizes))

    def _is_mask(self, array: np.ndarray) -> bool:
        return self._mask_of(array) is True

    def _mask_of(self, array: np.ndarray) -> bool | None:
        return is_mask(array, self.inside.positions_BT, self.inside.positions_BS, self.window)

    def _counts_slots(self, array: np.ndarray) -> bool:
        return counts_slots(array, self.inside.positions_BT.shape[1], self.inside.positions_BS.shape[1])

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
            if self._status.get(name) == "unknown"
            and self._is_made_here(name)
            and self.flow.maker[name] not in self._after_start
        ]
        makers = sorted(self.flow.before(beside) & (set(self.places) - self._after_start))
        outputs = ((one, name) for one in makers for name in self.flow.nodes[one].outputs)
        return next((one for one, name in outputs if self._status.get(name) == "unknown"), None)

    def _idle(self, place: int) -> int | None:
        """Where scores are never scaled, a norm has no weight, or a projection is not added to the stream: the first
        node that leaves what it reads as it is.
        """

        def unfinished(name: str) -> set[int]:
            return {
                id(each)
                for each in self._matches.get(name, ())
                if each.value.step == UNSCALED
                or each.value.point in ADDED
                or (each.value.point in NORMS and not each.value.is_point)
            }

        back: int | None = None
        names = [name for name in self.flow.nodes[place].inputs if unfinished(name)]
        while names:
            maker = self.flow.maker.get(names[0])
            if maker is None:
                break
            same = unfinished(names[0])
            names = [name for name in self.flow.nodes[maker].inputs if unfinished(name) & same]
            operator = self.flow.nodes[maker].operator
            back = maker if names and (operator == "Identity" or operator not in SHAPING) else back
        return back

    def _miscounted(self, place: int) -> int | None:
        """Where a mask lets each new token see as if there were no past: the node that counts them from 0."""
        tokens, slots = self.inside.positions_BT.shape[1], self.inside.positions_BS.shape[1]
        numbers_T = np.arange(tokens)
        sees_TS = numbers_T[:, None] >= np.arange(slots)
        made = [self.arrays[name] for name in self.flow.nodes[place].outputs if name in self.arrays]
        if tokens == slots or not any(np.array_equal(each.reshape(-1), sees_TS.reshape(-1)) for each in made):
            return None
        before = sorted(self.flow.before(self.flow.nodes[place].inputs) & set(self.places))
        counting = ((one, self.flow.nodes[one]) for one in before if self.flow.nodes[one].operator in COUNTING)
        given = ((one, self.arrays[name]) for one, node in counting for name in node.outputs if name in self.arrays)
        return next((one for one, array in given if np.array_equal(array.reshape(-1), numbers_T)), None)

    @cached_property
    def _wrong(self) -> set[str]:
        """Tensors that are not known, and from which something wrong follows."""
        here = set(self.places)
        wrong: set[str] = set()
        leading: set[str] = set()  # to something wrong, and themselves inside what the runtime has fused
        for place in reversed(self.places):
            of_sizes = self.flow.nodes[place].operator in OF_SIZES
            for name in self.flow.nodes[place].outputs:
                status = self._status.get(name, "no value")
                users = [self.flow.nodes[user] for user in self.flow.users.get(name, ()) if user in here]
                leads = any(set(user.outputs) & (wrong | leading) for user in users)
                if status == "unknown" and (name in self.ends or leads):
                    wrong.add(name)
                elif status == "no value" and leads and name in self.flow.fused and not of_sizes:
                    leading.add(name)
        return wrong

    @cached_property
    def _meaning(self) -> Meaning:
        return Meaning(self.flow, self.places, self.ends, self.arrays, self.inside, self._matches, self._wrong)

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

    def _order(self, place: int) -> tuple[int, ...]:
        """Whose values each head has in what a node gives; empty where it has none's, or all their own."""
        known = self.inside.point("self_attn.attend")
        if known is None:
            return ()
        wrong = [name for name in self.flow.nodes[place].outputs if name in self._wrong]
        found = (known.order_of_heads(given) for name in wrong for given in known.layouts(self.arrays[name]))
        return next((order for order in found if order is not None and order != tuple(range(len(order)))), ())

    def shown_by(self, guilty: Guilty) -> Shown | None:
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
        best, closest_error = None, np.inf
        for order in LAYOUTS[known.value.array.ndim]:
            turned = known.value.array.transpose(order).reshape(given.shape)
            there = known.there.transpose(order).reshape(given.shape)
            error = float(np.square(np.where(there, given - turned, 0)).sum())
            if best is None or error < closest_error:  # a NaN is no less than anything
                closest_error, best = error, Shown(name, tuple(made), fed, turned, there)
        return best
