"""Loops with a mistake are named from the record of what they decoded: from tokens alone, log-probabilities, logits."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from refengine.checkpoint import open_checkpoint
from refengine.tokenizer import encode_prompt, load_tokenizer
from refengine.weights import Weights
from tests.verify.commands import verify
from tests.verify.conftest import TEXTS, TINY_LLAMA
from tests.verify.traces import write_trace
from verify.causes import Evidence
from verify.causes.cache import cache_not_reset
from verify.causes.catalogue import name_of
from verify.causes.driver import bos_doubled, bos_missing, mask_length, repetition_penalty
from verify.causes.rope import position_offset, rope_theta
from verify.check import judge_trace
from verify.diagnose_trace import OWN, diagnose_trace
from verify.expect import EXACT
from verify.naming.as_if import Passes, run_as_if
from verify.naming.counterfactual import Counterfactual
from verify.report.result import Diagnosis
from verify.trace_file import Trace
from verify.truth.follow import log_softmax

pytestmark = pytest.mark.slow

NEW = 24
CHECKPOINT = open_checkpoint(TINY_LLAMA)
BOS = CHECKPOINT.config.bos_token_id
EVIDENCE = Evidence(CHECKPOINT.config, use_cache=True, longest=80, batches=2, is_our_loop=False)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights.open(CHECKPOINT, np.float32)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(TINY_LLAMA)
    return [[BOS, *encode_prompt(tokenizer, text, chat=False)] for text in TEXTS[1:]]


def decoded(weights: Weights, prompts: Sequence[Sequence[int]], mistakes: Sequence[Counterfactual]) -> Trace:
    """What a loop with these mistakes decodes greedily, one row after the other, with the logits that it chose by.

    All rows are run on a guess of their tokens, which becomes what they choose: every run settles one token at least.
    """
    tokens = [[0] * NEW for _ in prompts]
    while True:
        logits = [logits_PV[-NEW:] for logits_PV in run_as_if(weights, passes_of(prompts, tokens), mistakes)]
        chosen = [logits_TV.argmax(axis=-1).tolist() for logits_TV in logits]
        if chosen == tokens:
            return Trace(prompts, tokens, logits)
        tokens = chosen


def passes_of(prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> Passes:
    return Passes(prompts, tokens, [(row,) for row in range(len(prompts))], use_cache=True)


def kept(trace: Trace, what: str) -> Trace:
    if what == "logits":
        return trace
    if what == "tokens":
        return replace(trace, logits=None)
    rows = [
        [[(int(token), float(x_V[token])) for token in np.argsort(-x_V)[:5]] for x_V in log_softmax(logits_TV)]
        for logits_TV in trace.logits
    ]
    return replace(trace, logits=None, logprobs=rows)


def diagnosed(trace: Trace) -> Diagnosis | None:
    cell = judge_trace(CHECKPOINT, trace, EXACT)
    return diagnose_trace(CHECKPOINT, trace, cell, partial(judge_trace, CHECKPOINT, expectation=EXACT), seconds=300)


def named(trace: Trace) -> tuple[str, list[str]]:
    found = diagnosed(trace)
    return found.status, [each.name for each in found.causes if each.status != "ruled-out"]


def of(cause, **parameters) -> Counterfactual:
    """The counterfactual of a cause that has these parameters."""
    return next(each for each in cause(EVIDENCE) if parameters.items() <= each.parameters.items())


LOOPS = {
    "mask of the new tokens, zeros after it": of(mask_length, **{"a step sees": "the first token"}),
    "mask of the new tokens, zeros before it": of(mask_length, **{"a step sees": "itself"}),
    "stale positions": of(position_offset, position=0),
    "cache not reset": of(cache_not_reset, positions="begin again"),
    "a repetition penalty": of(repetition_penalty, repetition_penalty=1.1),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_with_a_mistake_is_named_by_its_tokens_alone(weights, prompts, name):
    loop = LOOPS[name]
    assert named(kept(decoded(weights, prompts, [loop]), "tokens")) == ("named", [loop.cause])


@pytest.mark.parametrize("what", ["logprobs", "logits"])
@pytest.mark.parametrize("name", ["mask of the new tokens, zeros before it", "cache not reset"])
def test_a_loop_with_a_mistake_is_named_by_what_is_recorded(weights, prompts, name, what):
    loop = LOOPS[name]
    assert named(kept(decoded(weights, prompts, [loop]), what)) == ("named", [loop.cause])


@pytest.mark.parametrize("cause", [bos_missing, bos_doubled])
def test_a_bos_that_is_missing_or_doubled_is_named(weights, prompts, cause):
    trace = kept(decoded(weights, prompts, [of(cause)]), "logprobs")
    assert named(trace) == ("named", [name_of(cause)])


def test_too_few_tokens_are_no_ground_for_a_name(weights, prompts):
    trace = kept(decoded(weights, prompts, [of(bos_missing)]), "tokens")
    found = diagnosed(trace)
    assert 0 < len(judge_trace(CHECKPOINT, trace, EXACT).differences) < 4
    assert (found.status, found.causes) == ("unexplained", ())
    assert "fewer than 4 tokens differ" in found.notes[0]


@pytest.mark.parametrize("wrong", [np.nan, -np.inf])
def test_no_cause_is_tried_on_logits_that_are_not_finite(weights, prompts, wrong):
    trace = kept(decoded(weights, prompts, []), "logits")
    logits = [logits_TV.copy() for logits_TV in trace.logits]
    logits[1][2, 7] = wrong
    found = diagnosed(replace(trace, logits=logits))
    assert (found.status, found.causes) == ("unexplained", ())
    assert found.untried.startswith("logits are NaN or infinite from row 1, step 2 on")


@pytest.mark.parametrize("what", ["tokens", "logits"])
def test_a_mistake_of_the_model_is_not_taken_for_one_of_the_loop(weights, prompts, what):
    trace = kept(decoded(weights, prompts, [next(iter(rope_theta(EVIDENCE)))]), what)
    assert judge_trace(CHECKPOINT, trace, EXACT).verdict == "mismatch"
    assert named(trace) == ("unexplained", [])


@pytest.mark.parametrize("what", ["logprobs", "logits"])
def test_the_value_of_a_penalty_is_solved_for(weights, prompts, what):
    penalty = repetition_penalty(EVIDENCE)
    family = next(each for each in penalty if not isinstance(each, Counterfactual))
    found = diagnosed(kept(decoded(weights, prompts, [family.make(1.37)]), what))
    cause = found.causes[0]
    assert (found.status, cause.name) == ("named", "repetition-penalty")
    assert cause.parameters["repetition_penalty"] == pytest.approx(1.37, abs=1e-6)
    assert cause.noise_ratio.after < 3 < cause.noise_ratio.before


def test_logits_before_the_penalty_leave_the_tokens_to_tell_of_it(weights, prompts):
    """As servers record them that give what the model said, and choose from something else."""
    trace = decoded(weights, prompts, [of(repetition_penalty, repetition_penalty=1.1)])
    rows = run_as_if(weights, passes_of(trace.prompts, trace.tokens), ())
    raw = replace(trace, logits=[logits_PV[-NEW:] for logits_PV in rows])
    found = diagnosed(raw)
    assert (found.status, found.causes[0].name) == ("named", "repetition-penalty")
    assert found.causes[0].parameters["least"] <= 1.1 <= found.causes[0].parameters["most"]


@pytest.mark.parametrize("what", ["logits", "logprobs"])
def test_two_mistakes_of_a_loop_are_named_together(weights, prompts, what):
    both = [of(bos_doubled), of(repetition_penalty, repetition_penalty=1.2)]
    found = diagnosed(kept(decoded(weights, prompts, both), what))
    assert (found.status, [each.name for each in found.causes[:2]]) == ("named", ["bos-doubled", "repetition-penalty"])
    assert all(each.status == "ruled-out" for each in found.causes[2:])
    assert found.causes[1].parameters["repetition_penalty"] == 1.2


def test_tokens_that_were_sampled_are_told_from_a_model_that_is_wrong(weights, prompts):
    right = decoded(weights, prompts, [])
    second = [[int(np.argsort(-logits_V)[1]) for logits_V in logits_TV] for logits_TV in right.logits]
    rows = run_as_if(weights, passes_of(prompts, second), ())
    found = diagnosed(Trace(prompts, second, [logits_PV[-NEW:] for logits_PV in rows]))
    assert (found.status, found.notes[0]) == ("unexplained", OWN)


def test_an_ignored_end_token_is_named_though_every_token_is_right(weights, prompts):
    trace = decoded(weights, prompts, ())
    end = CHECKPOINT.config.eos_token_id[0]
    going_on = Trace(trace.prompts[:1], [[*trace.tokens[0][:3], end, *trace.tokens[0][3:6]]])
    found = diagnosed(going_on)
    assert [(each.name, each.parameters) for each in found.causes if each.status == "confirmed"] == [
        ("eos-ignored", {"ids": [end]})
    ]


def test_an_honest_trace_has_nothing_to_explain(weights, prompts):
    assert diagnosed(decoded(weights, prompts, ())) is None


def test_the_command_names_the_mistake_of_the_loop(weights, prompts, tmp_path):
    trace = decoded(weights, prompts, [LOOPS["mask of the new tokens, zeros after it"]])
    path = write_trace(kept(trace, "tokens"), tmp_path / "trace.jsonl")
    done = verify("check", TINY_LLAMA, path)
    assert done.code == 1
    assert done.first_lines[1].startswith("cause: mask-length (a step sees the first token)")
    left_alone = verify("check", TINY_LLAMA, path, "--no-diagnose")
    assert "mask-length" not in left_alone.out
