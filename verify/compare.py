"""Compares an export with its checkpoint: every runtime asked for, with the cache and without it."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from refengine.checkpoint import Checkpoint
from refengine.errors import CheckpointError
from refengine.tokens import Rows
from verify.candidates import Opened, Settings
from verify.contestant import Contestant
from verify.drive import CandidateRun
from verify.errors import NoVerdict
from verify.expect import AND, EXACT, Expectation, expectations, joined
from verify.judge import judge, verdict_on
from verify.own_weights import are_expected
from verify.report.result import Cell, Judgement, Seconds
from verify.request import CacheMode, Request, request_for
from verify.truth.arithmetic import FLOAT32
from verify.truth.reference import ReferenceRun
from verify.truth.references import References
from verify.weights.exported import ExportedCheckpoint


class Progress(Protocol):
    """Told how a comparison goes on, for somebody who waits."""

    def begin(self, what: str, steps: int | None) -> None:
        """Something begins that takes so many steps (None: unknown)."""

    def advance(self, steps: int) -> None:
        """So many steps are done."""


@dataclass(frozen=True)
class Unequal:
    """A run whose verdict is to be explained.

    Attributes:
        mode: with the cache, or without it.
        request: as it was met.
        expectation: what it was held against.
        run: what the candidate gave when it was fed the reference's tokens.
        reference: of the same tokens.
        along: of the same, with the run's own choice of codes; None where its cache has none, or does not show them.
    """

    mode: CacheMode
    request: Request
    expectation: Expectation
    run: CandidateRun
    reference: ReferenceRun
    along: ReferenceRun | None = None


@dataclass(frozen=True)
class Explained:
    """A run that is equal to what its own settings and weights say, though not to what was asked for.

    Attributes:
        asked, said: what it was held against.
        before, after: its noise ratio against each.
    """

    asked: Expectation
    said: Expectation
    before: float
    after: float


@dataclass(frozen=True)
class _Held:
    """A run held against one reference, and the seconds that it took of each side."""

    judgement: Judgement
    unequal: Unequal
    candidate_seconds: float
    reference_seconds: float


class Comparison:
    """One checkpoint and some prompts, against any number of opened candidates.

    The reference runs once: its greedy tokens do not depend on who is compared with it.

    Args:
        exact_run: the reference's run of the prompts, where there is one already.
        own: the weights that the export holds. Where they are not the checkpoint's, what they compute is held against
            the reference on them too, to tell what rounding weights costs from whatever else is wrong.

    Attributes:
        unequal: a run whose verdict is neither equal nor explained by what its own settings say. With the cache where
            there is one: without it every new token is a pass over all before it, and the cache tells where to look.
        explained: of those that are not equal and are explained by that, the one whose settings say most.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        request: Request,
        progress: Progress,
        exact_run: ReferenceRun | None = None,
        own: ExportedCheckpoint | None = None,
    ):
        self.request = request
        self.progress = progress
        self.own = own
        self.unequal: Unequal | None = None
        self.explained: Explained | None = None
        self.references = References(checkpoint, own, lambda what: progress.begin(what, None), exact_run)

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
        said = _in_mode(self._said(candidate), mode)
        expectation = said if request.expectation is None else _in_mode(request.expectation, mode)
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
            run = self._drive(candidate, mode, request)
            held, also, seconds = self._judged(candidate, mode, request, run, expectation)
            judged = held.judgement
            verdict, tokens, noise = judged.verdict, judged.tokens, judged.noise_ratio
            cell = replace(cell, verdict=verdict, tokens=tokens, noise_ratio=noise, seconds=seconds, also=also)
            if verdict in ("drift", "mismatch") and said.name != expectation.name:
                held = self._held(candidate, mode, request, run, said)  # so that its own noise hides no mistake
                if held.judgement.verdict == "equal":
                    cell = replace(cell, explained_by=said.name)
                    ratios = noise.logits, held.judgement.noise_ratio.logits
                    self._keep(Explained(expectation, said, *ratios))
            if verdict in ("drift", "mismatch") and cell.explained_by is None and (not self.unequal or mode == "on"):
                self.unequal = held.unequal
        except NoVerdict as error:
            cell = replace(cell, reason=str(error))
        return replace(cell, peak_memory_bytes=candidate.peak_memory, output=tuple(candidate.said))

    def _keep(self, explained: Explained) -> None:
        def parts(each: Explained) -> int:
            return len(each.said.name.split(AND))

        if self.explained is None or parts(explained) > parts(self.explained):
            self.explained = explained

    def _said(self, candidate: Opened) -> Expectation:
        """What a candidate's settings say, and the export's weights where they are nothing but rounded."""
        if self.own is None or self.own.is_exact or not self.own.is_faithful:
            return candidate.expectation
        return joined(expectations()[f"{self.own.stored_as}-weights"], candidate.expectation)

    def _judged(
        self, candidate: Contestant, mode: CacheMode, request: Request, run: CandidateRun, expectation: Expectation
    ) -> tuple[_Held, Judgement | None, Seconds]:
        """The judgement on a free run that counts, and the one on the other weights where they are others."""
        on_checkpoint = self._held(candidate, mode, request, run, replace(expectation, own_weights=False))
        all_held = [on_checkpoint]
        if self.own is not None and not self.own.is_exact:
            # Where they are not finite there is nothing to hold it against.
            with suppress(CheckpointError):
                all_held.append(self._held(candidate, mode, request, run, replace(expectation, own_weights=True)))
        seconds = Seconds(
            run.seconds + sum(held.candidate_seconds for held in all_held),
            sum(held.reference_seconds for held in all_held),
        )
        if len(all_held) == 1 or self.own is None:
            return on_checkpoint, None, seconds
        on_own = all_held[1]
        if are_expected(self.own, expectation):
            return on_own, on_checkpoint.judgement, seconds
        return on_checkpoint, on_own.judgement, seconds

    def _held(
        self, candidate: Contestant, mode: CacheMode, request: Request, run: CandidateRun, expectation: Expectation
    ) -> _Held:
        """A free run against one reference."""
        seconds, began = 0.0, time.perf_counter()
        asked = expectation, request.prompts, request.max_new_tokens, run.tokens
        right = self.references.tokens(*asked)
        reference_seconds = time.perf_counter() - began
        if run.tokens != right:
            # From its first difference on, the candidate saw other tokens; feed both the same, so that one early
            # flip does not hide the rest. That difference itself stands, should the second run not repeat it.
            forced = self._drive(candidate, mode, request, forced=right)
            seconds = forced.seconds
            run = replace(forced, tokens=_with_first_differences(forced.tokens, run.tokens, right))
        began = time.perf_counter()
        coarse = mode == "on" and expectation.arithmetic != FLOAT32 and expectation.scheme is None
        along = self.references.along(expectation, run.caches or run.codes)
        reference = along or self.references.run(*asked)
        verdict, tokens, noise = judge(run, reference, coarse=coarse)
        if along is not None and verdict != "equal":
            # Where it is wrong is told by runs with codes of their own, which are held against the same. A token that
            # is right after these is not wrong.
            reference = self.references.run(*asked)
            _, others, _ = judge(run, reference)
            tokens = tokens if others.first_mismatch else others
            verdict = verdict_on(tokens, noise)
        if expectation.scheme is not None:
            # Values of a quantised cache differ where a code fell on the other side of a step: too seldom for a
            # handful of orders to say how often is too often. What comes of it is judged by the logits.
            noise = replace(noise, cache_beyond=())
        judgement = Judgement("export" if expectation.own_weights else "checkpoint", verdict, tokens, noise)
        unequal = Unequal(mode, request, expectation, run, reference, along)
        return _Held(judgement, unequal, seconds, reference_seconds + time.perf_counter() - began)

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


def _in_mode(expectation: Expectation, mode: CacheMode) -> Expectation:
    """What the run of a cache mode is held against."""
    return expectation if mode == "on" else expectation.without_cache


def _with_first_differences(forced: Rows, free: Rows, reference: Rows) -> list[list[int]]:
    """The forced choices, but in each row the first that differed when the candidate ran freely."""
    merged = [list(row) for row in forced]
    for row, (mine, right) in enumerate(zip(free, reference, strict=True)):
        for step, (actual, expected) in enumerate(zip(mine, right, strict=True)):
            if actual != expected:
                merged[row][step] = actual
                break
    return merged
