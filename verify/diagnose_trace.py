"""What the loop did wrong that decoded a trace: the reference is run in such loops, along the trace's own tokens."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import Literal

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.config import Config
from verify.causes import Evidence, Family
from verify.causes.cache import cache_not_reset
from verify.causes.driver import USUAL_PENALTIES, bos_doubled, bos_missing, mask_length, repetition_penalty
from verify.causes.pages import fix
from verify.causes.rope import position_offset
from verify.naming.as_if import Passes, run_as_if
from verify.naming.counterfactual import Counterfactual, Mistakes
from verify.naming.screen import EXPLAINED
from verify.report.result import CauseFound, Cell, Diagnosis, Residual
from verify.trace_file import Trace
from verify.truth.follow import log_softmax
from verify.truth.noise import rms
from verify.truth.opened import open_weights

Status = Literal["confirmed", "equivalent", "ruled-out"]
LOOPS = (bos_missing, bos_doubled, mask_length, position_offset, cache_not_reset)
SCREENED = 128  # new tokens of all rows together that a loop is first tried on
LEAST_SCREENED = 8  # of them in a row
HELPS = 0.5  # a loop that leaves more than this of what is wrong is not it
ENOUGH = 4  # tokens that a cause has to put right where nothing else is recorded: fewer may be chance
OWN = (
    "what is recorded beside the tokens is the model's own, so only their choice is another: they were sampled, or an "
    "option of the search acts behind what is recorded"
)
PENALTIES = np.arange(1.01, 2.0, 0.01)
FINE_PENALTIES = 400  # values on a logarithmic scale, where logits are recorded


def diagnose_trace(
    checkpoint: Checkpoint,
    trace: Trace,
    cell: Cell,
    judge: Callable[..., Cell],
    *,
    seconds: float,
    goes_on: bool = False,
    on_progress: Callable[[str], None] = lambda what: None,
) -> Diagnosis | None:
    """Which mistakes of the loop explain a trace: all of its tokens, and its logits where they are recorded.

    Args:
        cell: the verdict on the trace.
        judge: gives the verdict on a `trace` against a reference with `mistakes`.
        seconds: after which nothing new is begun.
        goes_on: it was asked to go on after end tokens.

    Returns:
        None where there is nothing to explain.
    """
    ends = time.monotonic() + seconds
    ended = [] if goes_on else list(_ignored_ends(trace, checkpoint.config))
    if cell.verdict not in ("drift", "mismatch"):
        return Diagnosis("named", tuple(ended)) if ended else None
    wrong = [each for each in cell.differences if not each.tie]
    is_own = _is_right_but_for_tokens(cell)
    if is_own:  # what was recorded is what the model gave, before a token was chosen
        trace, cell = replace(trace, logits=None, logprobs=None), replace(cell, noise_ratio=None)
    if cell.noise_ratio is None and len(wrong) < ENOUGH:
        note = f"fewer than {ENOUGH} tokens differ: any cause could explain so few; record logprobs to tell them apart"
        return _with_ended(Diagnosis("unexplained", notes=(note,), untried=note), ended)
    if (not_finite := _not_finite(trace)) is not None:
        return _with_ended(Diagnosis("unexplained", notes=(not_finite,), untried=not_finite), ended)
    on_progress("looking for the cause")
    screen = _Screen(checkpoint, trace)
    confirmed: list[CauseFound] = []
    ruled_out: list[CauseFound] = []
    notes = [OWN] if is_own else []
    for loop, score in screen.best_first():
        if score > HELPS * screen.before:
            ruled_out.append(_found(loop, cell, None, "ruled-out"))
        elif time.monotonic() > ends:
            notes.append(f"not confirmed within the time: {loop.cause}; give more with --diagnose-seconds")
        else:
            on_progress(f"confirming {loop.cause}")
            judged = judge(trace=trace, mistakes=[loop])
            is_it = _is_explained(cell, judged)
            found = _found(loop, cell, judged, "confirmed" if is_it else "ruled-out")
            (confirmed if is_it else ruled_out).append(found)
    if not confirmed and time.monotonic() < ends and (cell.noise_ratio is not None or len(wrong) >= 2 * ENOUGH):
        on_progress("looking for two mistakes")
        if both := _two_mistakes(screen, cell, partial(judge, trace=trace)):
            rest = (each for each in ruled_out if each.name not in {one.name for one in both})
            return _with_ended(Diagnosis("named", (*both, *rest), notes=tuple(notes)), ended)
    explained = [confirmed[0], *(replace(each, status="equivalent") for each in confirmed[1:])] if confirmed else []
    explained_by: Literal["named", "ambiguous"] = "ambiguous" if len(confirmed) > 1 else "named"
    whole = Diagnosis(explained_by if confirmed else "unexplained", (*explained, *ruled_out), notes=tuple(notes))
    return _with_ended(whole, ended)


def _two_mistakes(screen: "_Screen", cell: Cell, judge: Callable[..., Cell]) -> list[CauseFound]:
    """Two that explain a trace together, where one does not; none where there are no such."""
    both, score = screen.best_pair()
    if score > HELPS * screen.before:
        return []
    judged = judge(mistakes=both)
    return [_found(each, cell, judged, "confirmed") for each in both] if _is_explained(cell, judged) else []


def _is_explained(cell: Cell, judged: Cell) -> bool:
    """Whether all tokens are right, and what is left is noise over all positions together.

    As of an export: at a single position, a reference with a mistake may be more sensitive than its few orders show.
    """
    if judged.tokens is None or judged.tokens.first_mismatch is not None:
        return False
    was, left = cell.noise_ratio, judged.noise_ratio
    if was is None or left is None:
        return judged.verdict == "equal"
    return left.logits <= left.bound and left.logits <= EXPLAINED * was.logits


def _not_finite(trace: Trace) -> str | None:
    """Where logits are NaN or infinite first; None where all that were recorded are finite."""
    for row, logits_TV in enumerate(trace.logits or ()):
        wrong_T = ~np.isfinite(logits_TV).all(axis=-1)
        if wrong_T.any():
            where = f"logits are NaN or infinite from row {row}, step {int(wrong_T.argmax())} on"
            return f"{where}, so that no cause of the catalogue can be tried"
    return None


def _with_ended(found: Diagnosis, ended: Sequence[CauseFound]) -> Diagnosis:
    """With the end tokens that were ignored too: a cause beside another one, and no part of what is not explained."""
    if found.status == "named":
        return replace(found, causes=(*found.causes[:1], *ended, *found.causes[1:]))
    notes = [f"besides, end tokens were ignored ({each.name}): {each.parameters['ids']}" for each in ended]
    beside = ended if found.status == "unexplained" else ()  # of several causes, it is none that could be another one
    return replace(found, causes=(*beside, *found.causes), notes=(*found.notes, *notes))


class _Screen:
    """The first new tokens of each row, in float32.

    What a loop leaves unexplained is measured by the rms error of what is recorded, or by the tokens that differ.
    """

    def __init__(self, checkpoint: Checkpoint, trace: Trace):
        steps = max(LEAST_SCREENED, SCREENED // len(trace.tokens))
        self._tokens = [new[:steps] for new in trace.tokens]
        self._trace = trace
        self._weights = open_weights(checkpoint, np.float32)
        batches = [(row,) for row in range(len(trace.prompts))]
        self._passes = Passes(trace.prompts, self._tokens, batches, use_cache=True)
        self._right = run_as_if(self._weights, self._passes, ())
        self._evidence = Evidence(
            checkpoint.config,
            use_cache=any(len(new) > 1 for new in trace.tokens),
            longest=max(len(prompt) + len(new) - 1 for prompt, new in zip(trace.prompts, trace.tokens, strict=True)),
            batches=len(batches),
            is_our_loop=False,
        )
        self.before = self._left(self._right)

    def best_first(self) -> list[tuple[Counterfactual, float]]:
        """Of each cause what explains most, and how much it leaves."""
        penalty = self._best_penalty(self._right)
        return sorted([*self._best_loops.values(), penalty], key=lambda each: each[1])

    def best_pair(self) -> tuple[Mistakes, float]:
        """A loop and a penalty, or two loops, that together explain most, and how much they leave."""
        singles = sorted(self._best_loops.values(), key=lambda each: each[1])
        found: list[tuple[Mistakes, float]] = []
        for loop, _ in singles:
            penalty, left = self._best_penalty(self._run(loop))
            found.append(((loop, penalty), left))
        for first, _ in singles[:1]:
            others = (each for each in self._loops() if each.cause != first.cause)
            found += [((first, other), self._left(self._run(first, other))) for other in others]
        return min(found, key=lambda each: each[1], default=((), self.before))

    def _loops(self) -> Iterator[Counterfactual]:
        loops = chain.from_iterable(cause(self._evidence) for cause in LOOPS)
        return (each for each in loops if isinstance(each, Counterfactual))

    @cached_property
    def _best_loops(self) -> dict[str, tuple[Counterfactual, float]]:
        best: dict[str, tuple[Counterfactual, float]] = {}
        for loop in self._loops():
            left = self._left(self._run(loop))
            if loop.cause not in best or left < best[loop.cause][1]:
                best[loop.cause] = loop, left
        return best

    def _run(self, *loops: Counterfactual) -> list[np.ndarray]:
        """Of the tokens that are screened; where rows see those before them, these are run to their ends."""
        if not any(loop.keeps_rows for loop in loops):
            return run_as_if(self._weights, self._passes, loops)
        rows = run_as_if(self._weights, replace(self._passes, tokens=self._trace.tokens), loops)
        screened = zip(rows, self._trace.tokens, self._tokens, strict=True)
        return [logits_PV[: len(logits_PV) - len(new) + len(some)] for logits_PV, new, some in screened]

    def _best_penalty(self, rows: Sequence[np.ndarray]) -> tuple[Counterfactual, float]:
        """The usual value that explains most, or the one that does so best; of tokens alone a range of them does.

        Args:
            rows: the logits that it is put on.
        """
        found = []
        for make in _penalties(self._evidence):
            values = [float(f"{value:.2f}") for value in PENALTIES]
            left = {value: self._left_by(rows, make(value)) for value in dict.fromkeys([*USUAL_PENALTIES, *values])}
            least = min(left.values())
            if self._has_numbers:
                middle = min(left, key=lambda value: left[value])
                fine = np.geomspace(middle / 1.02, middle * 1.02, FINE_PENALTIES // 10)
                left |= {value: self._left_by(rows, make(value)) for value in map(float, fine)}
                value = next((usual for usual in USUAL_PENALTIES if left[usual] <= 1.02 * min(left.values())), None)
                value = value or min(left, key=lambda each: left[each])
                found.append((make(value), left[value]))
                continue
            fitting = sorted(value for value, each in left.items() if each == least)
            value = next((usual for usual in USUAL_PENALTIES if usual in fitting), fitting[len(fitting) // 2])
            made = make(value)
            between = {"least": fitting[0], "most": fitting[-1]}
            found.append((replace(made, parameters={**made.parameters, **between}), least))
        return min(found, key=lambda each: each[1])

    @property
    def _has_numbers(self) -> bool:
        return self._trace.logits is not None or self._trace.logprobs is not None

    def _left_by(self, rows: Sequence[np.ndarray], choice: Counterfactual) -> float:
        """Of a mistake in the choice alone, which needs no other pass."""
        of_rows = zip(rows, self._passes.prompts, self._tokens, strict=True)
        return self._left(
            [choice.logits(logits_PV, [*prompt, *new[:-1]], len(prompt) - 1) for logits_PV, prompt, new in of_rows]
        )

    def _left(self, rows: Sequence[np.ndarray]) -> float:
        chosen = [logits_PV[-len(new) :] for logits_PV, new in zip(rows, self._tokens, strict=True)]
        trace = self._trace
        if trace.logits is not None:
            given = (row[: len(made)] for row, made in zip(trace.logits, chosen, strict=True))
            return float(rms(np.concatenate([made - row for made, row in zip(chosen, given, strict=True)])))
        if trace.logprobs is not None:
            errors = [
                logprobs_V[token] - logprob
                for made, row in zip(chosen, trace.logprobs, strict=True)
                for logprobs_V, pairs in zip(log_softmax(made), row, strict=False)
                for token, logprob in pairs
            ]
            return float(rms(np.array(errors)))
        differ = [made.argmax(axis=-1) != np.array(new) for made, new in zip(chosen, self._tokens, strict=True)]
        return float(np.concatenate(differ).sum())


def _is_right_but_for_tokens(cell: Cell) -> bool:
    noise = cell.noise_ratio
    return noise is not None and noise.logits <= noise.bound and noise.worst_position.ratio <= noise.position_bound


def _penalties(evidence: Evidence) -> Iterator[Callable[[float], Counterfactual]]:
    return (each.make for each in repetition_penalty(evidence) if isinstance(each, Family))


def _found(loop: Counterfactual, cell: Cell, judged: Cell | None, status: Status) -> CauseFound:
    ratio = None
    if cell.noise_ratio is not None and judged is not None and judged.noise_ratio is not None:
        ratio = Residual(cell.noise_ratio.logits, judged.noise_ratio.logits)
    return CauseFound(loop.cause, loop.parameters, None, ratio, status, fix(loop.cause))


def _ignored_ends(trace: Trace, config: Config) -> Iterator[CauseFound]:
    """Rows that go on after an end token of the configuration's say so themselves."""
    passed = sorted({token for new in trace.tokens for token in new[:-1]} & set(config.eos_token_id))
    if passed:
        yield CauseFound("eos-ignored", {"ids": passed}, None, None, "confirmed", fix("eos-ignored"))
