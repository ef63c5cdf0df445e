"""A checkpoint compared with an export of it, for tests of the verdict."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from refengine.checkpoint import Checkpoint
from refengine.tokens import Rows
from verify.candidates import Candidate
from verify.compare import Comparison
from verify.drive import CandidateRun, run_candidate
from verify.report.result import Cell
from verify.request import Request
from verify.runtimes import RUNTIMES
from verify.schedule import Schedule
from verify.truth.reference import Reference, ReferenceRun


@dataclass
class Notes:
    """A `Progress` that keeps what it is told."""

    begun: list[tuple[str, int | None]] = field(default_factory=list)
    steps: int = 0

    def begin(self, what: str, steps: int | None) -> None:
        self.begun.append((what, steps))

    def advance(self, steps: int) -> None:
        self.steps += steps


class Here:
    """A candidate of this very process, to be compared."""

    peak_memory = None
    said = ()

    def __init__(self, candidate: Candidate):
        self._candidate = candidate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._candidate, name)

    def decode(self, prompts: Rows, schedule: Schedule, **how: Any) -> CandidateRun:
        return run_candidate(self._candidate, prompts, schedule, **how)

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self._candidate, *arguments)


@dataclass(frozen=True)
class Compared:
    """A checkpoint, prompts, and the reference's run of them, which is shared by everything compared with it."""

    checkpoint: Checkpoint
    prompts: Rows
    max_new_tokens: int

    @cached_property
    def reference(self) -> ReferenceRun:
        return Reference(self.checkpoint).run(self.prompts, self.max_new_tokens)

    def open(self, path: Path, runtime: str = "ort-cpu", options: Mapping[str, str] | None = None) -> Candidate:
        return RUNTIMES[runtime](path, runtime, options or {}, self.checkpoint.config)

    def cells(
        self, path: Path, runtime: str = "ort-cpu", options: Mapping[str, str] | None = None, **request: Any
    ) -> dict[str, Cell]:
        """The cells of one export, by cache mode; `request` is what `Request` is given besides the prompts."""
        asked = Request(self.prompts, self.max_new_tokens, **request)
        comparison = Comparison(self.checkpoint, asked, Notes(), self.reference)
        return {cell.cache: cell for cell in comparison.cells(Here(self.open(path, runtime, options)))}
