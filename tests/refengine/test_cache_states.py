"""A cache in any state that its verbs can bring about still gives each row the logits that it has alone."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.scheme import stored_as
from refengine.weights import Weights
from tests.refengine.strategies import (
    BOUND,
    KINDS_OF_CACHE,
    VOCABULARY,
    Prompts,
    one_shot,
    prompts,
    relative_error,
)


class CacheMachine(RuleBasedStateMachine):
    """Feeds, crops, selects and merges in any order; `slots` is what it should hold: a token or None each."""

    weights: Weights
    window: int | None = None

    @initialize(rows=prompts)
    def begin(self, rows: Prompts) -> None:
        self.slots: list[list[int | None]] = [[] for _ in rows]
        self.kept = self.fed(self.slots, rows)

    @rule(data=st.data())
    def feed(self, data: st.DataObject) -> None:
        columns = st.lists(
            st.tuples(*[st.none() | st.integers(0, VOCABULARY - 1)] * len(self.slots)), min_size=1, max_size=4
        )
        new = list(zip(*data.draw(columns), strict=True))
        self.kept = self.fed(self.slots, new, self.kept)

    @precondition(lambda self: self.window is None)
    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        length = round(share * len(self.slots[0]))
        self.kept.crop(length)
        self.slots = [row[:length] for row in self.slots]

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.slots) - 1), min_size=1, max_size=4))
        self.kept = self.kept.select(rows)
        used = [any(self.slots[row][s] is not None for row in rows) for s in range(len(self.slots[0]))]
        self.slots = [[token for token, keep in zip(self.slots[row], used, strict=True) if keep] for row in rows]

    @precondition(lambda self: len(self.slots) < 4)
    @rule(rows=prompts, first=st.booleans())
    def merge(self, rows: Prompts, first: bool) -> None:
        slots: list[list[int | None]] = [[] for _ in rows]
        other = self.fed(slots, rows)
        self.kept = self.kept.merge(other) if first else other.merge(self.kept)
        both = self.slots + slots if first else slots + self.slots
        longest = max(map(len, both))
        self.slots = [[None] * (longest - len(row)) + row for row in both]

    @invariant()
    def the_cache_holds_what_it_was_given(self) -> None:
        if self.window is None:
            counts = [np.cumsum([token is not None for token in row], dtype=int) for row in self.slots]
            expected = [
                [int(n) - 1 if token is not None else -1 for token, n in zip(row, count, strict=True)]
                for row, count in zip(self.slots, counts, strict=True)
            ]
            assert self.kept.positions_BS.tolist() == expected

    def fed(
        self, slots: list[list[int | None]], new: Sequence[Sequence[int | None]], kept: KVCache | None = None
    ) -> KVCache:
        """A pass of these columns, shorter rows padded in front: checks its logits, notes them in `slots`."""
        if kept is None:
            kept = KVCache(self.weights.config, len(new), stored_as(np.float64), self.window)
        width = max(map(len, new))
        before = [[token for token in row if token is not None] for row in slots]
        for row, tokens in zip(slots, new, strict=True):
            row += [None] * (width - len(tokens)) + list(tokens)
        columns = [row[-width:] for row in slots]
        token_ids_BT = np.array([[token or 0 for token in row] for row in columns])
        real_BT = np.array([[token is not None for token in row] for row in columns])
        positions_BT = np.where(real_BT, np.array([[len(row)] for row in before]) + np.cumsum(real_BT, axis=1) - 1, -1)
        logits_BTV = forward(self.weights, token_ids_BT, positions_BT, kept)
        for b in np.flatnonzero(real_BT.any(axis=1)):
            tokens = before[b] + [token for token in columns[b] if token is not None]
            expected_TV = one_shot(self.weights, tokens)[len(before[b]) :]
            assert relative_error(logits_BTV[b, real_BT[b]], expected_TV) <= BOUND
        return kept


@pytest.mark.parametrize(("model", "window"), KINDS_OF_CACHE, indirect=["model"])
def test_any_feeding_cropping_selecting_and_merging_keeps_each_rows_logits(model: Weights, window: int | None) -> None:
    class Machine(CacheMachine):
        weights = model

    Machine.window = window
    run_state_machine_as_test(Machine, settings=settings(max_examples=30, stateful_step_count=10))
