"""`check`: what other systems decoded, judged by its record, and what is no record."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refengine.generate import generate
from refengine.model import forward
from refengine.weights import Weights
from tests.verify.commands import verify
from tests.verify.fields import check_fields
from tests.verify.traces import write_trace
from verify.check import judge_trace
from verify.drive import run_candidate
from verify.expect import EXACT, expectations
from verify.report.result import Cell
from verify.trace_file import Trace
from verify.truth.follow import log_softmax
from verify.truth.reference import Reference, Rows, one_pass

NEW = (8, 3, 1)  # tokens of each row: of different numbers, and one that has nothing but its first


@pytest.fixture(scope="module")
def weights(tiny) -> Weights:
    """Those of the trained model in float32, going on past end tokens."""
    weights = Weights.open(tiny)
    return replace(weights, config=replace(weights.config, eos_token_id=()))


@pytest.fixture(scope="module")
def by_engine(compared, weights) -> Trace:
    """What the reference engine decodes in float32, one row after the other, with a cache."""
    tokens = [generate(weights, [prompt], new)[0] for prompt, new in zip(compared.prompts, NEW, strict=True)]
    return Trace(compared.prompts, tokens, logits=logits_of(weights, compared.prompts, tokens))


@pytest.fixture(scope="module")
def by_ort(compared) -> Trace:
    """What ONNX Runtime decodes in one left-padded batch, on an export that was frozen."""
    path = Path(__file__).parents[2] / "fixtures" / "exports" / "optimum" / "model.onnx"
    run = run_candidate(compared.open(path), compared.prompts, [(0, 1, 2)] * max(NEW), use_cache=True)
    tokens = [list(row[:new]) for row, new in zip(run.tokens, NEW, strict=True)]
    lengths = map(len, compared.prompts)
    logits = [row[length - 1 : length - 1 + new] for row, length, new in zip(run.logits, lengths, NEW, strict=True)]
    return Trace(compared.prompts, tokens, logits=logits)


def logits_of(weights: Weights, prompts: Rows, tokens: Rows) -> list[np.ndarray]:
    """The logits that choose each token, of one pass over each row."""
    fed = [np.array([[*prompt, *new[:-1]]]) for prompt, new in zip(prompts, tokens, strict=True)]
    passes = [forward(weights, row_1T, np.arange(row_1T.shape[1])[None])[0] for row_1T in fed]
    return [logits_TV[-len(new) :] for logits_TV, new in zip(passes, tokens, strict=True)]


def without_logits(trace: Trace) -> Trace:
    return replace(trace, logits=None)


def with_logprobs(trace: Trace, most: Sequence[int] = (5,), temperature: float = 1.0) -> Trace:
    """The trace as servers give it: the largest log-probabilities, as many at a step as `most` has it in turns."""
    rows = []
    for logits_TV in trace.logits:
        logprobs_TV = log_softmax(logits_TV / np.float32(temperature))
        tops = [np.argsort(-x_V)[: most[step % len(most)]].tolist() for step, x_V in enumerate(logprobs_TV)]
        rows.append([[(token, float(x_V[token])) for token in top] for top, x_V in zip(tops, logprobs_TV, strict=True)])
    return Trace(trace.prompts, trace.tokens, logprobs=rows)


def with_token(trace: Trace, row: int, step: int, token: int) -> Trace:
    """The trace with another token at one step, and without logits, which would be those of other tokens after it."""
    tokens = [list(new) for new in trace.tokens]
    tokens[row][step] = token
    return Trace(trace.prompts, tokens)


def counts(cell: Cell) -> tuple[str, int, int, int]:
    return cell.verdict, cell.tokens.compared, cell.tokens.equal, cell.tokens.ties


@pytest.mark.parametrize("system", ["by_engine", "by_ort"])
@pytest.mark.parametrize(
    "kept", [lambda trace: trace, with_logprobs, without_logits], ids=["logits", "logprobs", "tokens"]
)
def test_an_honest_trace_is_equal_whoever_made_it_and_whatever_it_kept(tiny, system, kept, request):
    trace = kept(request.getfixturevalue(system))
    cell = judge_trace(tiny, trace, EXACT)
    assert counts(cell) == ("equal", sum(NEW), sum(NEW), 0)
    assert (cell.runtime, cell.cache, cell.differences) == ("trace", "unknown", ())
    assert (cell.noise_ratio is None) == (trace.logits is trace.logprobs is None)
    if cell.noise_ratio is not None:
        assert 0 < cell.noise_ratio.logits <= cell.noise_ratio.bound


def test_one_row_and_one_token_are_a_trace(tiny, by_engine):
    one = Trace(by_engine.prompts[:1], [by_engine.tokens[0][:1]], logits=[by_engine.logits[0][:1]])
    assert counts(judge_trace(tiny, with_logprobs(one, most=(1,)), EXACT)) == ("equal", 1, 1, 0)


def test_another_token_is_a_mismatch_with_its_step_rank_and_margin(tiny, by_engine, weights):
    logits_V = by_engine.logits[0][3]
    order = np.argsort(-logits_V)
    cell = judge_trace(tiny, with_token(by_engine, 0, 3, int(order[4])), EXACT)
    first, difference = cell.tokens.first_mismatch, cell.differences[0]
    assert cell.verdict == "mismatch"
    assert (first.row, first.step, first.expected, first.actual) == (0, 3, order[0], order[4])
    assert (difference.row, difference.step, difference.rank, difference.tie) == (0, 3, 5, False)
    assert first.margin == difference.margin == pytest.approx(logits_V[order[0]] - logits_V[order[4]], abs=1e-4)


def test_tokens_after_another_one_are_held_against_what_the_reference_chooses_after_it(tiny, by_engine, weights):
    """A trace that goes its own way for one step, and then does what the model does from there, has one mismatch."""
    prompt, tokens = by_engine.prompts[0], list(by_engine.tokens[0][:3])
    tokens.append(int(np.argsort(by_engine.logits[0][3])[0]))
    tokens += generate(weights, [[*prompt, *tokens]], 4)[0]
    assert tokens[4:] != by_engine.tokens[0][4:]
    cell = judge_trace(tiny, Trace([prompt], [tokens]), EXACT)
    assert counts(cell) == ("mismatch", 8, 7, 0)
    assert cell.differences[0].rank == 384  # of as many


@pytest.mark.parametrize("most", [(384,), (5,), (1,), (1, 3)], ids=["all", "five", "one", "one or three"])
@pytest.mark.parametrize("temperature", [0.999, 0.7])
def test_logprobs_after_a_temperature_are_drift(tiny, by_engine, most, temperature):
    cell = judge_trace(tiny, with_logprobs(by_engine, most, temperature), EXACT)
    assert counts(cell) == ("drift", sum(NEW), sum(NEW), 0)
    assert cell.noise_ratio.logits > 10


def test_the_difference_of_logprobs_is_said_in_nats_too(tiny, by_engine):
    trace = with_logprobs(by_engine, most=(2, 3))
    pairs = sum(len(step) for row in trace.logprobs for step in row)
    shifted = replace(trace, logprobs=[[[(t, x - 0.25) for t, x in step] for step in row] for row in trace.logprobs])
    nats = judge_trace(tiny, shifted, EXACT).logprobs
    assert nats.compared == pairs
    assert (nats.rms, nats.largest) == (pytest.approx(0.25, rel=1e-3), pytest.approx(0.25, rel=1e-3))


def test_one_logprob_that_is_off_is_found_at_its_position(tiny, by_engine):
    trace = with_logprobs(by_engine)
    token, logprob = trace.logprobs[1][2][4]
    trace.logprobs[1][2][4] = (token, logprob + 0.01)
    cell = judge_trace(tiny, trace, EXACT)
    assert cell.verdict == "drift"
    worst = cell.noise_ratio.worst
    assert (worst.row, worst.position) == (1, len(trace.prompts[1]) + 1)  # what is fed there is the step before


def test_logits_that_are_not_finite_are_drift(tiny, by_engine):
    logits = [x_TV.copy() for x_TV in by_engine.logits]
    logits[0][2, 7] = np.nan
    assert judge_trace(tiny, replace(by_engine, logits=logits), EXACT).verdict == "drift"


def test_a_trace_of_a_quantised_cache_is_equal_where_that_is_expected_and_drift_where_not(tiny, compared, weights):
    """Rows of different lengths, decoded one after the other as their runtime would."""
    expectation = expectations()["int8-kv"]
    scheme = expectation.scheme
    rows = []
    for prompt, new in zip(compared.prompts, NEW, strict=True):
        tokens = generate(weights, [prompt], new, scheme=scheme)[0]
        rows.append((prompt, tokens, decoded_logits(weights, prompt, tokens, scheme)))
    trace = Trace(*map(list, zip(*rows, strict=True)))
    assert judge_trace(tiny, trace, expectation).verdict == "equal"
    assert judge_trace(tiny, trace, EXACT).verdict == "drift"


def decoded_logits(weights: Weights, prompt: Sequence[int], tokens: Sequence[int], scheme) -> np.ndarray:
    """The prompt in one pass, then a token at a time, as caches that lose something have to be read."""
    from refengine.generate import new_cache

    cache, fed, position, logits = new_cache(weights, 1, scheme), list(prompt), 0, []
    for token in tokens:
        positions_1T = np.arange(position, position + len(fed))[None]
        logits.append(forward(weights, np.array([fed]), positions_1T, cache)[0, -1])
        position, fed = position + len(fed), [token]
    return np.stack(logits)


def test_the_verb_says_verdict_cause_and_what_to_do_and_shows_where(tiny, by_engine, tmp_path):
    done = verify("check", tiny.path, write_trace(with_logprobs(by_engine), tmp_path / "trace.jsonl"))
    assert (done.code, done.err) == (0, "")
    assert done.first_lines == [
        "equal: all 12 tokens of 1 run are the checkpoint's, and the logprobs are honest float32",
        "cause: none to look for",
        "to do: nothing",
    ]
    shown = " ".join(done.out.split())  # long paths are wrapped
    assert "(trace of tokens and logprobs, sha256 " in shown
    assert "3, at most 8 new tokens each" in shown
    assert "trace: 60 logprobs are " in shown
    done = verify("check", tiny.path, write_trace(with_token(by_engine, 1, 2, 5), tmp_path / "wrong.jsonl"))
    assert done.code == 1
    assert done.first_lines[0] == "mismatch: tokens differ that float32 noise cannot explain, on trace"
    assert "look at the system that decoded this" in done.first_lines[2]
    assert "trace: first mismatch in row 1 at step 2: expected token " in done.out
    assert "trace: tokens that are not the reference's choice: " in done.out


def test_tokens_alone_prove_nothing_about_logits_and_the_report_says_so(tiny, by_engine, tmp_path):
    done = verify("check", tiny.path, write_trace(without_logits(by_engine), tmp_path / "trace.jsonl"))
    assert done.code == 0
    assert done.first_lines[0].endswith("are the checkpoint's; how far its logits are off was not recorded")
    assert "not revealed: drift: the trace holds neither logits nor logprobs" in done.out


def test_json_has_the_fields_of_a_comparison_and_every_step_that_differs(tiny, by_engine, tmp_path):
    trace = write_trace(by_engine, tmp_path / "trace.npz")
    done = verify("check", tiny.path, trace, "--json", "-")
    report = json.loads(done.out)
    check_fields(report)
    (cell,) = report["cells"]
    assert (report["schema"], report["verdict"], report["prompts"], done.code) == (1, "equal", 3, 0)
    assert (cell["runtime"], cell["cache"], cell["seconds"]["candidate"]) == ("trace", "unknown", None)
    assert report["candidate"]["exporter"] == "trace of tokens and logits"
    file = tmp_path / "report.json"
    verify("check", tiny.path, write_trace(with_token(by_engine, 0, 6, 5), trace), "--json", file)
    report = json.loads(file.read_text(encoding="utf-8"))
    check_fields(report)
    first = report["cells"][0]["differences"][0]
    assert (first["row"], first["step"], first["actual"]) == (0, 6, 5)
    assert set(first) == {"row", "step", "expected", "actual", "rank", "margin", "tie"}


@pytest.mark.parametrize("kept", [with_logprobs, without_logits], ids=["logprobs", "tokens"])
def test_json_has_null_for_what_a_record_does_not_say(tiny, by_engine, tmp_path, kept):
    done = verify("check", tiny.path, write_trace(kept(by_engine), tmp_path / "trace.jsonl"), "--json", "-")
    report = json.loads(done.out)
    check_fields(report)
    (cell,) = report["cells"]
    assert (cell["cache"], cell["batching"], cell["batch_size"], cell["reason"]) == ("unknown", None, None, None)
    assert (cell["noise_ratio"] is None, cell["logprobs"] is None) == (kept is without_logits,) * 2


@pytest.mark.parametrize(("row", "step", "noted"), [(0, 2, True), (0, 7, False), (2, 0, False)])
def test_tokens_after_an_end_token_are_noted_and_an_end_token_at_the_end_is_not(
    tiny, by_engine, tmp_path, row, step, noted
):
    trace = with_token(by_engine, row, step, tiny.config.eos_token_id[0])
    done = verify("check", tiny.path, write_trace(trace, tmp_path / "trace.jsonl"), "--json", "-")
    notes = json.loads(done.out)["notes"]
    assert notes == [f"1 of 3 rows go on after an end token, the first of them row {row} after step {step}"] * noted


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int4-weights", "--expect int4-weights: a record does not hold the weights that it was made with; give MODEL"),
        ("no-such", "--expect"),
    ],
)
def test_what_a_record_cannot_show_is_not_expected_of_it(tiny, by_engine, tmp_path, name, says):
    done = verify("check", tiny.path, write_trace(by_engine, tmp_path / "trace.npz"), "--expect", name)
    assert (done.code, done.out) == (2, "")
    assert says in done.err


def test_a_trace_in_bfloat16_is_equal_where_that_is_expected_and_drift_where_not(tiny, by_engine):
    """Logits with the error of bfloat16's arithmetic: the noise of one of its own orders."""
    bfloat16 = expectations()["bfloat16"]
    weights, orders = Reference(tiny, arithmetic=bfloat16.arithmetic).noisy(sum(map(len, by_engine.prompts)))
    ops = next(iter(orders.values()))
    rows = zip(by_engine.prompts, by_engine.tokens, strict=True)
    logits = [one_pass(weights, [prompt], [new], None, ops)[0][-len(new) :] for prompt, new in rows]
    trace = replace(by_engine, logits=logits)
    assert judge_trace(tiny, trace, bfloat16).verdict == "equal"
    assert judge_trace(tiny, trace, EXACT).verdict == "drift"
