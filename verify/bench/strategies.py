"""The ways of decoding that are measured, and the least that each can take."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refengine.config import Config
from refengine.cost import pass_cost
from refengine.machine import Machine
from refengine.quant import scheme_named

REFERENCE = "reference"
PROMPT_LENGTH = 16
REQUESTS_A_ROW = 4  # of continuous batching, one of them long
SHORTER = 4  # times, the others


@dataclass(frozen=True)
class Strategy:
    """A way of decoding.

    Attributes:
        batch_size: most rows at once.
        scheme: how the cache is stored, by name; without a cache it is of no meaning.
        continuous: requests of different lengths join and leave the batch as it runs.
    """

    name: str
    batch_size: int
    cached: bool
    scheme: str = "float32"
    continuous: bool = False

    def new_tokens(self, max_new_tokens: int) -> list[int]:
        """How many new tokens each request asks for; they are all alike unless batching is continuous."""
        if not self.continuous:
            return [max_new_tokens] * self.batch_size
        short = max(1, max_new_tokens // SHORTER)
        requests = range(REQUESTS_A_ROW * self.batch_size)
        return [short if number % REQUESTS_A_ROW else max_new_tokens for number in requests]


@dataclass(frozen=True)
class Task:
    """One row to measure: a strategy on the reference engine, or on a runtime with an export.

    Attributes:
        config: of the model.
        engine: REFERENCE, or the name of a runtime.
        candidate: the export; None on the reference engine.
    """

    strategy: Strategy
    model: Path
    config: Config
    max_new_tokens: int
    engine: str = REFERENCE
    candidate: Path | None = None

    @property
    def new_tokens(self) -> list[int]:
        """How many each request asks for."""
        return self.strategy.new_tokens(self.max_new_tokens)


def strategies_of_all(batch_size: int) -> list[Strategy]:
    """Those that every engine is measured in; the first is what the others are compared with."""
    return [
        Strategy("no cache", 1, cached=False),
        Strategy("cache", 1, cached=True),
        Strategy("batch", batch_size, cached=False),
        Strategy("batch, cache", batch_size, cached=True),
        Strategy("continuous", batch_size, cached=True, continuous=True),
    ]


def strategies_of_reference(batch_size: int, schemes: Sequence[str]) -> list[Strategy]:
    """Those that the reference engine is measured in, with a row for each scheme of its cache."""
    *of_all, continuous = strategies_of_all(batch_size)
    quantised = [Strategy(f"batch, cache, {scheme}", batch_size, cached=True, scheme=scheme) for scheme in schemes]
    return [*of_all, *quantised, continuous]


def least_seconds(task: Task, machine: Machine) -> float:
    """The least time for all requests by the roofline of each pass, the batch being full all the time."""
    strategy, seconds = task.strategy, 0.0
    scheme = scheme_named(strategy.scheme) if strategy.cached else None
    for new_tokens in task.new_tokens:
        for step in range(new_tokens):
            cached = strategy.cached and step > 0
            new, past = (1, PROMPT_LENGTH + step - 1) if cached else (PROMPT_LENGTH + step, 0)
            cost = pass_cost(task.config, strategy.batch_size, new, past, scheme)
            seconds += cost.seconds(machine) / strategy.batch_size
    return seconds
