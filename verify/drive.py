"""Drives a candidate: greedy decoding or given tokens, with its cache and without, in the batches of a schedule."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from refengine.tokens import Rows, left_padded
from verify.candidates import Candidate, Past
from verify.errors import NoVerdict
from verify.feeds import merge, select
from verify.schedule import Schedule

OnStep = Callable[[int], None]  # called with the number of tokens just gained, over all rows


@dataclass(frozen=True)
class CandidateRun:
    """What a candidate gave for some prompts.

    Attributes:
        tokens: its own choice at every step of each row; where tokens were forced, what it would have chosen.
        logits: of each row, at its last `len(logits)` positions (an export may give the last position's alone).
        caches: trace point -> of each row, keys or values at every position, heads flattened; empty if it gives none.
        seconds: spent in the candidate.
        codes: the same of a cache that shows no more than its codes, as uint8.
    """

    tokens: Rows
    logits: Sequence[np.ndarray]
    caches: Mapping[str, Sequence[np.ndarray]]
    seconds: float
    codes: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)


def run_candidate(
    candidate: Candidate,
    prompts: Rows,
    schedule: Schedule,
    *,
    use_cache: bool,
    forced: Rows | None = None,
    on_step: OnStep = lambda tokens: None,
) -> CandidateRun:
    """Decodes each prompt for as many steps as the schedule has it in, going on past end tokens.

    Rows that join a batch are read in a pass of their own, and their past is merged into that of the rows before them;
    of rows that leave it, the past is dropped. Without the cache every step is one pass over whole sequences.

    Args:
        schedule: the rows of each step, in any order; the steps of a row come one after the other.
        use_cache: feed only the new token and the past; otherwise the whole sequence again at every step.
        forced: tokens to feed whatever the candidate chooses.

    Raises:
        NoVerdict: the runtime failed, or gave a past that no step can go on from where one is to.
    """
    decoding = _Decoding(candidate, prompts, forced, use_cache)
    running: list[int] = []  # the rows of `past`
    past: Past | None = None
    for rows, later in pairwise([*schedule, ()]):
        joining = [row for row in rows if row not in running]
        if running:
            past = decoding.step(running, past)
        if joining:
            past = _joined(past, decoding.step(joining, None))
        batch = running + joining
        for place, row in enumerate(batch):
            if row not in later:
                decoding.end(row, past, place)
        running = [row for row in batch if row in later] if use_cache else []
        if not running:
            past = None
        elif past and len(running) < len(batch):
            past = select(past, [batch.index(row) for row in running])
        on_step(len(rows))
    return decoding.run()


def _joined(past: Past | None, theirs: Past | None) -> Past | None:
    return merge(past, theirs) if past and theirs else theirs


@dataclass
class _Row:
    """A prompt, and what a candidate has made of it."""

    tokens: list[int]  # the prompt, and what is fed after it
    chosen: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)  # (positions, V) of each pass; one array once it has ended
    cache: Mapping[str, np.ndarray] = field(default_factory=dict)  # once it has ended


class _Decoding:
    """A run of a candidate on its way."""

    def __init__(self, candidate: Candidate, prompts: Rows, forced: Rows | None, use_cache: bool):
        self.candidate = candidate
        self.use_cache = use_cache
        self.rows = [_Row(list(prompt)) for prompt in prompts]
        self.forced = forced
        self.seconds = 0.0

    def step(self, numbers: Sequence[int], past: Past | None) -> Past | None:
        """One pass that gives each of these rows a token, and what is past after it.

        Rows are fed their newest token after their past, or without one all of their tokens.
        """
        rows = [self.rows[number] for number in numbers]
        if past is None:
            token_ids_BT, positions_BT = left_padded([row.tokens for row in rows])
        else:
            token_ids_BT = np.array([row.tokens[-1:] for row in rows])
            positions_BT = np.array([[len(row.tokens) - 1] for row in rows])
        began = time.perf_counter()
        result = self.candidate.run(token_ids_BT, positions_BT, past)
        self.seconds += time.perf_counter() - began
        if self.use_cache and result.past is not None and result.past.fault:
            raise NoVerdict(result.past.fault)
        for number, row, logits_TV in zip(numbers, rows, result.logits_BTV, strict=True):
            new = 1 if row.chosen else len(row.tokens)
            # A copy, since a view would keep the logits of the whole batch and its padding alive.
            row.logits.append(logits_TV[-new:].copy())
            row.chosen.append(int(logits_TV[-1].argmax()))
            row.tokens.append(self.forced[number][len(row.chosen) - 1] if self.forced else row.chosen[-1])
        return result.past

    def end(self, number: int, past: Past | None, place: int) -> None:
        """Keeps what is kept of a row that has all its tokens, which is at this place of `past`."""
        row = self.rows[number]
        row.logits = [np.concatenate(row.logits)]
        row.cache = _cache(self.candidate, past, place) if past else {}

    def run(self) -> CandidateRun:
        """What the rows got, once all of them have ended."""
        shown = [name for name in self.rows[0].cache if all(name in row.cache for row in self.rows)]
        held = {name: [row.cache[name] for row in self.rows] for name in shown}
        shows_codes = any(rows[0].dtype == np.uint8 for rows in held.values())
        return CandidateRun(
            tokens=[row.chosen for row in self.rows],
            logits=[row.logits[0] for row in self.rows],
            caches={} if shows_codes else held,
            seconds=self.seconds,
            codes=held if shows_codes else {},
        )


def _cache(candidate: Candidate, past: Past, place: int) -> dict[str, np.ndarray]:
    """A row's keys and values by trace point, at its own positions only."""
    there_S = past.positions_BS[place] >= 0
    return {
        point: x_BKSH[place].swapaxes(0, 1)[there_S].reshape(int(there_S.sum()), -1)
        for point, x_BKSH in candidate.caches(past).items()
    }
