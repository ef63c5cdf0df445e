"""The rows of a run that are traced, and what a trace of them shows as one sequence a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refengine.tokens import left_padded
from verify.candidates.traced import Traced
from verify.drive import CandidateRun
from verify.naming.as_if import Passes
from verify.schedule import Schedule
from verify.truth.reference import ReferenceRun

POSITIONS = 192  # of all rows together, about so many are traced


@dataclass(frozen=True)
class Sample:
    """Rows that are run together, and what they are fed.

    Attributes:
        rows: their numbers in the whole run.
        prompts: theirs.
        tokens: fed after each prompt, the last of them only chosen.
        use_cache: each new token is a pass of its own that reads the cache.
    """

    rows: tuple[int, ...]
    prompts: Sequence[Sequence[int]]
    tokens: Sequence[Sequence[int]]
    use_cache: bool

    @property
    def schedule(self) -> Schedule:
        """All rows in every step."""
        return [tuple(range(len(self.rows)))] * len(self.tokens[0])

    @cached_property
    def token_ids_BT(self) -> np.ndarray:
        """All that is fed, padded in front."""
        return self._padded[0]

    @cached_property
    def positions_BT(self) -> np.ndarray:
        """Of the same; -1 is padding."""
        return self._padded[1]

    @cached_property
    def _padded(self) -> tuple[np.ndarray, np.ndarray]:
        return left_padded([[*prompt, *new[:-1]] for prompt, new in zip(self.prompts, self.tokens, strict=True)])

    def columns(self, number: int) -> slice:
        """Those of `positions_BT` whose values a pass brings: the prompts', or that of a new token."""
        width = self.positions_BT.shape[1]
        first = width - len(self.tokens[0]) + 1
        return slice(0, first) if number == 0 else slice(first + number - 1, first + number)

    def phase(self, row: int, position: int) -> str:
        """Which pass brings a position: "prefill", or "decode step n", the first being 1."""
        step = position - len(self.prompts[row]) + 1
        return "prefill" if step <= 0 else f"decode step {step}"

    def pass_of(self, row: int, position: int) -> int:
        """The number of the pass that brings a position."""
        return max(0, position - len(self.prompts[row]) + 1)

    def position_in(self, row: int, position: int, number: int) -> int:
        """A position, if a pass brings it; otherwise the first that the pass brings."""
        if self.pass_of(row, position) == number:
            return position
        return len(self.prompts[row]) + number - 1 if number else 0


def sample_of(passes: Passes, run: CandidateRun, reference: ReferenceRun) -> Sample:
    """The row in which the candidate is worst, and rows that were run beside it, the longest first."""
    rows_given = (reference.error_and_noise(row, given) for row, given in enumerate(run.logits))
    errors = [float((error_P / unit_P).max()) for error_P, unit_P in rows_given]
    worst = int(np.argmax(errors))  # argmax takes a NaN for the largest
    batch = next(batch for batch in passes.batches if worst in batch)
    rows, positions = [worst], 0
    for row in sorted((row for row in batch if row != worst), key=lambda row: -len(passes.prompts[row])):
        positions += len(passes.prompts[row]) + len(passes.tokens[row])
        if len(rows) == 1 or positions <= POSITIONS:
            rows.append(row)
    rows.sort()
    return Sample(
        tuple(rows),
        [passes.prompts[row] for row in rows],
        [reference.tokens[row] for row in rows],
        passes.use_cache,
    )


@dataclass(frozen=True)
class Streams:
    """What a trace of a sample shows, pass after pass."""

    sample: Sample
    traced: Traced

    def whole(self, name: str) -> np.ndarray | None:
        """A tensor `BT...` of all passes as one sequence; None where it is not of that shape or was not given."""
        pieces = []
        for number, one in enumerate(self.traced.passes):
            array = one.arrays.get(name)
            if array is None or array.shape[:2] != one.positions_BT.shape:
                return None
            pieces.append(array if number == 0 else array[:, -1:])
        return np.concatenate(pieces, axis=1)

    def caches(self, point: str) -> np.ndarray | None:
        """Keys or values as the run gave them, at all positions of all rows."""
        rows = self.traced.run.caches.get(point)
        return None if rows is None else np.concatenate(rows)
