"""Who is decoded together: static, dynamic and continuous batching of some prompts, each as a schedule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from refengine.requests import Limits

Batching = Literal["static", "dynamic", "continuous"]
Schedule = Sequence[tuple[int, ...]]  # the rows of each step, in which each of them gains one token


def static(lengths: Sequence[int], max_new_tokens: int, limits: Limits) -> Schedule:
    """Batches in the order of the prompts, as large as may be; all rows of a batch begin and end together."""
    rows, size = range(len(lengths)), limits.max_batch_size
    return _to_the_end([tuple(rows[start : start + size]) for start in range(0, len(rows), size)], max_new_tokens)


def dynamic(lengths: Sequence[int], max_new_tokens: int, limits: Limits) -> Schedule:
    """Batches of like length, the shortest first: as many rows as the limits allow, their padding counted.

    Args:
        lengths: of the prompts; each of them fits within the limits alone.
    """
    batches: list[tuple[int, ...]] = []
    batch: tuple[int, ...] = ()
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        slots = (len(batch) + 1) * (lengths[row] + max_new_tokens - 1)
        if batch and (len(batch) == limits.max_batch_size or (limits.max_tokens and slots > limits.max_tokens)):
            batches.append(batch)
            batch = ()
        batch = (*batch, row)
    return _to_the_end([*batches, batch], max_new_tokens)


def continuous(lengths: Sequence[int], max_new_tokens: int, limits: Limits) -> Schedule:
    """One batch that rows join in the order of the prompts, at most one a step, and leave when they have ended."""
    return joining_and_leaving([max_new_tokens] * len(lengths), limits.max_batch_size)


def joining_and_leaving(new_tokens: Sequence[int], max_batch_size: int) -> Schedule:
    """Likewise, of rows that gain different numbers of tokens."""
    steps: list[tuple[int, ...]] = []
    joined = 0
    awaited: dict[int, int] = {}  # row of the batch -> tokens that it still has to gain
    while awaited or joined < len(new_tokens):
        if joined < len(new_tokens) and len(awaited) < max_batch_size:
            awaited[joined] = new_tokens[joined]
            joined += 1
        steps.append(tuple(awaited))
        awaited = {row: tokens - 1 for row, tokens in awaited.items() if tokens > 1}
    return steps


SCHEDULES: Mapping[Batching, Callable[[Sequence[int], int, Limits], Schedule]] = {
    "static": static,
    "dynamic": dynamic,
    "continuous": continuous,
}


def is_padded(schedule: Schedule, lengths: Sequence[int]) -> bool:
    """Whether rows of different lengths, new tokens included, are ever decoded together."""
    now = list(lengths)
    for rows in schedule:
        if len({now[row] for row in rows}) > 1:
            return True
        for row in rows:
            now[row] += 1
    return False


def _to_the_end(batches: Sequence[tuple[int, ...]], max_new_tokens: int) -> Schedule:
    return [batch for batch in batches for _ in range(max_new_tokens)]
