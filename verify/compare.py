"""Compares an export with its checkpoint: every runtime asked for, with the cache and without it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, Protocol

from refengine.config import Config
from verify.candidates import Candidate, Settings
from verify.drive import CandidateRun, run_candidate
from verify.errors import NoVerdict
from verify.judge import judge
from verify.reference import Reference, ReferenceRun
from verify.report.result import Cell, Seconds

Rows = Sequence[Sequence[int]]
CacheMode = Literal["on", "off"]


class Progress(Protocol):
    """Told how a comparison goes on, for somebody who waits."""

    def begin(self, what: str, steps: int | None) -> None:
        """Something begins that takes so many steps (None: unknown)."""

    def advance(self, steps: int) -> None:
        """So many steps are done."""


@dataclass(frozen=True)
class Request:
    """What to compare: prompts, how far to decode, in which cache modes, rows at once (None: as many as go)."""

    prompts: Rows
    max_new_tokens: int
    modes: tuple[CacheMode, ...] = ("off", "on")
    batch_size: int | None = None


class Comparison:
    """One checkpoint and some prompts, against any number of opened candidates.

    The reference runs once: its greedy tokens do not depend on who is compared with it.
    """

    def __init__(
        self,
        reference: Reference,
        request: Request,
        progress: Progress,
        reference_run: ReferenceRun | None = None,
    ):
        self.reference = reference
        self.request = request
        self.progress = progress
        self.reference_run = reference_run

    def cells(self, candidate: Candidate) -> list[Cell]:
        """One cell for each cache mode asked for that the export can be run in, or one that says why there is none."""
        modes = [mode for mode in self.request.modes if mode == "off" or candidate.interface.has_cache]
        if not modes:
            return self.unopened(
                candidate.runtime,
                candidate.settings.requested,
                f"{candidate.path}: the export has no past_key_values input; compare it with --cache off",
            )
        return [self.cell(candidate, mode) for mode in modes]

    def unopened(self, runtime: str, requested: Mapping[str, str], reason: str) -> list[Cell]:
        """The cells of a runtime that could not be run at all."""
        settings = asdict(Settings(requested))
        rows = self.request.batch_size or len(self.request.prompts)
        return [Cell(runtime, mode, settings, "no-verdict", rows, reason=reason) for mode in self.request.modes]

    def cell(self, candidate: Candidate, mode: CacheMode) -> Cell:
        """The verdict on one candidate in one cache mode; what stops the runtime becomes the cell's reason."""
        rows = batch_size_for(candidate, self.request)
        settings = asdict(candidate.settings)
        try:
            verdict, tokens, noise, seconds = self._judged(candidate, mode, rows)
        except NoVerdict as error:
            return Cell(candidate.runtime, mode, settings, "no-verdict", rows, reason=str(error))
        return Cell(candidate.runtime, mode, settings, verdict, rows, tokens, noise, seconds)

    def _judged(self, candidate: Candidate, mode: CacheMode, rows: int) -> tuple:
        run = self._drive(candidate, mode, rows)
        seconds, began = run.seconds, time.perf_counter()
        if self.reference_run is None:
            self.reference_run = self.reference.run(self.request.prompts, self.request.max_new_tokens, guess=run.tokens)
        reference, reference_seconds = self.reference_run, time.perf_counter() - began
        if run.tokens != reference.tokens:
            # From its first difference on, the candidate saw other tokens; feed both the same, so that one early
            # flip does not hide the rest. That difference itself stands, should the second run not repeat it.
            forced = self._drive(candidate, mode, rows, forced=reference.tokens)
            seconds += forced.seconds
            run = replace(forced, tokens=_with_first_differences(forced.tokens, run.tokens, reference.tokens))
        began = time.perf_counter()
        verdict, tokens, noise = judge(run, reference)
        return verdict, tokens, noise, Seconds(seconds, reference_seconds + time.perf_counter() - began)

    def _drive(self, candidate: Candidate, mode: CacheMode, rows: int, forced: Rows | None = None) -> CandidateRun:
        request = self.request
        again = "" if forced is None else ", on the reference's tokens"
        self.progress.begin(f"{candidate.runtime}, cache {mode}{again}", len(request.prompts) * request.max_new_tokens)
        return run_candidate(
            candidate,
            request.prompts,
            request.max_new_tokens,
            use_cache=mode == "on",
            batch_size=rows,
            forced=forced,
            on_step=self.progress.advance,
        )


def _with_first_differences(forced: Rows, free: Rows, reference: Rows) -> list[list[int]]:
    """The forced choices, but in each row the first that differed when the candidate ran freely."""
    merged = [list(row) for row in forced]
    for row, (mine, right) in enumerate(zip(free, reference, strict=True)):
        for step, (actual, expected) in enumerate(zip(mine, right, strict=True)):
            if actual != expected:
                merged[row][step] = actual
                break
    return merged


def batch_size_for(candidate: Candidate, request: Request) -> int:
    """Rows that are decoded together: as asked for, but one by one where lengths differ and padding cannot be told."""
    if candidate.interface.batch_size is not None:
        return candidate.interface.batch_size
    ragged = len({len(prompt) for prompt in request.prompts}) > 1
    return 1 if ragged and not candidate.can_pad_left else request.batch_size or len(request.prompts)


def notes_on(candidate: Candidate, request: Request) -> list[str]:
    """What a reader has to know of how this candidate was compared."""
    notes = []
    if not candidate.interface.has_cache and "on" in request.modes:
        notes.append(
            f"{candidate.runtime}: the export has no past_key_values input, so it was compared without a cache only"
        )
    asked = request.batch_size or len(request.prompts)
    if candidate.interface.batch_size not in (None, asked):
        notes.append(f"{candidate.runtime}: the export takes {candidate.interface.batch_size} rows and no other number")
    elif batch_size_for(candidate, request) < asked:
        notes.append(
            f"{candidate.runtime}: the export cannot be told of left padding, so its prompts were run one by one"
        )
    return notes


def is_padded(request: Request, batch_size: int) -> bool:
    """Whether any batch of so many rows holds prompts of different lengths."""
    lengths = [len(prompt) for prompt in request.prompts]
    starts = range(0, len(lengths), batch_size)
    return any(len(set(lengths[start : start + batch_size])) > 1 for start in starts)


def not_revealed(config: Config, request: Request, padded: bool) -> list[str]:
    """Mistakes that these prompts could not have shown, and why; `padded` says whether any batch was left-padded."""
    longest = max(map(len, request.prompts)) + request.max_new_tokens - 1
    hidden = []
    if longest < 2:
        hidden.append("rope: no sequence is longer than one token")
    if config.sliding_window is not None and longest <= config.sliding_window:
        hidden.append(f"sliding-window: no sequence is longer than the window of {config.sliding_window}")
    rope = config.rope_parameters
    if rope.rope_type == "dynamic" and longest <= config.max_position_embeddings:
        hidden.append(f"rope-scaling: no sequence is longer than {config.max_position_embeddings} tokens")
    if not padded:
        hidden.append("padding-unmasked, positions-ignore-padding: no batch was left-padded")
    if config.num_hidden_layers <= 10:
        hidden.append("cache-layer-order: sorting as text goes wrong only with more than 10 layers")
    if "on" in request.modes and request.max_new_tokens < 2:
        hidden.append("cache: nothing was decoded after the first token, so no cache was read")
    if len(request.prompts) < 2:
        hidden.append("cache-not-reset: there was one prompt only")
    return hidden
