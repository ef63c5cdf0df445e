"""Batchings that are watched: what was asked for, what came, and whether that is what each request gets alone."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refengine.batching import CONTINUOUS, Batching, NewToken, Policy
from refengine.generate import generate
from refengine.requests import Limits
from refengine.weights import Weights
from tests.refengine.strategies import BOUND, one_shot, relative_error

PLENTY = Limits(max_batch_size=100)
Requests = list[tuple[list[int], int]]


class Watched(Batching):
    """Keeps the logits behind every token."""

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self.logits: dict[int, list[np.ndarray]] = {}

    def _choose(self, rows, logits_BTV):
        for row, logits_TV in zip(rows, logits_BTV, strict=True):
            if not row.ended:
                self.logits.setdefault(row.id, []).append(logits_TV[-1])
        super()._choose(rows, logits_BTV)


@dataclass
class Session:
    """A batching under a schedule, and what its requests asked for and got."""

    batching: Watched
    asked: dict[int, tuple[list[int], int]] = field(default_factory=dict)
    got: dict[int, list[int]] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)

    def add(self, request: tuple[list[int], int]) -> None:
        id = self.batching.add_request(*request)
        self.asked[id], self.got[id] = request, []

    def cancel(self, number: int) -> None:
        if number in self.asked and not self.has_ended(number):
            self.batching.cancel(number)
            self.cancelled.add(number)

    def has_ended(self, id: int) -> bool:
        (_, most), tokens = self.asked[id], self.got[id]
        eos = self.batching.weights.config.eos_token_id
        return id in self.cancelled or len(tokens) == most or bool(tokens and tokens[-1] in eos)

    def step(self) -> list[NewToken]:
        news = self.batching.step()
        assert len({new.id for new in news}) == len(news), "a request got two tokens in one step"
        for new in news:
            assert not self.has_ended(new.id)
            self.got[new.id].append(new.token)
            assert new.last == self.has_ended(new.id)
        return news

    def finish(self) -> None:
        for _ in range(sum(len(prompt) + most for prompt, most in self.asked.values())):
            if not self.batching.unfinished:
                return
            self.step()
        assert not self.batching.unfinished, "a request is never served"

    def check(self) -> None:
        """Every request has the tokens and logits it gets alone; a cancelled one has the first of them."""
        for id, (prompt, most) in self.asked.items():
            alone = alone_of(self.batching.weights, prompt, most)
            got = self.got[id]
            assert got == (alone[: len(got)] if id in self.cancelled else alone)
            if got:
                expected = one_shot(self.batching.weights, [*prompt, *got[:-1]])[len(prompt) - 1 :]
                assert relative_error(np.stack(self.batching.logits[id]), expected) <= BOUND


def alone_of(weights: Weights, prompt: list[int], most: int) -> list[int]:
    (tokens,) = generate(weights, [prompt], most, cache=False)
    return tokens


def session(weights: Weights, policy: Policy = CONTINUOUS, limits: Limits = PLENTY, given: Requests = ()) -> Session:
    made = Session(Watched(weights, policy, limits))
    for request in given:
        made.add(request)
    return made
