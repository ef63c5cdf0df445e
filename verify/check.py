"""`python -m verify check`: what another system decoded, judged by its record alone.

The reference reads prompts and tokens of the record in one teacher-forced pass: each token is held against the
reference's choice after the same tokens, so that one early difference does not hide the rest.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from refengine.checkpoint import Checkpoint, open_checkpoint
from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Settings
from verify.diagnose_trace import diagnose_trace
from verify.drive import CandidateRun
from verify.expect import Expectation, expected
from verify.files import sha256_of
from verify.judge import compare_noise, count_tokens, differences, verdict_on
from verify.naming.counterfactual import Mistakes
from verify.report.result import Cell, Exported, LogProbs, Model, NoiseRatio, Report, Seconds
from verify.request import Request, not_revealed
from verify.trace_file import TopLogprobs, Trace, check_trace, read_trace
from verify.truth.follow import follow
from verify.truth.noise import rms
from verify.truth.reference import Reference, Rows
from verify.verbs.terminal import check_json_place, deliver, progress_bars


def run_check(options: argparse.Namespace) -> int:
    """Judges a trace, prints the report, writes what was asked for, and returns the exit code."""
    check_json_place(options.json)
    expectation = check_expectation(expected(options.expect))
    trace = read_trace(options.trace)
    checkpoint = open_checkpoint(options.model)
    check_trace(options.trace, trace, checkpoint.config)
    with progress_bars() as progress:
        begin = partial(progress.begin, steps=None)
        cell = judge_trace(checkpoint, trace, expectation, begin)
        judge = partial(judge_trace, checkpoint, expectation=expectation)
        diagnosed = None
        if not options.no_diagnose:
            seconds = options.diagnose_seconds
            diagnosed = diagnose_trace(checkpoint, trace, cell, judge, seconds=seconds, on_progress=begin)
    report = Report(
        Model(str(checkpoint.path), checkpoint.config.model_type, sha256_of(*checkpoint.files)),
        Exported(str(options.trace), _kind(trace), sha256_of(options.trace)),
        len(trace.prompts),
        max(map(len, trace.tokens)),
        (cell,),
        tuple(after_end_tokens(trace, checkpoint.config)),
        tuple(hidden_from_trace(trace, checkpoint.config)),
        diagnosed=diagnosed,
    )
    deliver(report, options.json)
    return report.exit_code


def check_expectation(expectation: Expectation | None) -> Expectation:
    """The expectation, unless it asks for what no record shows: the settings or the weights of what made it.

    Raises:
        InputError: it does.
    """
    if expectation is None:
        raise InputError("--expect auto: a record does not say how it was made; expected the name of a precision")
    if expectation.own_weights:
        raise InputError(
            f"--expect {expectation.name}: a record does not hold the weights that it was made with; give MODEL with "
            "these weights, as a .gguf file or a directory, and leave this out"
        )
    return expectation


def judge_trace(
    checkpoint: Checkpoint,
    trace: Trace,
    expectation: Expectation,
    on_progress: Callable[[str], None] = lambda what: None,
    mistakes: Mistakes = (),
) -> Cell:
    """The verdict on a trace that `check_trace` has passed, and an expectation that `check_expectation` has.

    Args:
        mistakes: of the loop that the reference is decoded in, to see whether they explain the trace.
    """
    began = time.perf_counter()
    engine = Reference(checkpoint, on_progress, expectation.scheme, expectation.arithmetic)
    asked = None if trace.logprobs is None else _Asked.of(trace.logprobs)
    asked_SK = asked.token_ids_SK if asked else None
    reference, logprobs = follow(engine, trace.prompts, trace.tokens, asked_SK, mistakes)
    nats = None
    noise: NoiseRatio | None = None
    run = CandidateRun(trace.tokens, trace.logits or [np.empty((len(new), 0)) for new in trace.tokens], {}, seconds=0.0)
    if trace.logits is not None:
        noise = compare_noise(run, reference)
    if asked is not None and logprobs is not None:
        noise = compare_noise(replace(run, logits=asked.rows(trace.tokens)), replace(reference, logits=logprobs))
        nats = asked.in_nats(logprobs.value64_PX)
    found = differences(run, reference)
    tokens = count_tokens(found, reference)
    return Cell(
        runtime="trace",
        cache="unknown",
        settings=asdict(Settings()),
        verdict=verdict_on(tokens, noise),
        batching=None,
        batch_size=None,
        tokens=tokens,
        noise_ratio=noise and _in_whole_rows(noise, trace.prompts),
        seconds=Seconds(None, time.perf_counter() - began),
        expect=expectation.name,
        logprobs=nats,
        differences=tuple(found),
    )


def after_end_tokens(trace: Trace, config: Config) -> list[str]:
    """A note on rows that go on after an end token."""
    ends = [
        next((step for step, token in enumerate(new[:-1]) if token in config.eos_token_id), None)
        for new in trace.tokens
    ]
    first = next(((row, step) for row, step in enumerate(ends) if step is not None), None)
    if first is None:
        return []
    rows = f"{len(ends) - ends.count(None)} of {len(ends)} rows go on"
    return [f"{rows} after an end token, the first of them row {first[0]} after step {first[1]}"]


@dataclass(frozen=True)
class _Asked:
    """The tokens whose log-probabilities a trace has, at each of all rows' steps.

    Steps that have fewer than others are filled up with -1, which asks for none, and 0.
    """

    token_ids_SK: np.ndarray
    logprobs_SK: np.ndarray

    @classmethod
    def of(cls, logprobs: Sequence[TopLogprobs]) -> "_Asked":
        steps = [step for row in logprobs for step in row]
        token_ids_SK = np.full((len(steps), max(map(len, steps))), -1)
        logprobs_SK = np.zeros(token_ids_SK.shape)
        for place, pairs in enumerate(steps):
            token_ids_SK[place, : len(pairs)], logprobs_SK[place, : len(pairs)] = zip(*pairs, strict=True)
        return cls(token_ids_SK, logprobs_SK)

    def rows(self, tokens: Rows) -> list[np.ndarray]:
        return np.split(self.logprobs_SK, np.cumsum([len(new) for new in tokens])[:-1])

    def in_nats(self, reference_SK: np.ndarray) -> LogProbs:
        difference = (self.logprobs_SK - reference_SK)[self.token_ids_SK >= 0]
        return LogProbs(difference.size, float(np.abs(difference).max()), float(rms(difference)))


def _in_whole_rows(noise: NoiseRatio, prompts: Rows) -> NoiseRatio:
    """With positions counted from the first token of a prompt; what was judged begins with its last."""
    worst = noise.worst_position
    worst = replace(worst, position=worst.position + len(prompts[worst.row]) - 1)
    return replace(noise, worst_position=worst, worst=worst)


def _kind(trace: Trace) -> str:
    if trace.logits is not None:
        return "trace of tokens and logits"
    return "trace of tokens" if trace.logprobs is None else "trace of tokens and logprobs"


def hidden_from_trace(trace: Trace, config: Config) -> list[str]:
    """As for a comparison, of whole rows; who was padded, and whether a cache was read, a trace does not say."""
    fed = [[*prompt, *new[:-1]] for prompt, new in zip(trace.prompts, trace.tokens, strict=True)]
    hidden = not_revealed(config, Request(fed, max_new_tokens=1, modes=()), padded=True)
    if trace.logits is None and trace.logprobs is None:
        hidden.append("drift: the trace holds neither logits nor logprobs, so its tokens alone were judged")
    return hidden
