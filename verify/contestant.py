"""A candidate in a process of its own, as a comparison sees it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

from refengine.config import Config
from verify.candidates import Opened, Settings, Traits
from verify.drive import CandidateRun, OnStep, Rows, run_candidate
from verify.expect import Expectation
from verify.interface import Interface
from verify.runtimes import runtime_named
from verify.schedule import Schedule
from verify.workers.worker import UNBOUNDED, Bounds, Worker

Returned = TypeVar("Returned")


class Contestant(Opened, Protocol):
    """An opened model that can be asked to decode."""

    def decode(
        self, prompts: Rows, schedule: Schedule, *, use_cache: bool, forced: Rows | None, on_step: OnStep
    ) -> CandidateRun:
        """As `run_candidate` does it."""

    def apply(self, function: Callable[..., Returned], *arguments: object) -> Returned:
        """What `function(candidate, *arguments)` returns where the candidate is."""

    @property
    def peak_memory(self) -> int | None:
        """The most bytes that it has had in memory so far, where that is known."""

    @property
    def said(self) -> Sequence[str]:
        """The last lines that it has written, to whoever may have read them."""


class Isolated:
    """A candidate that a worker has opened; a worker that has died is replaced when it is needed again.

    Used in a `with` block, which begins with opening and ends with the end of the process.

    Args:
        path: the export, as the runtime takes it.
        provider_options: passed to the runtime unchanged.
        config: the checkpoint's.
        bounds: on silence and on memory.
        python: of another environment that has the runtime.

    Raises:
        InputError: the file cannot be used, or is an export of another model (in `with`).
        NoVerdict: the runtime is missing, or cannot open it, or died of it (in `with`).
    """

    runtime: str
    path: Path
    interface: Interface
    settings: Settings
    expectation: Expectation
    can_pad_left: bool
    can_merge: bool

    def __init__(
        self,
        path: Path,
        runtime: str,
        provider_options: Mapping[str, str],
        config: Config,
        bounds: Bounds = UNBOUNDED,
        python: Path | None = None,
    ):
        self.runtime = runtime
        self._new_worker = lambda: Worker(
            runtime_named(runtime), path, runtime, provider_options, config, bounds=bounds, python=python
        )

    def __enter__(self) -> Self:
        with ExitStack() as until_opened:
            self._worker = until_opened.enter_context(self._new_worker())
            traits = self._worker.call(Traits.of)
            until_opened.pop_all()
        self.runtime, self.path, self.interface = traits.runtime, traits.path, traits.interface
        self.settings, self.expectation = traits.settings, traits.expectation
        self.can_pad_left, self.can_merge = traits.can_pad_left, traits.can_merge
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.__exit__(kind, error, trace)

    @property
    def peak_memory(self) -> int | None:
        """Of the process that decoded last."""
        return self._worker.peak_memory

    @property
    def said(self) -> Sequence[str]:
        """By the process that decoded last."""
        return self._worker.said

    def decode(
        self, prompts: Rows, schedule: Schedule, *, use_cache: bool, forced: Rows | None, on_step: OnStep
    ) -> CandidateRun:
        """As `run_candidate` does it.

        Raises:
            NoVerdict: the runtime failed, or its process did or was ended.
        """
        drive = partial(run_candidate, use_cache=use_cache, forced=forced)
        return self._alive().call(drive, prompts, schedule, on_step=on_step)

    def apply(self, function: Callable[..., Returned], *arguments: object) -> Returned:
        """What `function(candidate, *arguments)` returns in its process.

        Raises:
            NoVerdict: the function raised that, or its process died or was ended.
        """
        return self._alive().call(function, *arguments)

    def _alive(self) -> Worker:
        """The worker, or a new one in place of one that has died."""
        if not self._worker.is_alive:
            self._worker.__exit__(None, None, None)
            self._worker = self._new_worker().__enter__()
        return self._worker
