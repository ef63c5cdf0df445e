"""Compares an export with its checkpoint: every runtime asked for, with the cache and without it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, Protocol

from refengine.checkpoint import Checkpoint
from refengine.config import Config
from refengine.requests import Limits
from verify.candidates import Opened, Settings
from verify.contestant import Contestant
from verify.drive import CandidateRun
from verify.errors import NoVerdict
from verify.expect import EXACT, Expectation
from verify.judge import judge
from verify.reference import Reference, ReferenceRun
from verify.report.result import Cell, Seconds
from verify.schedule import SCHEDULES, Batching, Schedule, is_padded

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
    """What to compare: prompts, how far to decode, in which cache modes, and who is decoded together.

    Attributes:
        batch_size: most rows at once; None: all of them.
        batching: when rows join and leave a batch.
        max_tokens: of dynamic batches, most slots of the cache (rows times the longest of them, new tokens included).
        expectation: what a cached run is held against; None: what each candidate's own settings say.
    """

    prompts: Rows
    max_new_tokens: int
    modes: tuple[CacheMode, ...] = ("off", "on")
    batch_size: int | None = None
    batching: Batching = "static"
    max_tokens: int | None = None
    expectation: Expectation | None = EXACT

    @property
    def lengths(self) -> list[int]:
        """Of the prompts."""
        return [len(prompt) for prompt in self.prompts]

    @property
    def most_rows(self) -> int:
        """That are ever decoded together."""
        return self.batch_size or len(self.prompts)

    @property
    def schedule(self) -> Schedule:
        """Who is decoded together, step by step."""
        limits = Limits(self.most_rows, self.max_tokens)
        return SCHEDULES[self.batching](self.lengths, self.max_new_tokens, limits)

    @property
    def is_padded(self) -> bool:
        """Whether any batch has rows of different lengths."""
        return is_padded(self.schedule, self.lengths)


class Comparison:
    """One checkpoint and some prompts, against any number of opened candidates.

    The reference runs once: its greedy tokens do not depend on who is compared with it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        request: Request,
        progress: Progress,
        exact_run: ReferenceRun | None = None,
    ):
        self.checkpoint = checkpoint
        self.request = request
        self.progress = progress
        self.reference_runs = {} if exact_run is None else {EXACT: exact_run}

    def cells(self, candidate: Contestant) -> list[Cell]:
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
        settings, asked = asdict(Settings(requested)), self.request
        expected = (asked.expectation or EXACT).name
        return [
            Cell(runtime, mode, settings, "no-verdict", asked.batching, asked.most_rows, reason=reason, expect=expected)
            for mode in asked.modes
        ]

    def cell(self, candidate: Contestant, mode: CacheMode) -> Cell:
        """The verdict on one candidate in one cache mode; what stops the runtime becomes the cell's reason."""
        request = request_for(candidate, self.request)
        # Without its cache a runtime reads every key and value as it computed them.
        expectation = (request.expectation or candidate.expectation) if mode == "on" else EXACT
        cell = Cell(
            candidate.runtime,
            mode,
            asdict(candidate.settings),
            "no-verdict",
            request.batching,
            request.most_rows,
            expect=expectation.name,
        )
        try:
            verdict, tokens, noise, seconds = self._judged(candidate, mode, request, expectation)
            cell = replace(cell, verdict=verdict, tokens=tokens, noise_ratio=noise, seconds=seconds)
        except NoVerdict as error:
            cell = replace(cell, reason=str(error))
        return replace(cell, peak_memory_bytes=candidate.peak_memory, output=tuple(candidate.said))

    def _judged(self, candidate: Contestant, mode: CacheMode, request: Request, expectation: Expectation) -> tuple:
        run = self._drive(candidate, mode, request)
        seconds, began = run.seconds, time.perf_counter()
        if expectation not in self.reference_runs:
            engine = Reference(self.checkpoint, lambda what: self.progress.begin(what, None), expectation.scheme)
            self.reference_runs[expectation] = engine.run(request.prompts, request.max_new_tokens, run.tokens)
        reference, reference_seconds = self.reference_runs[expectation], time.perf_counter() - began
        if run.tokens != reference.tokens:
            # From its first difference on, the candidate saw other tokens; feed both the same, so that one early
            # flip does not hide the rest. That difference itself stands, should the second run not repeat it.
            forced = self._drive(candidate, mode, request, forced=reference.tokens)
            seconds += forced.seconds
            run = replace(forced, tokens=_with_first_differences(forced.tokens, run.tokens, reference.tokens))
        began = time.perf_counter()
        verdict, tokens, noise = judge(run, reference)
        if expectation.scheme is not None:
            # Values of a quantised cache differ where a code fell on the other side of a step: too seldom for a
            # handful of orders to say how often is too often. What comes of it is judged by the logits.
            noise = replace(noise, cache_beyond=())
        return verdict, tokens, noise, Seconds(seconds, reference_seconds + time.perf_counter() - began)

    def _drive(
        self, candidate: Contestant, mode: CacheMode, request: Request, forced: Rows | None = None
    ) -> CandidateRun:
        again = "" if forced is None else ", on the reference's tokens"
        self.progress.begin(f"{candidate.runtime}, cache {mode}{again}", len(request.prompts) * request.max_new_tokens)
        return candidate.decode(
            request.prompts,
            request.schedule,
            use_cache=mode == "on",
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


def request_for(candidate: Opened, request: Request) -> Request:
    """The request as this candidate can meet it: static batches of the number of rows that it takes, or of one.

    Rows of different lengths need padding in front, in the past too where they join a running batch. A cache that codes
    neighbours in time together codes padding with them, and what that holds is nobody's business but the runtime's.
    """
    if candidate.interface.batch_size is not None:
        return replace(request, batching="static", batch_size=candidate.interface.batch_size)
    ragged = request.batching == "continuous" or len(set(request.lengths)) > 1
    scheme = (request.expectation or candidate.expectation).scheme
    padding_matters = scheme is not None and scheme.groups_tokens
    if ragged and request.most_rows > 1 and (padding_matters or not candidate.can_pad_left):
        return replace(request, batching="static", batch_size=1)
    if request.batching == "continuous" and not candidate.can_merge:
        return replace(request, batching="static")
    return request


def notes_on(candidate: Opened, request: Request) -> list[str]:
    """What a reader has to know of how this candidate was compared."""
    notes = []
    if not candidate.interface.has_cache and "on" in request.modes:
        notes.append(
            f"{candidate.runtime}: the export has no past_key_values input, so it was compared without a cache only"
        )
    if request.expectation is None and "on" in request.modes:
        notes.append(f"{candidate.runtime}: its settings say that its cache is {candidate.expectation.name}")
    met = request_for(candidate, request)
    if (met.batching, met.most_rows) == (request.batching, request.most_rows):
        return notes
    why = "the export cannot be told of left padding, so its prompts were run one by one"
    if candidate.can_pad_left:
        why = "its cache would code padding together with tokens, so its prompts were run one by one"
    if met.most_rows == request.most_rows:
        why = "the export keeps its past to itself, so that no row can join or leave: it was run in static batches"
    if candidate.interface.batch_size is not None:
        instead = "" if request.batching == "static" else ", so it was run in static batches of as many"
        why = f"the export takes {met.most_rows} rows and no other number{instead}"
    return [*notes, f"{candidate.runtime}: {why}"]


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
