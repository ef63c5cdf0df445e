"""How the place of a cause is said: in layers, in what is beside them, and what is no hint at all."""

import json

import onnx
import pytest

from refengine.checkpoint import open_checkpoint
from tests.meta.explaining import Subject, trained
from tests.verify.conftest import TINY_LLAMA
from verify.causes import Evidence
from verify.causes.constants import Constant
from verify.causes.norm_mlp import norm_eps
from verify.cli import main
from verify.diagnose import diagnose
from verify.drive import CandidateRun
from verify.naming.as_if import run_as_if
from verify.naming.search import read_from_export
from verify.report.diagnosis import cause_in_a_phrase, cause_in_words, details
from verify.report.result import CauseFound, Diagnosis, Residual

LAYERS = open_checkpoint(TINY_LLAMA).config.num_hidden_layers


@pytest.fixture(scope="module")
def subject() -> Subject:
    return trained()


@pytest.mark.parametrize(
    ("layers", "said", "parameters"),
    [
        ({LAYERS}, (), {"rms_norm_eps": 1e-3, "norm": "norm"}),
        ({2, LAYERS}, (2,), {"rms_norm_eps": 1e-3, "beside them": "norm"}),
        ({2}, (2,), {"rms_norm_eps": 1e-3}),
    ],
)
def test_the_norm_behind_the_layers_is_named_and_not_counted_as_one(subject, layers, said, parameters):
    reference = subject.compared.reference
    read = {"rms_norm_eps": (Constant(1e-3, frozenset(layers)),)}
    evidence = Evidence(subject.weights.config, longest=max(reference.lengths), constants=read)
    (mistake,) = read_from_export([norm_eps], evidence)
    rows = run_as_if(subject.weights, subject.passes, [mistake])
    run = CandidateRun(reference.tokens, rows, {}, seconds=0.0)
    parts = (subject.compared.checkpoint, subject.passes, run, reference, evidence, {"norm-eps": norm_eps})
    found = diagnose(*parts, seconds=60)
    assert (found.status, found.causes[0].layers, found.causes[0].parameters) == ("named", said, parameters)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (None, "lm-head-wrong"),
        ((), "lm-head-wrong"),
        ((3,), "lm-head-wrong in layer 3"),
        ((0, 3), "wrong in layers 0, 3"),
    ],
)
def test_what_is_in_no_layer_is_said_to_be_in_none(layers, said):
    assert cause_in_a_phrase(CauseFound("lm-head-wrong", {}, layers, None, "confirmed")).endswith(said)


@pytest.mark.parametrize(("left", "said"), [(899.0, "what comes nearest"), (901.0, "no cause of the catalogue")])
def test_a_cause_that_leaves_nearly_everything_is_no_hint(left, said):
    nearest = CauseFound("attention-softcap", {}, None, Residual(1000.0, left), "ruled-out")
    assert cause_in_words(Diagnosis("unexplained", (nearest,))).startswith(f"not known: {said}")


def test_what_says_the_same_as_a_cause_is_no_second_cause():
    ratio = Residual(1000.0, 1.0)
    swapped = CauseFound("mlp-gate-up-swapped", {}, (2,), ratio, "confirmed")
    tensors = CauseFound("weights-changed", {}, (2,), ratio, "equivalent")
    found = Diagnosis("named", (swapped, tensors))
    assert cause_in_words(found).startswith("mlp-gate-up-swapped in layer 2: with it")
    assert next(details(found)).startswith("the same, as weights-changed in layer 2: with it")


@pytest.mark.slow
def test_an_epsilon_that_float16_hides_in_most_layers_is_named_in_all_that_the_export_has_it_in(tmp_path):
    model = onnx.load(TINY_LLAMA.parent / "exports" / "genai-fp16" / "model.onnx")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-3
    onnx.save(model, tmp_path / "model.onnx")
    options = ["--runtime", "ort-cpu", "--cache", "on", "--expect", "auto", "--max-new-tokens", "8"]
    prompts = ["--prompt", "A class definition", "--prompt", "Return"]
    report = tmp_path / "report.json"
    main(["compare", str(TINY_LLAMA), str(tmp_path / "model.onnx"), *options, *prompts, "--json", str(report)])
    (cause,) = (each for each in json.loads(report.read_text())["causes"] if each["status"] == "confirmed")
    assert (cause["name"], cause["layers"], cause["parameters"]) == ("norm-eps", None, {"rms_norm_eps": 1e-3})
