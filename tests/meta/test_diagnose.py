"""The cause of a run that is not equal: several mistakes, arithmetic beside them, what is told apart, and the time."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from refengine.checkpoint import open_checkpoint
from refengine.quant import SCHEMES
from tests.meta.corpus import Corpus, corpus_of
from tests.meta.explaining import Subject, trained
from tests.meta.scores import faults_of
from tests.verify.comparing import Here, Notes
from tests.verify.conftest import TINY_LLAMA
from verify.causes import Cause, Evidence
from verify.causes.attention import attention_scale, sliding_window
from verify.causes.cache import cache_not_reset
from verify.causes.catalogue import CATALOGUE
from verify.causes.constants import Constant
from verify.causes.norm_mlp import activation, norm_eps
from verify.causes.rope import rope_missing, rope_theta
from verify.compare import Comparison
from verify.diagnose import diagnose
from verify.drive import CandidateRun
from verify.export.faults import FAULTS, stacked
from verify.find_cause import find_cause
from verify.naming.as_if import Passes, run_as_if
from verify.naming.counterfactual import Counterfactual
from verify.naming.screen import Screen, Tried, share_at_rest
from verify.naming.search import Clock, Search, read_from_export
from verify.naming.telling_apart import telling_probe
from verify.report.result import Diagnosis
from verify.request import Request
from verify.truth.arithmetic import ARITHMETICS, FLOAT32
from verify.truth.reference import Reference, ReferenceRun

EXPORTS = TINY_LLAMA.parent / "exports"
CONFIG = open_checkpoint(TINY_LLAMA).config
SECONDS = 900  # enough on the slowest machine


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return corpus_of(TINY_LLAMA, EXPORTS, SECONDS)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return trained()


def with_parameters(cause, **parameters) -> Counterfactual:
    evidence = Evidence(CONFIG, longest=200)
    single = (each for each in cause(evidence) if isinstance(each, Counterfactual))
    return next(each for each in single if parameters.items() <= each.parameters.items())


TOGETHER = {
    "norm-weight-offset and rope-missing": "one is in the way of the other wherever both are",
    "attention-softcap and cache-key-value-swapped": "one shows in steps after the prompts alone",
    "activation and norm-eps, layers 3": "both are in one half of one layer",
}


@pytest.mark.parametrize("name", TOGETHER)
def test_two_mistakes_are_named_where(corpus, name):
    fault = next(each for each in stacked.FAULTS if each.name == name)
    row = corpus.row("stacked", fault)
    assert list(faults_of(row)) == []
    assert (row.status, sorted(row.named)) == ("named", sorted(row.causes))


def test_keys_and_values_exchanged_in_a_fused_weight_are_named(corpus):
    fault = next(each for _, each in corpus.faults() if "keys and values of a fused weight" in each.name)
    row = corpus.row("catalogue", fault)
    assert (row.status, row.named) == ("named", ("weights-changed",))


def test_a_mistake_on_top_of_bfloat16_is_named_within_the_noise_of_bfloat16(corpus, tmp_path):
    fault = next(each for each in FAULTS if each.name == "gate and up swapped, layer 4")
    path = fault.write(corpus.checkpoint, tmp_path / "model.onnx")
    options = {"load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}}'}
    candidate = Here(corpus.compared.open(path, "ort-openvino", options))
    if candidate.expectation.arithmetic != ARITHMETICS["bfloat16"]:
        pytest.skip("OpenVINO has no bfloat16 on this processor")
    request = Request(corpus.compared.prompts, corpus.compared.max_new_tokens, modes=("on",))
    comparison = Comparison(corpus.checkpoint, request, Notes(), corpus.compared.reference)
    (cell,) = comparison.cells(candidate)
    assert (cell.verdict in ("drift", "mismatch"), cell.explained_by) == (True, None)
    found = find_cause(corpus.checkpoint, None, candidate, comparison.unequal, {}, SECONDS, Notes())
    assert explaining(found) == ["mlp-gate-up-swapped"]
    assert found.causes[0].noise_ratio.after < 2


def explaining(found: Diagnosis) -> list[str]:
    return [cause.name for cause in found.causes if cause.status != "ruled-out"]


USUAL = {name: CATALOGUE[name] for name in ("activation", "arithmetic-float16", "arithmetic-bfloat16")}


def diagnosed(
    subject: Subject,
    rows: list[np.ndarray],
    seconds: float = SECONDS,
    causes: Mapping[str, Cause] = USUAL,
    reference: ReferenceRun | None = None,
    passes: Passes | None = None,
    **how,
) -> Diagnosis:
    """What is found of a run that gave these logits, of which nothing else is known."""
    reference = reference or subject.compared.reference
    run = CandidateRun(reference.tokens, rows, {}, seconds=0.0)
    evidence = Evidence(CONFIG, use_cache=True, is_padded=True, longest=max(reference.lengths))
    parts = (subject.compared.checkpoint, passes or subject.passes, run, reference, evidence, causes)
    return diagnose(*parts, seconds=seconds, **how)


def in_arithmetic(subject: Subject, name: str, *mistakes: Counterfactual) -> list[np.ndarray]:
    """The reference as if in this arithmetic, in an order of sums on which its noise is not measured."""
    arithmetic = ARITHMETICS[name]
    ops = list(arithmetic.orders(1).values())[-1]
    return run_as_if(arithmetic.weights(subject.compared.checkpoint), subject.passes, mistakes, ops)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_arithmetic_that_no_setting_tells_of_is_named_by_its_noise(subject, name):
    found = diagnosed(subject, in_arithmetic(subject, name))
    assert (found.status, explaining(found)) == ("named", [f"arithmetic-{name}"])


def test_a_mistake_is_named_beside_arithmetic_that_no_setting_tells_of(subject):
    relu = with_parameters(activation, hidden_act="relu")
    found = diagnosed(subject, in_arithmetic(subject, "float16", relu))
    assert (found.status, explaining(found)) == ("named", ["activation", "arithmetic-float16"])
    assert found.causes[0].parameters == {"hidden_act": "relu"}


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_mistake_with_more_noise_than_the_right_model_is_named_in_the_arithmetic_that_is_expected(subject, name):
    arithmetic, new_tokens = ARITHMETICS[name], len(subject.passes.tokens[0])
    reference = Reference(subject.compared.checkpoint, arithmetic=arithmetic).run(subject.passes.prompts, new_tokens)
    rows = in_arithmetic(subject, name, with_parameters(attention_scale, scale=1.0))
    causes = {"attention-scale": attention_scale}
    found = diagnosed(subject, rows, causes=causes, reference=reference, arithmetic=arithmetic)
    assert (found.status, explaining(found)) == ("named", ["attention-scale"])
    assert found.causes[0].noise_ratio.after > reference.logits.noise.overall_bound


def test_of_a_mistake_on_top_of_a_cache_that_is_expected_to_be_coded_the_cache_is_no_part(subject):
    scheme = SCHEMES["ov-u8"]
    new_tokens = len(subject.passes.tokens[0])
    reference = Reference(subject.compared.checkpoint, scheme=scheme).run(subject.passes.prompts, new_tokens)
    passes = replace(subject.passes, tokens=reference.tokens, scheme=scheme)
    order = list(FLOAT32.orders(1).values())[-1]
    rows = run_as_if(subject.weights, passes, [with_parameters(activation, hidden_act="relu")], order)
    causes = {name: CATALOGUE[name] for name in ("activation", "cache-quantized")}
    found = diagnosed(subject, rows, causes=causes, reference=reference, passes=passes)
    assert (found.status, explaining(found)) == ("named", ["activation"])


def test_a_mistake_in_float32_is_not_taken_for_coarser_arithmetic(subject):
    rows = run_as_if(subject.weights, subject.passes, [with_parameters(rope_theta, rope_theta=5e5)])
    found = diagnosed(subject, rows)  # of causes none of which is it
    assert found.status == "unexplained"


def test_without_time_nothing_is_begun_and_everything_is_said_not_to_be_tried(subject):
    rows = run_as_if(subject.weights, subject.passes, [with_parameters(activation, hidden_act="relu")])
    over = []
    found = diagnosed(subject, rows, seconds=0, on_seconds=over.append)
    assert (found.status, found.causes) == ("unexplained", ())
    assert found.notes[0] == "not tried within the time: activation; give more with --diagnose-seconds"


def test_what_explains_everything_is_not_said_to_lack_time(subject):
    rows = run_as_if(subject.weights, subject.passes, [with_parameters(activation, hidden_act="relu")])
    over = []
    found = diagnosed(subject, rows, seconds=60, on_seconds=over.append)
    assert (explaining(found), found.notes) == (["activation"], ())
    assert sum(over) == 60  # the bar is at its end


def test_a_cache_that_is_not_reset_is_named_though_prompts_are_wrong_by_it(subject):
    passes = replace(subject.passes, batches=[(0,), (1,)])
    evidence = Evidence(CONFIG, use_cache=True, longest=max(subject.compared.reference.lengths), batches=2)
    reference = subject.compared.reference
    rows = run_as_if(subject.weights, passes, [next(cache_not_reset(evidence))])
    run = CandidateRun(reference.tokens, rows, {}, seconds=0.0)
    causes = {name: CATALOGUE[name] for name in ("cache-not-reset", "cache-past-ignored")}
    found = diagnose(subject.compared.checkpoint, passes, run, reference, evidence, causes, seconds=SECONDS)
    assert (found.status, explaining(found)) == ("named", ["cache-not-reset"])


def test_a_clock_tells_no_more_seconds_than_there_are():
    told = []
    clock = Clock(0.5, told.append)
    clock.look()
    clock.end()
    clock.end()
    assert told == [1]


def test_a_mistake_that_explains_some_positions_helps_though_the_ratio_stays():
    before, left = np.array([100.0, 900.0, 1000.0]), np.array([1.0, 950.0, 1000.0])
    assert share_at_rest(before, left, bound=4.0) == pytest.approx(1 / 3)
    assert Tried((), 990.0, rest=1 / 3).helps(Tried((), 1000.0))
    assert not Tried((), 990.0).helps(Tried((), 1000.0))


def test_a_mistake_that_explains_nothing_beside_others_is_left_out(subject):
    relu, nothing = with_parameters(activation, hidden_act="relu"), Counterfactual("rope-theta")
    rows = run_as_if(subject.weights, subject.passes, [relu])
    run = CandidateRun(subject.compared.reference.tokens, rows, {}, seconds=0.0)
    screen = Screen(subject.weights, subject.passes, run, subject.compared.reference, range(2))
    search = Search(screen.tried, Tried((), screen.before), ends=np.inf)
    assert search.necessary(screen.tried(nothing, relu)).mistakes == (relu,)


def test_what_an_export_itself_says_is_told_from_guesses():
    evidence = Evidence(CONFIG, longest=50, constants={"rms_norm_eps": (Constant(1e-3, frozenset({3})),)})
    (read,) = read_from_export([norm_eps, activation, rope_missing], evidence)
    assert (read.cause, read.parameters, read.layers) == ("norm-eps", {"rms_norm_eps": 1e-3}, {3})


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (60, 100, "a prompt of 192 tokens"),
        (2, 30, "a prompt of 3 tokens"),
        (None, None, None),
    ],
)
def test_the_first_probe_that_tells_two_causes_apart_is_named(subject, one, other, told):
    def windowed(window: int | None) -> Counterfactual:
        made = with_parameters(sliding_window)
        return replace(made, parameters={"window": window}, config={"sliding_window": window})

    probe = telling_probe(subject.weights, [windowed(one)], [windowed(other)], use_cache=True)
    assert probe == told


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        ((60, 100), "a prompt of 192 tokens would tell one from other: --probe adds prompts of that kind"),
        ((60, 60), "one and other are equivalent on this model: no probe tells them apart"),
    ],
)
def test_of_causes_that_explain_a_run_alike_it_is_said_what_would_tell_them_apart(subject, windows, said):
    relu = with_parameters(activation, hidden_act="relu")
    mistakes = [
        replace(relu, cause=name, config={"sliding_window": window})
        for name, window in zip(("one", "other"), windows, strict=True)
    ]
    rows = run_as_if(subject.weights, subject.passes, mistakes[:1])
    found = diagnosed(subject, rows, causes={each.cause: lambda _, each=each: iter([each]) for each in mistakes})
    assert (found.status, explaining(found)) == ("ambiguous", ["one", "other"])
    assert found.notes == (said,)
