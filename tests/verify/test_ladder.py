"""Each rung of the ladder is blamed for what is wrong on it, and for nothing else."""

from pathlib import Path

import pytest

from refengine.checkpoint import open_checkpoint
from refengine.tokenizer import encode_prompt, load_tokenizer
from tests.meta.drivers import Driven, losing
from tests.verify.caused import small_model
from tests.verify.comparing import Compared, Here
from tests.verify.conftest import TEXTS, TINY_LLAMA
from tests.verify.faulty import changed_weight, write_faulty
from verify.candidates import Candidate
from verify.candidates.files import describe_candidate
from verify.drive import run_candidate
from verify.expect import EXACT, Expectation, expectations
from verify.export import export_decoder
from verify.locating.ladder import Rung, blamed, is_of_plain_graph, ladder
from verify.naming.as_if import Passes
from verify.own_weights import read_weights
from verify.truth.reference import Reference

pytestmark = pytest.mark.slow

EXPORTS = TINY_LLAMA.parent / "exports"


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Compared:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def right(compared, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("right") / "model.onnx"
    export_decoder(compared.checkpoint, path)
    return path


@pytest.fixture(scope="module")
def trained() -> Compared:
    """One row of English."""
    prompt = encode_prompt(load_tokenizer(TINY_LLAMA), TEXTS[1], chat=False)
    return Compared(open_checkpoint(TINY_LLAMA), [prompt], 4)


def climbed(compared: Compared, candidate: Candidate, expectation: Expectation = EXACT) -> tuple[Rung, ...]:
    """The ladder of a candidate that reads its prompts together where it can."""
    reference = compared.reference
    if expectation != EXACT:
        reference = Reference(compared.checkpoint, scheme=expectation.scheme).run(
            compared.prompts, compared.max_new_tokens
        )
    rows = range(len(compared.prompts))
    batches = [tuple(rows)] if candidate.can_pad_left else [(row,) for row in rows]
    schedule = [batch for batch in batches for _ in range(compared.max_new_tokens)]
    run = run_candidate(candidate, compared.prompts, schedule, use_cache=True, forced=reference.tokens)
    own, _ = read_weights(compared.checkpoint, describe_candidate(candidate.path, candidate.runtime))
    others = own if own is not None and not own.is_exact else None
    passes = Passes(compared.prompts, reference.tokens, batches, use_cache=True)
    return ladder(Here(candidate), run, reference, passes, others, expectation)


def names(rungs: tuple[Rung, ...]) -> list[str]:
    return [rung.name for rung in rungs]


@pytest.mark.parametrize("runtime", ["ort-cpu", "ort-openvino"])
def test_nothing_is_blamed_of_a_right_export_that_saves_on_nothing(compared, right, runtime):
    rungs = climbed(compared, compared.open(right, runtime))
    assert blamed(rungs) is None
    assert all(rung.ratio is not None for rung in rungs)


def test_weights_that_are_rounded_stand_on_the_rung_of_the_weights(trained):
    rungs = climbed(trained, trained.open(EXPORTS / "genai-int4" / "model.onnx"))
    assert blamed(rungs) == "weights"


def test_a_weight_that_is_other_stands_on_the_rung_of_the_weights(compared, tmp_path):
    read = changed_weight("model.layers.1.self_attn.v_proj.weight.T", lambda weight: weight * 1.01)
    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", read=read)
    rungs = climbed(compared, compared.open(path))
    assert (blamed(rungs), names(rungs)) == ("weights", ["tokens", "weights", "export"])
    assert rungs[1].ratio == pytest.approx(rungs[2].ratio, rel=0.1)


def test_a_precision_that_is_asked_for_stands_on_its_rung(trained):
    candidate = trained.open(EXPORTS / "optimum-intel-stateless", "openvino", {"INFERENCE_PRECISION_HINT": "bf16"})
    rungs = climbed(trained, candidate)
    assert (blamed(rungs), names(rungs)) == ("precision", ["tokens", "export", "provider", "precision"])
    assert rungs[1].why.endswith("no ONNX file, which nobody but openvino runs")


def test_a_cache_that_is_coded_stands_on_its_rung(trained):
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "u8"}
    rungs = climbed(trained, trained.open(EXPORTS / "optimum-intel", "openvino", options))
    assert (blamed(rungs), names(rungs)) == ("cache", ["tokens", "export", "provider", "precision", "cache"])


def test_a_cache_that_is_expected_to_be_narrow_is_on_every_rung(trained):
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f16"}
    candidate = trained.open(EXPORTS / "optimum-intel", "openvino", options)
    rungs = climbed(trained, candidate, expectations()["ov-f16"])
    assert (blamed(rungs), names(rungs)) == (None, ["tokens", "export", "provider", "precision", "driver"])
    assert rungs[1].why.startswith("the reference has a coded cache")


def test_a_loop_that_loses_the_newest_slot_stands_on_the_rung_of_the_driver(compared, right):
    candidate = Driven(compared.open(right), losing(lambda held: slice(held - 1)))
    rungs = climbed(compared, candidate)
    assert (blamed(rungs), names(rungs)) == ("driver", ["tokens", "export", "optimizer", "driver"])


def test_what_adds_little_to_a_mismatch_is_not_blamed_for_it(trained):
    """An export in float16, which OpenVINO gets wrong by far more than float16 explains."""
    candidate = trained.open(EXPORTS / "genai-fp16", "openvino", {"INFERENCE_PRECISION_HINT": "f32"})
    rungs = climbed(trained, candidate)
    bound = trained.reference.logits.noise.overall_bound
    assert [rung.ratio > bound for rung in rungs if rung.name == "export"] == [True]
    assert blamed(rungs) == "provider"


def test_a_provider_of_which_nothing_is_asked_has_no_rung_of_precision(compared, right):
    assert names(climbed(compared, compared.open(right, "ort-openvino"))) == [
        *("tokens", "export", "optimizer", "provider", "driver")
    ]


@pytest.mark.parametrize(
    ("rung", "is_it"),
    [
        (Rung("export", 900.0, True, distance=1.9), True),
        (Rung("export", 900.0, True, distance=300.0), False),  # something else is wrong too, further up
        (Rung("export", 1.0, False, distance=1.9), False),
        (Rung("provider", 900.0, True, distance=1.9), False),
        (Rung("export", None, False, "it could not be run"), False),
    ],
)
def test_a_run_is_that_of_the_plain_graph_where_nothing_behind_it_adds_anything(rung, is_it):
    assert is_of_plain_graph([Rung("tokens", 0.0, False), rung], bound=2.0) == is_it
